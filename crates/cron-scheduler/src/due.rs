//! Everything that becomes due: one question tells what is next of each kind, and a loop per kind does what there is.
//!
//! An idle scheduler asks that one question once in [`IDLE`], and nothing else.

use std::{sync::Arc, time::Duration};

use bus_core::{
    launcher::{BoxError, Heartbeat},
    notify::DUE_IDLE,
    pg::{self, Agenda, StoreError},
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The safety interval: an idle scheduler asks once in this time. Most parked waits are longer, so that they
/// cannot become due unseen between two looks; the others are announced by [`Hint::Due`].
///
/// [`Hint::Due`]: bus_core::notify::Hint::Due
pub(crate) const IDLE: Duration = DUE_IDLE;

/// The shortest time between two questions, however many hints come.
pub(crate) const SHORTEST: Duration = Duration::from_millis(20);

/// After a look at something that is due and held by another scheduler.
const HELD: Duration = Duration::from_millis(200);

/// After an error.
const AGAIN: Duration = Duration::from_secs(1);

/// What is due next, as it was read last, and when it was.
#[derive(Debug, Clone, Copy)]
struct Read {
    at: Instant,
    agenda: Agenda,
}

/// What is due next, for the loops.
#[derive(Debug)]
pub(crate) struct Due {
    read: watch::Sender<Read>,
    /// Somebody wants to know again.
    ask: Notify,
}

impl Due {
    pub(crate) fn new() -> Arc<Self> {
        let nothing = Read { at: Instant::now(), agenda: Agenda::default() };
        Arc::new(Self { read: watch::Sender::new(nothing), ask: Notify::new() })
    }

    /// There may be something that was not there at the last question.
    pub(crate) fn ask(&self) {
        self.ask.notify_one();
    }

    /// Asks at intervals, and when somebody wants to know, until the stop.
    pub(crate) async fn follow(
        self: Arc<Self>,
        pool: PgPool,
        beat: Heartbeat,
        stop: CancellationToken,
    ) -> Result<(), BoxError> {
        let agenda = async move || pg::answered("ask what is due", pg::agenda(&pool)).await;
        self.follow_with(agenda, beat, stop).await
    }

    async fn follow_with(
        self: Arc<Self>,
        agenda: impl AsyncFn() -> Result<Agenda, StoreError>,
        beat: Heartbeat,
        stop: CancellationToken,
    ) -> Result<(), BoxError> {
        while !stop.is_cancelled() {
            beat.beat();
            let rest = match agenda().await {
                Ok(agenda) => {
                    self.read.send_replace(Read { at: Instant::now(), agenda });
                    IDLE
                }
                Err(failed) => {
                    warn!(error = %Chain(&failed), "What is due waits");
                    // Nothing is known; the loops are alive all the same.
                    self.read.send_replace(Read { at: Instant::now(), agenda: Agenda::default() });
                    AGAIN
                }
            };
            stop.run_until_cancelled(self.rest(rest)).await;
        }
        Ok(())
    }

    /// Waits until there is a reason to ask: `idle` is over, or somebody wants to know. All that happens meanwhile is
    /// one reason.
    async fn rest(&self, idle: Duration) {
        sleep(SHORTEST).await;
        // Either way the answer is the same: ask again.
        let _ = timeout(idle.saturating_sub(SHORTEST), self.ask.notified()).await;
    }
}

/// The loop of one kind.
#[derive(Debug)]
pub(crate) struct Loop {
    /// What it does, for the log.
    pub(crate) what: &'static str,
    pub(crate) due: Arc<Due>,
    /// Which of the agenda's entries it is about.
    pub(crate) next: fn(&Agenda) -> Option<Duration>,
    pub(crate) beat: Heartbeat,
    pub(crate) stop: CancellationToken,
}

impl Loop {
    /// Runs until the stop. `look` does what is due, or a part of it, and answers how long there is nothing more.
    pub(crate) async fn run<E>(self, look: impl AsyncFn() -> Result<Duration, E>) -> Result<(), BoxError>
    where
        E: std::error::Error + From<StoreError> + 'static,
    {
        let mut read = self.due.read.subscribe();
        while let Some(()) = self.stop.run_until_cancelled(self.until_due(&mut read)).await {
            let mut found = false;
            loop {
                self.beat.beat();
                match pg::answered(self.what, look()).await {
                    Ok(Duration::ZERO) if !self.stop.is_cancelled() => found = true,
                    Ok(_) => break,
                    Err(failed) => {
                        warn!(what = self.what, error = %Chain(&failed), "What is due waits");
                        self.stop.run_until_cancelled(sleep(AGAIN)).await;
                        break;
                    }
                }
            }
            if !found {
                // Another scheduler holds it. It is done soon, or the database takes it from whoever is stuck.
                self.stop.run_until_cancelled(sleep(HELD)).await;
            }
            // What was read before says that it is due; only a new answer counts.
            read.mark_unchanged();
            self.due.ask();
            self.stop.run_until_cancelled(read.changed()).await;
        }
        Ok(())
    }

    /// Waits until the next of this kind is due, by the latest answer.
    async fn until_due(&self, read: &mut watch::Receiver<Read>) {
        loop {
            self.beat.beat();
            let known = *read.borrow_and_update();
            let due = (self.next)(&known.agenda).and_then(|wait| known.at.checked_add(wait));
            let changed = match due {
                Some(due) => tokio::select! {
                    biased;
                    () = sleep_until(due) => return,
                    changed = read.changed() => changed,
                },
                None => read.changed().await,
            };
            // The sender lives as long as this loop.
            if changed.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use bus_core::launcher::Health;

    use super::*;

    /// A scheduler with one loop, and how often it asked and looked.
    struct Scheduler {
        due: Arc<Due>,
        asked: Arc<AtomicU32>,
        looked: Arc<AtomicU32>,
    }

    impl Scheduler {
        /// Something is due after this time, once; the first look takes it.
        fn start(next: Option<Duration>) -> Self {
            let this = Self { due: Due::new(), asked: Arc::default(), looked: Arc::default() };
            let health = Health::default();
            let stop = CancellationToken::new();
            let begun = Instant::now();
            let one = Loop {
                what: "test",
                due: Arc::clone(&this.due),
                next: |agenda| agenda.ticks,
                beat: health.heartbeat("test", IDLE),
                stop: stop.clone(),
            };
            let looked = Arc::clone(&this.looked);
            tokio::spawn(one.run(async move || {
                looked.fetch_add(1, Ordering::SeqCst);
                Ok::<_, StoreError>(IDLE)
            }));
            let (asked, looked) = (Arc::clone(&this.asked), Arc::clone(&this.looked));
            let agenda = async move || {
                asked.fetch_add(1, Ordering::SeqCst);
                let left = next.filter(|_| looked.load(Ordering::SeqCst) == 0);
                Ok(Agenda { ticks: left.map(|at| at.saturating_sub(begun.elapsed())), ..Agenda::default() })
            };
            tokio::spawn(Arc::clone(&this.due).follow_with(agenda, health.heartbeat("agenda", IDLE), stop));
            this
        }

        fn counts(&self) -> (u32, u32) {
            (self.asked.load(Ordering::SeqCst), self.looked.load(Ordering::SeqCst))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_scheduler_asks_once_in_the_safety_interval_and_does_nothing_else() {
        let scheduler = Scheduler::start(None);
        sleep(IDLE * 10 + SHORTEST).await;
        assert_eq!(scheduler.counts(), (11, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn it_looks_when_something_is_due_and_not_before() {
        let scheduler = Scheduler::start(Some(Duration::from_millis(7_300)));
        sleep(Duration::from_millis(7_299)).await;
        assert_eq!(scheduler.counts(), (2, 0));
        sleep(Duration::from_millis(2)).await;
        assert_eq!(scheduler.counts().1, 1);
        sleep(IDLE).await;
        assert_eq!(scheduler.counts().1, 1, "what it was told before is old");
    }

    #[tokio::test(start_paused = true)]
    async fn hints_wake_it_but_do_not_make_it_spin() {
        let scheduler = Scheduler::start(None);
        sleep(Duration::from_secs(1)).await;
        for _ in 0..1_000 {
            scheduler.due.ask();
        }
        sleep(Duration::from_secs(1)).await;
        // The first hint wakes it; those that came since the question are one reason for another one.
        assert_eq!(scheduler.counts().0, 3);
    }
}
