//! What a worker does while the database or the broker is needed and away: it holds what it has in hand and
//! waits. Putting it back instead would send it round and round, for as long as the outage lasts.

use std::time::Duration;

use bus_core::{launcher::BoxError, telemetry::Chain};
use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::hold::Hold;

/// Between two tries. Also how often a hold is extended, so it must be well below `ack_wait`.
const AGAIN: Duration = Duration::from_secs(2);

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
    pub(crate) async fn insist<T, F>(&self, hold: &Hold, mut attempt: impl FnMut() -> F) -> Option<T>
    where
        F: Future<Output = Result<T, BoxError>>,
    {
        let mut said = false;
        loop {
            match held_during(&[hold], attempt()).await {
                Ok(done) => {
                    if said {
                        info!(delivery.id = %hold.key.id, "The delivery goes on");
                    }
                    return Some(done);
                }
                Err(failed) if !said => {
                    warn!(delivery.id = %hold.key.id, error = %Chain(failed.as_ref()), "A delivery is held until this works");
                    said = true;
                }
                Err(_) => {}
            }
            self.wait().await?;
            hold.extend().await;
        }
    }

    /// Waits between two tries. `None` at the stop.
    pub(crate) async fn wait(&self) -> Option<()> {
        self.stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await
    }
}

/// Extends the holds while `work` is under way: neither a slow database nor a slow subscriber, as long as it
/// stays below its deadline, lets them end.
pub(crate) async fn held_during<T>(holds: &[&Hold], work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(AGAIN, &mut work).await {
            Ok(done) => return done,
            Err(_) => {
                join_all(holds.iter().map(|hold| hold.extend())).await;
            }
        }
    }
}
