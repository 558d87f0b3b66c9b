//! A store that fails in the ways in which stores fail.

use cold_storage::{ColdStorage, Error};
use devkit::s3::S3;

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::*,
};

const UPLOADS: [&str; 3] = ["/pending/", "/domain%3D", "/manifests/"];

#[tokio::test]
async fn a_store_that_fails_loses_nothing() {
    devkit::install_tls_provider();
    let server = S3::start().await.unwrap();
    let proxy = Proxy::start(server.endpoint().clone()).await;
    an_upload_that_fails_once_is_repeated(&proxy).await;
    an_outage_ends_a_batch_and_loses_nothing(&proxy).await;
    what_the_store_has_changed_is_not_confirmed(&proxy).await;
    a_note_that_could_not_be_removed_is_removed_by_the_next(&proxy).await;
}

async fn an_upload_that_fails_once_is_repeated(proxy: &Proxy) {
    for (number, fault) in
        [Fault::Unavailable, Fault::Tear, Fault::LoseAnswer, Fault::Hang].into_iter().enumerate()
    {
        let prefix = format!("once-{number}");
        let mut config = s3_config(proxy.url(), &prefix);
        config.request_timeout_ms = 5_000;
        let cold = ColdStorage::open(&config).unwrap();
        for (first, path) in (1..).zip(UPLOADS) {
            proxy.rule(Rule::upload(path, fault));
            archive(&cold, first, first, "writer-1")
                .await
                .unwrap_or_else(|error| panic!("{fault:?} {path}: {error}"));
            assert!(proxy.clear(), "{path} was met");
        }
        assert_whole(&cold, 3).await;
    }
}

async fn an_outage_ends_a_batch_and_loses_nothing(proxy: &Proxy) {
    let mut config = s3_config(proxy.url(), "outage");
    config.retries = 1;
    let cold = ColdStorage::open(&config).unwrap();
    for path in UPLOADS {
        proxy.rule(Rule { times: usize::MAX, ..Rule::upload(path, Fault::Unavailable) });
        let error = archive(&cold, 1, 5, "writer-1").await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        assert!(proxy.clear());
        assert_eq!(archived(&cold).await, Vec::<i64>::new());
    }
    archive(&cold, 1, 3, "writer-1").await.unwrap();
    assert_whole(&cold, 3).await;
}

async fn what_the_store_has_changed_is_not_confirmed(proxy: &Proxy) {
    let cold = ColdStorage::open(&s3_config(proxy.url(), "flipped")).unwrap();
    proxy.rule(Rule::upload("/domain%3D", Fault::FlipBit));
    let error = archive(&cold, 1, 5, "writer-1").await.unwrap_err();
    assert!(proxy.clear());
    assert!(matches!(error, Error::Refused { fault: cold_storage::Fault::Bytes, .. }), "{error:?}");
    assert_eq!(cold.manifest_at(&slot(1)).await.unwrap(), None);
    archive(&cold, 1, 5, "writer-1").await.unwrap();
    assert_whole(&cold, 5).await;
}

async fn a_note_that_could_not_be_removed_is_removed_by_the_next(proxy: &Proxy) {
    let mut config = s3_config(proxy.url(), "note");
    config.retries = 0;
    let cold = ColdStorage::open(&config).unwrap();
    // The note, two objects and the manifest go through.
    proxy.rule(Rule { after: 4, ..Rule::changes(Fault::Unavailable) });
    let manifest = archive(&cold, 1, 5, "writer-1").await.unwrap();
    assert!(proxy.clear());
    let resumed = cold.resume(STREAM).await.unwrap();
    assert_eq!((resumed.committed, resumed.discarded, resumed.open), (vec![manifest], 0, 0));
    let resumed = cold.resume(STREAM).await.unwrap();
    assert_eq!((resumed.committed.len(), resumed.discarded, resumed.open), (0, 0, 0));
    assert_whole(&cold, 5).await;
}
