//! The statements behind the outbox, parking, deduplication, partitions and schema checks.

use std::{collections::BTreeSet, time::Duration};

use bus_core::{
    delivery::{DeliveryKey, Progress},
    ids::{
        ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, OutboxId, SubscriptionId, SystemIds,
    },
    pg::{self, Broker, Claim, LastAttempt, Park, Recalled, StoreError, UniqueKey},
    queue::Body,
};
use bytes::Bytes;
use devkit::{
    database::{Database, role_url},
    processes::Role,
    servers::shared_servers,
};
use jiff::Timestamp;
use sqlx::PgPool;

async fn database() -> (Database, PgPool) {
    let servers = shared_servers().await.unwrap();
    let database = Database::create(servers.postgres_url()).await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    (database, pool)
}

async fn end(database: Database, pool: PgPool) {
    pool.close().await;
    database.drop().await.unwrap();
}

#[tokio::test]
async fn i1_an_unfinished_fan_out_is_taken_over_once_its_lease_ends_and_by_one() {
    let (database, pool) = database().await;
    let (held, left) = (OutboxId(SystemIds.next()), OutboxId(SystemIds.next()));
    let events = [EventUid(SystemIds.next()), EventUid(SystemIds.next())];
    let mut connection = pool.acquire().await.unwrap();
    pg::insert_outbox(&mut connection, held, &events, 600).await.unwrap();
    pg::insert_outbox(&mut connection, left, &events, 0).await.unwrap();
    let (a, b) = tokio::join!(pg::take_over(&pool, 10, 600), pg::take_over(&pool, 10, 600));
    let taken: Vec<_> = a.unwrap().into_iter().chain(b.unwrap()).collect();
    assert_eq!(taken.iter().map(|row| row.id).collect::<Vec<_>>(), [left]);
    assert_eq!(taken[0].events, events);
    pg::advance_outbox(&pool, left, &events[1..], 0).await.unwrap();
    let again = pg::take_over(&pool, 10, 600).await.unwrap();
    assert_eq!(again[0].events, events[1..], "what is done is not done again");
    pg::finish_outbox(&pool, &[left, held]).await.unwrap();
    assert!(pg::take_over(&pool, 10, 0).await.unwrap().is_empty(), "finished is finished");
    assert_eq!(pg::sweep_outbox(&pool, Duration::from_secs(600), 100).await.unwrap(), 0);
    assert_eq!(pg::sweep_outbox(&pool, Duration::ZERO, 100).await.unwrap(), 2);
    drop(connection);
    end(database, pool).await;
}

#[tokio::test]
async fn i1_a_new_broker_is_for_one_publisher_to_compare_and_for_the_next_one_when_that_one_failed() {
    const LEASE: Duration = Duration::from_secs(600);
    let (database, pool) = database().await;
    let broker = |server: &str| Broker { server: server.to_owned(), stream: "created".to_owned() };
    let first = pg::meet_broker(&pool, &broker("first"), LEASE).await.unwrap();
    assert!(first.is_none(), "it has no predecessor");
    let new = broker("new");
    let (a, b) = tokio::join!(pg::meet_broker(&pool, &new, LEASE), pg::meet_broker(&pool, &new, LEASE));
    let held = [a.unwrap(), b.unwrap()];
    assert_eq!(held.iter().flatten().count(), 1);
    assert!(held.iter().flatten().all(|new| !new.stream_is_new));
    pg::hold_broker(&pool, &new, Duration::ZERO).await.unwrap();
    assert!(pg::meet_broker(&pool, &new, LEASE).await.unwrap().is_some(), "nobody waits for the lease");
    pg::broker_is_reconciled(&pool, &new).await.unwrap();
    pg::hold_broker(&pool, &new, Duration::ZERO).await.unwrap();
    assert!(pg::meet_broker(&pool, &new, LEASE).await.unwrap().is_none());
    end(database, pool).await;
}

