//! A process that dies at any point of its work, and those who come after it.

use cold_storage::ColdStorage;
use devkit::s3::S3;

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::*,
};

const END: u64 = 20;

on_both_stores! {
    who_dies_between_two_steps_is_followed_up,
    a_stale_writer_leaves_nothing_behind,
}

async fn who_dies_between_two_steps_is_followed_up(store: &Store) {
    let cold = &store.cold;
    // The same writer begins again with other sizes, then another one.
    drop(receipts(1, 7).write(cold, stream(1, 7), "writer-1", noon(11)).await.unwrap());
    let written = receipts(1, 5).write(cold, stream(1, 5), "writer-1", noon(11)).await.unwrap();
    drop(written.confirm(cold).await.unwrap());
    assert_eq!(archived(cold).await, Vec::<i64>::new(), "nothing of it counts");
    let report = cold.verify(|_| ()).await.unwrap();
    assert_eq!((report.in_progress.len(), report.problems.len()), (4, 0));
    archive_rest(cold, END, "writer-2", 6).await.unwrap();
    assert_whole(cold, END).await;
}

async fn a_stale_writer_leaves_nothing_behind(store: &Store) {
    let cold = &store.cold;
    let slow = receipts(1, 9).write(cold, stream(1, 9), "writer-1", noon(11)).await.unwrap();
    archive_rest(cold, END, "writer-2", 6).await.unwrap();
    let refused = slow.confirm(cold).await.unwrap_err();
    assert!(matches!(refused, cold_storage::Error::Fenced { .. }), "{refused}");
    assert_whole(cold, END).await;
}

/// Cuts the connection for good after each number of changes in turn: every point at which a process may die.
#[tokio::test]
async fn who_dies_after_any_change_is_followed_up() {
    devkit::install_tls_provider();
    let server = S3::start().await.unwrap();
    let proxy = Proxy::start(server.endpoint().clone()).await;
    let mut survived = false;
    let mut changes = 0;
    while !survived {
        let successor = if changes % 2 == 0 { "writer-1" } else { "writer-2" };
        let prefix = format!("cut-{changes}");
        let mut config = s3_config(proxy.url(), &prefix);
        config.retries = 0;
        let dying = ColdStorage::open(&config).unwrap();
        proxy.rule(Rule { after: changes, ..Rule::changes(Fault::Tear) });
        // Its note may stay behind, so that its last request fails unseen: what counts is whether it was cut.
        let outcome = archive_rest(&dying, END, "writer-1", 10).await;
        survived = !proxy.clear();
        assert!(outcome.is_ok() || !survived, "{outcome:?}");

        let cold = ColdStorage::open(&s3_config(server.endpoint(), &prefix)).unwrap();
        archive_rest(&cold, END, successor, 7).await.unwrap();
        assert_whole(&cold, END).await;
        changes += 1;
    }
    assert!(changes >= 10, "{changes} changes were made in all");
}
