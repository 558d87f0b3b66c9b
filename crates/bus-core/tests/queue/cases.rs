//! What every queue does.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use bus_core::{
    delivery::DeliveryKey,
    ids::{DeliveryId, Ids as _, SystemIds},
    queue::Enqueue,
};

use devkit::wait_until;

use super::fixture::{
    DEADLINE, Fixture, Kind, LEASE, WAIT, ids, leased_ids, pull, pull_all, pull_for, pull_lane,
};

pub(crate) async fn comes_out_as_it_was_put_in(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.put(50).await;
    for one in pull_all(&fixture.queue, 50).await {
        let sent = deliveries.iter().find(|delivery| delivery.key == one.key).expect("one that was put in");
        assert_eq!((one.progress, one.handed_out, &one.body), (sent.progress, 1, &sent.body));
        one.lease.ack().await.unwrap();
    }
    assert!(pull(&fixture.queue, 10).await.is_empty(), "what is finished does not come again");
    fixture.end().await;
}

/// Promised: one connection, one worker, nothing handed out before. Between connections, between workers and
/// after a retry no order is promised, so there is nothing to test.
pub(crate) async fn comes_out_in_the_order_of_its_connection(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let connection = SystemIds.next().into();
    let mut sent = Vec::new();
    for chunk in 0..4u32 {
        let mut deliveries = Vec::new();
        for n in 0..15 {
            deliveries.push(fixture.delivery_to(connection, format!("{chunk}:{n}").as_bytes()).await);
        }
        fixture.queue.enqueue(&deliveries).await.unwrap();
        sent.extend(deliveries.into_iter().map(|delivery| delivery.key.id));
    }
    let mut got = Vec::new();
    while got.len() < sent.len() {
        for one in pull_all(&fixture.queue, 7.min(sent.len() - got.len())).await {
            got.push(one.key.id);
            one.lease.ack().await.unwrap();
        }
    }
    assert_eq!(got, sent);
    fixture.end().await;
}

pub(crate) async fn is_put_in_once_however_often_it_is_tried(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.put(20).await;
    fixture.other_worker.enqueue(&deliveries).await.unwrap();
    let leased = pull_all(&fixture.queue, 20).await;
    assert_eq!(leased_ids(&leased), ids(&deliveries));
    for one in leased {
        one.lease.ack().await.unwrap();
    }
    assert!(pull(&fixture.queue, 10).await.is_empty());
    fixture.end().await;
}

pub(crate) async fn what_a_dead_worker_held_comes_again(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.put(5).await;
    // Dropped without an answer, as a crash does.
    drop(pull_all(&fixture.queue, 5).await);
    fixture.pass(LEASE).await;
    let again = pull_all(&fixture.other_worker, 5).await;
    assert_eq!(leased_ids(&again), ids(&deliveries));
    for one in &again {
        assert_eq!((one.progress.attempts, one.handed_out), (0, 2), "no attempt is charged for the crash");
    }
    fixture.end().await;
}

pub(crate) async fn what_is_postponed_comes_again_with_what_it_has_behind_it(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let mut deliveries = fixture.deliveries(1).await;
    deliveries[0].progress = deliveries[0].progress.next(4);
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let first = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!(first.progress, deliveries[0].progress);
    let next = first.progress.next(5);
    let wait = Duration::from_millis(300);
    first.lease.postpone(next, wait).await.unwrap();
    fixture.pass(wait).await;
    let second = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((second.key, second.progress, second.handed_out), (deliveries[0].key, next, 1));
    second.lease.ack().await.unwrap();
    fixture.end().await;
}

pub(crate) async fn what_is_put_back_comes_again_as_it_was(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.put(1).await;
    let first = pull_all(&fixture.queue, 1).await.remove(0);
    first.lease.put_back(Duration::from_millis(100)).await.unwrap();
    fixture.pass(Duration::from_millis(100)).await;
    let second = pull_all(&fixture.other_worker, 1).await.remove(0);
    assert_eq!((second.key, second.progress, second.handed_out), (deliveries[0].key, first.progress, 2));
    second.lease.ack().await.unwrap();
    fixture.end().await;
}

pub(crate) async fn a_hold_that_is_extended_lasts(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.put(1).await;
    let held = pull_all(&fixture.queue, 1).await.remove(0);
    for _ in 0..8 {
        held.lease.extend().await.unwrap();
        fixture.pass(LEASE / 4).await;
        let taken = pull_for(&fixture.other_worker, 1, Duration::from_millis(50)).await;
        assert!(taken.is_empty(), "nobody else gets what is held");
    }
    held.lease.ack().await.unwrap();
    fixture.end().await;
}

pub(crate) async fn a_waiting_pull_gets_what_is_enqueued_meanwhile(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let queue = fixture.queue.clone();
    let waiting = tokio::spawn(async move { pull_all(&queue, 1).await });
    let deliveries = fixture.deliveries(1).await;
    fixture.other_worker.enqueue(&deliveries).await.unwrap();
    let got = waiting.await.unwrap();
    assert_eq!(got[0].key, deliveries[0].key);
    fixture.end().await;
}

