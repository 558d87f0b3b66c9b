//! The lanes that a worker pulls: which there are can change while it runs, and so can the lane of an organization.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bus_core::{
    ids::OrganizationId,
    launcher::{BoxError, Health},
    notify::{self, Hint, Notifier},
    pg::{self, StoreError},
    queue::{DeliveryQueue, lane_of},
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio::{
    sync::{Mutex, Notify},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use crate::{
    delivery::Deliverer,
    lane::{Lane, PULL_WAIT},
};

/// Between two looks for lanes.
const LOOK: Duration = Duration::from_secs(10);

/// A delivery is moved by what was read this lately. Two workers of which one knows better would otherwise send it to
/// and fro between two lanes until the other one is told.
const FRESH: Duration = Duration::from_secs(1);

/// How long a question to the database may take while deliveries wait for the answer, and until it is asked again after
/// it gave none.
const ASK: Duration = Duration::from_secs(1);
/// See [`ASK`].
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// The organizations that have a lane of their own, as far as this worker knows. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Homes {
    pool: PgPool,
    lanes: u16,
    kept: Arc<RwLock<Kept>>,
    /// Held while they are read; until when the last failure counts.
    failed_until: Arc<Mutex<Option<Instant>>>,
}

#[derive(Debug, Default)]
struct Kept {
    own: HashMap<OrganizationId, u16>,
    read_at: Option<Instant>,
}

impl Homes {
    /// None is known yet; `lanes` are configured.
    pub fn new(pool: PgPool, lanes: u16) -> Self {
        Self { pool, lanes, kept: Arc::default(), failed_until: Arc::default() }
    }

    /// Where a delivery of this organization belongs, if that is not the `lane` in which it was. None if that cannot be
    /// known now: it is delivered where it is.
    pub(crate) async fn elsewhere(&self, organization: OrganizationId, lane: u16) -> Option<u16> {
        self.judge(organization, lane)?;
        let mut failed_until = self.failed_until.lock().await;
        let fresh = self.kept(|kept| kept.read_at.is_some_and(|at| at.elapsed() < FRESH));
        if !fresh {
            if failed_until.is_some_and(|until| Instant::now() < until) {
                return None;
            }
            let asked = timeout(ASK, self.read()).await;
            if !matches!(asked, Ok(Ok(()))) {
                debug!(organization.id = %organization, "Whether its deliveries have to move is not known now");
                *failed_until = Some(Instant::now() + ASK_AGAIN);
                return None;
            }
        }
        drop(failed_until);
        self.judge(organization, lane)
    }

    /// Without a lane of its own an organization may have any that is configured, now or by another process. Only what
    /// is in none of them has to move.
    fn judge(&self, organization: OrganizationId, lane: u16) -> Option<u16> {
        let own = self.kept(|kept| kept.own.get(&organization).copied());
        if own.is_none() && lane < self.lanes {
            return None;
        }
        Some(lane_of(organization, own, self.lanes)).filter(|home| *home != lane)
    }

    fn kept<T>(&self, ask: impl FnOnce(&Kept) -> T) -> T {
        ask(&self.kept.read().unwrap_or_else(PoisonError::into_inner))
    }

    async fn read(&self) -> Result<(), StoreError> {
        let read_at = Some(Instant::now());
        let own = pg::assigned_lanes(&self.pool).await?;
        *self.kept.write().unwrap_or_else(PoisonError::into_inner) = Kept { own, read_at };
        Ok(())
    }

    fn assigned(&self) -> BTreeSet<u16> {
        self.kept(|kept| kept.own.values().copied().collect())
    }
}

/// Starts and stops the lanes of one worker.
#[derive(Debug)]
pub(crate) struct Lanes {
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) hints: Arc<dyn Notifier>,
    pub(crate) homes: Homes,
    /// Slots of one lane.
    pub(crate) in_flight: usize,
    /// The longest that what was read is kept, for the case that a hint was lost.
    pub(crate) ttl: Duration,
    pub(crate) deliverer: Arc<Deliverer>,
    pub(crate) tasks: TaskTracker,
    pub(crate) health: Health,
    pub(crate) stop: CancellationToken,
}

/// The lanes that run, and those that come to their end.
#[derive(Default)]
struct Running {
    stops: BTreeMap<u16, CancellationToken>,
    loops: JoinSet<Result<(), BoxError>>,
}

