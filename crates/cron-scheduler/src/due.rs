//! The loop of everything that becomes due: look, do what there is, rest until there may be more.

use std::{fmt, sync::Arc, time::Duration};

use bus_core::{
    launcher::{BoxError, Heartbeat},
    notify::DUE_IDLE,
    telemetry::Chain,
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The safety interval: an idle scheduler asks once in this time. Most parked waits are longer, so that they
/// cannot become due unseen between two looks; the others are announced by [`Hint::Due`].
///
/// [`Hint::Due`]: bus_core::notify::Hint::Due
pub(crate) const IDLE: Duration = DUE_IDLE;

/// The shortest sleep between two looks that found nothing to do, however many hints come.
pub(crate) const SHORTEST: Duration = Duration::from_millis(20);

/// After an error.
const AGAIN: Duration = Duration::from_secs(1);

/// One such loop.
#[derive(Debug)]
pub(crate) struct Loop {
    /// What it does, for the log.
    pub(crate) what: &'static str,
    /// Says that there may be something to do.
    pub(crate) wake: Arc<Notify>,
    pub(crate) beat: Heartbeat,
    pub(crate) stop: CancellationToken,
}

impl Loop {
    /// Runs until the stop. `look` does what there is to do, or a part of it, and answers how long there is
    /// nothing more.
    pub(crate) async fn run<E>(self, look: impl AsyncFn() -> Result<Duration, E>) -> Result<(), BoxError>
    where
        E: std::error::Error + fmt::Debug + 'static,
    {
        while !self.stop.is_cancelled() {
            self.beat.beat();
            let idle = look().await.unwrap_or_else(|failed| {
                warn!(what = self.what, error = %Chain(&failed), "What is due waits");
                AGAIN
            });
            self.stop.run_until_cancelled(rest(idle, &self.wake)).await;
        }
        Ok(())
    }
}

/// Waits until there may be something to do: `idle`, or shorter if something became due. All that was
/// announced since the last look is one reason to look again.
async fn rest(idle: Duration, due: &Notify) {
    let shortest = idle.min(SHORTEST);
    sleep(shortest).await;
    // Either way the answer is the same: look again.
    let _ = timeout(idle - shortest, due.notified()).await;
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
