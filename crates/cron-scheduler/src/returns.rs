//! Parked deliveries return to the queue when they are due.

use std::{sync::Arc, time::Duration};

use bus_core::{
    ids::DeliveryId,
    launcher::{BoxError, Heartbeat},
    notify::DUE_IDLE,
    pg::{self, DeadLetter},
    queue::{DeliveryQueue, Enqueue, QueueError},
    retry::DeadReason,
    telemetry::Chain,
};
use bytes::Bytes;
use metrics::counter;
use sqlx::PgPool;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// The safety interval: an idle scheduler asks once in this time. Most parked waits are longer, so that they
/// cannot become due unseen between two looks; the others are announced by [`Hint::Due`].
///
/// [`Hint::Due`]: bus_core::notify::Hint::Due
pub(crate) const IDLE: Duration = DUE_IDLE;

/// The shortest sleep between two looks that found nothing to do, however many hints come.
pub(crate) const SHORTEST: Duration = Duration::from_millis(20);

/// After an error.
const AGAIN: Duration = Duration::from_secs(1);

/// Deliveries returned at a time; with the largest body that the queue carries, 50 MiB.
const BATCH: u32 = 200;

/// If this process dies with deliveries in hand, another one takes them after this time. Well within the
/// broker's duplicate window, so that what was already put back is recognised.
pub(crate) const LEASE_S: u64 = 30;

/// Runs until the stop.
pub(crate) async fn run(
    pool: PgPool,
    queue: Arc<dyn DeliveryQueue>,
    due: Arc<Notify>,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    while !stop.is_cancelled() {
        beat.beat();
        let idle = match return_due(&pool, queue.as_ref()).await {
            Ok(idle) => idle,
            Err(failed) => {
                warn!(error = %Chain(&failed), "Due deliveries wait");
                AGAIN
            }
        };
        stop.run_until_cancelled(rest(idle, &due)).await;
    }
    Ok(())
}

/// Waits until there may be something to do: `idle`, or shorter if something became due. All that was
/// announced since the last look is one reason to look again.
pub(crate) async fn rest(idle: Duration, due: &Notify) {
    let shortest = idle.min(SHORTEST);
    sleep(shortest).await;
    // Either way the answer is the same: look again.
    let _ = timeout(idle - shortest, due.notified()).await;
}

/// Returns one batch; answers how long there is nothing more to do.
pub async fn return_due(pool: &PgPool, queue: &dyn DeliveryQueue) -> Result<Duration, QueueError> {
    let due = pg::take_due(pool, BATCH, LEASE_S).await?;
    if due.is_empty() {
        let next = pg::next_due_in(pool).await?;
        let next = next.map_or(IDLE, |seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(IDLE));
        return Ok(next.clamp(SHORTEST, IDLE));
    }
    let mut deliveries = Vec::with_capacity(due.len());
    for due in &due {
        match &due.body {
            Some(body) => {
                deliveries.push(Enqueue { key: due.key, progress: due.progress, body: body.clone() });
            }
            None => {
                let expired = DeadLetter::new(due.key, due.progress, DeadReason::EventExpired);
                queue.dead_letter(&expired, &Bytes::new()).await?;
                pg::bury(pool, &expired).await?;
            }
        }
    }
    queue.enqueue(&deliveries).await?;
    let back: Vec<(DeliveryId, i64)> =
        deliveries.iter().map(|delivery| (delivery.key.id, delivery.progress.turn)).collect();
    pg::returned(pool, &back).await?;
    counter!("bus_parked_returned").increment(back.len() as u64);
    debug!(deliveries = back.len(), "Due deliveries are back in the queue");
    Ok(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_announced_ends_the_rest_but_hints_do_not_make_it_spin() {
        let due = Arc::new(Notify::new());
        let begun = Instant::now();
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), IDLE, "nothing was announced");

        let (announcing, begun) = (Arc::clone(&due), Instant::now());
        tokio::spawn(async move {
            sleep(Duration::from_secs(1)).await;
            announcing.notify_one();
        });
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(1));

        let begun = Instant::now();
        for _ in 0..1_000 {
            due.notify_one();
        }
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), SHORTEST, "a thousand hints are one reason");
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), SHORTEST + IDLE);

        let begun = Instant::now();
        rest(Duration::ZERO, &due).await;
        assert_eq!(begun.elapsed(), Duration::ZERO, "there is more to do already");
    }
}
