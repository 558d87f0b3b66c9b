//! How many processes of one kind there are, so that they can share what is limited for all of them together.
//!
//! Each says by a hint that it is there, and counts whom it hears. Nobody leads and nothing is stored: what a process
//! believes may be wrong for the seconds in which another one comes or goes, and a limit is exceeded, or not made full
//! use of, for as long.

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use metrics::gauge;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::info;
use uuid::Uuid;

use crate::notify::{Hint, Notifier};

/// Between two announcements.
const EVERY: Duration = Duration::from_secs(2);

/// Who has not been heard for so long is gone.
const HEARD: Duration = Duration::from_secs(10);

/// Processes that share limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerRole {
    /// They share the limits of publishing.
    Publisher,
    /// They share the limits of delivering.
    DeliveryWorker,
}

impl PeerRole {
    const ALL: [Self; 2] = [Self::Publisher, Self::DeliveryWorker];

    /// Its word in a hint.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Publisher => "publisher",
            Self::DeliveryWorker => "delivery-worker",
        }
    }

    /// The role with this word. `None` for one that this version does not know.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == word)
    }
}

impl fmt::Display for PeerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How many processes share what is limited. Clones share the count.
#[derive(Debug, Clone)]
pub struct Peers(Arc<AtomicU32>);

impl Peers {
    /// Nobody else.
    pub fn alone() -> Self {
        Self(Arc::new(AtomicU32::new(1)))
    }

    /// Announces this process as `instance` of `role` and counts those who do the same, until the stop. As long as
    /// none is heard it counts itself; without a transport that carries hints it stays so.
    pub fn start(
        hints: Arc<dyn Notifier>,
        role: PeerRole,
        instance: Uuid,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let peers = Self::alone();
        let counting = follow(hints, role, instance, peers.clone());
        tasks.spawn(stop.run_until_cancelled_owned(counting));
        peers
    }

    /// How many there are, this one included.
    pub fn count(&self) -> NonZeroU32 {
        NonZeroU32::new(self.0.load(Ordering::Relaxed)).unwrap_or(NonZeroU32::MIN)
    }

    /// This process's share of a number of places. At least one: of fewer places than processes each still takes one.
    pub fn share(&self, limit: u32) -> u32 {
        (limit / self.count()).max(1)
    }

    /// This process's share of a rate.
    pub fn share_of_rate(&self, per_second: f64) -> f64 {
        per_second / f64::from(self.count().get())
    }
}

/// Never ends.
async fn follow(hints: Arc<dyn Notifier>, role: PeerRole, instance: Uuid, peers: Peers) {
    let mut heard = Heard::new(instance);
    let alive = Hint::Alive { role, instance };
    let mut news = hints.listen();
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let shown = gauge!("bus_peers", "role" => role.as_str());
    loop {
        tokio::select! {
            _ = ticks.tick() => hints.notify(alive).await,
            hint = news.next() => match hint {
                // Whoever is new knows of us without having to wait.
                Some(Hint::Alive { role: of, instance }) if of == role => {
                    if heard.hear(instance, Instant::now()) && instance != heard.own {
                        hints.notify(alive).await;
                    }
                }
                Some(_) => {}
                None => return,
            },
        }
        if let Some(count) = heard.count(Instant::now()) {
            let before = peers.0.swap(count.get(), Ordering::Relaxed);
            if before != count.get() {
                info!(%role, before, now = count, "The number of processes has changed");
            }
        }
        shown.set(peers.count().get());
    }
}

/// Whom this process has heard, and when last.
#[derive(Debug)]
struct Heard {
    own: Uuid,
    last: HashMap<Uuid, Instant>,
    /// When it began to hear again, after it had not heard itself.
    resumed: Option<Instant>,
    believed: u32,
}

impl Heard {
    fn new(own: Uuid) -> Self {
        Self { own, last: HashMap::new(), resumed: None, believed: 1 }
    }

