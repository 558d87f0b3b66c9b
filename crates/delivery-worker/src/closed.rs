//! Deliveries that were closed from outside (acknowledged by the subscriber, or cancelled), kept in memory so
//! that dropping one needs no read.
//!
//! Nothing may be attempted once its cancellation was answered. So memory has a say only while it is current, which
//! [`Current`] finds out from the hints themselves, and complete: nothing that was missed is still to be read, and
//! nothing was forgotten that a delivery may still ask for. Otherwise the database is asked.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bus_core::{
    delivery::{DeliveryKey, Progress},
    ids::{DeliveryId, Ids},
    lifecycle::State,
    notify::{Current, Hint, MAX_AGE, Notifier},
    pg::{self, Closed, StoreError},
    telemetry::Chain,
};
use futures::StreamExt as _;
use metrics::counter;
use moka::{notification::RemovalCause, sync::Cache};
use sqlx::PgPool;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

/// The most that are kept, about 100 bytes each. Beyond it the database is asked before each attempt.
const CAPACITY: u64 = 200_000;

/// How many are read after hints may have been missed.
const READ: u32 = 100_000;

/// A transaction that closes deliveries may commit this much later than the time that it writes.
const OVERLAP: Duration = Duration::from_secs(60);

/// How long a question to the database may take.
const ASK: Duration = Duration::from_secs(1);

/// The turn of a delivery that is about to be attempted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turn {
    pub(crate) key: DeliveryKey,
    pub(crate) progress: Progress,
    /// How often it was handed out in this turn.
    pub(crate) handed_out: u32,
    /// Since the delivery's lifetime began.
    pub(crate) age: Duration,
}

impl Turn {
    /// The happy path, which is judged from memory alone (invariant I6).
    fn is_first(&self) -> bool {
        self.progress.turn == 0 && self.handed_out <= 1
    }
}

/// The closed deliveries. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ClosedDeliveries {
    pool: PgPool,
    lifetime: Duration,
    kept: Cache<DeliveryId, Closed>,
    /// When one was forgotten last for want of room.
    forgot: Arc<Mutex<Option<Instant>>>,
    current: Current,
    hints: Arc<dyn Notifier>,
}

