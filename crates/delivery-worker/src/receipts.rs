//! Receipts: sent in batches beside the deliveries, which never wait for them.

use std::{sync::Arc, time::Duration};

use bus_core::{queue::DeliveryQueue, receipt::Receipt, telemetry::Chain};
use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

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
        // A batch that cannot be sent holds the channel up until it fills, and then the gap is counted.
        while let Err(failed) = queue.receipts(&batch).await {
            warn!(error = %Chain(&failed), receipts = batch.len(), "Receipts not sent yet");
            if stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await.is_none() {
                counter!("bus_receipts_lost").increment(batch.len() as u64);
                break;
            }
        }
        batch.clear();
    }
}
