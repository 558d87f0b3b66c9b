//! Parked deliveries return to the queue when they are due.

use std::time::Duration;

use bus_core::{
    ids::DeliveryId,
    pg::{self, DeadLetter},
    queue::{DeliveryQueue, Enqueue, QueueError},
};
use bytes::Bytes;
use metrics::counter;
use sqlx::PgPool;
use tracing::debug;

use crate::due::IDLE;

/// Deliveries returned at a time; with the largest body that the queue carries, 50 MiB.
const BATCH: u32 = 200;

/// If this process dies with deliveries in hand, another one takes them after this time. Well within the
/// broker's duplicate window, so that what was already put back is recognised.
pub(crate) const LEASE_S: u64 = 30;

/// Returns one batch; answers how long there is nothing more to do.
pub async fn return_due(pool: &PgPool, queue: &dyn DeliveryQueue) -> Result<Duration, QueueError> {
    let due = pg::take_due(pool, BATCH, LEASE_S).await?;
    if due.is_empty() {
        return Ok(IDLE);
    }
    let mut deliveries = Vec::with_capacity(due.len());
    for due in &due {
        match &due.body {
            Ok(body) => {
                let (key, progress, lane) = (due.key, due.progress, due.lane);
                deliveries.push(Enqueue { key, progress, lane, body: body.clone() });
            }
            Err(reason) => {
                let gone = DeadLetter::new(due.key, due.progress, *reason);
                queue.dead_letter(&gone, &Bytes::new()).await?;
                pg::bury(pool, &gone).await?;
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
