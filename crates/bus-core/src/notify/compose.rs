//! Several transports at once.

use std::sync::Arc;

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    future::join_all,
    stream::{self, BoxStream, select_all},
};

use super::{Hint, Notifier};

/// Hints that are looked at together, at most.
const TOGETHER: usize = 256;

/// Sends by every transport and listens to all of them: as long as one of them works, hints arrive in time.
/// A hint comes once from each, which does no harm.
#[derive(Debug, Clone)]
pub struct Compose(Vec<Arc<dyn Notifier>>);

impl Compose {
    /// All of these.
    pub fn new(parts: Vec<Arc<dyn Notifier>>) -> Self {
        Self(parts)
    }
}

#[async_trait]
impl Notifier for Compose {
    async fn notify(&self, hint: Hint) {
        for part in &self.0 {
            part.notify(hint).await;
        }
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        select_all(self.0.iter().map(|part| part.listen()))
            .ready_chunks(TOGETHER)
            .flat_map(|heard| stream::iter(merged(heard)))
            .boxed()
    }

    async fn flush(&self) {
        join_all(self.0.iter().map(|part| part.flush())).await;
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
    use super::{super::MemoryNotifier, *};
    use futures::FutureExt as _;

    #[tokio::test]
    async fn sends_by_all_and_hears_all() {
        let (one, other) = (MemoryNotifier::default(), MemoryNotifier::default());
        let both = Compose::new(vec![Arc::new(one.clone()), Arc::new(other.clone())]);
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
}
