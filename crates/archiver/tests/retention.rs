//! What is kept how long, with a clock that the test moves.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use archiver::{ArchiveConfig, Expiry, Leases, TableArchiver, TableRetention};
use bus_core::{
    clock::{Clock as _, ManualClock, SystemClock},
    ids::{Ids as _, SystemIds, uuid_floor},
    pg::{self, DayTable},
    streams::Archive,
};
use cold_storage::{ColdStorage, Config, Manifest, Query, Record, Value};
use devkit::{database::Database, servers::shared_servers};
use futures::TryStreamExt as _;
use jiff::{SignedDuration, Span, Timestamp, civil::Date, tz::TimeZone};
use sqlx::PgPool;
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

/// Days for which partitions exist ahead, whenever some are created.
const AHEAD: i32 = 31;

struct World {
    database: Database,
    pool: PgPool,
    folder: TempDir,
    clock: ManualClock,
    organizations: [Uuid; 2],
}

fn day_of(at: Timestamp) -> Date {
    at.to_zoned(TimeZone::UTC).date()
}

impl World {
    /// So many days before today.
    async fn ago(days: i64) -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let clock = ManualClock::new(SystemClock.now() - SignedDuration::from_hours(24 * days));
        let organizations = [(); 2].map(|()| SystemIds.next());
        // Rows that carry a time of their own carry that of their day.
        sqlx::raw_sql(
            "CREATE FUNCTION uuid_day(uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE RETURN
                 to_timestamp(('x' || left(replace($1::text, '-', ''), 12))::bit(48)::bigint / 1000.0)",
        )
        .execute(&pool)
        .await
        .unwrap();
        Self { database, pool, folder: TempDir::new().unwrap(), clock, organizations }
    }

    fn today(&self) -> Date {
        day_of(self.clock.now())
    }

    fn cold(&self) -> ColdStorage {
        let url = Url::from_directory_path(self.folder.path()).unwrap();
        ColdStorage::open(&Config::at(url)).unwrap()
    }

    fn leases(&self) -> Leases {
        Leases { pool: self.pool.clone(), holder: "test".into(), seconds: 60 }
    }

    /// Parts of at least so many rows.
    fn archiver(&self, table: DayTable, keep_days: u32, archive: Archive, part: u64) -> TableArchiver {
        TableArchiver {
            table,
            retention: TableRetention { keep_days, archive },
            by_stream: None,
            cold: self.cold(),
            leases: self.leases(),
            config: ArchiveConfig { batch_messages: part, batch_bytes: 1 << 20, batch_age_s: 0, lease_s: 60 },
            clock: Arc::new(self.clock.clone()),
        }
    }

    /// Four rows in every table, of one organization or of both.
    async fn live_a_day(&self, both: bool) {
        let floor = uuid_floor(self.clock.now()).as_u128();
        let uids = (1..=4).map(|n| Uuid::from_u128(floor + n)).collect::<Vec<_>>();
        let [first, second] = if both { self.organizations } else { [self.organizations[0]; 2] };
        self.rows(&uids, &[first, second, first, second]).await;
    }

    /// One row of each in every table.
    async fn rows(&self, uids: &[Uuid], organizations: &[Uuid]) {
        let mut transaction = self.pool.begin().await.unwrap();
        for statement in [
            "INSERT INTO events (uid, organization_id, id, source, type, time, body)
             SELECT u, o, u::text, '/s', 't', now(), '{\"specversion\":\"1.0\"}' FROM UNNEST($1, $2) AS r (u, o)",
            "INSERT INTO delivery_attempts (delivery_id, attempt, event_uid, organization_id, subscription_id, connection_id,
                                            outcome, status, at, duration_ms)
             SELECT u, 1, u, o, u, u, 'delivered', 204, uuid_day(u), 5 FROM UNNEST($1, $2) AS r (u, o)",
            "INSERT INTO occurrences (uid, schedule_id, organization_id, state, tick, last_tick, ticks)
             SELECT u, u, o, 'fired', now(), now(), 1 FROM UNNEST($1, $2) AS r (u, o)",
            "INSERT INTO audit_records (id, organization_id, at, actor, action, target_kind, target_id, after)
             SELECT u, o, uuid_day(u), 'system', 'connection.disabled', 'connection', 'c', '{\"enabled\": false}'
             FROM UNNEST($1, $2) AS r (u, o)",
        ] {
            let insert = sqlx::query(statement).bind(uids).bind(organizations);
            insert.execute(&mut *transaction).await.unwrap();
        }
        transaction.commit().await.unwrap();
    }

    async fn partition(&self, table: DayTable, day: Date) {
        let create = sqlx::query("SELECT create_day_partition($1, $2::text::date)");
        create.bind(table.name()).bind(day.to_string()).execute(&self.pool).await.unwrap();
    }

    /// Somebody reads the table of events, so that its day cannot be dropped when it is archived.
    async fn archive_without_dropping(&self, archiver: &TableArchiver) {
        let mut reader = self.pool.begin().await.unwrap();
        sqlx::query("SELECT count(*) FROM events").execute(&mut *reader).await.unwrap();
        self.leases().round(archiver).await.unwrap_err();
        reader.rollback().await.unwrap();
    }

    /// The days for which a table has a partition.
    async fn days(&self, table: DayTable) -> BTreeSet<Date> {
        pg::partition_days(&self.pool, table).await.unwrap().into_iter().collect()
    }

    /// Rows in cold storage by domain and day; every manifest is whole, and nothing is there besides.
    async fn archived(&self) -> BTreeMap<(String, Date), u64> {
        let cold = self.cold();
        let report = cold.verify(|_| ()).await.unwrap();
        assert!(report.problems.is_empty() && report.in_progress.is_empty(), "{report:?}");
        let manifests: Vec<Manifest> = cold.manifests(None).try_collect().await.unwrap();
        let mut rows = BTreeMap::new();
        for object in manifests.iter().flat_map(|manifest| &manifest.objects) {
            *rows.entry((object.domain.clone(), object.date)).or_insert(0) += object.rows;
        }
        rows
    }

    /// The events in cold storage.
    async fn uids(&self) -> Vec<Uuid> {
        let query = Query {
            domain: "events".into(),
            organization: None,
            since: None,
            until: None,
            event: None,
            limit: usize::MAX,
        };
        let rows: Vec<Record> = self.cold().query(&query).unwrap().try_collect().await.unwrap();
        rows.iter()
            .map(|row| match row.get("uid") {
                Some(Value::Uuid(uid)) => *uid,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    /// Removes the manifest and the objects of a part, wherever they are.
    fn remove_part(&self, part: u64) {
        let number = format!("{part:020}");
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let named = path.file_name().unwrap().to_str().unwrap().contains(&number);
                match (named, path.is_dir()) {
                    (true, true) => std::fs::remove_dir_all(path).unwrap(),
                    (true, false) => std::fs::remove_file(path).unwrap(),
                    (false, true) => folders.push(path),
                    (false, false) => {}
                }
            }
        }
    }

    fn span(&self, from: i64, to: i64) -> BTreeSet<Date> {
        (from..=to).map(|days| self.today().checked_add(Span::new().days(days)).unwrap()).collect()
    }
}

