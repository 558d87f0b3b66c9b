//! `cargo xtask archive restore` and `expunge`, as their user sees them.

#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use archiver::{ArchiveConfig, Leases, TableArchiver, TableRetention};
use bus_core::{
    audit::By,
    clock::{Clock as _, SystemClock},
    ids::{ErasureId, EventUid, Ids as _, OrganizationId, SystemIds},
    pg::{self, DayTable},
    streams::Archive,
};
use cold_storage::{ColdStorage, Config};
use devkit::{database::Database, servers::shared_servers};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::process::Command;
use url::Url;
use uuid::Uuid;

/// A database of which everything has been moved to cold storage.
struct Setup {
    database: Database,
    pool: PgPool,
    url: Url,
    organizations: [OrganizationId; 2],
    _folder: tempfile::TempDir,
}

impl Setup {
    async fn new() -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let url = Url::from_directory_path(folder.path()).unwrap();
        let organizations = [(); 2].map(|()| OrganizationId(SystemIds.next()));
        Self { database, pool, url, organizations, _folder: folder }
    }

    /// Three rows of each table for each organization, with everything that is hard to carry.
    async fn fill(&self) {
        for (name, organization) in ["one", "two"].into_iter().zip(self.organizations) {
            for table in DayTable::ALL {
                sqlx::query("SELECT create_day_partition($1, $2::text::date)")
                    .bind(table.name())
                    .bind(long_ago().to_zoned(TimeZone::UTC).date().to_string())
                    .execute(&self.pool)
                    .await
                    .unwrap();
            }
            sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, $2)")
                .bind(organization.0)
                .bind(name)
                .execute(&self.pool)
                .await
                .unwrap();
            for n in 0..3 {
                let (uid, other) = (old(SystemIds.next()), SystemIds.next());
                for statement in [
                    "INSERT INTO events (uid, organization_id, id, source, type, subject, time, publisher, subscriptions, body)
                     VALUES ($1, $2, 'id-' || $3, '/s', 't', 'a \"quoted\" subject', now(), $4, ARRAY[$4, $1],
                             convert_to('{\"data\":1.10,\"n\":' || $3 || '}', 'UTF8'))",
                    "INSERT INTO delivery_attempts (delivery_id, attempt, turn, event_uid, organization_id, subscription_id,
                                                    connection_id, outcome, status, error, at, duration_ms)
                     VALUES ($4, $3 + 1, 7, $1, $2, $4, $4, 'failed', NULL, 'no', now(), 12)",
                    "INSERT INTO occurrences (uid, schedule_id, organization_id, state, reason, manual, tick, last_tick, ticks)
                     VALUES ($1, $4, $2, 'skipped', 'paused', false, now(), now(), 1 + $3)",
                    "INSERT INTO audit_records (id, organization_id, actor, key_id, action, target_kind, target_id, before,
                                                request_id, relayed_at)
                     VALUES ($1, $2, 'key', $4, 'key.created', 'key', $3::text, '{\"n\": 1.10}', NULL, now())",
                ] {
                    sqlx::query(statement)
                        .bind(uid)
                        .bind(organization.0)
                        .bind(n)
                        .bind(other)
                        .execute(&self.pool)
                        .await
                        .unwrap();
                }
            }
        }
    }

    async fn archive(&self) {
        let cold = ColdStorage::open(&Config::at(self.url.clone())).unwrap();
        for table in DayTable::ALL {
            let leases = Leases { pool: self.pool.clone(), holder: "test".to_owned(), seconds: 30 };
            let config =
                ArchiveConfig { batch_messages: 4, batch_bytes: 1024 * 1024, batch_age_s: 300, lease_s: 30 };
            let archiver = TableArchiver {
                table,
                retention: TableRetention { keep_days: 1, archive: Archive::Archive },
                by_stream: None,
                cold: cold.clone(),
                leases: leases.clone(),
                config,
                clock: Arc::new(SystemClock),
            };
            assert!(leases.round(&archiver).await.unwrap());
        }
    }

    /// All rows of a table, apart from when a record was passed on to the stream, and from the records of restoring.
    async fn rows(&self, table: DayTable) -> Vec<String> {
        let statement = format!(
            "SELECT (to_jsonb(t) - 'relayed_at')::text FROM {} t
             WHERE to_jsonb(t)->>'action' IS DISTINCT FROM 'rows.restored' ORDER BY 1",
            table.name()
        );
        sqlx::query_scalar(AssertSqlSafe(statement)).fetch_all(&self.pool).await.unwrap()
    }

    /// Succeeds; what it said.
    async fn run(&self, action: &str, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["archive", action, "--url", self.url.as_str()])
            .args(arguments)
            .env("DATABASE_URL", self.database.url())
            .output()
            .await
            .unwrap();
        let told =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        told
    }

    async fn end(self) {
        self.pool.close().await;
        self.database.drop().await.unwrap();
    }
}