#[tokio::test]
async fn i10_usage_is_swept_when_it_is_old_and_by_the_archiver() {
    let (database, pool) = database().await;
    let organization = OrganizationId(SystemIds.next());
    sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, 'acme')")
        .bind(organization.0)
        .execute(&pool)
        .await
        .unwrap();
    // Of tomorrow too, so that it does not matter if the day ends meanwhile.
    sqlx::query(
        "INSERT INTO organization_usage SELECT $1, (now() AT TIME ZONE 'UTC')::date - ago, 1
         FROM unnest(ARRAY [-1, 0, 398, 402, 403, 404]) AS ago",
    )
    .bind(organization.0)
    .execute(&pool)
    .await
    .unwrap();
    let archiver = PgPool::connect(&role_url(database.url(), Role::Archiver).unwrap()).await.unwrap();
    assert_eq!(pg::sweep_usage(&archiver, 400, 2).await.unwrap(), 2, "no more than asked for");
    assert_eq!(pg::sweep_usage(&archiver, 400, 2).await.unwrap(), 1);
    assert_eq!(pg::sweep_usage(&archiver, 400, 2).await.unwrap(), 0);
    assert_eq!(pg::usage_by_day(&pool, organization, 10).await.unwrap().len(), 3);
    archiver.close().await;
    end(database, pool).await;
}

#[tokio::test]
async fn concurrent_claims_of_one_key_have_one_winner_and_the_others_see_it() {
    let (database, pool) = database().await;
    let organization = OrganizationId(SystemIds.next());
    let claim = |n: u8| {
        let pool = pool.clone();
        async move {
            let event = EventUid(SystemIds.next());
            let mut claims = vec![Claim {
                key: UniqueKey::event(organization, "/shop", "o-1"),
                events: vec![event],
                fingerprint: None,
            }];
            // In different orders, which must not make them wait for each other.
            let other = Claim {
                key: UniqueKey::event(organization, "/shop", &format!("only-{n}")),
                events: vec![event],
                fingerprint: None,
            };
            claims.insert(usize::from(n % 2), other);
            let mut transaction = pg::begin(&pool).await.unwrap();
            let taken = pg::claim_keys(&mut transaction, &claims, 60).await.unwrap();
            pg::commit(transaction).await.unwrap();
            let shared = UniqueKey::event(organization, "/shop", "o-1");
            taken.get(&shared).map_or(event, |taken| taken.events[0])
        }
    };
    let winners: BTreeSet<EventUid> =
        futures::future::join_all((0..8).map(claim)).await.into_iter().collect();
    assert_eq!(winners.len(), 1, "{winners:?}");
    end(database, pool).await;
}

#[tokio::test]
async fn an_expired_key_can_be_claimed_again() {
    let (database, pool) = database().await;
    let key = UniqueKey::idempotency(OrganizationId(SystemIds.next()), "abc");
    let mut connection = pool.acquire().await.unwrap();
    for expect_taken in [false, false, true] {
        let claim =
            Claim { key: key.clone(), events: vec![EventUid(SystemIds.next())], fingerprint: Some([7; 32]) };
        let window = if expect_taken { 60 } else { 0 };
        let taken = pg::claim_keys(&mut connection, std::slice::from_ref(&claim), window).await.unwrap();
        assert!(taken.is_empty(), "nobody has it");
        if expect_taken {
            let taken = pg::claim_keys(&mut connection, &[claim], 60).await.unwrap();
            assert_eq!(taken[&key].fingerprint.as_deref(), Some(&[7; 32][..]));
        }
    }
    drop(connection);
    end(database, pool).await;
}

async fn parked(pool: &PgPool, attempts: u32, wait_s: u64) -> Park {
    let (event, subscription) = (EventUid(SystemIds.next()), SubscriptionId(SystemIds.next()));
    let organization = OrganizationId(SystemIds.next());
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, time, body)
         VALUES ($1, $2, $1::text, '/test', 'test', now(), 'body')",
    )
    .bind(event.0)
    .bind(organization.0)
    .execute(pool)
    .await
    .unwrap();
    let key = DeliveryKey {
        id: DeliveryId::derive(event, subscription),
        event,
        organization,
        subscription,
        connection: SystemIds.next().into(),
        connection_version: 1,
    };
    let since = Timestamp::from_second(1_800_000_000).unwrap();
    let next = Progress { attempts, turn: i64::from(attempts), since };
    let wait = Duration::from_secs(wait_s);
    let reason = "the endpoint answered 500".to_owned();
    Park { key, next, wait, paced: false, reason, last: LastAttempt::default() }
}