/// As a replay does.
pub(crate) async fn a_later_turn_goes_in_beside_what_was_finished(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let mut delivery = fixture.put(1).await.remove(0);
    pull_all(&fixture.queue, 1).await.remove(0).lease.ack().await.unwrap();
    delivery.progress.turn = 1_800_000_000_000;
    fixture.queue.enqueue(std::slice::from_ref(&delivery)).await.unwrap();
    let again = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((again.key, again.progress), (delivery.key, delivery.progress));
    again.lease.ack().await.unwrap();
    fixture.end().await;
}

pub(crate) async fn the_depth_counts_what_is_held_and_what_waits(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.put_each(5).await;
    let mut held = pull_all(&fixture.queue, 3).await;
    let postponed = held.remove(0);
    postponed.lease.postpone(postponed.progress.next(1), Duration::from_secs(3)).await.unwrap();
    // An acknowledgement is not waited for, so that of the earlier turn may still be on its way.
    depth_becomes(&fixture, 5).await;
    held.remove(0).lease.ack().await.unwrap();
    depth_becomes(&fixture, 4).await;
    fixture.end().await;
}

async fn depth_becomes(fixture: &Fixture, expected: u64) {
    wait_until("the depth", DEADLINE, || async {
        let depth = fixture.other_worker.depth().await.unwrap();
        if depth == expected { Ok(()) } else { Err(depth) }
    })
    .await;
}

/// A lane that was not configured: whoever asks which there are is told, and others have nothing of it.
pub(crate) async fn what_has_a_lane_of_its_own_is_found_in_it_and_in_no_other(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    assert_eq!(fixture.other_worker.lanes().await.unwrap(), BTreeSet::from([0]));
    let own = Enqueue { lane: Some(9), ..fixture.delivery(b"own").await };
    let shared = fixture.delivery(b"shared").await;
    fixture.queue.enqueue(&[own.clone(), shared.clone()]).await.unwrap();
    assert_eq!(fixture.other_worker.lanes().await.unwrap(), BTreeSet::from([0, 9]));
    for (lane, sent) in [(0, shared), (9, own)] {
        let leased = pull_lane(&fixture.other_worker, lane, 10, WAIT).await;
        assert_eq!(leased_ids(&leased), ids(&[sent]));
        assert_eq!(leased[0].lane, lane);
        leased[0].lease.ack().await.unwrap();
    }
    wait_until("a lane that is empty again", DEADLINE, || async {
        let lanes = fixture.queue.lanes().await.unwrap();
        if lanes == BTreeSet::from([0]) { Ok(()) } else { Err(lanes) }
    })
    .await;
    fixture.end().await;
}

/// As its next turn, by whoever holds it; and back again.
pub(crate) async fn what_is_moved_to_another_lane_is_in_that_one_alone(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let mut sent = fixture.delivery(b"moved").await;
    fixture.queue.enqueue(std::slice::from_ref(&sent)).await.unwrap();
    for (from, to) in [(0, 9), (9, 0)] {
        let held = pull_lane(&fixture.queue, from, 1, WAIT).await.remove(0);
        sent = Enqueue { lane: Some(to), progress: held.progress.next(held.progress.attempts), ..sent };
        fixture.queue.enqueue(std::slice::from_ref(&sent)).await.unwrap();
        // Whoever dies before the acknowledgement does the same once more.
        fixture.other_worker.enqueue(std::slice::from_ref(&sent)).await.unwrap();
        held.lease.ack().await.unwrap();
        wait_until("one delivery", DEADLINE, || async {
            let depth = fixture.queue.depth().await.unwrap();
            if depth == 1 { Ok(()) } else { Err(depth) }
        })
        .await;
        assert_eq!(pull_lane(&fixture.queue, from, 1, Duration::from_millis(50)).await.len(), 0);
    }
    let held = pull_lane(&fixture.other_worker, 0, 1, WAIT).await.remove(0);
    assert_eq!((held.key, held.progress, held.handed_out, held.lane), (sent.key, sent.progress, 1, 0));
    assert_eq!(held.progress.attempts, 0);
    held.lease.ack().await.unwrap();
    fixture.end().await;
}

pub(crate) async fn it_knows_what_it_holds(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let keys: Vec<DeliveryKey> = fixture.put_each(5).await.into_iter().map(|one| one.key).collect();
    let stranger = fixture.delivery(b"{}").await;
    let mut held = pull_all(&fixture.queue, 3).await;
    let (acked, postponed) = (held.remove(0), held.remove(0));
    let expected: HashSet<DeliveryId> =
        keys.iter().map(|key| key.id).filter(|id| *id != acked.key.id).collect();
    acked.lease.ack().await.unwrap();
    postponed.lease.postpone(postponed.progress.next(1), Duration::from_secs(3)).await.unwrap();
    let asked: Vec<DeliveryKey> = keys.into_iter().chain([stranger.key]).collect();
    // An acknowledgement is not waited for.
    wait_until("the acknowledged one to be gone", DEADLINE, || async {
        let holds = fixture.other_worker.holds(&asked).await.unwrap();
        if holds == expected { Ok(()) } else { Err(holds.len()) }
    })
    .await;
    assert!(fixture.queue.holds(&[]).await.unwrap().is_empty());
    fixture.end().await;
}
