//! Several deliveries of one connection in one message: nobody of them has to do with what becomes of the others.

use std::{collections::HashSet, time::Duration};

use async_nats::HeaderMap;
use bus_core::{
    ids::{Ids as _, SystemIds},
    queue::Leased,
};
use devkit::wait_until;

use super::fixture::{DEADLINE, Fixture, Kind, LEASE, PACK, ids, leased_ids, pull_all, pull_for};

/// A pack in a worker's hands, the only message.
async fn one_pack(fixture: &Fixture) -> Vec<Leased> {
    let leased = another_pack(fixture).await;
    messages_become(fixture, 1).await;
    leased
}

/// A pack in a worker's hands.
async fn another_pack(fixture: &Fixture) -> Vec<Leased> {
    let deliveries = fixture.put(PACK).await;
    let leased = pull_all(&fixture.queue, PACK).await;
    assert_eq!(leased_ids(&leased), ids(&deliveries));
    leased
}

/// An acknowledgement is not waited for.
async fn messages_become(fixture: &Fixture, expected: u64) {
    wait_until("the messages in the stream", DEADLINE, || async {
        let messages = fixture.other_worker.depth().await.unwrap();
        if messages == expected { Ok(()) } else { Err(messages) }
    })
    .await;
}

async fn nothing_comes(fixture: &Fixture) {
    let pulled = pull_for(&fixture.other_worker, 10, Duration::from_millis(200)).await;
    assert!(pulled.is_empty(), "{pulled:?}");
}

#[tokio::test]
async fn the_message_goes_when_each_has_its_outcome() {
    let fixture = Fixture::new(Kind::JetStreamPacked).await;
    let mut leased = one_pack(&fixture).await;
    let last = leased.pop().unwrap();
    for one in leased {
        one.lease.ack().await.unwrap();
        // Repeated, as after an error.
        one.lease.ack().await.unwrap();
    }
    fixture.pass(LEASE / 2).await;
    last.lease.extend().await.unwrap();
    fixture.pass(LEASE / 2 + LEASE / 4).await;
    nothing_comes(&fixture).await;
    last.lease.ack().await.unwrap();
    messages_become(&fixture, 0).await;
    fixture.end().await;
}

#[tokio::test]
async fn i4_one_that_fails_comes_again_without_the_others() {
    let fixture = Fixture::new(Kind::JetStreamPacked).await;
    let mut leased = one_pack(&fixture).await;
    let (failed, left) = (leased.remove(3), leased.remove(5));
    let (key, next) = (failed.key, failed.progress.next(1));
    failed.lease.postpone(next, Duration::from_millis(100)).await.unwrap();
    left.lease.put_back(Duration::from_millis(100)).await.unwrap();
    for one in leased {
        one.lease.ack().await.unwrap();
    }
    messages_become(&fixture, 2).await;
    let again = pull_all(&fixture.other_worker, 2).await;
    assert_eq!(again.len(), 2);
    for one in &again {
        let expected = if one.key == key { next } else { left.progress };
        assert_eq!((one.progress, one.handed_out), (expected, 1));
        one.lease.ack().await.unwrap();
    }
    assert_eq!(leased_ids(&again), HashSet::from([key.id, left.key.id]).into_iter().collect());
    messages_become(&fixture, 0).await;
    fixture.end().await;
}

/// The price of a pack.
#[tokio::test]
async fn i3_what_a_worker_had_finished_when_it_died_comes_again_with_its_pack_and_no_other() {
    let fixture = Fixture::new(Kind::JetStreamPacked).await;
    let whole = one_pack(&fixture).await;
    let mut broken = another_pack(&fixture).await;
    for one in &whole {
        one.lease.ack().await.unwrap();
    }
    let repeated = leased_ids(&broken);
    for one in broken.drain(..PACK / 2) {
        one.lease.ack().await.unwrap();
    }
    drop(broken);
    fixture.pass(LEASE).await;
    let again = pull_all(&fixture.other_worker, PACK).await;
    assert_eq!((again.len(), leased_ids(&again)), (PACK, repeated));
    assert!(again.iter().all(|one| one.handed_out == 2));
    fixture.end().await;
}

/// One of it may be what takes the workers down.
#[tokio::test]
async fn i4_a_pack_that_nobody_finishes_is_taken_apart() {
    let fixture = Fixture::new(Kind::JetStreamPacked).await;
    let pack = one_pack(&fixture).await;
    let (expected, left) = (leased_ids(&pack), pack[2].progress);
    // Who has one of it in hand alone, when the worker that had the pack is gone.
    pack[2].lease.put_back(Duration::ZERO).await.unwrap();
    drop(pack);
    fixture.pass(LEASE).await;
    let again = pull_all(&fixture.other_worker, PACK).await;
    assert!(again.iter().any(|one| one.handed_out == 2), "{again:?}");
    drop(again);
    fixture.pass(LEASE).await;
    let alone = pull_all(&fixture.other_worker, PACK).await;
    assert_eq!((alone.len(), leased_ids(&alone)), (PACK, expected));
    assert!(alone.iter().all(|one| one.progress == left && one.handed_out < 3), "{alone:?}");
    messages_become(&fixture, PACK as u64).await;
    for (left, one) in (0..PACK as u64).rev().zip(&alone) {
        one.lease.ack().await.unwrap();
        messages_become(&fixture, left).await;
    }
    fixture.end().await;
}

#[tokio::test]
async fn i1_what_is_in_a_pack_is_known_to_be_in_the_queue() {
    let fixture = Fixture::new(Kind::JetStreamPacked).await;
    let keys: Vec<_> = one_pack(&fixture).await.into_iter().map(|one| one.key).collect();
    let stranger = fixture.delivery(b"{}").await.key;
    let asked: Vec<_> = keys.iter().copied().chain([stranger]).collect();
    let held = fixture.other_worker.holds(&asked).await.unwrap();
    assert_eq!(held, keys.iter().map(|key| key.id).collect());
    fixture.end().await;
}

#[tokio::test]
async fn a_pack_that_is_cut_off_is_set_aside_and_blocks_nothing() {
    let fixture = Fixture::new(Kind::JetStreamPacked).await;
    let nats = fixture.nats.clone().unwrap();
    let subject = nats.names.deliver(0, fixture.organization, SystemIds.next().into());
    let mut headers = HeaderMap::new();
    for (name, value) in [("Nats-Msg-Id", "pack:1"), ("Bus-Pack", "2"), ("Bus-Connection-Version", "1")] {
        headers.insert(name, value);
    }
    let sent = nats.jetstream.publish_with_headers(subject, headers, "cut off".into()).await.unwrap();
    sent.await.unwrap();
    for one in another_pack(&fixture).await {
        one.lease.ack().await.unwrap();
    }
    messages_become(&fixture, 0).await;
    let dead = nats.jetstream.get_stream(&nats.names.dead_stream).await.unwrap();
    let aside = dead.get_last_raw_message_by_subject(&nats.names.malformed()).await.unwrap();
    assert_eq!(aside.headers.get("Bus-Reason").unwrap().as_str(), "a pack that is cut off");
    fixture.end().await;
}
