//! How a listener knows that it has heard everything.
//!
//! Hints may come late. Who has to know that none is on its way announces one of its own, a probe: a transport keeps
//! the order, so once the probe comes back, all that was announced before it has come too.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};
use tracing::debug;
use uuid::Uuid;

use super::{Hint, Notifier};
use crate::{ids::Ids, telemetry::Chain};

/// What a listener knows may be this old when it acts on it. So one that is always busy sends four probes a second,
/// and one that is idle sends one for each time that it has to know.
pub const MAX_AGE: Duration = Duration::from_millis(250);

/// So long after an announcement was made nobody acts any more on what he knew before it. Twice [`MAX_AGE`]: the rest
/// is for the time between a decision and the first byte that follows from it, and for the way between the servers
/// of a cluster. Part of the protocol between the processes: it may only be changed for all of them at a time.
pub const SETTLED: Duration = Duration::from_millis(500);

/// How long a probe may take to come back.
const PROBE: Duration = Duration::from_secs(3);

/// As of when a listener has applied all that was announced. The listener reports the probes that it hears; whoever
/// acts on what the listener keeps asks first whether that is current. Clones share it.
#[derive(Debug, Clone)]
pub struct Current {
    notifier: Arc<dyn Notifier>,
    ids: Arc<dyn Ids>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Held by the one who probes for all who wait.
    probing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// What was announced before this moment is applied.
    as_of: Option<Instant>,
    /// The probe that is on its way.
    probe: Option<(Uuid, oneshot::Sender<bool>)>,
}

impl Current {
    /// For one listener of this notifier. It is not current before its first probe.
    pub fn new(notifier: Arc<dyn Notifier>, ids: Arc<dyn Ids>) -> Self {
        Self { notifier, ids, shared: Arc::default() }
    }

    /// Makes sure that all is applied that was announced longer than [`MAX_AGE`] ago. False if that cannot be had
    /// within three seconds.
    pub async fn catch_up(&self) -> bool {
        self.is_current() || timeout(PROBE, self.probe()).await.unwrap_or(false)
    }

    /// Whether this is the probe that somebody waits for.
    pub fn awaits(&self, probe: Uuid) -> bool {
        self.state().probe.as_ref().is_some_and(|(awaited, _)| *awaited == probe)
    }

    /// The listener has heard this probe, and has applied what it heard before. `complete` says whether it was all:
    /// false as long as something that was missed has not been read again.
    pub fn heard(&self, probe: Uuid, complete: bool) {
        if self.awaits(probe)
            && let Some((_, answer)) = self.state().probe.take()
        {
            // Whoever waited may have given up.
            let _ = answer.send(complete);
        }
    }

    async fn probe(&self) -> bool {
        let _one_at_a_time = self.shared.probing.lock().await;
        // Somebody else may have done it meanwhile.
        if self.is_current() {
            return true;
        }
        let (probe, began) = (self.ids.next(), Instant::now());
        let (answer, heard) = oneshot::channel();
        self.state().probe = Some((probe, answer));
        if let Err(failed) = self.notifier.announce(&[Hint::Probe(probe)]).await {
            debug!(error = %Chain(&failed), "Cannot catch up with the hints");
            return false;
        }
        // An error says that another probe has taken its place.
        if heard.await.unwrap_or(false) {
            self.state().as_of = Some(began);
        }
        self.is_current()
    }

    fn is_current(&self) -> bool {
        self.state().as_of.is_some_and(|at| at.elapsed() <= MAX_AGE)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, future::join_all, stream::BoxStream};

    use super::*;
    use crate::{
        ids::SystemIds,
        notify::{MemoryNotifier, Polling},
    };

    fn of(notifier: impl Notifier + 'static) -> (Current, BoxStream<'static, Hint>) {
        let hints = notifier.listen();
        (Current::new(Arc::new(notifier), Arc::new(SystemIds)), hints)
    }

    /// Answers every probe so, and counts them.
    async fn answer(current: Current, hints: BoxStream<'static, Hint>, complete: bool, probes: &Mutex<u32>) {
        let answered = hints.for_each(|hint| {
            if let Hint::Probe(probe) = hint {
                *probes.lock().expect("nobody panics") += 1;
                current.heard(probe, complete);
            }
            std::future::ready(())
        });
        answered.await;
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_serves_all_who_wait_and_all_who_come_soon() {
        let (current, hints) = of(MemoryNotifier::default());
        let probes = Mutex::new(0);
        let asked = async {
            for round in 1..=3 {
                let all = join_all((0..100).map(|_| current.catch_up())).await;
                assert!(all.iter().all(|caught_up| *caught_up));
                tokio::time::advance(MAX_AGE).await;
                assert!(current.catch_up().await);
                assert_eq!(*probes.lock().expect("nobody panics"), round);
                tokio::time::advance(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = asked => {}
            () = answer(current.clone(), hints, true, &probes) => unreachable!("hints never end"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_missed_something_or_hears_nothing_is_not_current() {
        let (current, hints) = of(MemoryNotifier::default());
        assert!(!current.catch_up().await, "nobody answers");
        current.heard(SystemIds.next(), true);
        assert!(!current.catch_up().await, "another one's probe proves nothing");
        let probes = Mutex::new(0);
        tokio::select! {
            caught_up = current.catch_up() => assert!(!caught_up),
            () = answer(current.clone(), hints, false, &probes) => unreachable!("hints never end"),
        }
        let (polling, _) = of(Polling::new(Duration::from_secs(1)));
        assert!(!polling.catch_up().await);
    }
}
