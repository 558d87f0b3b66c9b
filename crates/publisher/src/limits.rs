//! How fast, and how much, each organization may publish.
//!
//! The rate is kept by a bucket in each publisher, with its share of the limit. What was published is counted in memory and
//! added to the database about once a second, in one statement for all organizations, which also says what the others have
//! counted. So a quota may be exceeded by what all publishers together accept within about a second, and a publisher that
//! is killed forgets at most as much.

mod account;
mod bucket;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bus_core::{
    ids::OrganizationId,
    launcher::{BoxError, Heartbeat},
    peers::Peers,
    pg::{self, PublishQuota, PublishRate, StoreError},
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use self::account::Account;

/// Between two additions to the database.
pub(crate) const EVERY: Duration = Duration::from_secs(1);

/// How long a request waits for what the database says; then what is known counts.
const ASK: Duration = Duration::from_secs(1);

/// Requests that ask the database at a time. Those beyond them go by what is known: commits need the connections more.
const ASKING: usize = 2;

/// How long a statement may take after the stop.
const LAST: Duration = Duration::from_secs(5);

/// Organizations that are known at a time, about 250 bytes each.
const CAPACITY: usize = 100_000;

/// The lowest rate, events a second, but for 0, which is no limit.
pub(crate) const MIN_RATE: f64 = 0.001;

/// The highest rate, events a second.
pub(crate) const MAX_RATE: f64 = 1e6;

/// Whether `per_second` can be a limit, or none.
pub(crate) fn is_rate(per_second: f64) -> bool {
    per_second == 0.0 || (MIN_RATE..=MAX_RATE).contains(&per_second)
}

/// Organizations of one statement.
const CHUNK: usize = 1_000;

/// The limits of organizations that have none of their own.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// How fast.
    pub rate: PublishRate,
    /// How many.
    pub quota: PublishQuota,
}

/// The limits, and what was counted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limits {
    pool: PgPool,
    defaults: Defaults,
    peers: Peers,
    tasks: TaskTracker,
    stop: CancellationToken,
    asking: Arc<Semaphore>,
    accounts: Arc<Mutex<HashMap<OrganizationId, Account>>>,
}

/// A limit, and what is left of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    /// `rate` or `quota`.
    pub(crate) policy: &'static str,
    /// Events in a window.
    pub(crate) limit: u64,
    /// How long the window is.
    pub(crate) window: Duration,
    /// Events that are left.
    pub(crate) left: u64,
    /// Until all of them are there again.
    pub(crate) restored_in: Duration,
}

/// A request that is not let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    /// The limit that stands against it.
    pub(crate) policy: &'static str,
    /// When to try again.
    pub(crate) retry_after: Duration,
}

/// What stands for and against a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The limits that the organization has.
    pub(crate) standings: Vec<Standing>,
    /// Set if it is not let through.
    pub(crate) refused: Option<Refused>,
}

impl Limits {
    /// Nothing is counted yet. What is asked of the database runs among `tasks`, and is cut short soon after the stop.
    pub fn new(
        pool: PgPool,
        defaults: Defaults,
        peers: Peers,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let asking = Arc::new(Semaphore::new(ASKING));
        Self { pool, defaults, peers, tasks, stop, asking, accounts: Arc::default() }
    }

    /// Judges a request of `n` events. It costs rate, whatever becomes of it; quota is charged by [`Limits::count`].
    pub(crate) async fn judge(&self, organization: OrganizationId, n: u64) -> Verdict {
        let now = Instant::now();
        let (fresh, may_ask) = {
            let mut accounts = self.accounts();
            make_room(&mut accounts, now);
            let account = accounts.entry(organization).or_default();
            (account.asked, account.asked_at) = (true, Some(now));
            (account.is_fresh(now), account.may_ask(now))
        };
        let known = fresh || (may_ask && self.ask(organization).await);
        if !known {
            counter!("bus_limits_unknown").increment(1);
        }
        let now = Instant::now();
        let share = f64::from(self.peers.count().get());
        let mut accounts = self.accounts();
        accounts.entry(organization).or_default().judge(n, &self.defaults, share, now)
    }

