//! What an archive promises in any store.

use cold_storage::{Batch, ColdStorage, Config, EVENTS, Error, Query, RECEIPTS, Value};
use futures::TryStreamExt as _;

use crate::support::*;

on_both_stores! {
    the_store_refuses_to_create_what_is_there,
    rows_come_back_as_they_were_given,
    an_empty_range_is_archived_too,
    a_query_finds_what_is_asked_for_and_reads_nothing_else,
    of_two_writers_one_wins,
    what_is_old_expires_and_leaves_no_hole,
    a_row_with_a_wrong_clock_keeps_no_batch,
}

async fn the_store_refuses_to_create_what_is_there(store: &Store) {
    store.cold.probe("writer-1").await.unwrap();
    store.cold.probe("writer-1").await.unwrap();
    assert_eq!(store.paths("").await, Vec::<String>::new());
}

async fn rows_come_back_as_they_were_given(store: &Store) {
    let (whose, time) = (organization(1), noon(10));
    let mut given = others(whose, time);
    given.push((&RECEIPTS, receipt(whose, time, 7)));
    given.push((&EVENTS, event(whose, time, 7)));
    let mut batch = Batch::new();
    for (dataset, row) in &given {
        batch.push(dataset, row.clone()).unwrap();
    }
    assert_eq!(batch.rows(), 5);
    let written = batch.write(&store.cold, stream(1, 5), "writer-1", noon(11)).await.unwrap();
    let manifest = written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();

    assert_eq!(manifest.rows, 5);
    for (dataset, row) in given {
        let found = all(&store.cold, dataset.domain).await;
        assert_eq!(found.len(), 1, "{}", dataset.domain);
        assert_eq!(found[0].values, row, "{}", dataset.domain);
        let names: Vec<&str> = dataset.columns.iter().map(|column| column.name).collect();
        assert_eq!(found[0].columns.to_vec(), names);
    }
    assert_eq!(store.cold.manifest_at(&slot(1)).await.unwrap(), Some(manifest));
    assert_eq!(store.paths("pending").await, Vec::<String>::new());
    assert_eq!(store.paths("domain=audit/org=_/date=2026-11-10/").await.len(), 1);
    let folder =
        format!("domain=events/org={whose}/date=2026-11-10/bus_audit-00000000000000000001-writer-1-");
    assert_eq!(store.paths(&folder).await.len(), 1);
}

async fn an_empty_range_is_archived_too(store: &Store) {
    let written = Batch::new().write(&store.cold, stream(1, 5), "writer-1", noon(11)).await.unwrap();
    written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
    archive(&store.cold, 6, 6, "writer-1").await.unwrap();
    let report = store.cold.verify(|_| ()).await.unwrap();
    assert_eq!((report.batches, report.rows, report.problems), (2, 1, Vec::new()));
}

async fn a_query_finds_what_is_asked_for_and_reads_nothing_else(store: &Store) {
    let mut batch = Batch::new();
    for day in 1..=3 {
        for whose in 0..2 {
            batch.push(&RECEIPTS, receipt(organization(whose), noon(day), day)).unwrap();
        }
    }
    let written = batch.write(&store.cold, stream(1, 6), "writer-1", noon(11)).await.unwrap();
    let manifest = written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
    // Only the object that is asked for is left: a query that read another one would fail.
    let kept = |path: &str| path.contains(&organization(1).to_string()) && path.contains("date=2026-11-02");
    for object in manifest.objects.iter().filter(|object| !kept(&object.path)) {
        store.delete(&object.path).await;
    }
    let query = Query {
        domain: "receipts".to_owned(),
        organization: Some(organization(1)),
        since: Some(noon(2)),
        until: Some(noon(3)),
        event: None,
        limit: 10,
    };
    let find = async |query: &Query| -> Result<usize, Error> {
        let found: Vec<_> = store.cold.query(query)?.try_collect().await?;
        Ok(found.len())
    };
    assert_eq!(find(&query).await.unwrap(), 1);
    assert_eq!(find(&Query { limit: 0, ..query.clone() }).await.unwrap(), 0);
    assert_eq!(
        find(&Query { since: Some(noon(2) + jiff::SignedDuration::from_secs(1)), ..query.clone() })
            .await
            .unwrap(),
        0
    );
    // What is older than the event is not read.
    let of_event = Query { since: None, event: Some(uid(noon(2), 2)), ..query.clone() };
    assert_eq!(find(&of_event).await.unwrap(), 1);
    assert_eq!(find(&Query { event: Some(uid(noon(2), 9)), ..of_event.clone() }).await.unwrap(), 0);
    let unlimited = find(&Query { since: None, ..query.clone() }).await;
    assert!(matches!(unlimited, Err(Error::Refused { .. })), "{unlimited:?}");

    let audit = Query { domain: "audit".to_owned(), ..of_event };
    assert!(matches!(find(&audit).await, Err(Error::NoEvent("audit"))));
    let unknown = Query { domain: "nothing".to_owned(), ..query };
    assert!(matches!(find(&unknown).await, Err(Error::UnknownDomain(_))));
}