impl ClosedDeliveries {
    /// None is kept for longer than a delivery may live.
    pub(crate) fn new(pool: PgPool, hints: Arc<dyn Notifier>, ids: Arc<dyn Ids>, lifetime: Duration) -> Self {
        let forgot = Arc::<Mutex<Option<Instant>>>::default();
        let noted = Arc::clone(&forgot);
        let kept = Cache::builder()
            .max_capacity(CAPACITY)
            .time_to_live(lifetime + OVERLAP)
            .eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Size {
                    note_now(&noted);
                }
            })
            .build();
        let current = Current::new(Arc::clone(&hints), ids);
        Self { pool, lifetime, kept, forgot, current, hints }
    }

    /// Which of these turns are not to be attempted any more, as of at most [`MAX_AGE`] ago. An error says that this
    /// cannot be known now, so that none of them may be attempted.
    pub(crate) async fn overruled(&self, turns: &[Turn]) -> Result<Vec<bool>, StoreError> {
        // What was acknowledged may have been replayed since, and a later turn may have begun; only the database
        // knows. If it is away, that must not stop deliveries.
        let later: Vec<DeliveryId> =
            turns.iter().filter(|turn| !turn.is_first()).map(|turn| turn.key.id).collect();
        let standings = match self.ask(&later).await {
            Ok(standings) => Some(standings),
            Err(failed) => {
                debug!(error = %Chain(&failed), "The database is away; memory serves");
                None
            }
        };
        if self.knows(turns).await {
            return Ok(turns.iter().map(|turn| self.judge(turn, standings.as_ref())).collect());
        }
        counter!("bus_closed_asked").increment(turns.len() as u64);
        let all: Vec<DeliveryId> = turns.iter().map(|turn| turn.key.id).collect();
        let asked = Instant::now();
        let standings = self.ask(&all).await?;
        if asked.elapsed() > MAX_AGE {
            return Err(too_slow());
        }
        Ok(turns.iter().map(|turn| stands_against(&standings, turn)).collect())
    }

    /// Whether memory is current, and has all that may matter to these.
    async fn knows(&self, turns: &[Turn]) -> bool {
        let forgot = *self.forgot.lock().unwrap_or_else(PoisonError::into_inner);
        forgot.is_none_or(|at| at.elapsed() > self.lifetime + OVERLAP)
            && turns.iter().all(|turn| turn.age < self.lifetime)
            && self.current.catch_up().await
    }

    /// From memory. `standings` is what the database says of later turns, if it is there.
    fn judge(&self, turn: &Turn, standings: Option<&HashMap<DeliveryId, (State, i64)>>) -> bool {
        match (self.kept.get(&turn.key.id), standings) {
            // For good, whatever the turn.
            (Some(Closed::Cancelled), _) => true,
            (kept, _) if turn.is_first() => kept.is_some(),
            (_, Some(standings)) => stands_against(standings, turn),
            (kept, None) => kept.is_some() && !turn.progress.is_replayed(),
        }
    }

    async fn ask(&self, deliveries: &[DeliveryId]) -> Result<HashMap<DeliveryId, (State, i64)>, StoreError> {
        if deliveries.is_empty() {
            return Ok(HashMap::new());
        }
        // Boxed, since it is rare: see `delivery`.
        let asked = timeout(ASK, Box::pin(pg::standings(&self.pool, deliveries))).await;
        asked.unwrap_or_else(|_| Err(too_slow()))
    }

    /// Follows what hints say. Never ends.
    pub(crate) async fn follow(self) {
        let mut hints = self.hints.listen();
        let (mut complete, mut read_at) = (false, None);
        while let Some(hint) = hints.next().await {
            match hint {
                Hint::Closed(id) => self.keep(id, Closed::Acked),
                Hint::Cancelled(id) => self.keep(id, Closed::Cancelled),
                Hint::Missed => complete = self.read_again(&mut read_at).await,
                Hint::Probe(probe) if self.current.awaits(probe) => {
                    complete = complete || self.read_again(&mut read_at).await;
                    self.current.heard(probe, complete);
                }
                Hint::ConnectionChanged(_)
                | Hint::Due
                | Hint::Enqueued
                | Hint::LanesChanged
                | Hint::Probe(_)
                | Hint::Alive { .. } => {}
            }
        }
    }

    fn keep(&self, id: DeliveryId, closed: Closed) {
        // A hint may come late, and what is cancelled stays so.
        if self.kept.get(&id) != Some(Closed::Cancelled) {
            self.kept.insert(id, closed);
        }
    }

    /// Reads what may have been missed: the first time all that may matter, then what came since.
    async fn read_again(&self, read_at: &mut Option<Instant>) -> bool {
        let begun = Instant::now();
        let since = read_at.map_or(self.lifetime, |at| at.elapsed().min(self.lifetime)) + OVERLAP;
        let lately = pg::closed_lately(&self.pool, since.as_secs(), READ);
        match pg::answered("read which deliveries were closed", lately).await {
            Ok(closed) => {
                if closed.len() >= READ as usize {
                    note_now(&self.forgot);
                }
                for (id, closed) in closed {
                    self.keep(id, closed);
                }
                *read_at = Some(begun);
                true
            }
            Err(failed) => {
                warn!(error = %Chain(&failed), "The database is asked before each attempt until this works");
                false
            }
        }
    }
}

fn note_now(moment: &Mutex<Option<Instant>>) {
    *moment.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

fn too_slow() -> StoreError {
    StoreError::TimedOut { operation: "ask which deliveries are closed" }
}

fn stands_against(standings: &HashMap<DeliveryId, (State, i64)>, turn: &Turn) -> bool {
    standings.get(&turn.key.id).is_some_and(|(state, at)| state.overrules(*at, turn.progress.turn))
}
