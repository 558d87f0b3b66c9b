//! What only the queue on JetStream has: a stream with limits, messages that others can write, and lanes that
//! outlive a configuration.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bus_core::{
    delivery::DeliveryKey,
    ids::{DeliveryId, Ids as _, SystemIds},
    queue::{Body, DeliveryQueue, Enqueue, JetStreamQueue, MAX_INLINE},
};
use devkit::wait_until;
use futures::StreamExt as _;

use super::fixture::{DEADLINE, Fixture, Kind, ids, pull_all};

#[tokio::test]
async fn i10_many_large_fan_outs_at_once_do_not_wait_for_each_other() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let sample = fixture.delivery(b"many").await;
    let fan_outs = (0..16).map(|_| {
        let deliveries: Vec<Enqueue> = (0..1_000)
            .map(|_| {
                let key = DeliveryKey { id: DeliveryId(SystemIds.next()), ..sample.key };
                Enqueue { key, ..sample.clone() }
            })
            .collect();
        let queue = fixture.queue.clone();
        async move { queue.enqueue(&deliveries).await.unwrap() }
    });
    tokio::time::timeout(DEADLINE, futures::future::join_all(fan_outs)).await.expect("every fan-out ends");
    let nats = fixture.nats.clone().unwrap();
    let stream = nats.jetstream.get_stream(&nats.names.deliver_stream).await.unwrap();
    assert_eq!(stream.cached_info().state.messages, 16_000);
    fixture.end().await;
}

#[tokio::test]
async fn a_lane_of_an_earlier_configuration_is_still_pulled() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    assert_eq!(fixture.queue.lanes().await.unwrap(), BTreeSet::from([0]));
    let earlier: Arc<dyn DeliveryQueue> = Arc::new(JetStreamQueue::new(nats, 8));
    // Who pulled lane 5 made its consumer, and left something to it.
    let late = Enqueue { lane: Some(5), ..fixture.delivery(b"late").await };
    assert!(earlier.pull(5, 1, Duration::from_millis(100)).await.unwrap().next().await.is_none());
    assert_eq!(fixture.queue.lanes().await.unwrap(), BTreeSet::from([0]), "nothing is in it");
    earlier.enqueue(&[late]).await.unwrap();
    // The broker counts what a consumer has left a moment after it has stored it.
    wait_until("the lane that has something", DEADLINE, || async {
        let lanes = fixture.queue.lanes().await.unwrap();
        if lanes == BTreeSet::from([0, 5]) { Ok(()) } else { Err(lanes) }
    })
    .await;
    fixture.end().await;
}

#[tokio::test]
async fn i10_a_large_body_stays_out_of_the_stream() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let large = fixture.delivery(&vec![b'x'; MAX_INLINE + 1]).await;
    assert_eq!(large.body, Body::Stored);
    fixture.queue.enqueue(std::slice::from_ref(&large)).await.unwrap();
    let leased = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((leased.key, &leased.body), (large.key, &Body::Stored));
    leased.lease.ack().await.unwrap();
    fixture.end().await;
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_set_aside_and_blocks_nothing() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    let subject = nats.names.deliver(0, fixture.organization, SystemIds.next().into());
    nats.jetstream.publish(subject.clone(), "not ours".into()).await.unwrap().await.unwrap();
    let deliveries = fixture.deliveries(1).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let leased = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!(leased.key, deliveries[0].key);
    leased.lease.ack().await.unwrap();
    let dead = nats.jetstream.get_stream(&nats.names.dead_stream).await.unwrap();
    let aside = dead.get_last_raw_message_by_subject(&nats.names.malformed()).await.unwrap();
    assert_eq!(aside.payload, "not ours");
    assert_eq!(aside.headers.get("Bus-Reason").unwrap().as_str(), "no headers");
    assert_eq!(aside.headers.get("Bus-Subject").unwrap().as_str(), subject);
    wait_until("an empty work queue", DEADLINE, || async {
        let stream = nats.jetstream.get_stream(&nats.names.deliver_stream).await.unwrap();
        let left = stream.cached_info().state.messages;
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    fixture.end().await;
}

#[tokio::test]
async fn a_full_stream_refuses_and_keeps_what_it_has() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    let mut config =
        nats.jetstream.get_stream(&nats.names.deliver_stream).await.unwrap().cached_info().config.clone();
    config.max_bytes = 10_000;
    nats.jetstream.update_stream(config).await.unwrap();
    let mut accepted = Vec::new();
    loop {
        let one = fixture.delivery(&[b'x'; 1_000]).await;
        match fixture.queue.enqueue(std::slice::from_ref(&one)).await {
            Ok(()) => accepted.push(one),
            Err(_) => break,
        }
        assert!(accepted.len() < 100, "the stream does not refuse");
    }
    let held = pull_all(&fixture.queue, accepted.len()).await;
    assert_eq!(held.iter().map(|one| one.key.id).collect::<BTreeSet<_>>(), ids(&accepted));
    fixture.end().await;
}
