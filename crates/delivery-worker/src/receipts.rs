//! Receipts: sent in batches beside the deliveries, which never wait for them.

use std::{sync::Arc, time::Duration};

use bus_core::{queue::DeliveryQueue, receipt::Receipt, telemetry::Chain};
use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

/// Receipts of one message or statement.
const BATCH: usize = 500;

/// How long a batch gathers.
const GATHER: Duration = Duration::from_millis(100);

/// Between two tries to send a batch.
const AGAIN: Duration = Duration::from_secs(1);

/// The way to history. Cheap to clone; the batches end with the last clone.
#[derive(Debug, Clone)]
pub(crate) struct Receipts(mpsc::Sender<Receipt>);

impl Receipts {
    pub(crate) fn start(
        queue: Arc<dyn DeliveryQueue>,
        buffer: usize,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let (sender, receipts) = mpsc::channel(buffer.max(1));
        tasks.spawn(forward(queue, receipts, stop));
        Self(sender)
    }

    /// Never waits: if history is that far behind, the gap is counted.
    pub(crate) fn send(&self, receipt: Receipt) {
        if self.0.try_send(receipt).is_err() {
            counter!("bus_receipts_lost").increment(1);
        }
    }
}

async fn forward(
    queue: Arc<dyn DeliveryQueue>,
    mut receipts: mpsc::Receiver<Receipt>,
    stop: CancellationToken,
) {
    let mut batch = Vec::with_capacity(BATCH);
    while receipts.recv_many(&mut batch, BATCH).await > 0 {
        if batch.len() < BATCH {
            stop.run_until_cancelled(tokio::time::sleep(GATHER)).await;
            while batch.len() < BATCH
                && let Ok(receipt) = receipts.try_recv()
            {
                batch.push(receipt);
            }
        }
        if !send(queue.as_ref(), &batch, &stop).await {
            // What comes after it would wait as long, and whoever stops must not.
            receipts.close();
            let mut left = batch.len() as u64;
            while receipts.try_recv().is_ok() {
                left += 1;
            }
            counter!("bus_receipts_lost").increment(left);
            return;
        }
        batch.clear();
    }
}

/// Sends a batch, as often as it takes. One that cannot be sent, because the broker is away or the stream is full,
/// holds the channel up until that fills, and then the gap is counted. `false` if it could not be sent before the
/// process stops.
async fn send(queue: &dyn DeliveryQueue, batch: &[Receipt], stop: &CancellationToken) -> bool {
    let mut said: Option<String> = None;
    while let Err(failed) = queue.receipts(batch).await {
        // Once per cause: a stream may be full for days.
        let cause = Chain(&failed).to_string();
        if said.as_ref() != Some(&cause) {
            warn!(error = cause, "Receipts are not taken; deliveries go on without them");
            said = Some(cause);
        }
        if stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await.is_none() {
            return false;
        }
    }
    if said.is_some() {
        info!("Receipts are taken again");
    }
    true
}

#[cfg(test)]
#[path = "receipts_tests.rs"]
mod tests;
