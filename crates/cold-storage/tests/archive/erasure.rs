//! Payloads that are to be forgotten.

use cold_storage::{Batch, ColdStorage, Column, Dataset, EVENTS, Error, Expunged, Kind, RECEIPTS, Value};
use devkit::s3::S3;

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::*,
};

on_both_stores! { payloads_are_emptied_and_the_rest_stays }

/// Two batches with two events each of two organizations, and a receipt.
async fn fill(cold: &ColdStorage) {
    for first in [1_u64, 5] {
        let mut batch = Batch::new();
        for number in 0..4 {
            let number = u128::from(first) + number;
            batch.push(&EVENTS, event(organization(number % 2), noon(10), number)).unwrap();
        }
        batch.push(&RECEIPTS, receipt(organization(1), noon(10), 1)).unwrap();
        let written = batch.write(cold, stream(first, first + 3), "writer-1", noon(11)).await.unwrap();
        written.confirm(cold).await.unwrap().commit(cold).await.unwrap();
    }
}

/// The numbers of the events that have a payload, and of those that are marked.
async fn payloads(cold: &ColdStorage) -> (Vec<String>, Vec<String>) {
    let ids = |column: &'static str, records: &[cold_storage::Record]| {
        let full = records.iter().filter(|record| *record.get(column).unwrap() != Value::Null);
        let mut ids: Vec<String> =
            full.map(|record| record.to_json()["id"].as_str().unwrap()[6..].to_owned()).collect();
        ids.sort();
        ids
    };
    let records = all(cold, "events").await;
    assert_eq!(records.len(), 8, "every event is there once");
    (ids("body", &records), ids("expunged_at", &records))
}

async fn payloads_are_emptied_and_the_rest_stays(store: &Store) {
    let cold = &store.cold;
    fill(cold).await;
    let before: Vec<String> = store.paths("domain=events").await;
    let one = cold.expunge(organization(1), Some(uid(noon(10), 5)), noon(12)).await.unwrap();
    assert_eq!(one, Expunged { rows: 1, objects: 1, batches: 1 });
    let rest = cold.expunge(organization(1), None, noon(13)).await.unwrap();
    assert_eq!(rest, Expunged { rows: 3, objects: 2, batches: 2 });
    let again = cold.expunge(organization(1), None, noon(14)).await.unwrap();
    assert_eq!(again, Expunged::default());

    let (full, marked) = payloads(cold).await;
    assert_eq!(full.concat(), "2468");
    assert_eq!(marked.concat(), "1357");
    let records = all(cold, "events").await;
    let first = records.iter().find(|record| record.to_json()["id"] == "order-5").unwrap();
    assert_eq!(first.get("expunged_at"), Some(&Value::Timestamp(noon(12))));
    // The old objects are gone.
    let after = store.paths("domain=events").await;
    assert_eq!(after.iter().filter(|path| before.contains(path)).count(), 2);
    assert_eq!(after.len(), 4);
    assert_eq!(store.cold.verify(|_| ()).await.unwrap().problems, []);
    assert_eq!(store.paths("pending").await, Vec::<String>::new());
    assert_eq!(store.cold.manifest_at(&slot(5)).await.unwrap().unwrap().revision, 3);
    let expired = cold.expire(jiff::civil::date(2027, 1, 1)).await.unwrap();
    assert_eq!(expired.batches, 2);
    assert_eq!(store.paths("").await, Vec::<String>::new());
}

/// The dataset of a version to come, as far as a test can tell.
fn events_to_come() -> &'static Dataset {
    let mut columns = EVENTS.columns.to_vec();
    columns.push(Column { name: "attachment", kind: Kind::Bytes, nullable: true });
    Box::leak(Box::new(Dataset { columns: columns.leak(), ..EVENTS }))
}

#[tokio::test]
async fn what_a_later_version_wrote_is_not_rewritten_without_its_columns() {
    let store = Store::files().await;
    let mut row = event(organization(1), noon(10), 1);
    row.push(Value::Bytes(b"attached".as_slice().into()));
    let mut batch = Batch::new();
    batch.push(events_to_come(), row).unwrap();
    let written = batch.write(&store.cold, stream(1, 1), "writer-1", noon(11)).await.unwrap();
    written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
    let before = store.paths("").await;
    let refused = store.cold.expunge(organization(1), None, noon(12)).await.unwrap_err();
    assert!(matches!(&refused, Error::UnknownColumn { column, .. } if column == "attachment"), "{refused}");
    assert_eq!(store.paths("").await, before);
}

#[tokio::test]
async fn an_erasure_that_dies_after_any_change_is_completed_by_its_repetition() {
    devkit::install_tls_provider();
    let server = S3::start().await.unwrap();
    let proxy = Proxy::start(server.endpoint().clone()).await;
    let mut survived = false;
    let mut changes = 0;
    while !survived {
        let prefix = format!("cut-{changes}");
        let cold = ColdStorage::open(&s3_config(server.endpoint(), &prefix)).unwrap();
        fill(&cold).await;
        let mut config = s3_config(proxy.url(), &prefix);
        config.retries = 0;
        let dying = ColdStorage::open(&config).unwrap();
        proxy.rule(Rule { after: changes, ..Rule::changes(Fault::Tear) });
        let outcome = dying.expunge(organization(1), None, noon(12)).await;
        survived = !proxy.clear();
        assert_eq!(outcome.is_ok(), survived, "{outcome:?}");
        assert_eq!(cold.verify(|_| ()).await.unwrap().problems, []);

        cold.expunge(organization(1), None, noon(13)).await.unwrap();
        let (full, marked) = payloads(&cold).await;
        assert_eq!((full.concat(), marked.concat()), ("2468".to_owned(), "1357".to_owned()));
        let report = cold.verify(|_| ()).await.unwrap();
        assert_eq!((report.problems, report.in_progress, report.objects), (vec![], vec![], 6));
        changes += 1;
    }
    assert!(changes > 6, "{changes} changes were made in all");
}
