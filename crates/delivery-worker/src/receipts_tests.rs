#![allow(clippy::unwrap_used)]

use std::collections::{BTreeSet, HashSet};

use bus_core::{
    delivery::DeliveryKey,
    ids::{DeliveryId, EventUid, SubscriptionId},
    nats::NatsError,
    pg::DeadLetter,
    queue::{Enqueue, Leased, QueueError},
    receipt::ReceiptOutcome,
};
use bytes::Bytes;
use futures::stream::BoxStream;
use jiff::Timestamp;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::sync::watch;
use uuid::Uuid;

use super::*;

/// How many receipts find room.
const ROOM: usize = 4;

/// A queue that has only receipts, and refuses them until it is told otherwise.
#[derive(Debug)]
struct Refusing {
    takes: watch::Sender<bool>,
    refused: watch::Sender<usize>,
    taken: watch::Sender<usize>,
}

impl Refusing {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            takes: watch::Sender::new(false),
            refused: watch::Sender::new(0),
            taken: watch::Sender::new(0),
        })
    }

    /// Waits until it has refused once more than now.
    async fn refuses_again(&self) {
        let mut refused = self.refused.subscribe();
        let before = *refused.borrow();
        refused.wait_for(|refused| *refused > before).await.unwrap();
    }
}

#[async_trait::async_trait]
impl DeliveryQueue for Refusing {
    async fn receipts(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        if *self.takes.borrow() {
            self.taken.send_modify(|taken| *taken += receipts.len());
            return Ok(());
        }
        self.refused.send_modify(|refused| *refused += 1);
        Err(NatsError::Call { operation: "publish receipts", source: "maximum bytes exceeded".into() }.into())
    }

    async fn enqueue(&self, _: &[Enqueue]) -> Result<(), QueueError> {
        unreachable!()
    }

    async fn pull(
        &self,
        _: u16,
        _: usize,
        _: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError> {
        unreachable!()
    }

    async fn withdraw(&self, _: &[DeliveryId]) -> Result<(), QueueError> {
        unreachable!()
    }

    async fn lanes(&self) -> Result<BTreeSet<u16>, QueueError> {
        unreachable!()
    }

    async fn holds(&self, _: &[DeliveryKey]) -> Result<HashSet<DeliveryId>, QueueError> {
        unreachable!()
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        unreachable!()
    }

    async fn dead_letter(&self, _: &DeadLetter, _: &Bytes) -> Result<(), QueueError> {
        unreachable!()
    }

    async fn prepare(&self) -> Result<(), QueueError> {
        unreachable!()
    }
}

fn receipt() -> Receipt {
    let (event, subscription) = (EventUid(Uuid::from_u128(1)), SubscriptionId(Uuid::from_u128(2)));
    Receipt {
        delivery: DeliveryId::derive(event, subscription),
        attempt: 1,
        turn: 0,
        event,
        organization: Uuid::from_u128(3).into(),
        subscription,
        connection: Uuid::from_u128(4).into(),
        outcome: ReceiptOutcome::Delivered,
        status: Some(204),
        error: None,
        at: Timestamp::UNIX_EPOCH,
        duration_ms: 1,
    }
}

fn lost(metrics: &PrometheusHandle) -> usize {
    let page = metrics.render();
    let line = page.lines().find_map(|line| line.strip_prefix("bus_receipts_lost "));
    line.map_or(0, |count| count.parse().unwrap())
}

fn send(receipts: &Receipts, n: usize) {
    for _ in 0..n {
        receipts.send(receipt());
    }
}

#[tokio::test(start_paused = true)]
async fn what_finds_no_room_is_counted_and_the_rest_is_sent_when_the_broker_takes_it_again() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    // This test runs on one thread.
    let _guard = metrics::set_default_local_recorder(&recorder);
    let (queue, tasks, stop) = (Refusing::new(), TaskTracker::new(), CancellationToken::new());
    let receipts = Receipts::start(queue.clone(), ROOM, &tasks, stop);

    send(&receipts, ROOM + 3);
    assert_eq!(lost(&metrics), 3, "whoever sends does not wait");
    queue.refuses_again().await;
    queue.refuses_again().await;
    // The first ones are in hand now, and their places are free.
    send(&receipts, ROOM + 3);
    assert_eq!(lost(&metrics), 6);
    assert_eq!(*queue.taken.borrow(), 0);

    queue.takes.send_replace(true);
    let mut taken = queue.taken.subscribe();
    taken.wait_for(|taken| *taken == 2 * ROOM).await.unwrap();
    send(&receipts, ROOM);
    drop(receipts);
    tasks.close();
    tasks.wait().await;
    assert_eq!((*queue.taken.borrow(), lost(&metrics)), (3 * ROOM, 6));
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_broker_that_refuses() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let (queue, tasks, stop) = (Refusing::new(), TaskTracker::new(), CancellationToken::new());
    let receipts = Receipts::start(queue.clone(), ROOM, &tasks, stop.clone());
    send(&receipts, ROOM);
    queue.refuses_again().await;
    send(&receipts, ROOM);
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    // Those of deliveries that end during the drain.
    send(&receipts, 2);
    assert_eq!((lost(&metrics), *queue.taken.borrow()), (2 * ROOM + 2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stop_sends_what_the_broker_takes() {
    let (queue, tasks, stop) = (Refusing::new(), TaskTracker::new(), CancellationToken::new());
    queue.takes.send_replace(true);
    let receipts = Receipts::start(queue.clone(), ROOM, &tasks, stop.clone());
    stop.cancel();
    send(&receipts, ROOM);
    drop(receipts);
    tasks.close();
    tasks.wait().await;
    assert_eq!(*queue.taken.borrow(), ROOM);
}