impl Lanes {
    /// Runs until the stop, and until every lane has ended.
    pub(crate) async fn run(self) -> Result<(), BoxError> {
        let told = Arc::new(Notify::new());
        let wake = Arc::clone(&told);
        let following =
            notify::wake_on(Arc::clone(&self.hints), Hint::LanesChanged, move || wake.notify_one());
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(following));
        let beat = self.health.heartbeat("lanes", LOOK * 6);
        let mut running = Running::default();
        let (mut found, mut read_at) = (BTreeSet::new(), None::<Instant>);
        // Those that are configured wait for nobody.
        self.adjust(&mut running, &(0..self.homes.lanes).collect());
        let mut outdated = true;
        while !self.stop.is_cancelled() {
            beat.beat();
            if let Some(known) = self.look().await {
                // One that appears belongs to somebody, even if no hint said so.
                outdated |= !known.is_subset(&found);
                found = known;
            }
            if outdated || read_at.is_none_or(|at| at.elapsed() >= self.ttl) {
                match timeout(LOOK, self.homes.read()).await {
                    Ok(Ok(())) => (outdated, read_at) = (false, Some(Instant::now())),
                    Ok(Err(failed)) => {
                        warn!(error = %Chain(&failed), "Which organizations have a lane of their own is not known");
                    }
                    Err(_) => {
                        warn!("Which organizations have a lane of their own is not known: no answer in time");
                    }
                }
            }
            let wanted =
                (0..self.homes.lanes).chain(found.iter().copied()).chain(self.homes.assigned()).collect();
            self.adjust(&mut running, &wanted);
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = told.notified() => outdated = true,
                () = tokio::time::sleep(LOOK) => {}
                Some(ended) = running.loops.join_next() => ended??,
            }
        }
        while let Some(ended) = running.loops.join_next().await {
            ended??;
        }
        Ok(())
    }

    /// The lanes that hold deliveries, as far as the queue can say now.
    async fn look(&self) -> Option<BTreeSet<u16>> {
        match timeout(LOOK, self.queue.lanes()).await {
            Ok(Ok(lanes)) => Some(lanes),
            Ok(Err(failed)) => {
                debug!(error = %Chain(&failed), "Whether there are other lanes is not known now");
                None
            }
            Err(_) => None,
        }
    }

    /// Starts the lanes that are wanted, and stops the others; what these have in hand is brought to its end.
    fn adjust(&self, running: &mut Running, wanted: &BTreeSet<u16>) {
        running.stops.retain(|number, stop| {
            let stays = wanted.contains(number);
            if !stays {
                info!(
                    lane = number,
                    "Nothing is left in this lane, and it is nobody's: it is not pulled any more"
                );
                stop.cancel();
            }
            stays
        });
        for &number in wanted {
            if running.stops.contains_key(&number) {
                continue;
            }
            if number >= self.homes.lanes {
                info!(lane = number, "A lane beyond those that are configured is pulled");
            }
            let (stop, beat) =
                (self.stop.child_token(), self.health.heartbeat(format!("lane {number}"), PULL_WAIT * 15));
            let lane = Lane {
                number,
                in_flight: self.in_flight,
                queue: Arc::clone(&self.queue),
                deliverer: Arc::clone(&self.deliverer),
                tasks: self.tasks.clone(),
                beat: beat.clone(),
                stop: stop.clone(),
            };
            running.loops.spawn(async move {
                let ended = lane.run().await;
                beat.end();
                ended
            });
            running.stops.insert(number, stop);
        }
    }
}

#[cfg(test)]
mod tests {
    use bus_core::ids::{Ids as _, SystemIds};

    use super::*;

    #[tokio::test]
    async fn only_what_is_in_a_strangers_lane_has_to_move() {
        let pool = PgPool::connect_lazy("postgres://localhost/none").expect("a URL");
        let homes = Homes::new(pool, 4);
        let (owner, other) = (OrganizationId(SystemIds.next()), OrganizationId(SystemIds.next()));
        homes.kept.write().expect("nobody panicked").own.insert(owner, 7);
        let shared = other.lane(4);
        for (organization, lane, home) in [
            (owner, 7, None),
            (owner, owner.lane(4), Some(7)),
            (owner, 9, Some(7)),
            // Another configuration may have put it there.
            (other, (shared + 1) % 4, None),
            (other, shared, None),
            (other, 7, Some(shared)),
        ] {
            assert_eq!(homes.judge(organization, lane), home, "in {lane}");
        }
        // What may be outdated moves nothing, and the database is not asked for each delivery.
        assert_eq!(homes.elsewhere(owner, 0).await, None);
        let failed_until = *homes.failed_until.lock().await;
        assert!(failed_until.is_some());
        assert_eq!(homes.elsewhere(other, 7).await, None);
        assert_eq!(*homes.failed_until.lock().await, failed_until);
    }
}
