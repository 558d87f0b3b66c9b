//! Replays as the scheduler works them off: on a real database, with the scheduler's own role.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{collections::BTreeSet, time::Duration};

use bus_core::{
    delivery::{DeliveryKey, Progress},
    ids::{
        ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, ReplayId, SubscriptionId, SystemIds,
        uuid_floor,
    },
    lifecycle::State,
    pg::{
        self, ClaimReplay, CreateReplay, DeadLetter, DeadLetterAction, DeadLetterFilter, DeadLetters,
        NewReplay, Replay, ReplayState, Selection, Whose,
    },
    retry::DeadReason,
};
use cron_scheduler::{replay_chunk, replay_due};
use devkit::{
    database::{Database, role_url},
    processes::Role,
    servers::shared_servers,
};
use jiff::Timestamp;
use sqlx::{PgPool, postgres::PgPoolOptions};
use uuid::Uuid;

/// One organization with a webhook, and the scheduler's view of the database.
struct Scene {
    database: Database,
    owner: PgPool,
    scheduler: PgPool,
    whose: Whose,
    connection: ConnectionId,
}

impl Scene {
    async fn new() -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let owner = PgPool::connect(database.url()).await.unwrap();
        let scheduler =
            PgPool::connect(&role_url(database.url(), Role::CronScheduler).unwrap()).await.unwrap();
        let organization = OrganizationId(SystemIds.next());
        let connection = ConnectionId(SystemIds.next());
        sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, 'acme')")
            .bind(organization.0)
            .execute(&owner)
            .await
            .unwrap();
        sqlx::query(
            "INSERT INTO connections (id, organization_id, name, kind, url, secret)
             VALUES ($1, $2, 'hook', 'webhook', 'https://receiver.example', 'whsec_x')",
        )
        .bind(connection.0)
        .bind(organization.0)
        .execute(&owner)
        .await
        .unwrap();
        let whose = Whose { organization, only: None };
        Self { database, owner, scheduler, whose, connection }
    }

    async fn subscription(&self, event_type: &str, filter: Option<&str>) -> SubscriptionId {
        let id = SubscriptionId(SystemIds.next());
        sqlx::query(
            "INSERT INTO subscriptions (id, organization_id, connection_id, event_type, filter, filter_hash)
             VALUES ($1, $2, $3, $4, $5, sha256($5::text::bytea))",
        )
        .bind(id.0)
        .bind(self.whose.organization.0)
        .bind(self.connection.0)
        .bind(event_type)
        .bind(filter)
        .execute(&self.owner)
        .await
        .unwrap();
        id
    }

    /// Stored events of a type with a payload `{"n": …}` each, in order.
    async fn events(&self, event_type: &str, count: usize) -> Vec<EventUid> {
        let uids: Vec<EventUid> = (0..count).map(|_| EventUid(SystemIds.next())).collect();
        let bodies: Vec<Vec<u8>> = (0..count)
            .map(|n| {
                let text = format!(
                    r#"{{"specversion":"1.0","id":"{n}","source":"/test","type":"{event_type}","data":{{"n":{n}}}}}"#
                );
                text.into_bytes()
            })
            .collect();
        sqlx::query(
            "INSERT INTO events (uid, organization_id, id, source, type, time, body)
             SELECT uid, $2, uid::text, '/test', $3, now(), body FROM UNNEST($1::uuid[], $4::bytea[]) AS u (uid, body)",
        )
        .bind(uids.iter().map(|uid| uid.0).collect::<Vec<_>>())
        .bind(self.whose.organization.0)
        .bind(event_type)
        .bind(bodies)
        .execute(&self.owner)
        .await
        .unwrap();
        uids
    }

    fn key(&self, event: EventUid, subscription: SubscriptionId) -> DeliveryKey {
        DeliveryKey {
            id: DeliveryId::derive(event, subscription),
            event,
            organization: self.whose.organization,
            subscription,
            connection: self.connection,
            connection_version: 1,
        }
    }

    async fn dead(&self, events: &[EventUid], subscription: SubscriptionId, reason: DeadReason) {
        let progress = Progress { attempts: 20, turn: 20, since: "2026-01-01T00:00:00Z".parse().unwrap() };
        for event in events {
            let letter = DeadLetter::new(self.key(*event, subscription), progress, reason);
            pg::bury(&self.owner, &letter).await.unwrap();
        }
    }

    async fn start(&self, selection: Selection, per_second: u32) -> ReplayId {
        self.start_for(self.whose, selection, per_second).await
    }

    async fn start_for(&self, whose: Whose, selection: Selection, per_second: u32) -> ReplayId {
        let id = ReplayId(SystemIds.next());
        let new = NewReplay { id, whose, selection, per_second, request: None };
        match pg::create_replay(&self.owner, &new).await.unwrap() {
            CreateReplay::Stored(_) => id,
            other => panic!("{other:?}"),
        }
    }

    async fn job(&self, id: ReplayId) -> Replay {
        pg::replay(&self.owner, self.whose, id).await.unwrap().unwrap()
    }

    /// How many deliveries are in each state, and how many turns they have had beyond their first replay.
    async fn states(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT state, count(*) FROM delivery_states GROUP BY state ORDER BY state")
            .fetch_all(&self.owner)
            .await
            .unwrap()
    }

    /// Works until the job has ended; the waits between chunks are skipped.
    async fn finish(&self, id: ReplayId) -> Replay {
        loop {
            let job = self.job(id).await;
            if job.finished_at.is_some() {
                return job;
            }
            self.skip_wait().await;
            replay_due(&self.scheduler).await.unwrap();
        }
    }

    async fn skip_wait(&self) {
        sqlx::query("UPDATE replays SET next_at = now() WHERE finished_at IS NULL")
            .execute(&self.owner)
            .await
            .unwrap();
    }

    async fn end(self) {
        self.owner.close().await;
        self.scheduler.close().await;
        self.database.drop().await.unwrap();
    }
}

