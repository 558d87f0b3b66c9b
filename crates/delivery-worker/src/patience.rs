//! What a worker does while the database or the broker is needed and away: it holds what it has in hand and
//! waits. Putting it back instead would send it round and round, for as long as the outage lasts.

use std::{
    error::Error,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bus_core::{
    launcher::BoxError,
    pg::{self, StoreError},
    telemetry::Chain,
};
use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

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

    /// Repeats `attempt` until it succeeds, extending the holds of those that wait for it. `None` at the stop, and for
    /// an error that does not pass by itself: whoever puts the deliveries back then gets rid of them, and of their
    /// slots, until they were handed out too often.
    pub(crate) async fn insist<T, F>(&self, holds: &[&Hold], mut attempt: impl FnMut() -> F) -> Option<T>
    where
        F: Future<Output = Result<T, BoxError>>,
    {
        let mut said = false;
        // One of a batch stands for all.
        let first = holds.first().map(|hold| tracing::field::display(hold.key.id));
        loop {
            let answered = pin!(pg::answered("bring a delivery on", attempt()));
            match held_during(holds, answered).await {
                Ok(done) => {
                    if said {
                        info!(delivery.id = first, "The delivery goes on");
                    }
                    return Some(done);
                }
                Err(failed) if !passes(failed.as_ref()) => {
                    error!(delivery.id = first, error = %Chain(failed.as_ref()), "A delivery cannot go on");
                    return None;
                }
                Err(failed) if !said => {
                    warn!(delivery.id = first, error = %Chain(failed.as_ref()), "A delivery is held until this works");
                    said = true;
                }
                Err(_) => {}
            }
            self.wait().await?;
            join_all(holds.iter().map(|hold| hold.extend())).await;
        }
    }

    /// Waits between two tries. `None` at the stop.
    pub(crate) async fn wait(&self) -> Option<()> {
        self.stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await
    }
}

/// Whether the same may succeed later: the broker's errors may, and those of a database that is away.
fn passes(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source())
        .find_map(|error| {
            let shared = error.downcast_ref::<Arc<StoreError>>().map(|error| error.as_ref());
            shared.or_else(|| error.downcast_ref::<StoreError>())
        })
        .is_none_or(StoreError::is_unavailable)
}

/// Extends the holds while `work` is under way: neither a slow database nor a slow subscriber, as long as it
/// stays below its deadline, lets them end.
///
/// The work is the caller's, pinned: given as a value it would be kept twice, and copied for every delivery.
pub(crate) async fn held_during<F: Future>(holds: &[&Hold], mut work: Pin<&mut F>) -> F::Output {
    loop {
        match tokio::time::timeout(AGAIN, &mut work).await {
            Ok(done) => return done,
            Err(_) => {
                join_all(holds.iter().map(|hold| hold.extend())).await;
            }
        }
    }
}