/// `RETENTION_DAYS=365` for a whole year.
#[tokio::test]
async fn the_days_that_pass_leave_the_partitions_and_objects_that_the_policy_says_and_nothing_else() {
    let days: i64 = std::env::var("RETENTION_DAYS").map_or(130, |days| days.parse().unwrap());
    let last = days - 1;
    let world = World::ago(last).await;
    let policy = [
        (DayTable::Events, 60, Archive::Archive),
        (DayTable::DeliveryAttempts, 10, Archive::Archive),
        (DayTable::Occurrences, 20, Archive::Drop),
        (DayTable::AuditRecords, 90, Archive::Archive),
    ];
    // Partitions of the first days that the migration made are of now, far ahead of this clock.
    for table in DayTable::ALL {
        for day in world.days(table).await {
            sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
                "DROP TABLE {}_{}",
                table.name(),
                day.strftime("%Y%m%d")
            )))
            .execute(&world.pool)
            .await
            .unwrap();
        }
        world.partition(table, world.today()).await;
    }
    let leases = world.leases();
    let expiry = Expiry {
        cold: world.cold(),
        leases: world.leases(),
        days: 120,
        clock: Arc::new(world.clock.clone()),
    };
    for day in 0..days {
        if day % 28 == 0 {
            pg::create_partitions(&world.pool, world.clock.now(), AHEAD).await.unwrap();
        }
        world.live_a_day(day % 10 == 0).await;
        // Something late for a day that is gone.
        if day == 100 {
            let gone = world.clock.now() - SignedDuration::from_hours(24 * 95);
            world.rows(&[uuid_floor(gone)], &world.organizations[..1]).await;
        }
        if day % 28 == 0 || day == last {
            for (table, keep_days, archive) in policy {
                let archiver = world.archiver(table, keep_days, archive, 100);
                assert!(leases.round(&archiver).await.unwrap());
            }
            assert!(leases.round(&expiry).await.unwrap());
        }
        if day < last {
            world.clock.advance(SignedDuration::from_hours(24));
        }
    }

    let ahead = i64::from(AHEAD) - last % 28;
    for (table, keep_days, archive) in policy {
        let kept = world.span(-i64::from(keep_days), ahead);
        assert_eq!(world.days(table).await, kept, "{}", table.name());
        let rows: u64 = {
            let mut rows = 0;
            for day in &kept {
                rows += pg::day_count(&world.pool, table, *day).await.unwrap();
            }
            rows
        };
        assert_eq!(rows, u64::from(keep_days + 1) * 4, "{}", table.name());
        let all: i64 = match table {
            DayTable::Events => sqlx::query_scalar("SELECT count(*) FROM events"),
            DayTable::DeliveryAttempts => sqlx::query_scalar("SELECT count(*) FROM delivery_attempts"),
            DayTable::Occurrences => sqlx::query_scalar("SELECT count(*) FROM occurrences"),
            DayTable::AuditRecords => sqlx::query_scalar("SELECT count(*) FROM audit_records"),
        }
        .fetch_one(&world.pool)
        .await
        .unwrap();
        // What came late for a day that was archived and dropped is not deleted, since cold storage does not have it.
        let late = u64::from(archive == Archive::Archive && keep_days < 79);
        assert_eq!(all.unsigned_abs(), rows + late, "{}", table.name());
    }
    let mut expected = BTreeMap::new();
    for (domain, keep_days) in [("events", 60), ("receipts", 10), ("audit", 90)] {
        for day in world.span(-120, -keep_days - 1) {
            expected.insert((domain.to_owned(), day), 4);
        }
    }
    assert_eq!(world.archived().await, expected);
    world.pool.close().await;
    drop(world.database);
}