fn since(subscription: SubscriptionId) -> Selection {
    Selection::Subscription {
        subscription,
        since: "2020-01-01T00:00:00Z".parse().unwrap(),
        until: "2100-01-01T00:00:00Z".parse().unwrap(),
    }
}

fn dead_letters(action: DeadLetterAction, filter: DeadLetterFilter) -> Selection {
    Selection::DeadLetters { action, which: DeadLetters::Filter(filter) }
}

fn progress(job: &Replay) -> (ReplayState, u64, u64) {
    (job.state, job.looked, job.replayed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_middle_of_a_chunk_repeats_and_loses_nothing() {
    let scene = Scene::new().await;
    let subscription = scene.subscription("a", None).await;
    let events = scene.events("a", 25).await;
    let id = scene.start(since(subscription), 10).await;
    replay_due(&scene.scheduler).await.unwrap();
    assert_eq!(progress(&scene.job(id).await), (ReplayState::Running, 10, 10));
    let turns = || async {
        let turns: Vec<(Uuid, i64)> =
            sqlx::query_as("SELECT delivery_id, turn FROM delivery_states ORDER BY delivery_id")
                .fetch_all(&scene.owner)
                .await
                .unwrap();
        turns
    };
    let before = turns().await;
    scene.skip_wait().await;
    // The second chunk is done, but for its commit.
    let mut transaction = pg::begin(&scene.scheduler).await.unwrap();
    let ClaimReplay::Due(job) = pg::claim_replay(&mut transaction, 30).await.unwrap() else { panic!() };
    let chunk = replay_chunk(&mut transaction, &job).await.unwrap();
    assert_eq!((chunk.looked, chunk.replayed), (10, 10));
    drop(transaction);
    assert_eq!(progress(&scene.job(id).await), (ReplayState::Running, 10, 10));
    assert_eq!(turns().await, before);

    let done = scene.finish(id).await;
    assert_eq!(progress(&done), (ReplayState::Done, 25, 25));
    let after = turns().await;
    let expected: BTreeSet<Uuid> = events.iter().map(|event| scene.key(*event, subscription).id.0).collect();
    assert_eq!(after.iter().map(|(id, _)| *id).collect::<BTreeSet<_>>(), expected);
    assert!(before.iter().all(|row| after.contains(row)), "what the first chunk did was not repeated");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_schedulers_share_the_jobs_and_neither_does_what_the_other_holds() {
    let scene = Scene::new().await;
    let subscription = scene.subscription("a", None).await;
    scene.events("a", 30).await;
    let first = scene.start(since(subscription), 10).await;
    let mut held = pg::begin(&scene.scheduler).await.unwrap();
    let ClaimReplay::Due(job) = pg::claim_replay(&mut held, 30).await.unwrap() else { panic!() };
    assert_eq!(job.id, first);
    // The other one finds nothing, and does not wait for the first.
    assert!(replay_due(&scene.scheduler).await.unwrap() > Duration::from_secs(1));
    assert_eq!(progress(&scene.job(first).await), (ReplayState::Pending, 0, 0));
    let second = scene.start(since(subscription), 10).await;
    replay_due(&scene.scheduler).await.unwrap();
    assert_eq!(progress(&scene.job(second).await), (ReplayState::Running, 10, 10), "it takes the free one");
    drop(held);

    // Many at once: each event comes back exactly once for each job.
    let workers = (0..4).map(|_| async {
        for _ in 0..20 {
            scene.skip_wait().await;
            replay_due(&scene.scheduler).await.unwrap();
        }
    });
    futures::future::join_all(workers).await;
    for id in [first, second] {
        assert_eq!(progress(&scene.job(id).await), (ReplayState::Done, 30, 30));
    }
    assert_eq!(scene.states().await, [("waiting".to_owned(), 30)]);
    scene.end().await;
}

/// By the database's clock: how long it is between the chunks, not how long a test takes.
#[tokio::test(flavor = "multi_thread")]
async fn the_rate_is_kept() {
    let scene = Scene::new().await;
    let subscription = scene.subscription("a", None).await;
    scene.events("a", 1_200).await;
    for (per_second, chunk, seconds) in [(1, 1, 1.0), (7, 7, 1.0), (500, 500, 1.0), (10_000, 500, 0.05)] {
        let id = scene.start(since(subscription), per_second).await;
        replay_due(&scene.scheduler).await.unwrap();
        let job = scene.job(id).await;
        assert_eq!((job.state, job.replayed), (ReplayState::Running, chunk), "{per_second}");
        // The rows became due when the chunk began, which is when the wait began.
        let wait: f64 = sqlx::query_scalar(
            "SELECT extract(epoch FROM next_at - (SELECT max(due_at) FROM delivery_states))::float8
             FROM replays WHERE id = $1",
        )
        .bind(id.0)
        .fetch_one(&scene.owner)
        .await
        .unwrap();
        assert!((wait - seconds).abs() < 1e-3, "{per_second}: {wait}");
        pg::cancel_replay(&scene.owner, scene.whose, id).await.unwrap();
    }
    // What does not come back costs no wait.
    let nothing = scene.subscription(">", Some("$[?$.none]")).await;
    let id = scene.start(since(nothing), 1).await;
    for looked in [500, 1_000, 1_200] {
        replay_due(&scene.scheduler).await.unwrap();
        assert_eq!(scene.job(id).await.looked, looked);
    }
    assert_eq!(progress(&scene.job(id).await), (ReplayState::Done, 1_200, 0));
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_stops_where_it_is() {
    let scene = Scene::new().await;
    let subscription = scene.subscription("a", None).await;
    scene.events("a", 20).await;
    let id = scene.start(since(subscription), 5).await;
    replay_due(&scene.scheduler).await.unwrap();
    let cancelled = pg::cancel_replay(&scene.owner, scene.whose, id).await.unwrap().unwrap();
    assert_eq!(progress(&cancelled), (ReplayState::Cancelled, 5, 5));
    scene.skip_wait().await;
    replay_due(&scene.scheduler).await.unwrap();
    assert_eq!(scene.job(id).await, cancelled);
    assert_eq!(scene.states().await, [("waiting".to_owned(), 5)]);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_and_types_decide_as_when_publishing() {
    let scene = Scene::new().await;
    let filtered = scene.subscription("order.*", Some("$[?@ >= 4]")).await;
    let events = scene.events("order.created", 6).await;
    scene.events("invoice.created", 3).await;
    let id = scene.start(since(filtered), 100).await;
    assert_eq!(progress(&scene.finish(id).await), (ReplayState::Done, 9, 2));
    for (event, expected) in events.iter().zip([None, None, None, None, Some(()), Some(())]) {
        let standing = pg::standing(&scene.owner, scene.key(*event, filtered).id).await.unwrap();
        assert_eq!(standing.map(|(state, _)| assert_eq!(state, State::Waiting)), expected);
    }
    // An exact type looks at nothing else.
    let exact = scene.subscription("invoice.created", None).await;
    let id = scene.start(since(exact), 100).await;
    assert_eq!(progress(&scene.finish(id).await), (ReplayState::Done, 3, 3));
    // A part of the time, whole milliseconds, the end excluded.
    let selection = Selection::Subscription {
        subscription: exact,
        since: "2020-01-01T00:00:00Z".parse().unwrap(),
        until: events[0].received_at().unwrap(),
    };
    let id = scene.start(selection, 100).await;
    assert_eq!(progress(&scene.finish(id).await), (ReplayState::Done, 0, 0));

    for (statement, why) in [
        ("UPDATE connections SET enabled = false", "subscription_disabled"),
        ("UPDATE subscriptions SET deleted_at = now()", "subscription_deleted"),
    ] {
        sqlx::query(statement).execute(&scene.owner).await.unwrap();
        let id = scene.start(since(exact), 100).await;
        let job = scene.finish(id).await;
        assert_eq!((job.state, job.failure.as_deref()), (ReplayState::Failed, Some(why)));
    }
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_restarts_every_delivery_but_a_cancelled_one() {
    let scene = Scene::new().await;
    let events = scene.events("a", 1).await;
    let mut keys = Vec::new();
    for filter in ["$.n", "$['n']", "$[*]", "$..n", "$.*", "$"] {
        keys.push(scene.key(events[0], scene.subscription("a", Some(filter)).await));
    }
    for (key, state) in keys.iter().zip(State::ALL) {
        sqlx::query(
            "INSERT INTO delivery_states (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                          connection_version, state, turn, attempts, since, due_at, reason)
             VALUES ($1, $2, $3, $4, $5, 0, $6, 9000000000000, 7, now() - interval '1 day',
                     CASE WHEN $6 = 'waiting' THEN now() + interval '1 day' END, 'x')",
        )
        .bind(key.id.0)
        .bind(key.event.0)
        .bind(key.organization.0)
        .bind(key.subscription.0)
        .bind(key.connection.0)
        .bind(state.as_str())
        .execute(&scene.owner)
        .await
        .unwrap();
    }
    // In two chunks, by the order of the subscriptions.
    let id = scene.start(Selection::Event { event: events[0], subscription: None }, 4).await;
    replay_due(&scene.scheduler).await.unwrap();
    assert_eq!(scene.job(id).await.looked, 4);
    assert_eq!(progress(&scene.finish(id).await), (ReplayState::Done, 6, 5));
    for (key, state) in keys.iter().zip(State::ALL) {
        let (now, turn) = pg::standing(&scene.owner, key.id).await.unwrap().unwrap();
        assert_eq!(now, state.after(bus_core::lifecycle::Step::Replay, false));
        assert_eq!(turn, 9_000_000_000_000 + i64::from(state != State::Cancelled), "later than any before");
    }
    let due: Vec<(i32, bool)> = sqlx::query_as(
        "SELECT attempts, due_at <= now() AND since > now() - interval '1 hour'
         FROM delivery_states WHERE state = 'waiting'",
    )
    .fetch_all(&scene.owner)
    .await
    .unwrap();
    assert_eq!(due, [(0, true); 5]);

    // One that cannot be found, or no longer matches, ends the job with the reason.
    let gone = EventUid(SystemIds.next());
    for (selection, why) in [
        (Selection::Event { event: gone, subscription: None }, "event_expired"),
        (
            Selection::Event { event: events[0], subscription: Some(scene.subscription("b", None).await) },
            "no_match",
        ),
    ] {
        let id = scene.start(selection, 4).await;
        assert_eq!(scene.finish(id).await.failure.as_deref(), Some(why));
    }
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_go_by_filter_and_only_those_that_were_dead_before() {
    let scene = Scene::new().await;
    let subscription = scene.subscription(">", None).await;
    let (a, b) = (scene.events("a.x", 12).await, scene.events("b.x", 8).await);
    scene.dead(&a, subscription, DeadReason::AttemptsExhausted).await;
    scene.dead(&b, subscription, DeadReason::Expired).await;
    let filter = DeadLetterFilter { event_type: Some("a.*".parse().unwrap()), ..Default::default() };
    let id = scene.start(dead_letters(DeadLetterAction::Replay, filter), 5).await;
    replay_due(&scene.scheduler).await.unwrap();
    assert_eq!(scene.job(id).await.replayed, 5);
    // One of them dies again while the job goes on: it is not taken up twice.
    let again: (Uuid, i64) =
        sqlx::query_as("SELECT event_uid, turn FROM delivery_states WHERE state = 'waiting' LIMIT 1")
            .fetch_one(&scene.owner)
            .await
            .unwrap();
    let progress_again = Progress { attempts: 1, turn: again.1, since: Timestamp::UNIX_EPOCH };
    let key = scene.key(EventUid(again.0), subscription);
    pg::bury(&scene.owner, &DeadLetter::new(key, progress_again, DeadReason::Expired)).await.unwrap();
    assert_eq!(progress(&scene.finish(id).await), (ReplayState::Done, 20, 12));
    assert_eq!(scene.states().await, [("dead".to_owned(), 9), ("waiting".to_owned(), 11)]);

    let filter = DeadLetterFilter { reason: Some("expired".into()), ..Default::default() };
    let id = scene.start(dead_letters(DeadLetterAction::Discard, filter), 500).await;
    assert_eq!(progress(&scene.finish(id).await), (ReplayState::Done, 9, 9));
    assert_eq!(scene.states().await, [("cancelled".to_owned(), 9), ("waiting".to_owned(), 11)]);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i3_a_job_touches_nothing_of_others() {
    let scene = Scene::new().await;
    let subscription = scene.subscription(">", None).await;
    let events = scene.events("a", 3).await;
    scene.dead(&events, subscription, DeadReason::AttemptsExhausted).await;
    let ids: Vec<DeliveryId> = events.iter().map(|event| scene.key(*event, subscription).id).collect();
    let stranger = OrganizationId(SystemIds.next());
    sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, 'stranger')")
        .bind(stranger.0)
        .execute(&scene.owner)
        .await
        .unwrap();
    let foreign = Whose { organization: stranger, only: None };
    // A key that is bound to another connection of the same organization.
    let bound = Whose { only: Some(ConnectionId(SystemIds.next())), ..scene.whose };
    for whose in [foreign, bound] {
        let filter = DeadLetterFilter { connection: Some(scene.connection), ..Default::default() };
        for selection in [
            Selection::DeadLetters {
                action: DeadLetterAction::Discard,
                which: DeadLetters::Ids(ids.clone()),
            },
            dead_letters(DeadLetterAction::Replay, DeadLetterFilter::default()),
            dead_letters(DeadLetterAction::Replay, filter),
            Selection::Event { event: events[0], subscription: None },
            Selection::Event { event: events[0], subscription: Some(subscription) },
        ] {
            let id = scene.start_for(whose, selection, 10).await;
            loop {
                let job = pg::replay(&scene.owner, whose, id).await.unwrap().unwrap();
                if job.finished_at.is_some() {
                    assert_eq!(job.replayed, 0, "{job:?}");
                    break;
                }
                replay_due(&scene.scheduler).await.unwrap();
            }
        }
    }
    assert_eq!(scene.states().await, [("dead".to_owned(), 3)]);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_read_does_not_keep_others_from_their_turn() {
    let scene = Scene::new().await;
    let subscription = scene.subscription("a", None).await;
    scene.events("a", 2).await;
    let broken = scene.start(since(subscription), 10).await;
    sqlx::query("UPDATE replays SET selection = '{}'").execute(&scene.owner).await.unwrap();
    let fine = scene.start(since(subscription), 10).await;
    assert_eq!(progress(&scene.finish(fine).await), (ReplayState::Done, 2, 2));
    let state: String = sqlx::query_scalar("SELECT state || ' ' || failure FROM replays WHERE id = $1")
        .bind(broken.0)
        .fetch_one(&scene.owner)
        .await
        .unwrap();
    assert_eq!(state, "failed inconsistent");
    scene.end().await;
}

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
