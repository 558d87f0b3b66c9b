//! What the statements of dead letters and replays read: as much as they show, and no more.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use bus_core::{
    ids::{Ids as _, SystemIds, uuid_floor},
    pg::{self, DeadLetterFilter, ReplayState},
};
use common::{Scene, progress, since};
use cron_scheduler::replay_due;
use sqlx::{PgPool, postgres::PgPoolOptions};

/// A page of a large list reads as many rows as it shows, whatever the filter's index.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_dead_letters_is_not_a_scan() {
    let scene = Scene::new().await;
    let subscription = scene.subscription(">", None).await;
    sqlx::query(
        "INSERT INTO delivery_states (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                      connection_version, state, turn, attempts, since, reason, changed_at)
         SELECT gen_random_uuid(), $4, CASE WHEN n % 2 = 0 THEN $1 ELSE gen_random_uuid() END,
                CASE WHEN n % 4 = 0 THEN $2 ELSE gen_random_uuid() END,
                CASE WHEN n % 4 = 0 THEN $3 ELSE gen_random_uuid() END, 1, 'dead', 1, 1, now(), 'x',
                now() - n * interval '1 second'
         FROM generate_series(1, 40000) AS n",
    )
    .bind(scene.whose.organization.0)
    .bind(subscription.0)
    .bind(scene.connection.0)
    .bind(uuid_floor("2026-01-01T00:00:00Z".parse().unwrap()))
    .execute(&scene.owner)
    .await
    .unwrap();
    let session = PgPoolOptions::new().max_connections(1).connect(scene.database.url()).await.unwrap();
    let read = async || rows_read(&session, "delivery_states").await;
    // Before and after the planner knows the table.
    for analyzed in [false, true] {
        if analyzed {
            sqlx::query("ANALYZE delivery_states").execute(&session).await.unwrap();
        }
        let of_connection = DeadLetterFilter { connection: Some(scene.connection), ..Default::default() };
        let of_subscription = DeadLetterFilter { subscription: Some(subscription), ..Default::default() };
        for filter in [DeadLetterFilter::default(), of_connection, of_subscription] {
            let before = read().await;
            let page = pg::dead_letters(&session, scene.whose, &filter, None, 50).await.unwrap();
            let next = pg::dead_letters(&session, scene.whose, &filter, page.next, 50).await.unwrap();
            assert_eq!((page.items.len(), next.items.len()), (50, 50));
            let rows = read().await - before;
            assert!(
                (100..=110).contains(&rows),
                "{rows} rows read for two pages, analyzed: {analyzed}, {filter:?}"
            );
        }
        // What is looked for and not there is looked for in a bounded number of rows.
        let nothing = DeadLetterFilter { reason: Some("none".into()), ..Default::default() };
        let page = pg::dead_letters(&session, scene.whose, &nothing, None, 50).await.unwrap();
        assert!(page.items.is_empty() && page.next.is_some());
    }
    session.close().await;
    scene.end().await;
}

/// The events of others, however many there are, are not read past.
#[tokio::test(flavor = "multi_thread")]
async fn a_walk_reads_only_what_it_may_match() {
    let scene = Scene::new().await;
    let (any, exact) = (scene.subscription(">", None).await, scene.subscription("b", None).await);
    scene.events("a", 40).await;
    scene.events("b", 3).await;
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, time, body)
         SELECT overlay($1::text placing lpad(to_hex(n), 12, '0') from 25)::uuid, gen_random_uuid(), 'x', '/test', 'b',
                now(), '' FROM generate_series(1, 20000) AS n",
    )
    .bind(SystemIds.next())
    .execute(&scene.owner)
    .await
    .unwrap();
    let session = PgPoolOptions::new().max_connections(1).connect(scene.database.url()).await.unwrap();
    for analyzed in [false, true] {
        if analyzed {
            sqlx::query("ANALYZE events").execute(&session).await.unwrap();
        }
        for (subscription, events) in [(any, 43), (exact, 3)] {
            let id = scene.start(since(subscription), 1_000).await;
            let before = rows_read(&session, "events%").await;
            replay_due(&session).await.unwrap();
            let rows = rows_read(&session, "events%").await - before;
            assert_eq!(progress(&scene.job(id).await), (ReplayState::Done, events, events));
            let events = i64::try_from(events).unwrap();
            assert!(
                (events..events + 20).contains(&rows),
                "{rows} rows read for {events}, analyzed: {analyzed}"
            );
        }
    }
    session.close().await;
    scene.end().await;
}

/// The rows that were read of the tables of that name so far, through indexes or past them. What the session of
/// the pool has read is counted now; a session of its own makes that exact.
async fn rows_read(session: &PgPool, tables: &str) -> i64 {
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(session).await.unwrap();
    sqlx::query_scalar(
        "SELECT ((SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE relname LIKE $1)
                 + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname LIKE $1))::int8",
    )
    .bind(tables)
    .fetch_one(session)
    .await
    .unwrap()
}
