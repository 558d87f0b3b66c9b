//! What a worker does while the database or the broker is needed and away: it holds what it has in hand and
//! waits. Putting it back instead would count attempts that were never made (invariant I4).

use std::time::Duration;

use bus_core::{delivery::DeliveryKey, launcher::BoxError, queue::Lease, telemetry::Chain};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Between two tries. Also how often a hold is extended, so it must be well below `ack_wait`.
const AGAIN: Duration = Duration::from_secs(2);

/// At a stop, what is held is handed to another worker after this time.
const HANDED_OVER: Duration = Duration::from_secs(1);

/// Insists until the stop.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    stop: CancellationToken,
}

impl Patience {
    pub(crate) fn new(stop: CancellationToken) -> Self {
        Self { stop }
    }

    /// Repeats `attempt` until it succeeds, extending the hold meanwhile. `None` at the stop.
    pub(crate) async fn insist<T, F>(
        &self,
        lease: &dyn Lease,
        key: &DeliveryKey,
        mut attempt: impl FnMut() -> F,
    ) -> Option<T>
    where
        F: Future<Output = Result<T, BoxError>>,
    {
        let mut said = false;
        loop {
            match held_during(lease, key, attempt()).await {
                Ok(done) => {
                    if said {
                        info!(delivery.id = %key.id, "The delivery goes on");
                    }
                    return Some(done);
                }
                Err(failed) if !said => {
                    warn!(delivery.id = %key.id, error = %Chain(failed.as_ref()), "A delivery is held until this works");
                    said = true;
                }
                Err(_) => {}
            }
            self.wait().await?;
            extend(lease, key).await;
        }
    }

    /// Waits between two tries. `None` at the stop.
    pub(crate) async fn wait(&self) -> Option<()> {
        self.stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await
    }
}

/// Extends the hold while `work` is under way: a slow database must not let it end either.
async fn held_during<T>(lease: &dyn Lease, key: &DeliveryKey, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(AGAIN, &mut work).await {
            Ok(done) => return done,
            Err(_) => extend(lease, key).await,
        }
    }
}

/// Keeps a hold from ending while its delivery waits.
pub(crate) async fn extend(lease: &dyn Lease, key: &DeliveryKey) {
    if let Err(failed) = lease.extend().await {
        warn!(delivery.id = %key.id, error = %Chain(&failed), "A hold may end before its delivery");
    }
}

/// Leaves a delivery to another worker, at a stop.
pub(crate) async fn put_back(lease: Box<dyn Lease>, key: &DeliveryKey) {
    if let Err(failed) = lease.retry(HANDED_OVER).await {
        warn!(delivery.id = %key.id, error = %Chain(&failed), "Not put back; it comes again after ack_wait");
    }
}
