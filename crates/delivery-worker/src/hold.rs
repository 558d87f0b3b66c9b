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
pub(crate) const HANDED_OVER: Duration = Duration::from_secs(1);

/// Between two tries to acknowledge.
const AGAIN: Duration = Duration::from_millis(200);

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

    /// The queue's own part of it, for a hold that goes on as another one.
    pub(crate) fn into_lease(self) -> Box<dyn Lease> {
        self.lease
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

    /// The delivery is finished. Insists for as long as the hold lasts: what was not acknowledged is handed out
    /// again, and the subscriber gets it twice.
    pub(crate) async fn ack(self) {
        while let Err(failed) = self.lease.ack().await {
            if self.is_lost() {
                warn!(delivery.id = %self.key.id, error = %Chain(&failed), "Finished, but not acknowledged");
                return;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The delivery comes again as `next`. False if the queue does not take it.
    pub(crate) async fn postpone(&self, next: Progress, wait: Duration) -> bool {
        match self.lease.postpone(next, wait).await {
            Ok(()) => true,
            Err(failed) => {
                warn!(delivery.id = %self.key.id, error = %Chain(&failed), "Not postponed; it is parked instead");
                false
            }
        }
    }

    /// Leaves the delivery to another worker, as it was, not before `wait` is over.
    pub(crate) async fn put_back(self, wait: Duration) {
        if let Err(failed) = self.lease.put_back(wait).await {
            warn!(delivery.id = %self.key.id, error = %Chain(&failed), "Not put back; it comes again after ack_wait");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use async_trait::async_trait;
    use bus_core::queue::QueueError;
    use uuid::Uuid;

    use super::*;

    /// Counts how often it is extended.
    #[derive(Debug)]
    struct Counting(Arc<AtomicU32>);

    #[async_trait]
    impl Lease for Counting {
        async fn ack(&self) -> Result<(), QueueError> {
            Ok(())
        }

        async fn postpone(&self, _: Progress, _: Duration) -> Result<(), QueueError> {
            Ok(())
        }

        async fn put_back(&self, _: Duration) -> Result<(), QueueError> {
            Ok(())
        }

        async fn extend(&self) -> Result<(), QueueError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn i4_a_hold_that_is_extended_in_time_lasts_and_one_that_is_lost_is_not_won_back() {
        let id = Uuid::from_u128(1);
        let key = DeliveryKey {
            id: id.into(),
            event: id.into(),
            organization: id.into(),
            subscription: id.into(),
            connection: id.into(),
            connection_version: 1,
        };
        let extended = Arc::new(AtomicU32::new(0));
        let hold = Hold::new(key, Box::new(Counting(Arc::clone(&extended))), Duration::from_secs(10));
        for _ in 0..5 {
            tokio::time::advance(Duration::from_secs(8)).await;
            assert!(!hold.is_lost());
            hold.extend().await;
        }
        assert_eq!(extended.load(Ordering::Relaxed), 5);
        // A tenth of it is not relied on.
        tokio::time::advance(Duration::from_secs(9)).await;
        assert!(hold.is_lost());
        hold.extend().await;
        assert!(hold.is_lost(), "somebody else has it");
        assert_eq!(extended.load(Ordering::Relaxed), 5, "and theirs must not be made longer");
    }
}
