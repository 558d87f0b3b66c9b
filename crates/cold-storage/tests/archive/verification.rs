//! What a verification finds.

use cold_storage::{Batch, Fault, Problem, RECEIPTS, Source};

use crate::support::*;

on_both_stores! {
    whatever_is_damaged_is_named,
    what_is_no_note_is_named_and_keeps_nobody,
}

async fn whatever_is_damaged_is_named(store: &Store) {
    for (first, last) in [(1, 2), (3, 4), (5, 6)] {
        archive(&store.cold, first, last, "writer-1").await.unwrap();
    }
    let problems = async || store.cold.verify(|_| ()).await.unwrap().problems;
    assert_eq!(problems().await, []);
    let manifest = store.cold.manifest_at(&slot(3)).await.unwrap().unwrap();
    let path = &manifest.objects[0].path;
    let whole = store.get(path).await;
    let object = |fault| vec![Problem::Object { slot: slot(3), path: path.clone(), fault }];

    store.delete(path).await;
    assert_eq!(problems().await, object(Fault::Missing));

    let mut flipped = whole.to_vec();
    flipped[whole.len() / 2] ^= 1;
    store.put(path, flipped).await;
    assert_eq!(problems().await, object(Fault::Bytes));

    store.put(path, whole.slice(..whole.len() - 1)).await;
    let expected = whole.len() as u64;
    assert_eq!(problems().await, object(Fault::Length { expected, found: expected - 1 }));
    store.put(path, whole.clone()).await;

    let stray = format!("{path}-copy");
    store.put(&stray, whole.clone()).await;
    assert_eq!(problems().await, [Problem::Stray { path: stray.clone(), bytes: expected }]);
    store.delete(&stray).await;

    let path = store.paths("manifests").await.remove(1);
    let json = store.get(&path).await;
    store.delete(&path).await;
    let found = problems().await;
    assert_eq!(found[0], Problem::Hole { slot: slot(5), expected: 3 });
    assert_eq!(found[0].to_string(), "bus_audit 20261101T000000Z: 3 to 4 are missing");
    assert_eq!(found.iter().filter(|problem| matches!(problem, Problem::Stray { .. })).count(), 2);

    let text = String::from_utf8(json.to_vec()).unwrap();
    store.put(&path, text.replace("\"last\":4", "\"last\":5")).await;
    assert_eq!(problems().await, [Problem::Overlap { slot: slot(5), expected: 6 }]);
    store.put(&path, text.replace("\"rows\":2,", "\"rows\":3,")).await;
    assert!(matches!(&problems().await[..], [Problem::Manifest { .. }]));
    store.put(&path, text.replace("domain=receipts", "domain=audit")).await;
    assert!(problems().await.iter().any(|problem| matches!(problem, Problem::Manifest { .. })));
    store.put(&path, json).await;
    assert_eq!(problems().await, []);
}

#[tokio::test]
async fn the_parts_of_a_tables_day_are_counted() {
    let store = Store::files().await;
    let part = |part, complete| Source::Table {
        name: "events".to_owned(),
        day: jiff::civil::date(2026, 11, 10),
        attempt: 0,
        part,
        last: uuid::Uuid::nil(),
        complete,
    };
    for source in [part(0, false), part(1, true)] {
        let mut batch = Batch::new();
        batch.push(&RECEIPTS, receipt(organization(1), noon(10), 1)).unwrap();
        let is_open = source.next().is_some();
        let written = batch.write(&store.cold, source, "writer-1", noon(11)).await.unwrap();
        written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
        let report = store.cold.verify(|_| ()).await.unwrap();
        assert_eq!(report.problems, []);
        // A day without its last part is named.
        let open = if is_open { store.paths("manifests").await } else { Vec::new() };
        assert_eq!(report.in_progress, open);
    }
    let first = store.cold.manifest_at(&part(0, false).slot()).await.unwrap().unwrap();
    store.delete(&store.paths("manifests").await[0]).await;
    let problems = store.cold.verify(|_| ()).await.unwrap().problems;
    assert_eq!(problems[0], Problem::Hole { slot: part(1, true).slot(), expected: 0 });
    assert_eq!(problems.len(), 1 + first.objects.len());
    assert_eq!(part(1, true).next(), None);
}

async fn what_is_no_note_is_named_and_keeps_nobody(store: &Store) {
    let cold = &store.cold;
    drop(receipts(1, 9).write(cold, stream(1, 9), "writer-1", noon(11)).await.unwrap());
    let note = store.paths("pending").await.remove(0);
    let text = String::from_utf8(store.get(&note).await.to_vec()).unwrap();
    let foreign =
        ["pending/a b/c".into(), format!("pending/{STREAM}/0.json"), format!("pending/{STREAM}/1.json")];
    store.put(&foreign[0], "{}").await;
    store.put(&foreign[1], "half a no").await;
    // A note, and not in its place.
    store.put(&foreign[2], text).await;

    archive(cold, 1, 4, "writer-2").await.unwrap();
    assert_eq!(store.paths("pending").await, foreign, "the note in its place was followed up");
    cold.expunge(organization(1), None, noon(12)).await.unwrap();
    let report = cold.verify(|_| ()).await.unwrap();
    let mut named: Vec<&str> = report
        .problems
        .iter()
        .map(|problem| match problem {
            Problem::Note { path, .. } => path.as_str(),
            other => panic!("{other}"),
        })
        .collect();
    named.sort_unstable();
    assert_eq!(named, foreign);
    assert_eq!(cold.expire(jiff::civil::date(2027, 1, 1)).await.unwrap().batches, 1);
    assert_eq!(store.paths("").await, foreign);
}
