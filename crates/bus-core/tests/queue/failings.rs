//! What earlier designs got wrong, a case for each. Those that need a whole bus (a filter that is ignored,
//! results that are mapped to the wrong event) are in the system tests.

use std::{collections::BTreeSet, time::Duration};

use bus_core::{
    audit::By,
    ids::{Ids as _, SystemIds},
    lifecycle::State,
    pg::{self, Closed, DeadLetter, LastAttempt, Park},
    queue::Body,
    retry::DeadReason,
};
use bytes::Bytes;

use super::fixture::{Fixture, Kind, LEASE, WAIT, WINDOW, ids, leased_ids, pull, pull_all, pull_for};

/// `0`, `false`, `""`, `null` and nothing at all are payloads.
pub(crate) async fn falsy_payload_lost(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    for body in [&b"0"[..], b"false", b"\"\"", b"null", b"{}", b"[]", b""] {
        let delivery = fixture.delivery(body).await;
        fixture.queue.enqueue(std::slice::from_ref(&delivery)).await.unwrap();
        let leased = pull_all(&fixture.queue, 1).await.remove(0);
        assert_eq!(leased.body, Body::Inline(Bytes::copy_from_slice(body)));
        leased.lease.ack().await.unwrap();
    }
    fixture.end().await;
}

/// What is postponed comes once, after its wait, and not over and over meanwhile.
pub(crate) async fn nak_hot_loop(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.put(1).await;
    let first = pull_all(&fixture.queue, 1).await.remove(0);
    let (next, wait) = (first.progress.next(1), Duration::from_secs(3));
    first.lease.postpone(next, wait).await.unwrap();
    // Each of these pulls stays open: one that came back at once, empty-handed, would be the loop.
    for _ in 0..2 {
        let pulled = pull_for(&fixture.queue, 1, Duration::from_millis(500)).await;
        assert!(pulled.is_empty(), "it was handed out before its wait was over: {pulled:?}");
    }
    fixture.pass(wait).await;
    let again = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((again.progress, again.handed_out), (next, 1));
    again.lease.ack().await.unwrap();
    fixture.end().await;
}

/// More deliveries wait than the lane's window takes, and still what is fresh comes out. Those that the queue
/// has no room for come with the advice to park them.
pub(crate) async fn naks_fill_the_window(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let waiting = fixture.put(3 * WINDOW).await;
    let mut postponed = 0;
    while postponed < waiting.len() {
        for one in pull(&fixture.queue, WINDOW / 2).await {
            if one.wait.is_none() {
                postponed += 1;
                one.lease.postpone(one.progress.next(1), Duration::from_secs(5)).await.unwrap();
            } else {
                one.lease.ack().await.unwrap();
            }
        }
    }
    let fresh = fixture.put(20).await;
    let mut came = BTreeSet::new();
    let until = tokio::time::Instant::now() + Duration::from_secs(4);
    while came.len() < fresh.len() {
        assert!(tokio::time::Instant::now() < until, "{} of {} came", came.len(), fresh.len());
        for one in pull_for(&fixture.queue, WINDOW / 2, Duration::from_millis(100)).await {
            // Parked, or fresh.
            if one.wait.is_none() {
                came.insert(one.key.id);
            }
            one.lease.ack().await.unwrap();
        }
    }
    assert_eq!(came, ids(&fresh));
    fixture.end().await;
}

/// A delivery whose every holder dies is counted, so that it can be given up, and holds nobody else up.
pub(crate) async fn poison_message_blocks(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let poison = fixture.put(1).await.remove(0);
    for time in 1..=3 {
        let fresh = fixture.put(3).await;
        let leased = pull_all(&fixture.queue, 4).await;
        for one in leased {
            if one.key.id == poison.key.id {
                assert_eq!(one.handed_out, time);
                drop(one);
            } else {
                assert!(ids(&fresh).contains(&one.key.id));
                one.lease.ack().await.unwrap();
            }
        }
        fixture.pass(LEASE).await;
    }
    fixture.end().await;
}

/// Another worker that starts up, and goes on pulling, gets only what nobody holds.
pub(crate) async fn second_worker_takes_live_work(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.put_each(20).await;
    let mine = pull_all(&fixture.queue, 12).await;
    fixture.other_worker.prepare().await.unwrap();
    let others = pull_all(&fixture.other_worker, 8).await;
    let all: BTreeSet<_> = leased_ids(&mine).union(&leased_ids(&others)).copied().collect();
    assert_eq!(all, ids(&deliveries), "each is held by one worker");
    assert!(pull_for(&fixture.other_worker, 20, Duration::from_millis(200)).await.is_empty());
    fixture.end().await;
}

pub(crate) async fn more_claimed_than_asked(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.put_each(60).await;
    assert_eq!(pull_all(&fixture.queue, 7).await.len(), 7);
    let pulls = [3usize, 5, 11].map(|max| {
        let queue = fixture.queue.clone();
        async move { (max, pull(&queue, max).await.len()) }
    });
    for (max, got) in futures::future::join_all(pulls).await {
        assert!(got <= max, "asked for {max}, got {got}");
    }
    fixture.end().await;
}

