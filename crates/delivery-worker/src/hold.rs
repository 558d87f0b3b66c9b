//! A worker's hold on a delivery, and how long it is sure of it.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bus_core::{
    delivery::{DeliveryKey, Progress},
    queue::Lease,
    telemetry::Chain,
};
use tokio::time::Instant;
use tracing::warn;

/// At a stop, what is held is handed to another worker after this time.
const HANDED_OVER: Duration = Duration::from_secs(1);

/// A hold that knows its age. A worker that was frozen for longer than the hold lasts must not act on a failure
/// any more: somebody else has the delivery now, and may have delivered it.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) key: DeliveryKey,
    lease: Box<dyn Lease>,
    lasts: Duration,
    renewed: Mutex<Instant>,
}

impl Hold {
    /// A hold that began just now. The queue's own begin was a little earlier, so a tenth is not relied on.
    pub(crate) fn new(key: DeliveryKey, lease: Box<dyn Lease>, lasts: Duration) -> Self {
        Self { key, lease, lasts: lasts - lasts / 10, renewed: Mutex::new(Instant::now()) }
    }

    /// Whether it may have ended.
    pub(crate) fn is_lost(&self) -> bool {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner).elapsed() >= self.lasts
    }

    /// Keeps it from ending while its delivery waits. What is lost is not won back: it is somebody else's hold.
    pub(crate) async fn extend(&self) {
        if self.is_lost() {
            return;
        }
        let now = Instant::now();
        match self.lease.extend().await {
            Ok(()) => *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = now,
            Err(failed) => {
                warn!(delivery.id = %self.key.id, error = %Chain(&failed), "A hold may end before its delivery");
            }
        }
    }

    /// The delivery is finished.
    pub(crate) async fn ack(self) {
        if let Err(failed) = self.lease.ack().await {
            // The queue does not know: it will be handed out again, with the same id.
            warn!(delivery.id = %self.key.id, error = %Chain(&failed), "Finished, but not acknowledged");
        }
    }

    /// The delivery comes again as `next`.
    pub(crate) async fn postpone(self, next: Progress, wait: Duration) {
        if let Err(failed) = self.lease.postpone(next, wait).await {
            warn!(delivery.id = %self.key.id, error = %Chain(&failed), "Not postponed; it comes again after ack_wait");
        }
    }

    /// Leaves the delivery to another worker, at a stop.
    pub(crate) async fn put_back(self) {
        if let Err(failed) = self.lease.put_back(HANDED_OVER).await {
            warn!(delivery.id = %self.key.id, error = %Chain(&failed), "Not put back; it comes again after ack_wait");
        }
    }
}