#[tokio::test]
async fn i8_a_row_that_comes_late_to_an_archived_day_is_archived_before_the_day_goes() {
    let world = World::ago(100).await;
    let (table, day) = (DayTable::Events, world.today());
    world.partition(table, day).await;
    world.live_a_day(true).await;
    world.clock.advance(SignedDuration::from_hours(24 * 50));
    let archiver = world.archiver(table, 10, Archive::Archive, 3);
    let leases = world.leases();

    // Somebody reads the table, so that the day cannot be dropped when it is archived.
    let mut reader = world.pool.begin().await.unwrap();
    sqlx::query("SELECT count(*) FROM events").execute(&mut *reader).await.unwrap();
    leases.round(&archiver).await.unwrap_err();
    let domain = ("events".to_owned(), day);
    assert_eq!(world.archived().await, BTreeMap::from([(domain.clone(), 4)]), "in two parts");

    // Before the others, where no part would look for it.
    let late = uuid_floor(world.clock.now() - SignedDuration::from_hours(24 * 50));
    world.rows(&[late], &world.organizations[..1]).await;
    reader.rollback().await.unwrap();
    assert!(leases.round(&archiver).await.unwrap());
    assert_eq!(pg::day_count(&world.pool, table, day).await.unwrap(), 5, "nothing goes that is not archived");
    assert_eq!(world.archived().await, BTreeMap::new());

    assert!(leases.round(&archiver).await.unwrap());
    assert_eq!(world.archived().await, BTreeMap::from([(domain, 5)]));
    assert_eq!(pg::day_count(&world.pool, table, day).await.unwrap(), 0);
    assert!(!world.days(table).await.contains(&day));
    world.pool.close().await;
    drop(world.database);
}