#[tokio::test]
async fn a_parked_delivery_is_handed_out_when_due_and_to_one_scheduler() {
    let (database, pool) = database().await;
    let (due, later) = (parked(&pool, 3, 0).await, parked(&pool, 3, 3_600).await);
    pg::park(&pool, &[due.clone(), later.clone()]).await.unwrap();
    let (a, b) = tokio::join!(pg::take_due(&pool, 10, 600), pg::take_due(&pool, 10, 600));
    let taken: Vec<_> = a.unwrap().into_iter().chain(b.unwrap()).collect();
    assert_eq!(taken.len(), 1);
    assert_eq!(
        (taken[0].key, taken[0].progress, &taken[0].body),
        (due.key, due.next, &Ok(Body::Inline(Bytes::from_static(b"body"))))
    );
    pg::returned(&pool, &[(due.key.id, 3)]).await.unwrap();
    let next = pg::agenda(&pool).await.unwrap().deliveries.expect("one is left").as_secs();
    assert!((3_000..=3_600).contains(&next), "{next}");
    end(database, pool).await;
}

#[tokio::test]
async fn what_waits_for_room_alone_is_recalled_and_never_put_off() {
    let (database, pool) = database().await;
    let connection: ConnectionId = SystemIds.next().into();
    let mut all = Vec::new();
    for (wait_s, paced) in [(3_000, true), (2_000, true), (4_000, true), (2_500, false), (50, true)] {
        let mut park = parked(&pool, 1, wait_s).await;
        park.key.connection = connection;
        all.push(Park { paced, ..park });
    }
    let other = Park { paced: true, ..parked(&pool, 1, 3_600).await };
    // One that came back, and was told by its endpoint to wait.
    let mut told = Park { paced: true, ..parked(&pool, 1, 2_200).await };
    told.key.connection = connection;
    all.extend([other, told.clone()]);
    pg::park(&pool, &all).await.unwrap();
    pg::park(&pool, &[Park { next: told.next.next(2), paced: false, ..told }]).await.unwrap();
    let recalled = pg::recall(&pool, connection, Duration::from_secs(100), 3).await.unwrap();
    // No more than three are looked at, and the one that is due sooner is left.
    assert_eq!(recalled, Recalled { seen: 3, moved: 2 });
    let mut waits = Vec::new();
    for park in &all {
        let wait: f64 = sqlx::query_scalar(
            "SELECT extract(epoch FROM due_at - now())::float8 FROM delivery_states WHERE delivery_id = $1",
        )
        .bind(park.key.id.0)
        .fetch_one(&pool)
        .await
        .unwrap();
        // Rounded up, which allows time between the statements.
        waits.push((wait / 100.0).ceil());
    }
    assert_eq!(waits, [3.0, 2.0, 40.0, 25.0, 1.0, 36.0, 22.0]);
    end(database, pool).await;
}

#[tokio::test]
async fn a_delivery_that_is_twice_in_one_batch_counts_once_with_its_later_turn() {
    let (database, pool) = database().await;
    // A hold that ended too early: the worker has the delivery twice, and both attempts failed.
    let (first, other) = (parked(&pool, 3, 0).await, parked(&pool, 1, 0).await);
    let again = Park { next: first.next.next(4), reason: "not text: \0".into(), ..first.clone() };
    pg::park(&pool, &[first.clone(), again.clone(), other, first.clone()]).await.unwrap();
    let due = pg::take_due(&pool, 10, 60).await.unwrap();
    assert_eq!(due.len(), 2);
    assert!(due.iter().any(|due| due.key == first.key && due.progress == again.next));

    let mut connection = pool.acquire().await.unwrap();
    let twice = [(first.key, first.next, 0), (again.key, again.next, 0), (first.key, first.next, 0)];
    pg::insert_queued(&mut connection, &twice).await.unwrap();
    let turns: Vec<i64> =
        sqlx::query_scalar("SELECT turn FROM delivery_queue").fetch_all(&pool).await.unwrap();
    assert_eq!(turns, [again.next.turn]);
    drop(connection);
    end(database, pool).await;
}

