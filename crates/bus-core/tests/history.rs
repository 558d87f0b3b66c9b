//! What the archiver writes to the database: attempts, how far history goes, whose turn it is, and days that expire.

use std::time::Duration;

use bus_core::{
    ids::{
        ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds, uuid_floor,
    },
    pg::{self, ArchivePosition, ArchivedBatch, DayTable, DropDay, Through},
    receipt::{Receipt, ReceiptOutcome},
};
use devkit::{database::Database, servers::shared_servers};
use jiff::{Span, Timestamp, civil::Date, tz::TimeZone};
use sqlx::{PgPool, Row as _};
use uuid::Uuid;

async fn database() -> (Database, PgPool) {
    let servers = shared_servers().await.unwrap();
    let database = Database::create(servers.postgres_url()).await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    (database, pool)
}

fn receipt(event: EventUid, attempt: u32, at: &str) -> Receipt {
    let subscription = SubscriptionId(SystemIds.next());
    Receipt {
        delivery: DeliveryId::derive(event, subscription),
        attempt,
        turn: i64::from(attempt) - 1,
        event,
        organization: OrganizationId(SystemIds.next()),
        subscription,
        connection: ConnectionId(SystemIds.next()),
        outcome: ReceiptOutcome::Delivered,
        status: Some(200),
        error: None,
        at: at.parse().unwrap(),
        duration_ms: 12,
    }
}

async fn attempts(pool: &PgPool) -> Vec<String> {
    sqlx::query("SELECT a::text AS line FROM delivery_attempts a ORDER BY 1")
        .fetch_all(pool)
        .await
        .unwrap()
        .iter()
        .map(|row| row.get("line"))
        .collect()
}

#[tokio::test]
async fn a_receipt_becomes_the_same_row_whichever_way_it_comes_and_only_once() {
    let event = EventUid(SystemIds.next());
    let failed = Receipt {
        outcome: ReceiptOutcome::Failed,
        status: None,
        error: Some("no\0answer: ünïcode, \"quotes\", tab\t and \\N".into()),
        duration_ms: u32::MAX,
        ..receipt(event, 1, "2026-11-21T10:00:00.123456789Z")
    };
    let receipts = [
        failed.clone(),
        // another attempt of that delivery, which began in the same microsecond
        Receipt { attempt: 2, turn: 7, at: "2026-11-21T10:00:00.123456999Z".parse().unwrap(), ..failed },
        receipt(EventUid(SystemIds.next()), 1, "1969-12-31T23:59:59.999999999Z"),
        Receipt { outcome: ReceiptOutcome::Deferred, ..receipt(event, 3, "2026-02-28T00:00:00Z") },
    ];
    let (_copied_in, copied) = database().await;
    let (_inserted_in, inserted) = database().await;
    pg::copy_attempts(&copied, &receipts).await.unwrap();
    pg::insert_attempts(&inserted, &receipts).await.unwrap();
    let rows = attempts(&copied).await;
    assert_eq!(rows.len(), 4);
    assert_eq!(rows, attempts(&inserted).await);

    // A repeat by the other way changes nothing, and what is new among repeats is taken.
    let more = receipt(event, 9, "2026-11-21T10:00:01Z");
    pg::insert_attempts(&copied, &receipts).await.unwrap();
    pg::copy_attempts(&inserted, &[&receipts[..], &[more]].concat()).await.unwrap();
    assert_eq!(attempts(&copied).await, rows);
    assert_eq!(attempts(&inserted).await.len(), 5);
}

#[tokio::test]
async fn history_says_how_far_it_goes_and_never_goes_back() {
    let (_database, pool) = database().await;
    assert_eq!(pg::history_through(&pool).await.unwrap(), None);
    let early: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    pg::note_history_through(&pool, Through::Time(early)).await.unwrap();
    let (through, behind) = pg::history_through(&pool).await.unwrap().unwrap();
    assert_eq!(through, early);
    assert!(behind > Duration::from_secs(86_400));
    pg::note_history_through(&pool, Through::Ago(Duration::from_secs(60))).await.unwrap();
    let (through, behind) = pg::history_through(&pool).await.unwrap().unwrap();
    assert!(through > early && behind >= Duration::from_secs(60), "{through} {behind:?}");
    for earlier in [Through::Time(early), Through::Ago(Duration::from_secs(3_600))] {
        pg::note_history_through(&pool, earlier).await.unwrap();
        assert_eq!(pg::history_through(&pool).await.unwrap().unwrap().0, through);
    }
}

