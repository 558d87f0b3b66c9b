//! Several transports at once.

use std::sync::Arc;

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    future::join_all,
    stream::{self, BoxStream, select_all},
};

use super::{AnnounceError, Hint, Notifier};

/// Hints that are looked at together, at most.
const TOGETHER: usize = 256;

/// Sends by every transport and listens to all of them: as long as one of them works, hints arrive in time.
/// A hint comes once from each, which does no harm.
///
/// The first one has the word: it must take what is announced, and by it listeners catch up. If any would do for
/// either, two processes could choose different ones, and one would miss what the other has announced.
#[derive(Debug, Clone)]
pub struct Compose {
    first: Arc<dyn Notifier>,
    others: Vec<Arc<dyn Notifier>>,
}

impl Compose {
    /// All of these.
    pub fn new(first: Arc<dyn Notifier>, others: Vec<Arc<dyn Notifier>>) -> Self {
        Self { first, others }
    }

    fn parts(&self) -> impl Iterator<Item = &Arc<dyn Notifier>> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

#[async_trait]
impl Notifier for Compose {
    async fn notify(&self, hint: Hint) {
        for part in self.parts() {
            part.notify(hint).await;
        }
    }

    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError> {
        let news = hints.iter().filter(|hint| !matches!(hint, Hint::Probe(_)));
        for hint in news {
            for other in &self.others {
                other.notify(*hint).await;
            }
        }
        self.first.announce(hints).await
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        select_all(self.parts().map(|part| part.listen()))
            .ready_chunks(TOGETHER)
            .flat_map(|heard| stream::iter(merged(heard)))
            .boxed()
    }

    async fn flush(&self) {
        join_all(self.parts().map(|part| part.flush())).await;
    }
}

/// What was heard at one moment: reading again once is enough for all that say so.
fn merged(mut heard: Vec<Hint>) -> Vec<Hint> {
    let mut missed = false;
    heard.retain(|hint| *hint != Hint::Missed || !std::mem::replace(&mut missed, true));
    heard
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt as _;
    use uuid::Uuid;

    use super::{
        super::{MemoryNotifier, Polling},
        *,
    };

    #[tokio::test]
    async fn sends_by_all_and_hears_all() {
        let (one, other) = (MemoryNotifier::default(), MemoryNotifier::default());
        let both = Compose::new(Arc::new(one.clone()), vec![Arc::new(other.clone())]);
        let mut hints = both.listen();
        one.notify(Hint::Due).await;
        other.notify(Hint::Enqueued).await;
        let mut heard = Vec::new();
        while let Some(hint) = hints.next().now_or_never() {
            heard.push(hint.expect("it never ends"));
        }
        assert_eq!(heard.iter().filter(|hint| **hint == Hint::Missed).count(), 1, "{heard:?}");
        assert_eq!(heard.len(), 3, "{heard:?}");
        let mut heard_by_parts = [one.listen().skip(1), other.listen().skip(1)];
        both.notify(Hint::Enqueued).await;
        for part in &mut heard_by_parts {
            assert_eq!(part.next().await, Some(Hint::Enqueued));
        }
    }
    #[tokio::test]
    async fn the_first_one_has_the_word() {
        let (one, other) = (MemoryNotifier::default(), MemoryNotifier::default());
        let both = Compose::new(Arc::new(one.clone()), vec![Arc::new(other.clone())]);
        let mut heard_by_parts = [one.listen().skip(1), other.listen().skip(1)];
        let probe = Hint::Probe(Uuid::from_u128(1));
        both.announce(&[probe, Hint::Due]).await.expect("the first one takes it");
        assert_eq!(heard_by_parts[0].next().await, Some(probe));
        assert_eq!(heard_by_parts[0].next().await, Some(Hint::Due));
        assert_eq!(heard_by_parts[1].next().await, Some(Hint::Due), "a probe is for the first one alone");
        let silent = Compose::new(Arc::new(Polling::new(Duration::from_secs(1))), vec![Arc::new(other)]);
        silent.announce(&[probe]).await.expect_err("the first one cannot");
    }
}
