//! The way out to a transport that may be away.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use metrics::counter;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::Hint;
use crate::{launcher::BoxError, telemetry::Chain};

/// Hints that wait, at most; beyond it one [`Hint::Missed`] stands for all that found no room.
const WAITING: usize = 1024;

/// Between two tries while the transport is away.
const AGAIN: Duration = Duration::from_millis(500);

/// How long a flush waits, at most.
const FLUSH: Duration = Duration::from_secs(2);

/// Gathers hints and sends them from a task of its own, so that no caller waits for a transport. What has
/// gathered while the last ones were under way is sent together, each hint once; what cannot be sent is tried
/// again, since those who listen need not be cut off as well. The task ends with the last clone.
#[derive(Debug, Clone)]
pub(super) struct Outgoing {
    items: mpsc::Sender<Item>,
    overflowed: Arc<AtomicBool>,
}

enum Item {
    Hint(Hint),
    /// All before it are to be sent.
    Flush(oneshot::Sender<()>),
}

impl Outgoing {
    /// Sends by `send`, which is given distinct hints. `transport` names it in the log.
    pub(super) fn start<F>(
        transport: &'static str,
        send: impl Fn(Vec<Hint>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), BoxError>> + Send,
    {
        let (items, mut gathered) = mpsc::channel(WAITING);
        let overflowed = Arc::new(AtomicBool::new(false));
        let lost = Arc::clone(&overflowed);
        tokio::spawn(async move {
            let mut batch = Vec::new();
            while gathered.recv_many(&mut batch, WAITING).await > 0 {
                let (mut hints, mut flushes) = (HashSet::new(), Vec::new());
                for item in batch.drain(..) {
                    match item {
                        Item::Hint(hint) => drop(hints.insert(hint)),
                        Item::Flush(done) => flushes.push(done),
                    }
                }
                if lost.swap(false, Ordering::AcqRel) {
                    hints.insert(Hint::Missed);
                }
                insist(transport, &send, hints.into_iter().collect(), &gathered).await;
                for done in flushes {
                    // Whoever waited may have given up.
                    let _ = done.send(());
                }
            }
        });
        Self { items, overflowed }
    }

    pub(super) fn put(&self, hint: Hint) {
        if self.items.try_send(Item::Hint(hint)).is_err() {
            counter!("bus_hints_dropped").increment(1);
            self.overflowed.store(true, Ordering::Release);
        }
    }

    /// Waits until all so far are sent, not for ever.
    pub(super) async fn flush(&self) {
        let flushed = async {
            let (done, sent) = oneshot::channel();
            if self.items.send(Item::Flush(done)).await.is_ok() {
                // An error says that the task is gone, and all with it.
                let _ = sent.await;
            }
        };
        if tokio::time::timeout(FLUSH, flushed).await.is_err() {
            warn!("The last hints may not have been sent");
        }
    }
}

/// Sends, as often as it takes, unless nobody is left to send for.
async fn insist<F>(
    transport: &'static str,
    send: impl Fn(Vec<Hint>) -> F,
    hints: Vec<Hint>,
    gathered: &mpsc::Receiver<Item>,
) where
    F: Future<Output = Result<(), BoxError>>,
{
    let mut said = false;
    while !hints.is_empty() {
        match send(hints.clone()).await {
            Ok(()) => break,
            Err(_) if gathered.is_closed() => return,
            Err(failed) => {
                if !std::mem::replace(&mut said, true) {
                    warn!(transport, error = %Chain(failed.as_ref()), "Hints wait; others learn of changes late");
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
    if said {
        info!(transport, "Hints are sent again");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Mutex;

    use super::*;

    /// A transport that is away while `away` says so, and what reached it.
    fn transport(away: Arc<AtomicBool>) -> (Outgoing, Arc<Mutex<Vec<Vec<Hint>>>>) {
        let sent: Arc<Mutex<Vec<Vec<Hint>>>> = Arc::default();
        let to = Arc::clone(&sent);
        let outgoing = Outgoing::start("test", move |hints| {
            let (away, to) = (Arc::clone(&away), Arc::clone(&to));
            async move {
                if away.load(Ordering::Acquire) {
                    return Err("away".into());
                }
                to.lock().unwrap().push(hints);
                Ok(())
            }
        });
        (outgoing, sent)
    }

    #[tokio::test(start_paused = true)]
    async fn what_gathers_is_sent_together_and_once() {
        let (outgoing, sent) = transport(Arc::default());
        for _ in 0..100 {
            outgoing.put(Hint::Enqueued);
            outgoing.put(Hint::Due);
        }
        outgoing.flush().await;
        let sent = sent.lock().unwrap();
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].iter().collect::<HashSet<_>>(), HashSet::from([&Hint::Enqueued, &Hint::Due]));
        assert_eq!(sent[0].len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_transport_that_is_away_and_too_many_become_one() {
        let away = Arc::new(AtomicBool::new(true));
        let (outgoing, sent) = transport(Arc::clone(&away));
        for _ in 0..WAITING * 3 {
            outgoing.put(Hint::Due);
        }
        outgoing.flush().await;
        assert!(sent.lock().unwrap().is_empty());
        away.store(false, Ordering::Release);
        outgoing.flush().await;
        let sent: HashSet<Hint> = sent.lock().unwrap().iter().flatten().copied().collect();
        assert_eq!(sent, HashSet::from([Hint::Due, Hint::Missed]));
    }
}