    /// Notes that `n` events were accepted.
    pub(crate) fn count(&self, organization: OrganizationId, n: u64) {
        if n > 0 {
            let mut accounts = self.accounts();
            let account = accounts.entry(organization).or_default();
            account.uncounted = account.uncounted.saturating_add(n);
        }
    }

    /// Adds what was counted to the database about once a second, until the stop.
    pub(crate) async fn run(self, beat: Heartbeat) -> Result<(), BoxError> {
        while self.stop.run_until_cancelled(sleep(EVERY)).await.is_some() {
            self.flush(|| beat.beat()).await;
        }
        Ok(())
    }

    /// Adds what was counted to the database, with a sign of life before each statement. Without a word of it there is no
    /// statement.
    pub(crate) async fn flush(&self, alive: impl Fn()) {
        alive();
        let news: Vec<OrganizationId> = {
            let accounts = self.accounts();
            let news = accounts.iter().filter(|(_, account)| account.asked || account.uncounted > 0);
            news.map(|(id, _)| *id).collect()
        };
        for chunk in news.chunks(CHUNK) {
            alive();
            // The others have not begun, so that they are as they were.
            if !self.exchange(chunk).await {
                return;
            }
        }
    }

    /// Asks about one organization out of turn. False if that brought no answer in time.
    async fn ask(&self, organization: OrganizationId) -> bool {
        let Ok(turn) = Arc::clone(&self.asking).try_acquire_owned() else { return false };
        let limits = self.clone();
        // It goes on when nobody waits for it any more: a statement keeps its connection until it is answered.
        let asked = self.tasks.spawn(async move {
            let _turn = turn;
            limits.exchange(&[organization]).await
        });
        matches!(timeout(ASK, asked).await, Ok(Ok(true)))
    }

    /// Tells the database what was counted, and learns what stands there. What it did not take is kept for the next time.
    /// False if it did not answer. Of an organization with a statement under way nothing is told.
    async fn exchange(&self, organizations: &[OrganizationId]) -> bool {
        const OPERATION: &str = "count what was published";
        let asked = Instant::now();
        let told: Vec<(OrganizationId, u64)> = {
            let mut accounts = self.accounts();
            let tell = |id: &OrganizationId| Some((*id, accounts.entry(*id).or_default().tell()?));
            organizations.iter().filter_map(tell).collect()
        };
        if told.is_empty() {
            return true;
        }
        let answer = tokio::select! {
            answer = pg::answered(OPERATION, pg::add_usage(&self.pool, &told)) => answer,
            () = self.cut_short() => Err(StoreError::TimedOut { operation: OPERATION }),
        };
        let now = Instant::now();
        let mut accounts = self.accounts();
        match answer {
            Ok(usages) => {
                let mut usages: HashMap<_, _> = usages.into_iter().map(|u| (u.organization, u)).collect();
                for (organization, _) in told {
                    let account = accounts.entry(organization).or_default();
                    account.told(usages.remove(&organization), asked);
                }
                true
            }
            Err(failed) => {
                warn!(error = %Chain(&failed), "What was published is not counted in the database yet");
                for (organization, _) in told {
                    accounts.entry(organization).or_default().not_told(now);
                }
                false
            }
        }
    }

    /// Comes some time after the stop, and never before it.
    async fn cut_short(&self) {
        self.stop.cancelled().await;
        sleep(LAST).await;
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<OrganizationId, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets those that have nothing to say. Their buckets begin full again, so the oldest go: the quarter that asked least
/// lately.
fn make_room(accounts: &mut HashMap<OrganizationId, Account>, now: Instant) {
    if accounts.len() < CAPACITY {
        return;
    }
    let mut idle: Vec<Duration> =
        accounts.values().map(|account| account.asked_at.map_or(Duration::MAX, |at| now - at)).collect();
    let (_, bound, _) = idle.select_nth_unstable(CAPACITY * 3 / 4);
    let bound = *bound;
    accounts.retain(|_, account| account.has_news() || account.asked_at.is_some_and(|at| now - at < bound));
}
