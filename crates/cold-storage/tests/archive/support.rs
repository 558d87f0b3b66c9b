//! Stores, rows, and an archiver small enough to be read at a glance.

use std::sync::Arc;

use bytes::Bytes;
use cold_storage::{
    AUDIT, Batch, ColdStorage, Config, Dataset, Error, MESSAGES, Manifest, OCCURRENCES, Query, RECEIPTS,
    Record, Row, Slot, Source, Value,
};
use devkit::s3::{BUCKET, S3};
use futures::TryStreamExt as _;
use jiff::{SignedDuration, Timestamp};
use object_store::{
    ObjectStore, ObjectStoreExt as _, aws::AmazonS3Builder, local::LocalFileSystem, path::Path,
    prefix::PrefixStore,
};
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

pub(crate) const STREAM: &str = "bus_audit";
pub(crate) const INCARNATION: &str = "20261101T000000Z";

/// An archive, and the way around it.
pub(crate) struct Store {
    pub(crate) cold: ColdStorage,
    /// The same objects, for tests that damage them.
    pub(crate) raw: Arc<dyn ObjectStore>,
    pub(crate) folder: Option<TempDir>,
}

impl Store {
    pub(crate) async fn files() -> Self {
        let folder = TempDir::new().unwrap();
        let config = Config::at(Url::from_directory_path(folder.path()).unwrap());
        let cold = ColdStorage::open(&config).unwrap();
        let raw = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
        Self { cold, raw, folder: Some(folder) }
    }

    /// A part of a server of its own.
    pub(crate) fn s3(server: &S3, prefix: &str) -> Self {
        let cold = ColdStorage::open(&s3_config(server.endpoint(), prefix)).unwrap();
        let raw = AmazonS3Builder::new()
            .with_bucket_name(BUCKET)
            .with_endpoint(server.endpoint().as_str().trim_end_matches('/'))
            .with_access_key_id("id")
            .with_secret_access_key("secret")
            .with_allow_http(true)
            .build()
            .unwrap();
        let raw = Arc::new(PrefixStore::new(raw, prefix));
        Self { cold, raw, folder: None }
    }

    pub(crate) async fn paths(&self, folder: &str) -> Vec<String> {
        let found = self.raw.list(None).map_ok(|meta| String::from(meta.location));
        let mut found: Vec<String> = found.try_collect().await.unwrap();
        found.retain(|path| path.starts_with(folder));
        found.sort();
        found
    }

    pub(crate) async fn get(&self, path: &str) -> Bytes {
        self.raw.get(&Path::from(path)).await.unwrap().bytes().await.unwrap()
    }

    pub(crate) async fn put(&self, path: &str, bytes: impl Into<Bytes>) {
        self.raw.put(&Path::from(path), bytes.into().into()).await.unwrap();
    }

    pub(crate) async fn delete(&self, path: &str) {
        self.raw.delete(&Path::from(path)).await.unwrap();
    }
}

pub(crate) fn s3_config(endpoint: &Url, prefix: &str) -> Config {
    Config {
        endpoint: Some(endpoint.clone()),
        region: Some("us-east-1".to_owned()),
        access_key_id: Some("id".to_owned()),
        secret_access_key: Some("secret".into()),
        allow_http: true,
        ..Config::at(Url::parse(&format!("s3://{BUCKET}/{prefix}")).unwrap())
    }
}

/// Runs each case in a folder of its own, and all of them in one S3: a server takes longer to start than a case.
macro_rules! on_both_stores {
    ($($case:ident),+ $(,)?) => {
        mod files {
            $(#[tokio::test] async fn $case() { super::$case(&crate::support::Store::files().await).await; })+
        }

        #[tokio::test]
        async fn the_same_in_an_s3() {
            devkit::install_tls_provider();
            let server = devkit::s3::S3::start().await.unwrap();
            $(
                println!("{}", stringify!($case));
                $case(&crate::support::Store::s3(&server, stringify!($case))).await;
            )+
        }
    };
}
pub(crate) use on_both_stores;

pub(crate) fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// Noon of a day in November.
pub(crate) fn noon(day: i64) -> Timestamp {
    at("2026-11-01T12:00:00Z") + SignedDuration::from_hours(24 * (day - 1))
}

pub(crate) fn organization(number: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + number)
}

/// A UUIDv7 of this time.
pub(crate) fn uid(time: Timestamp, number: u128) -> Uuid {
    let milliseconds = u128::try_from(time.as_millisecond()).unwrap();
    Uuid::from_u128((milliseconds << 80) | (0x7000 << 64) | (0x8000 << 48) | number)
}

pub(crate) fn receipt(organization: Uuid, at: Timestamp, number: i64) -> Row {
    let id = |kind: u128| Uuid::from_u128(kind << 64 | u128::try_from(number).unwrap());
    vec![
        Value::Uuid(id(1)),
        Value::Int(1),
        Value::Long(number),
        Value::Uuid(uid(at, u128::try_from(number).unwrap())),
        Value::Uuid(organization),
        Value::Uuid(id(2)),
        Value::Uuid(id(3)),
        Value::Text("failed".to_owned()),
        if number % 2 == 0 { Value::Null } else { Value::Int(503) },
        Value::Text("no answer".to_owned()),
        Value::Timestamp(at),
        Value::Int(17),
    ]
}