/// What was acknowledged or cancelled stays so, whatever a worker that held it says later; and what somebody
/// else has finished is not brought back by a holder whose hold has ended.
pub(crate) async fn late_result_overwrites(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    for closed in [Closed::Acked, Closed::Cancelled] {
        let delivery = matched(&fixture).await;
        fixture.queue.enqueue(std::slice::from_ref(&delivery)).await.unwrap();
        let held = pull_all(&fixture.queue, 1).await.remove(0);
        let key = held.key;
        let ids = pg::close_deliveries(
            &fixture.pool,
            key.organization,
            key.event,
            Some(key.connection),
            closed,
            &By::system(SystemIds.next()),
        )
        .await
        .unwrap()
        .expect("the event exists");
        assert_eq!(ids, [key.id]);
        fixture.queue.withdraw(&ids).await.unwrap();
        // The attempt that was under way fails; its worker does not know yet.
        let next = held.progress.next(1);
        let reason = "the endpoint answered 500".to_owned();
        let park = Park { key, next, wait: WAIT, paced: false, reason, last: LastAttempt::default() };
        pg::park(&fixture.pool, &[park]).await.unwrap();
        pg::bury(&fixture.pool, &DeadLetter::new(key, next, DeadReason::AttemptsExhausted)).await.unwrap();
        let standing = pg::standing(&fixture.pool, key.id).await.unwrap();
        assert_eq!(standing, Some((State::from(closed), 0)));
        held.lease.postpone(next, Duration::from_millis(10)).await.unwrap();
        fixture.pass(Duration::from_millis(10)).await;
        // The stream cannot find a message by its delivery: there the worker drops it, on the word of the row.
        if kind.is_jetstream() {
            let again = pull_all(&fixture.queue, 1).await.remove(0);
            assert!(State::from(closed).overrules(0, again.progress.turn));
            again.lease.ack().await.unwrap();
        }
        assert!(pull_for(&fixture.queue, 1, Duration::from_millis(200)).await.is_empty());
    }
    // In JetStream an acknowledgement names the message and not the holder, so a holder must know the age of
    // its hold: the worker's `Hold` does, and has its own test.
    if !kind.is_jetstream() {
        fixture.put(1).await;
        let late = pull_all(&fixture.queue, 1).await.remove(0);
        fixture.pass(LEASE).await;
        let present = pull_all(&fixture.other_worker, 1).await.remove(0);
        late.lease.postpone(late.progress.next(1), Duration::ZERO).await.unwrap();
        assert!(pull_for(&fixture.queue, 1, Duration::from_millis(200)).await.is_empty(), "it is still held");
        present.lease.ack().await.unwrap();
        assert_eq!(fixture.queue.depth().await.unwrap(), 0);
    }
    fixture.end().await;
}

/// A delivery of an event that matched the subscription of a connection, as the tables have it.
async fn matched(fixture: &Fixture) -> bus_core::queue::Enqueue {
    let delivery = fixture.delivery(b"{}").await;
    let key = delivery.key;
    for (statement, ids) in [
        (
            "INSERT INTO organizations (id, name) VALUES ($1, $1::text) ON CONFLICT DO NOTHING",
            [key.organization.0; 3],
        ),
        (
            "INSERT INTO connections (id, organization_id, name, kind) VALUES ($1, $2, $1::text, 'publisher')
             ON CONFLICT DO NOTHING",
            [key.connection.0, key.organization.0, key.connection.0],
        ),
        (
            // Of one connection no two may be for the same.
            "INSERT INTO subscriptions (id, organization_id, connection_id, event_type) VALUES ($1, $2, $3, $1::text)",
            [key.subscription.0, key.organization.0, key.connection.0],
        ),
        (
            "UPDATE events SET subscriptions = ARRAY[$1] WHERE uid = $2",
            [key.subscription.0, key.event.0, key.event.0],
        ),
    ] {
        let mut query = sqlx::query(statement);
        for (place, id) in ids.iter().enumerate() {
            if statement.contains(&format!("${}", place + 1)) {
                query = query.bind(id);
            }
        }
        query.execute(&fixture.pool).await.unwrap();
    }
    delivery
}

/// Fifty times "ask me later" leave the attempts at 0.
pub(crate) async fn retry_after_costs_attempts(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.put(1).await;
    let wait = Duration::from_millis(1);
    for turn in 0..50 {
        let held = pull_all(&fixture.queue, 1).await.remove(0);
        assert_eq!((held.progress.attempts, held.progress.turn), (0, turn));
        held.lease.postpone(held.progress.next(held.progress.attempts), wait).await.unwrap();
        fixture.pass(wait).await;
    }
    let last = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((last.progress.attempts, last.progress.turn), (0, 50));
    last.lease.ack().await.unwrap();
    fixture.end().await;
}

/// Two that put the same deliveries in at the same time put them in once. (The look-up of idempotency keys and
/// CloudEvents ids is the event store's; its race has its test there.)
pub(crate) async fn idempotency_look_ups_race(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.deliveries(30).await;
    let racing = (0..4).map(|n| {
        let queue = if n % 2 == 0 { fixture.queue.clone() } else { fixture.other_worker.clone() };
        let deliveries = &deliveries;
        async move { queue.enqueue(deliveries).await.unwrap() }
    });
    futures::future::join_all(racing).await;
    let leased = pull_all(&fixture.queue, 30).await;
    assert_eq!((leased.len(), leased_ids(&leased)), (30, ids(&deliveries)));
    assert!(pull_for(&fixture.queue, 30, Duration::from_millis(200)).await.is_empty());
    fixture.end().await;
}