#[tokio::test]
async fn i8_of_two_archivers_only_the_holder_of_the_lease_notes_anything() {
    let (_database, pool) = database().await;
    let first = pg::take_archive_lease(&pool, "AUDIT", "one", 60).await.unwrap().unwrap();
    assert_eq!(first.position, ArchivePosition { incarnation: None, next: 1, after: None, last_at: None });
    assert_eq!(pg::take_archive_lease(&pool, "AUDIT", "two", 60).await.unwrap(), None);
    assert!(pg::take_archive_lease(&pool, "OTHER", "two", 60).await.unwrap().is_some());

    let began = ArchivePosition { incarnation: Some("monday".into()), next: 11, after: None, last_at: None };
    assert!(pg::restart_archive_source(&pool, &first, &began).await.unwrap());
    let newest: Timestamp = "2026-11-21T00:00:00Z".parse().unwrap();
    let batch = ArchivedBatch { first: 11, last: 20, newest };
    assert!(pg::note_archived(&pool, &first, &batch, None).await.unwrap());
    assert!(
        !pg::note_archived(&pool, &first, &batch, None).await.unwrap(),
        "it does not begin where the last ended"
    );

    // Its lease runs out, and another takes it.
    sqlx::query("UPDATE archive_sources SET lease_until = now() - interval '1 s' WHERE source = 'AUDIT'")
        .execute(&pool)
        .await
        .unwrap();
    assert!(pg::renew_archive_lease(&pool, &first, 0).await.unwrap(), "nobody has taken it yet");
    sqlx::query("UPDATE archive_sources SET lease_until = now() - interval '1 s' WHERE source = 'AUDIT'")
        .execute(&pool)
        .await
        .unwrap();
    let second = pg::take_archive_lease(&pool, "AUDIT", "two", 60).await.unwrap().unwrap();
    assert_eq!(second.position, ArchivePosition { next: 21, last_at: Some(newest), ..began.clone() });
    let late = ArchivedBatch { first: 21, last: 30, newest };
    assert!(!pg::renew_archive_lease(&pool, &first, 60).await.unwrap());
    assert!(!pg::note_archived(&pool, &first, &late, None).await.unwrap());
    assert!(!pg::note_trimmed(&pool, &first, 21).await.unwrap());
    assert!(!pg::restart_archive_source(&pool, &first, &ArchivePosition::default()).await.unwrap());
    pg::release_archive_lease(&pool, &first).await.unwrap();
    assert_eq!(
        pg::take_archive_lease(&pool, "AUDIT", "one", 60).await.unwrap(),
        None,
        "it was not its to give back"
    );

    assert_eq!(pg::archived_batches(&pool, "AUDIT", 10).await.unwrap(), [batch]);
    assert!(pg::note_trimmed(&pool, &second, 21).await.unwrap());
    assert_eq!(pg::archived_batches(&pool, "AUDIT", 10).await.unwrap(), []);
    pg::release_archive_lease(&pool, &second).await.unwrap();
    assert!(pg::take_archive_lease(&pool, "AUDIT", "one", 60).await.unwrap().is_some());
}

/// A uid of that time.
fn uid(at: Timestamp, n: u128) -> Uuid {
    Uuid::from_u128(uuid_floor(at).as_u128() + n)
}

async fn occurrence(pool: &PgPool, uid: Uuid) {
    sqlx::query(
        "INSERT INTO occurrences (uid, schedule_id, organization_id, state, tick, last_tick, ticks)
         VALUES ($1, $1, $1, 'fired', now(), now(), 1)",
    )
    .bind(uid)
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_day_goes_whole_and_only_if_nothing_came_since_it_was_counted() {
    let (_database, pool) = database().await;
    let today: Date = sqlx::query_scalar::<_, String>("SELECT (now() AT TIME ZONE 'UTC')::date::text")
        .fetch_one(&pool)
        .await
        .unwrap()
        .parse()
        .unwrap();
    let noon = |day: Date| day.at(12, 0, 0, 0).to_zoned(TimeZone::UTC).unwrap().timestamp();
    let day = today.checked_sub(Span::new().days(40)).unwrap();
    for table in DayTable::ALL {
        assert!(!pg::partition_days(&pool, table).await.unwrap().contains(&day));
        sqlx::query("SELECT create_day_partition($1, $2::text::date)")
            .bind(table.name())
            .bind(day.to_string())
            .execute(&pool)
            .await
            .unwrap();
        assert_eq!(pg::partition_days(&pool, table).await.unwrap()[0], day, "the oldest first");
    }
    let of_day: Vec<Uuid> = (0..5).map(|n| uid(noon(day), n)).collect();
    for uid in &of_day {
        occurrence(&pool, *uid).await;
    }
    let before = uid(noon(day.yesterday().unwrap()), 0);
    let today = uid(noon(today), 0);
    occurrence(&pool, before).await;
    occurrence(&pool, today).await;

    let table = DayTable::Occurrences;
    let mut read = Vec::new();
    loop {
        let rows = pg::day_rows(&pool, table, day, read.last().copied(), 2).await.unwrap();
        if rows.is_empty() {
            break;
        }
        assert!(rows.len() <= 2);
        read.extend(rows.iter().map(|row| row.get::<Uuid, _>("key")));
    }
    assert_eq!(read, of_day);
    assert_eq!(pg::day_count(&pool, table, day).await.unwrap(), 5);

    for expected in [4, 6] {
        assert_eq!(pg::drop_day(&pool, table, day, Some(expected)).await.unwrap(), DropDay::Has(5));
    }
    for _ in 0..2 {
        assert_eq!(pg::drop_day(&pool, table, day, Some(5)).await.unwrap(), DropDay::Dropped);
    }
    assert_eq!(pg::strays(&pool, table, day.tomorrow().unwrap(), 100).await.unwrap(), 1);
    assert_eq!(pg::sweep_strays(&pool, table, day.tomorrow().unwrap(), 100).await.unwrap(), 1);
    let left: Vec<Uuid> = sqlx::query_scalar("SELECT uid FROM occurrences").fetch_all(&pool).await.unwrap();
    assert_eq!(left, [today]);
    for not_over in [40, 42] {
        let day = day.checked_add(Span::new().days(not_over)).unwrap();
        pg::drop_day(&pool, table, day, None).await.unwrap_err();
    }
}
