//! How fast, and how much, each organization may publish.
//!
//! The rate is kept by a bucket in each publisher, with its share of the limit. What was published is counted in memory and
//! added to the database about once a second, in one statement for all organizations, which also says what the others have
//! counted. So a quota may be exceeded by what all publishers together accept within about a second, and a publisher that
//! is killed forgets at most as much.

mod bucket;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bus_core::{
    ids::OrganizationId,
    launcher::{BoxError, Heartbeat},
    peers::Peers,
    pg::{self, OwnLimits, PublishQuota, PublishRate, QuotaPeriod, Usage},
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::bucket::{Bucket, Rate};

/// Between two additions to the database.
pub(crate) const EVERY: Duration = Duration::from_secs(1);

/// What was read longer ago is read again before a request is judged by it. Of organizations that publish it is younger.
const FRESH: Duration = Duration::from_secs(5);

/// How long a request waits for it; then what is known counts.
const ASK: Duration = Duration::from_secs(1);

/// Organizations that are known at a time, about 250 bytes each.
const CAPACITY: usize = 100_000;

/// The highest rate, events a second.
pub(crate) const MAX_RATE: f64 = 1e6;

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
    accounts: Arc<Mutex<HashMap<OrganizationId, Account>>>,
}

/// One organization's.
#[derive(Debug, Default)]
struct Account {
    /// As of the last statement; none before the first.
    read: Option<(Usage, Instant)>,
    /// Not in the database yet.
    uncounted: u64,
    bucket: Bucket,
    /// Somebody asked since the last statement.
    asked: bool,
    asked_at: Option<Instant>,
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
    /// Nothing is counted yet.
    pub fn new(pool: PgPool, defaults: Defaults, peers: Peers) -> Self {
        Self { pool, defaults, peers, accounts: Arc::default() }
    }

