//! Replays as the scheduler works them off: on a real database, with the scheduler's own role.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{collections::BTreeSet, time::Duration};

use bus_core::{
    audit::By,
    delivery::Progress,
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SystemIds},
    lifecycle::{State, Step},
    pg::{
        self, ClaimReplay, DeadLetter, DeadLetterAction, DeadLetterFilter, DeadLetters, ReplayState,
        Selection, Whose,
    },
    retry::DeadReason,
};
use common::{Scene, dead_letters, progress, since};
use cron_scheduler::{replay_chunk, replay_due};
use jiff::Timestamp;
use uuid::Uuid;

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
        pg::cancel_replay(&scene.owner, scene.whose, id, &By::system(SystemIds.next())).await.unwrap();
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
    let cancelled = pg::cancel_replay(&scene.owner, scene.whose, id, &By::system(SystemIds.next()))
        .await
        .unwrap()
        .unwrap();
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
        assert_eq!(now, state.after(Step::Replay, false));
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