fn long_ago() -> Timestamp {
    SystemClock.now() - SignedDuration::from_hours(72)
}

/// The same id, of that time.
fn old(id: Uuid) -> Uuid {
    EventUid::at(long_ago(), id).0
}

const DOMAINS: [(&str, DayTable); 4] = [
    ("events", DayTable::Events),
    ("receipts", DayTable::DeliveryAttempts),
    ("occurrences", DayTable::Occurrences),
    ("audit", DayTable::AuditRecords),
];

#[tokio::test]
async fn what_expired_comes_back_exactly_and_once() {
    let setup = Setup::new().await;
    setup.fill().await;
    let mut before = Vec::new();
    for (_, table) in DOMAINS {
        before.push(setup.rows(table).await);
    }
    setup.archive().await;
    for ((domain, table), before) in DOMAINS.into_iter().zip(before) {
        assert_eq!(before.len(), 6);
        assert_eq!(setup.rows(table).await, [""; 0], "{domain} has gone");
        let told = setup.run("restore", &["--domain", domain, "--dry-run"]).await;
        assert!(told.contains("Cold storage has 6"), "{told}");
        assert_eq!(setup.rows(table).await, [""; 0]);

        let one = setup.organizations[0].to_string();
        let told = setup.run("restore", &["--domain", domain, "--organization", &one]).await;
        assert!(told.contains("3 rows restored; 0 were there already"), "{told}");
        let told = setup.run("restore", &["--domain", domain]).await;
        assert!(told.contains("3 rows restored; 3 were there already"), "{told}");
        assert_eq!(setup.rows(table).await, before, "{domain}");
    }
    let passed_on: i64 = sqlx::query_scalar("SELECT count(relayed_at) FROM audit_records")
        .fetch_one(&setup.pool)
        .await
        .unwrap();
    assert_eq!(passed_on, 6, "they are not passed on a second time");

    // They stay, and cold storage keeps what it has of everybody.
    sqlx::query("DELETE FROM events WHERE organization_id = $1")
        .bind(setup.organizations[0].0)
        .execute(&setup.pool)
        .await
        .unwrap();
    setup.archive().await;
    assert_eq!(setup.rows(DayTable::Events).await.len(), 3);
    let told = setup.run("restore", &["--domain", "events"]).await;
    assert!(told.contains("3 rows restored; 3 were there already"), "{told}");
    setup.end().await;
}

#[tokio::test]
async fn what_was_erased_does_not_come_back() {
    let setup = Setup::new().await;
    setup.fill().await;
    setup.archive().await;
    let [one, two] = setup.organizations;
    let told = setup.run("expunge", &["--organization", &one.to_string()]).await;
    assert!(told.contains("3 rows emptied"), "{told}");
    let told = setup.run("expunge", &["--organization", &one.to_string()]).await;
    assert!(told.contains("nothing to empty"), "{told}");
    // The job of the other is open: cold storage still has the payloads.
    let by = By::system(SystemIds.next());
    pg::create_erasure(&setup.pool, ErasureId(SystemIds.next()), two, None, &by).await.unwrap();
    setup.run("restore", &["--domain", "events"]).await;
    let (rows, empty): (i64, i64) = sqlx::query_as(
        "SELECT count(*), count(*) FILTER (WHERE expunged_at IS NOT NULL AND body = '') FROM events",
    )
    .fetch_one(&setup.pool)
    .await
    .unwrap();
    assert_eq!((rows, empty), (6, 6));
    setup.end().await;
}
