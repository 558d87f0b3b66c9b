#![allow(clippy::unwrap_used)]

use bus_core::{
    delivery::DeliveryKey,
    ids::{DeliveryId, EventUid},
};
use bytes::Bytes;
use futures::{FutureExt as _, future::join_all};
use tokio::time::Instant;
use uuid::Uuid;

use super::*;

const LONG: Duration = Duration::from_secs(5);

fn batcher() -> Batcher<u32> {
    Batcher::new(LONG, CancellationToken::new())
}

fn policy(max_events: u16, max_wait_ms: u16) -> BatchPolicy {
    BatchPolicy { max_events, max_wait_ms }
}

fn with_body(subscription: u128, event: u128, body: String) -> Delivery {
    let (subscription, event) =
        (SubscriptionId(Uuid::from_u128(subscription)), EventUid(Uuid::from_u128(event)));
    let key = DeliveryKey {
        id: DeliveryId::derive(event, subscription),
        event,
        organization: Uuid::from_u128(1).into(),
        subscription,
        connection: Uuid::from_u128(2).into(),
        connection_version: 1,
    };
    Delivery { key, body: Bytes::from(body) }
}

fn delivery(subscription: u128, event: u128) -> Delivery {
    with_body(subscription, event, format!(r#"{{"id":"e-{event}"}}"#))
}

/// The holds of each batch, by who got it.
async fn gather<'a>(
    added: impl IntoIterator<Item = impl Future<Output = Option<Batch<u32>>> + 'a>,
) -> Vec<Vec<Vec<u32>>> {
    let batches = join_all(added).await.into_iter().flatten();
    batches
        .inspect(|batch| assert_eq!(batch.deliveries.len(), batch.held.len()))
        .map(|batch| batch.held)
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_full_goes_at_once() {
    let (batcher, started) = (batcher(), Instant::now());
    let added = (0..6).map(|n| batcher.add(policy(3, 5_000), delivery(1, n.into()), n));
    assert_eq!(gather(added).await, [[[0], [1], [2]], [[3], [4], [5]]]);
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_does_not_fill_goes_when_its_time_is_over() {
    let (batcher, started) = (batcher(), Instant::now());
    let added = (0..2).map(|n| batcher.add(policy(3, 700), delivery(1, n.into()), n));
    assert_eq!(gather(added).await, [[[0], [1]]]);
    assert_eq!(started.elapsed(), Duration::from_millis(700));
    // The next one has its own time.
    assert_eq!(gather([batcher.add(policy(3, 700), delivery(1, 9), 9)]).await, [[[9]]]);
    assert_eq!(started.elapsed(), Duration::from_millis(1_400));
}

#[tokio::test(start_paused = true)]
async fn no_batch_waits_longer_than_the_configuration_allows() {
    let batcher = Batcher::new(Duration::from_millis(300), CancellationToken::new());
    let started = Instant::now();
    assert_eq!(gather([batcher.add(policy(3, 5_000), delivery(1, 1), 1)]).await, [[[1]]]);
    assert_eq!(started.elapsed(), Duration::from_millis(300));
}

#[tokio::test(start_paused = true)]
async fn batches_of_one_and_of_no_time_do_not_wait() {
    let (batcher, started) = (batcher(), Instant::now());
    for policy in [policy(1, 5_000), policy(9, 0)] {
        assert_eq!(gather([batcher.add(policy, delivery(1, 1), 1)]).await, [[[1]]]);
    }
    assert!(started.elapsed() < Duration::from_millis(5), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn two_subscriptions_of_one_connection_are_two_batches() {
    let batcher = batcher();
    let added = [(1, 1, 10), (2, 1, 20), (1, 2, 11), (2, 2, 21)].map(|(subscription, event, hold)| {
        batcher.add(policy(2, 5_000), delivery(subscription, event), hold)
    });
    assert_eq!(gather(added).await, [[[10], [11]], [[20], [21]]]);
}

#[tokio::test(start_paused = true)]
async fn a_delivery_that_comes_again_is_in_once_and_both_holds_are_kept() {
    let batcher = batcher();
    let added = [(1, 10), (2, 20), (1, 11), (3, 30)]
        .map(|(event, hold)| batcher.add(policy(3, 5_000), delivery(1, event), hold));
    assert_eq!(gather(added).await, [vec![vec![10, 11], vec![20], vec![30]]]);
}

#[tokio::test(start_paused = true)]
async fn two_events_of_one_id_are_never_in_one_batch() {
    // Two sources may use the same id (CloudEvents 1.0, "id").
    let batcher = batcher();
    let add = |event, hold| batcher.add(policy(9, 100), with_body(1, event, r#"{"id":"same"}"#.into()), hold);
    assert_eq!(gather([add(1, 10), add(2, 20), add(1, 11)]).await, [[[10]], [[20]], [[11]]]);
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_bounded_in_bytes() {
    let batcher = batcher();
    let body = |event: u128, size: usize| format!(r#"{{"id":"{event}","data":"{}"}}"#, "x".repeat(size));
    let half = MAX_BATCH_BYTES / 2 - 100;
    let added = [(1, half, 1), (2, half, 2), (3, 200, 3), (4, MAX_BATCH_BYTES, 4), (5, 1, 5)]
        .map(|(event, size, hold)| batcher.add(policy(9, 100), with_body(1, event, body(event, size)), hold));
    assert_eq!(gather(added).await, [vec![vec![1], vec![2]], vec![vec![3]], vec![vec![4]], vec![vec![5]]]);
}

#[tokio::test(start_paused = true)]
async fn a_flush_sends_every_batch_off() {
    let (batcher, started) = (batcher(), Instant::now());
    let added = (0..4).map(|n: u32| batcher.add(policy(9, 5_000), delivery((n % 2).into(), n.into()), n));
    let (batches, ()) = tokio::join!(gather(added), async { batcher.flush_all() });
    assert_eq!(batches, [[[0], [2]], [[1], [3]]]);
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn from_the_stop_on_nothing_waits() {
    let (stop, started) = (CancellationToken::new(), Instant::now());
    let batcher = Batcher::new(LONG, stop.clone());
    let added = (0..2).map(|n| batcher.add(policy(9, 5_000), delivery(1, n.into()), n));
    let (batches, ()) = tokio::join!(gather(added), async { stop.cancel() });
    assert_eq!(batches, [[[0], [1]]]);
    assert_eq!(gather([batcher.add(policy(9, 5_000), delivery(1, 3), 3)]).await, [[[3]]]);
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_was_gathered_for_one_who_is_gone_is_let_go() {
    let batcher = Batcher::new(LONG, CancellationToken::new());
    let hold = std::sync::Arc::new(());
    {
        let mut first = Box::pin(batcher.add(policy(9, 5_000), delivery(1, 1), hold.clone()));
        assert!(first.as_mut().now_or_never().is_none(), "it waits");
    }
    let batch = batcher.add(policy(9, 100), delivery(1, 2), hold.clone()).await.unwrap();
    assert_eq!(batch.deliveries.len(), 1, "the next one has a batch of its own");
    drop(batch);
    assert_eq!(std::sync::Arc::strong_count(&hold), 1);
}

/// Nothing is lost and nothing is there twice, however the threads meet.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_hold_comes_out_once() {
    let batcher = std::sync::Arc::new(batcher());
    let tasks: Vec<_> = (0..5_000u32)
        .map(|n| {
            let batcher = batcher.clone();
            let event = u128::from(n / 5);
            tokio::spawn(async move {
                if n % 97 == 0 {
                    batcher.flush_all();
                }
                batcher
                    .add(policy(7, u16::try_from(n % 3).unwrap()), delivery(u128::from(n % 2), event), n)
                    .await
            })
        })
        .collect();
    let mut out = Vec::new();
    for task in tasks {
        if let Some(batch) = task.await.unwrap() {
            assert!((1..=7).contains(&batch.deliveries.len()));
            out.extend(batch.held.into_iter().flatten());
        }
    }
    out.sort_unstable();
    assert_eq!(out, (0..5_000).collect::<Vec<_>>());
}
