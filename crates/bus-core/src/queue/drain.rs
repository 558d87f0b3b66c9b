//! Moves what is pending from one queue into another: for a deployment that changes its backend.

use std::time::Duration;

use futures::{TryStreamExt as _, future::try_join_all};

use super::{Body, DeliveryQueue, Enqueue, Leased, QueueError};

/// Deliveries moved at a time; with the largest body that a queue carries, 50 MiB, and with the largest event that
/// the database hands out, 200 MiB.
const BATCH: usize = 200;

/// How long one look at an empty lane takes. What is held or waits comes in a later look.
const LOOK: Duration = Duration::from_millis(200);

/// How far a drain has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Deliveries that are in the other queue by now.
    pub moved: u64,
    /// Deliveries that are left, as far as was counted last; several in one message count as one.
    pub left: u64,
}

/// Moves every delivery of `from` into `to`, until `from` is empty, and says how far it is after each batch.
/// Waits for what is postponed and for what a worker held that died, so it may take as long as a hold lasts;
/// nobody else may take from either queue, or put into `from`.
///
/// Each delivery enters the other queue as its next turn, with the attempts that it has behind it. So a drain
/// that is broken off can be repeated: what was moved already is recognised, by JetStream within its duplicate
/// window. And one that is drained back again soon is not taken for a repetition of the first time.
pub async fn drain(
    from: &dyn DeliveryQueue,
    to: &dyn DeliveryQueue,
    mut tell: impl FnMut(Drained),
) -> Result<u64, QueueError> {
    let lanes = from.lanes().await?;
    let mut moved = 0;
    loop {
        let mut left = from.depth().await?;
        tell(Drained { moved, left });
        if left == 0 {
            return Ok(moved);
        }
        for &lane in &lanes {
            loop {
                let batch = move_batch(from, to, lane).await?;
                if batch == 0 {
                    break;
                }
                moved += batch;
                left = left.saturating_sub(batch);
                tell(Drained { moved, left });
            }
        }
    }
}

/// The other queue has them before this one forgets them: whatever dies in between, none is lost.
async fn move_batch(from: &dyn DeliveryQueue, to: &dyn DeliveryQueue, lane: u16) -> Result<u64, QueueError> {
    let leased: Vec<Leased> = from.pull(lane, BATCH, LOOK).await?.try_collect().await?;
    let (mut deliveries, mut leases) = (Vec::with_capacity(leased.len()), Vec::with_capacity(leased.len()));
    for Leased { key, progress, wait, body, lease, .. } in leased {
        match wait {
            // Not a moment early: it waits here, and is moved then.
            Some(wait) => lease.put_back(wait).await?,
            None => {
                // The database hands out large ones whole; a broker takes a reference.
                let body = match body {
                    Body::Inline(body) => Body::bounded(&body),
                    Body::Stored => Body::Stored,
                };
                // Whoever takes it there moves it to its organization's own lane, if that has one.
                let progress = progress.next(progress.attempts);
                deliveries.push(Enqueue { key, progress, lane: None, body });
                leases.push(lease);
            }
        }
    }
    to.enqueue(&deliveries).await?;
    try_join_all(leases.iter().map(|lease| lease.ack())).await?;
    Ok(deliveries.len() as u64)
}
