//! No hints at all, for those who have nothing to carry them.

use std::time::Duration;

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::time::{MissedTickBehavior, interval};

use super::{AnnounceError, Hint, Notifier};

/// Says nothing, and tells its listeners at an interval that they may have missed something. `LISTEN` needs
/// a session of its own, which a pooler in transaction mode does not give.
#[derive(Debug, Clone, Copy)]
pub struct Polling {
    every: Duration,
}

impl Polling {
    /// A [`Hint::Missed`] at once and then `every` so often. Not zero.
    pub fn new(every: Duration) -> Self {
        Self { every }
    }
}

#[async_trait]
impl Notifier for Polling {
    async fn notify(&self, _: Hint) {}

    /// There is nobody to tell: a probe fails, so that every listener asks the database, which has the news by now.
    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError> {
        let probes = hints.iter().any(|hint| matches!(hint, Hint::Probe(_)));
        if probes { Err(AnnounceError::NoTransport) } else { Ok(()) }
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        let mut ticks = interval(self.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        stream::unfold(ticks, |mut ticks| async move {
            ticks.tick().await;
            Some((Hint::Missed, ticks))
        })
        .boxed()
    }

    async fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn says_at_every_interval_that_something_may_have_been_missed() {
        let notifier = Polling::new(Duration::from_secs(1));
        let mut hints = notifier.listen();
        let begun = Instant::now();
        for second in 0..3 {
            assert_eq!(hints.next().await, Some(Hint::Missed));
            assert_eq!(begun.elapsed(), Duration::from_secs(second));
        }
    }
}