    /// Judges a request of `n` events. It costs rate, whatever becomes of it; quota is charged by [`Limits::count`].
    pub(crate) async fn judge(&self, organization: OrganizationId, n: u64) -> Verdict {
        let now = Instant::now();
        let fresh = {
            let mut accounts = self.accounts();
            make_room(&mut accounts, now);
            let account = accounts.entry(organization).or_default();
            (account.asked, account.asked_at) = (true, Some(now));
            account.read.is_some_and(|(_, at)| now - at < FRESH)
        };
        if !fresh {
            let read = tokio::time::timeout(ASK, self.exchange(vec![(organization, 0)])).await;
            if !matches!(read, Ok(true)) {
                counter!("bus_limits_unknown").increment(1);
            }
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
    pub(crate) async fn run(self, beat: Heartbeat, stop: CancellationToken) -> Result<(), BoxError> {
        while stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_some() {
            beat.beat();
            self.flush().await;
        }
        Ok(())
    }

    /// Adds what was counted to the database. Without a word of it there is no statement.
    pub(crate) async fn flush(&self) {
        let news: Vec<(OrganizationId, u64)> = {
            let mut accounts = self.accounts();
            let told = accounts.iter_mut().filter(|(_, account)| account.asked || account.uncounted > 0);
            told.map(|(id, account)| {
                account.asked = false;
                (*id, std::mem::take(&mut account.uncounted))
            })
            .collect()
        };
        for chunk in news.chunks(CHUNK) {
            self.exchange(chunk.to_vec()).await;
        }
    }

    /// Tells the database what was counted, and learns what stands there. What it did not take is kept for the next time.
    async fn exchange(&self, counted: Vec<(OrganizationId, u64)>) -> bool {
        let read = pg::add_usage(&self.pool, &counted).await;
        let now = Instant::now();
        let mut accounts = self.accounts();
        match read {
            Ok(usages) => {
                for usage in usages {
                    accounts.entry(usage.organization).or_default().read = Some((usage, now));
                }
                true
            }
            Err(failed) => {
                warn!(error = %Chain(&failed), "What was published is not counted in the database yet");
                for (organization, n) in counted {
                    let account = accounts.entry(organization).or_default();
                    account.uncounted = account.uncounted.saturating_add(n);
                }
                false
            }
        }
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
    accounts
        .retain(|_, account| account.uncounted > 0 || account.asked_at.is_some_and(|at| now - at < bound));
}

impl Account {
    fn judge(&mut self, n: u64, defaults: &Defaults, share: f64, now: Instant) -> Verdict {
        let own = self.read.map_or(OwnLimits::default(), |(usage, _)| usage.limits);
        let quota = own.quota.unwrap_or(defaults.quota);
        let mut verdict = Verdict { standings: Vec::new(), refused: None };
        if let (true, Some((usage, at))) = (quota.events > 0, self.read) {
            let (used, ends_in, lasts) = match quota.period {
                QuotaPeriod::Day => (usage.day, usage.day_ends_in, Duration::from_secs(86_400)),
                QuotaPeriod::Month => (usage.month, usage.month_ends_in, usage.month_lasts),
            };
            // Over, as far as this clock can say: what was used counts no more.
            let (used, ends_in) = match ends_in.checked_sub(now - at) {
                Some(left) => (used, left),
                None => (0, lasts),
            };
            let used = used.saturating_add(self.uncounted);
            let left = quota.events.saturating_sub(used);
            if left < n {
                verdict.refused = Some(Refused { policy: "quota", retry_after: ends_in });
            }
            verdict.standings.push(Standing {
                policy: "quota",
                limit: quota.events,
                window: lasts,
                left,
                restored_in: ends_in,
            });
        }
        let rate = own.rate.unwrap_or(defaults.rate);
        if rate.per_second > 0.0 {
            let burst = rate.burst.max(1) as f64;
            let window = Duration::try_from_secs_f64(burst / rate.per_second).unwrap_or(Duration::MAX);
            let here = Rate { per_second: rate.per_second / share, burst: (burst / share).max(1.0) };
            if verdict.refused.is_none()
                && let Err(wait) = self.bucket.take(n as f64, here, now)
            {
                verdict.refused = Some(Refused { policy: "rate", retry_after: wait });
            }
            // A number of events, and not negative.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most the burst")]
            let left = self.bucket.tokens(here, now).max(0.0) as u64;
            let restored_in = self.bucket.full_in(here, now);
            let standing = Standing { policy: "rate", limit: rate.burst.max(1), window, left, restored_in };
            verdict.standings.insert(0, standing);
        }
        if let Some(refused) = &verdict.refused {
            counter!("bus_publish_refused", "policy" => refused.policy).increment(1);
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Defaults = Defaults {
        rate: PublishRate { per_second: 0.0, burst: 0 },
        quota: PublishQuota { events: 0, period: QuotaPeriod::Day },
    };

    fn usage(limits: OwnLimits) -> Usage {
        Usage {
            organization: OrganizationId(uuid::Uuid::nil()),
            limits,
            day: 7,
            month: 90,
            day_ends_in: Duration::from_secs(100),
            month_ends_in: Duration::from_secs(1_000),
            month_lasts: Duration::from_secs(2_592_000),
        }
    }

    fn account(limits: OwnLimits, now: Instant) -> Account {
        Account { read: Some((usage(limits), now)), ..Account::default() }
    }

    #[test]
    fn without_limits_everything_is_let_through() {
        let now = Instant::now();
        let verdict = account(OwnLimits::default(), now).judge(1_000_000, &NONE, 1.0, now);
        assert_eq!(verdict, Verdict { standings: vec![], refused: None });
    }

    #[test]
    fn a_quota_is_for_its_period_and_what_is_not_counted_yet_counts() {
        let now = Instant::now();
        let quota = |events, period| OwnLimits { quota: Some(PublishQuota { events, period }), rate: None };
        let refused = |wait| Some(Refused { policy: "quota", retry_after: Duration::from_secs(wait) });
        let mut daily = account(quota(10, QuotaPeriod::Day), now);
        assert_eq!(daily.judge(3, &NONE, 1.0, now).refused, None);
        assert_eq!(daily.judge(4, &NONE, 1.0, now).refused, refused(100));
        daily.uncounted = 2;
        assert_eq!(daily.judge(2, &NONE, 1.0, now + Duration::from_secs(40)).refused, refused(60));
        let tomorrow = now + Duration::from_secs(101);
        assert_eq!(daily.judge(8, &NONE, 1.0, tomorrow).refused, None);
        let mut monthly = account(quota(100, QuotaPeriod::Month), now);
        assert_eq!(monthly.judge(11, &NONE, 1.0, tomorrow).refused, refused(899));
        // None of its own beats a configured one.
        let configured = Defaults { quota: PublishQuota { events: 1, period: QuotaPeriod::Day }, ..NONE };
        assert_eq!(account(quota(0, QuotaPeriod::Day), now).judge(9, &configured, 1.0, now).refused, None);
        assert!(account(OwnLimits::default(), now).judge(1, &configured, 1.0, now).refused.is_some());
    }

    #[test]
    fn each_of_several_publishers_has_its_share_of_the_rate() {
        let now = Instant::now();
        let rate = Some(PublishRate { per_second: 10.0, burst: 20 });
        let mut account = account(OwnLimits { rate, quota: None }, now);
        let verdict = account.judge(4, &NONE, 4.0, now);
        assert_eq!(verdict.refused, None);
        let standing = Standing {
            policy: "rate",
            limit: 20,
            window: Duration::from_secs(2),
            left: 1,
            restored_in: Duration::from_millis(1_600),
        };
        assert_eq!(verdict.standings, [standing]);
        let verdict = account.judge(2, &NONE, 4.0, now);
        assert_eq!(
            verdict.refused,
            Some(Refused { policy: "rate", retry_after: Duration::from_millis(400) })
        );
        // Those who are alone may have all of it, once it has come in.
        assert_eq!(account.judge(20, &NONE, 1.0, now + Duration::from_millis(1_900)).refused, None);
    }

    #[tokio::test(start_paused = true)]
    async fn i10_those_that_asked_least_lately_make_room() {
        let (now, mut accounts) = (Instant::now(), HashMap::new());
        for n in 0..CAPACITY {
            let id = OrganizationId(uuid::Uuid::from_u128(n as u128));
            let asked_at = Some(now - Duration::from_micros(n as u64));
            accounts.insert(
                id,
                Account { asked_at, uncounted: u64::from(n + 1 == CAPACITY), ..Account::default() },
            );
        }
        make_room(&mut accounts, now);
        assert_eq!(accounts.len(), CAPACITY * 3 / 4 + 1, "and one that has something to say stays");
        assert!(accounts.contains_key(&OrganizationId(uuid::Uuid::nil())));
    }
}