async fn of_two_writers_one_wins(store: &Store) {
    let slow = receipts(1, 9).write(&store.cold, stream(1, 9), "writer-1", noon(11)).await.unwrap();
    let slow = slow.confirm(&store.cold).await.unwrap();
    let resumed = store.cold.resume(STREAM).await.unwrap();
    assert_eq!((resumed.open, resumed.discarded), (1, 0), "its writer may still be there");
    archive(&store.cold, 1, 4, "writer-2").await.unwrap();

    let refused = slow.commit(&store.cold).await.unwrap_err();
    assert!(matches!(&refused, Error::Fenced { winner, .. } if winner == "writer-2"), "{refused}");
    let again = archive(&store.cold, 1, 9, "writer-1").await.unwrap_err();
    assert!(matches!(&again, Error::AlreadyArchived(manifest) if manifest.writer == "writer-2"), "{again}");
    assert_whole(&store.cold, 4).await;
}

async fn what_is_old_expires_and_leaves_no_hole(store: &Store) {
    for day in 1..=4_u64 {
        let mut batch = Batch::new();
        // The third batch has a row that is older than those of the second.
        let time = noon(i64::try_from(if day == 3 { 1 } else { day }).unwrap());
        batch.push(&RECEIPTS, receipt(organization(1), time, 1)).unwrap();
        let written = batch.write(&store.cold, stream(day, day), "writer-1", noon(11)).await.unwrap();
        written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
    }
    let expired = store.cold.expire(jiff::civil::date(2026, 11, 2)).await.unwrap();
    assert_eq!((expired.batches, expired.objects), (1, 1));
    let report = store.cold.verify(|_| ()).await.unwrap();
    assert_eq!((report.batches, report.problems), (3, Vec::new()));
    // Somebody was killed after the objects: the manifest is there for the next one.
    let manifest = store.cold.manifest_at(&slot(2)).await.unwrap().unwrap();
    store.delete(&manifest.objects[0].path).await;
    let expired = store.cold.expire(jiff::civil::date(2026, 12, 1)).await.unwrap();
    assert_eq!(expired.batches, 3);
    assert_eq!(store.paths("").await, Vec::<String>::new());
}

async fn a_row_with_a_wrong_clock_keeps_no_batch(store: &Store) {
    let mut batch = receipts(1, 1);
    batch.push(&RECEIPTS, receipt(organization(1), at("2099-01-01T00:00:00Z"), 2)).unwrap();
    let written = batch.write(&store.cold, stream(1, 2), "writer-1", noon(11)).await.unwrap();
    written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
    let expired = async |day| store.cold.expire(jiff::civil::date(2026, 11, day)).await.unwrap().batches;
    assert_eq!(expired(12).await, 0, "clocks may differ by a day");
    assert_eq!(expired(13).await, 1);
}

#[tokio::test]
async fn an_address_names_what_its_scheme_says_and_no_credentials() {
    devkit::install_tls_provider();
    let folder = tempfile::TempDir::new().unwrap();
    let prefix = folder.path().join("archive");
    let bucket = format!("s3://localhost{}", prefix.display());
    ColdStorage::open(&Config::at(bucket.parse().unwrap())).unwrap();
    assert!(!prefix.exists(), "a bucket is no folder");

    let bucket = |url: &str| Config::at(url.parse().unwrap());
    for url in ["s3://id:secret@archive/bus", "s3://id@archive/bus"] {
        let problem = bucket(url).problem().unwrap();
        assert_eq!(problem, "cold.url: credentials belong in access_key_id and secret_access_key");
    }
    let endpoint = Some("https://id:secret@minio.internal:9000".parse().unwrap());
    let problem = Config { endpoint, ..bucket("s3://archive/bus") }.problem().unwrap();
    assert!(problem.starts_with("cold.endpoint: credentials"), "{problem}");
}

#[test]
fn a_row_that_does_not_fit_is_refused() {
    let mut batch = Batch::new();
    let good = receipt(organization(1), noon(1), 1);
    let reason = |batch: &mut Batch, row| batch.push(&RECEIPTS, row).unwrap_err().to_string();
    assert_eq!(reason(&mut batch, good[1..].to_vec()), "a row of receipts: 11 values for 12 columns");
    let mut null = good.clone();
    null[0] = Value::Null;
    assert_eq!(reason(&mut batch, null), "a row of receipts: delivery is null");
    let mut wrong = good.clone();
    wrong[1] = Value::Long(1);
    assert_eq!(reason(&mut batch, wrong), "a row of receipts: attempt is Long and not Int");
    let mut bad = event(organization(1), noon(1), 1);
    bad[9] = Value::Json("[".to_owned());
    let refused = batch.push(&EVENTS, bad).unwrap_err().to_string();
    assert_eq!(refused, "a row of events: subscriptions is not JSON");
    assert_eq!((batch.rows(), batch.bytes()), (0, 0));
    batch.push(&RECEIPTS, good).unwrap();
    assert!(batch.bytes() > 0);
}