    /// Whether this one is new.
    fn hear(&mut self, instance: Uuid, now: Instant) -> bool {
        let before = self.last.insert(instance, now);
        if instance == self.own && before.is_none_or(|at| now.duration_since(at) > HEARD) {
            self.resumed = Some(now);
        }
        before.is_none()
    }

    /// How many there are. `None` if this process does not hear itself: it would not hear the others either, and
    /// what it believed before is the better guess. It also is for a while after it hears itself again: the others may be
    /// heard only later.
    fn count(&mut self, now: Instant) -> Option<NonZeroU32> {
        let is_fresh = |at: &Instant| now.duration_since(*at) <= HEARD;
        if !self.last.get(&self.own).is_some_and(is_fresh) {
            return None;
        }
        self.last.retain(|_, at| is_fresh(at));
        let heard = u32::try_from(self.last.len()).unwrap_or(u32::MAX);
        let is_early = self.resumed.is_some_and(|at| now.duration_since(at) < EVERY * 2);
        self.believed = if is_early { heard.max(self.believed) } else { heard };
        NonZeroU32::new(self.believed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::notify::{MemoryNotifier, Polling};

    const WORKER: PeerRole = PeerRole::DeliveryWorker;

    /// A process that can be stopped.
    struct Process {
        peers: Peers,
        stop: CancellationToken,
    }

    impl Process {
        fn start(hints: impl Notifier + 'static, role: PeerRole, instance: u128) -> Self {
            let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
            let instance = Uuid::from_u128(instance);
            let peers = Peers::start(Arc::new(hints), role, instance, &tasks, stop.clone());
            Self { peers, stop }
        }

        fn count(&self) -> u32 {
            self.peers.count().get()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_come_and_go_are_counted_by_role() {
        let hints = MemoryNotifier::default();
        let one = Process::start(hints.clone(), WORKER, 1);
        let other = Process::start(hints.clone(), WORKER, 2);
        let publisher = Process::start(hints.clone(), PeerRole::Publisher, 3);
        tokio::time::sleep(EVERY / 2).await;
        assert_eq!((one.count(), other.count(), publisher.count()), (2, 2, 1));
        let late = Process::start(hints, WORKER, 4);
        tokio::time::sleep(EVERY / 2).await;
        assert_eq!(
            (one.count(), late.count()),
            (3, 3),
            "they do not wait for each other's next announcement"
        );
        assert_eq!(one.peers.share(64), 21);
        assert_eq!(one.peers.share(2), 1, "everyone takes one");
        assert!((one.peers.share_of_rate(1.5) - 0.5).abs() < f64::EPSILON);
        other.stop.cancel();
        late.stop.cancel();
        tokio::time::sleep(HEARD + EVERY * 2).await;
        assert_eq!((one.count(), other.count()), (1, 3), "who stopped does not count any more");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_transport_there_is_one() {
        let process = Process::start(Polling::new(Duration::from_secs(1)), WORKER, 1);
        tokio::time::sleep(HEARD * 2).await;
        assert_eq!(process.count(), 1);
    }

    #[test]
    fn who_is_cut_off_believes_what_it_knew() {
        let (own, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut heard = Heard::new(own);
        let begun = Instant::now();
        assert!(heard.hear(other, begun));
        assert_eq!(heard.count(begun), None, "it has not heard itself");
        assert!(heard.hear(own, begun));
        assert!(!heard.hear(other, begun), "known already");
        assert_eq!(heard.count(begun + HEARD), NonZeroU32::new(2));
        let later = begun + HEARD + Duration::from_millis(1);
        assert_eq!(heard.count(later), None);
        heard.hear(own, later);
        assert_eq!(heard.count(later), NonZeroU32::new(2), "the other one may be heard in a moment");
        heard.hear(own, later + EVERY * 2);
        assert_eq!(heard.count(later + EVERY * 2), NonZeroU32::new(1));
    }

    #[test]
    fn roles_are_read_as_they_are_written() {
        for role in PeerRole::ALL {
            assert_eq!(PeerRole::parse(&role.to_string()), Some(role));
        }
        assert_eq!(PeerRole::parse("archiver"), None);
    }
}