pub(crate) fn event(organization: Uuid, time: Timestamp, number: u128) -> Row {
    vec![
        Value::Uuid(uid(time, number)),
        Value::Uuid(organization),
        Value::Text(format!("order-{number}")),
        Value::Text("/shop".to_owned()),
        Value::Text("order.created".to_owned()),
        Value::Null,
        Value::Timestamp(time),
        Value::Null,
        Value::Timestamp(time),
        Value::Json("[]".to_owned()),
        Value::Bytes(Bytes::from(format!(r#"{{"secret":{number}}}"#))),
        Value::Null,
    ]
}

/// One row of each other dataset.
pub(crate) fn others(organization: Uuid, time: Timestamp) -> Vec<(&'static Dataset, Row)> {
    let text = |text: &str| Value::Text(text.to_owned());
    let json = |text: &str| Value::Json(text.to_owned());
    let audit = vec![
        Value::Uuid(uid(time, 1)),
        Value::Null,
        Value::Timestamp(time),
        text("operator"),
        Value::Null,
        Value::Null,
        text("create"),
        text("organization"),
        text("acme"),
        Value::Null,
        json(r#"{"name":"Acme"}"#),
        Value::Null,
    ];
    let occurrence = vec![
        Value::Uuid(uid(time, 2)),
        Value::Uuid(uid(time, 3)),
        Value::Uuid(organization),
        text("skipped"),
        text("missed"),
        Value::Bool(false),
        Value::Timestamp(time),
        Value::Timestamp(time),
        Value::Long(60),
        Value::Timestamp(time),
    ];
    let message = vec![
        Value::Long(1),
        text("bus.events.audit.x"),
        Value::Null,
        Value::Null,
        Value::Timestamp(time),
        json(r#"{"Nats-Msg-Id":["1"]}"#),
        Value::Bytes(Bytes::from_static(b"\x00\xffpayload")),
        Value::Null,
    ];
    vec![(&AUDIT, audit), (&OCCURRENCES, occurrence), (&MESSAGES, message)]
}

pub(crate) fn stream(first: u64, last: u64) -> Source {
    Source::Stream {
        name: STREAM.to_owned(),
        incarnation: INCARNATION.to_owned(),
        first,
        last,
        messages: last + 1 - first,
    }
}

pub(crate) fn slot(first: u64) -> Slot {
    Slot { source: STREAM.to_owned(), incarnation: INCARNATION.to_owned(), first }
}

/// The messages of a stream: message n is the receipt n, of one of two organizations.
pub(crate) fn receipts(first: u64, last: u64) -> Batch {
    let mut batch = Batch::new();
    for number in first..=last {
        let whose = organization(u128::from(number % 2));
        batch.push(&RECEIPTS, receipt(whose, noon(10), i64::try_from(number).unwrap())).unwrap();
    }
    batch
}

/// Archives messages as one batch.
pub(crate) async fn archive(
    cold: &ColdStorage,
    first: u64,
    last: u64,
    writer: &str,
) -> Result<Manifest, Error> {
    let written = receipts(first, last).write(cold, stream(first, last), writer, noon(11)).await?;
    written.confirm(cold).await?.commit(cold).await
}

/// Archives whatever of the messages 1 to `end` is not archived yet, as an archiver that has just been started.
pub(crate) async fn archive_rest(cold: &ColdStorage, end: u64, writer: &str, size: u64) -> Result<(), Error> {
    let _ = cold.resume(STREAM).await?;
    let mut next = 1;
    while next <= end {
        next = match cold.manifest_at(&slot(next)).await? {
            Some(manifest) => manifest.source.next().unwrap(),
            None => {
                let last = end.min(next + size - 1);
                archive(cold, next, last, writer).await?.source.next().unwrap()
            }
        };
    }
    Ok(())
}

pub(crate) async fn all(cold: &ColdStorage, domain: &str) -> Vec<Record> {
    let query = Query {
        domain: domain.to_owned(),
        organization: None,
        since: None,
        until: None,
        event: None,
        limit: usize::MAX,
    };
    cold.query(&query).unwrap().try_collect().await.unwrap()
}

/// The messages whose receipts are in the archive, sorted.
pub(crate) async fn archived(cold: &ColdStorage) -> Vec<i64> {
    let mut turns: Vec<i64> = all(cold, "receipts")
        .await
        .iter()
        .map(|record| match record.get("turn") {
            Some(Value::Long(turn)) => *turn,
            other => panic!("{other:?}"),
        })
        .collect();
    turns.sort_unstable();
    turns
}

/// Every message is there exactly once, and nothing else is.
pub(crate) async fn assert_whole(cold: &ColdStorage, end: u64) {
    let report = cold.verify(|_| ()).await.unwrap();
    assert_eq!(report.problems, [], "{report:?}");
    assert_eq!(report.in_progress, Vec::<String>::new());
    assert_eq!(report.rows, end);
    assert_eq!(archived(cold).await, (1..=i64::try_from(end).unwrap()).collect::<Vec<_>>());
}