#[tokio::test]
async fn i8_a_row_that_comes_late_between_two_parts_is_not_passed_over() {
    let world = World::ago(100).await;
    let (table, day) = (DayTable::Events, world.today());
    world.partition(table, day).await;
    world.live_a_day(true).await;
    let late = uuid_floor(world.clock.now());
    world.clock.advance(SignedDuration::from_hours(24 * 50));
    let archiver = world.archiver(table, 10, Archive::Archive, 3);
    let leases = world.leases();
    world.archive_without_dropping(&archiver).await;

    // As if the archiver had died when the first part, three of the four rows, was committed and not noted yet.
    sqlx::query("UPDATE archive_sources SET next = 1, after = NULL").execute(&world.pool).await.unwrap();
    sqlx::query("DELETE FROM archive_batches").execute(&world.pool).await.unwrap();
    world.remove_part(1);
    assert_eq!(world.uids().await.len(), 3);

    // Before them all, where the second part does not look.
    world.rows(&[late], &world.organizations[..1]).await;
    for _ in 0..2 {
        assert!(leases.round(&archiver).await.unwrap());
    }
    let archived = world.uids().await;
    assert_eq!((archived.len(), archived.iter().collect::<BTreeSet<_>>().len()), (5, 5), "{archived:?}");
    assert!(archived.contains(&late));
    assert!(!world.days(table).await.contains(&day));
    world.pool.close().await;
    drop(world.database);
}

#[tokio::test]
async fn i8_a_day_that_has_lost_rows_takes_nothing_out_of_cold_storage() {
    let world = World::ago(100).await;
    let (table, day) = (DayTable::Events, world.today());
    world.partition(table, day).await;
    world.live_a_day(true).await;
    world.clock.advance(SignedDuration::from_hours(24 * 50));
    let archiver = world.archiver(table, 10, Archive::Archive, 3);
    let leases = world.leases();
    world.archive_without_dropping(&archiver).await;
    // Somebody puts the database back to when the day was half over.
    sqlx::query("DELETE FROM events WHERE uid IN (SELECT uid FROM events LIMIT 2)")
        .execute(&world.pool)
        .await
        .unwrap();
    assert!(leases.round(&archiver).await.unwrap());
    assert_eq!(world.uids().await.len(), 4);
    assert_eq!(
        pg::day_count(&world.pool, table, day).await.unwrap(),
        2,
        "it stays until somebody has looked"
    );
    world.pool.close().await;
    drop(world.database);
}

#[tokio::test]
async fn a_day_that_is_kept_longer_after_all_leaves_cold_storage_and_stays() {
    let world = World::ago(100).await;
    let (table, day) = (DayTable::Events, world.today());
    world.partition(table, day).await;
    world.live_a_day(true).await;
    world.clock.advance(SignedDuration::from_hours(24 * 50));
    let leases = world.leases();
    world.archive_without_dropping(&world.archiver(table, 10, Archive::Archive, 3)).await;
    assert_eq!(world.uids().await.len(), 4);

    let longer = world.archiver(table, 60, Archive::Archive, 3);
    for _ in 0..2 {
        assert!(leases.round(&longer).await.unwrap());
    }
    assert!(world.uids().await.is_empty());
    assert_eq!(pg::day_count(&world.pool, table, day).await.unwrap(), 4);
    let position = pg::archive_position(&world.pool, table.name()).await.unwrap().unwrap();
    assert_eq!(position.incarnation, None, "nothing is under way");
    world.clock.advance(SignedDuration::from_hours(24 * 20));
    assert!(leases.round(&longer).await.unwrap());
    assert_eq!(world.uids().await.len(), 4);
    assert!(!world.days(table).await.contains(&day));
    world.pool.close().await;
    drop(world.database);
}
