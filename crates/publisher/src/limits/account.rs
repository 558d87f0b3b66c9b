//! What a publisher knows of one organization.

use std::time::Duration;

use bus_core::pg::{OwnLimits, QuotaPeriod, Usage};
use metrics::counter;
use tokio::time::Instant;

use super::{
    Defaults, Refused, Standing, Verdict,
    bucket::{Bucket, Rate},
};

/// What was read longer ago is read again before a request is judged by it. Of organizations that publish it is younger.
const FRESH: Duration = Duration::from_secs(5);

/// After a failure no request asks the database for so long.
const PAUSE: Duration = Duration::from_secs(5);

/// One organization's.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// As of the last statement, and when that was begun; none before the first.
    read: Option<(Usage, Instant)>,
    /// Not in the database yet.
    pub(super) uncounted: u64,
    /// What the statement that is under way adds; none if there is none. There is one at a time, so that no answer is older
    /// than the one before.
    telling: Option<u64>,
    /// When a statement failed, if the last one did.
    failed: Option<Instant>,
    bucket: Bucket,
    /// Somebody asked since the last statement.
    pub(super) asked: bool,
    pub(super) asked_at: Option<Instant>,
}

impl Account {
    /// Whether what was read is as good as asking.
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        self.read.is_some_and(|(_, at)| now.saturating_duration_since(at) < FRESH)
    }

    /// Whether a request may ask the database by itself.
    pub(super) fn may_ask(&self, now: Instant) -> bool {
        let paused = self.failed.is_some_and(|at| now.saturating_duration_since(at) < PAUSE);
        self.telling.is_none() && !paused
    }

    /// Whether the database does not have all that was counted.
    pub(super) fn has_news(&self) -> bool {
        self.uncounted > 0 || self.telling.is_some()
    }

    /// Begins a statement; says what it is to add. None if one is under way.
    pub(super) fn tell(&mut self) -> Option<u64> {
        if self.telling.is_some() {
            return None;
        }
        self.asked = false;
        self.telling = Some(std::mem::take(&mut self.uncounted));
        self.telling
    }

    /// Ends the statement that was begun at `asked`. An organization that is gone has no answer.
    pub(super) fn told(&mut self, answer: Option<Usage>, asked: Instant) {
        (self.telling, self.failed) = (None, None);
        if let Some(usage) = answer {
            self.read = Some((usage, asked));
        }
    }

    /// Ends the statement, which failed: what it was to add is still to be told.
    pub(super) fn not_told(&mut self, now: Instant) {
        self.uncounted = self.uncounted.saturating_add(self.telling.take().unwrap_or(0));
        self.failed = Some(now);
    }

    /// Judges a request of `n` events, and takes its rate. `share` publishers share the rate.
    pub(super) fn judge(&mut self, n: u64, defaults: &Defaults, share: f64, now: Instant) -> Verdict {
        let own = self.read.map_or(OwnLimits::default(), |(usage, _)| usage.limits);
        let quota = own.quota.unwrap_or(defaults.quota);
        let mut verdict = Verdict { standings: Vec::new(), refused: None };
        if let (true, Some((usage, at))) = (quota.events > 0, self.read) {
            let (used, ends_in, lasts) = match quota.period {
                QuotaPeriod::Day => (usage.day, usage.day_ends_in, Duration::from_secs(86_400)),
                QuotaPeriod::Month => (usage.month, usage.month_ends_in, usage.month_lasts),
            };
            // Over, as far as this clock can say: what was used counts no more.
            let (used, ends_in) = match ends_in.checked_sub(now.saturating_duration_since(at)) {
                Some(left) => (used, left),
                None => (0, lasts),
            };
            let used = used.saturating_add(self.uncounted).saturating_add(self.telling.unwrap_or(0));
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
    use bus_core::{
        ids::OrganizationId,
        pg::{PublishQuota, PublishRate},
    };

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

    #[test]
    fn what_is_being_counted_counts_and_so_does_what_could_not_be() {
        let now = Instant::now();
        let quota = Some(PublishQuota { events: 12, period: QuotaPeriod::Day });
        let mut account = account(OwnLimits { rate: None, quota }, now);
        account.uncounted = 5;
        assert_eq!(account.tell(), Some(5));
        assert_eq!(account.tell(), None, "one statement at a time");
        assert!(account.judge(1, &NONE, 1.0, now).refused.is_some(), "7 are there, and 5 on their way");
        assert!(account.has_news());
        account.not_told(now);
        assert!(account.judge(1, &NONE, 1.0, now).refused.is_some());
        assert_eq!(account.tell(), Some(5));
        // The database has them now.
        account.told(Some(Usage { day: 12, ..usage(OwnLimits { rate: None, quota }) }), now);
        assert!(account.judge(1, &NONE, 1.0, now).refused.is_some());
        assert!(!account.has_news());
        account.told(Some(usage(OwnLimits { rate: None, quota })), now);
        assert_eq!(account.judge(5, &NONE, 1.0, now).refused, None, "nothing of it counts twice");
    }

    #[test]
    fn one_request_asks_at_a_time_and_none_soon_after_a_failure() {
        let now = Instant::now();
        let mut account = account(OwnLimits::default(), now);
        assert!(account.is_fresh(now + Duration::from_secs(4)));
        assert!(!account.is_fresh(now + FRESH));
        assert!(account.may_ask(now));
        account.tell();
        assert!(!account.may_ask(now));
        account.not_told(now);
        assert!(!account.may_ask(now + Duration::from_secs(4)));
        assert!(account.may_ask(now + PAUSE));
        account.tell();
        account.told(None, now);
        assert!(account.may_ask(now));
    }

    #[test]
    fn a_rate_that_hardly_comes_back_is_no_trouble() {
        let now = Instant::now();
        let rate = Some(PublishRate { per_second: 1e-300, burst: 1 });
        let mut account = account(OwnLimits { rate, quota: None }, now);
        assert_eq!(account.judge(1, &NONE, 2.0, now).refused, None);
        let verdict = account.judge(1, &NONE, 2.0, now);
        assert_eq!(verdict.refused, Some(Refused { policy: "rate", retry_after: Duration::MAX }));
        assert_eq!(verdict.standings[0].window, Duration::MAX);
    }
}