#[tokio::test]
async fn a_delivery_that_was_parked_again_meanwhile_stays() {
    let (database, pool) = database().await;
    let first = parked(&pool, 3, 0).await;
    pg::park(&pool, std::slice::from_ref(&first)).await.unwrap();
    let taken = pg::take_due(&pool, 10, 600).await.unwrap();
    let again = Park { next: first.next.next(4), wait: Duration::from_secs(3_600), ..first.clone() };
    pg::park(&pool, &[again]).await.unwrap();
    // What the scheduler took has failed once more before it could say so.
    pg::returned(&pool, &[(taken[0].key.id, taken[0].progress.turn)]).await.unwrap();
    pg::park(&pool, &[first]).await.unwrap();
    let rows: Vec<(String, i32)> =
        sqlx::query_as("SELECT state, attempts FROM delivery_states").fetch_all(&pool).await.unwrap();
    assert_eq!(rows, [("waiting".to_owned(), 4)], "the later turn stays");
    end(database, pool).await;
}

#[tokio::test]
async fn partitions_are_created_ahead_once_and_by_the_archivers_role() {
    let (database, pool) = database().await;
    let archiver = PgPool::connect(&role_url(database.url(), Role::Archiver).unwrap()).await.unwrap();
    let now: Timestamp = "2026-12-30T23:59:59Z".parse().unwrap();
    let (a, b) = tokio::join!(pg::create_partitions(&archiver, now, 3), pg::create_partitions(&pool, now, 3));
    assert_eq!(a.unwrap() + b.unwrap(), 12, "three days of four tables, each once");
    assert_eq!(pg::create_partitions(&archiver, now, 3).await.unwrap(), 0);
    // An event of New Year's Day goes to its own partition.
    let uid = bus_core::ids::uuid_floor("2027-01-01T12:00:00Z".parse().unwrap());
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, time, body)
         VALUES ($1, $1, 'x', '/test', 'test', now(), '')",
    )
    .bind(uid)
    .execute(&pool)
    .await
    .unwrap();
    let partition: String = sqlx::query_scalar("SELECT tableoid::regclass::text FROM events WHERE uid = $1")
        .bind(uid)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(partition, "events_20270101");
    archiver.close().await;
    end(database, pool).await;
}

#[tokio::test]
async fn a_schema_that_is_behind_is_named_and_one_that_is_ahead_is_accepted() {
    let (database, pool) = database().await;
    pg::check_schema(&pool).await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (30000101000000, 'of the future', true, '', 0)",
    )
    .execute(&pool)
    .await
    .unwrap();
    pg::check_schema(&pool).await.unwrap();
    sqlx::query("DELETE FROM _sqlx_migrations WHERE version > 20261121000001").execute(&pool).await.unwrap();
    match pg::check_schema(&pool).await {
        Err(StoreError::Schema { found: Some(20_261_121_000_001), .. }) => {}
        other => panic!("{other:?}"),
    }
    end(database, pool).await;
}

#[tokio::test]
async fn i3_a_worker_cannot_read_a_key() {
    let (database, pool) = database().await;
    let worker = PgPool::connect(&role_url(database.url(), Role::DeliveryWorker).unwrap()).await.unwrap();
    let refused = sqlx::query("SELECT hash FROM api_keys").execute(&worker).await.unwrap_err();
    let code = refused.as_database_error().and_then(|error| error.code().map(|code| code.into_owned()));
    assert_eq!(code.as_deref(), Some("42501"), "{refused}");
    worker.close().await;
    end(database, pool).await;
}
