//! Hints within one process.

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    future::ready,
    stream::{self, BoxStream},
};
use tokio::sync::broadcast::{self, error::RecvError};

use super::{AnnounceError, Hint, Notifier};

/// Hints that a slow listener may be behind; beyond it, it is told that it missed some.
const BACKLOG: usize = 1024;

/// Hints within one process. Clones share their listeners.
#[derive(Debug, Clone)]
pub struct MemoryNotifier(broadcast::Sender<Hint>);

impl Default for MemoryNotifier {
    fn default() -> Self {
        Self(broadcast::Sender::new(BACKLOG))
    }
}

impl MemoryNotifier {
    /// Tells every listener.
    pub(super) fn tell(&self, hint: Hint) {
        // Nobody listens: nobody needs it.
        let _ = self.0.send(hint);
    }
}

#[async_trait]
impl Notifier for MemoryNotifier {
    async fn notify(&self, hint: Hint) {
        self.tell(hint);
    }

    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError> {
        hints.iter().for_each(|hint| self.tell(*hint));
        Ok(())
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        let heard = stream::unfold(self.0.subscribe(), |mut heard| async move {
            let hint = match heard.recv().await {
                Ok(hint) => hint,
                Err(RecvError::Lagged(_)) => Hint::Missed,
                Err(RecvError::Closed) => return None,
            };
            Some((hint, heard))
        });
        // Without anybody who could tell, it is silent, but does not end.
        stream::once(ready(Hint::Missed)).chain(heard).chain(stream::pending()).boxed()
    }

    async fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn everyone_who_listens_is_told() {
        let notifier = MemoryNotifier::default();
        notifier.notify(Hint::Enqueued).await;
        let (mut one, mut other) = (notifier.listen(), notifier.clone().listen());
        notifier.notify(Hint::Due).await;
        for listener in [&mut one, &mut other] {
            assert_eq!(listener.next().await, Some(Hint::Missed), "the first one");
            assert_eq!(listener.next().await, Some(Hint::Due));
        }
        drop(notifier);
        assert_eq!(one.next().now_or_never(), None, "silent, but not over");
    }

    #[tokio::test]
    async fn whoever_falls_behind_is_told_so() {
        let notifier = MemoryNotifier::default();
        let mut slow = notifier.listen();
        for _ in 0..=BACKLOG {
            notifier.notify(Hint::Due).await;
        }
        assert_eq!(slow.next().await, Some(Hint::Missed), "the first one");
        assert_eq!(slow.next().await, Some(Hint::Missed));
        assert_eq!(slow.next().await, Some(Hint::Due));
    }
}
