//! The rate limit of one connection: a token bucket, told by the time at which it will be full again.

use std::time::Duration;

use tokio::time::Instant;

/// A rate, as far as it is this worker's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    /// Above zero.
    pub(crate) per_second: f64,
    /// How many may follow at once after a pause, one or more.
    pub(crate) burst: u32,
}

impl Rate {
    /// Between two.
    pub(crate) fn interval(self) -> Duration {
        Duration::try_from_secs_f64(self.per_second.recip()).unwrap_or(Duration::MAX)
    }
}

/// The tokens of one connection.
#[derive(Debug)]
pub(crate) struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// How long until there is a token.
    pub(crate) fn wait(&self, now: Instant, rate: Rate) -> Duration {
        let spent = self.full_at.saturating_duration_since(now);
        let room = rate.interval().saturating_mul(rate.burst.saturating_sub(1));
        spent.saturating_sub(room)
    }

    /// Takes the next token, and says how long until it is there.
    pub(crate) fn take(&mut self, now: Instant, rate: Rate) -> Duration {
        let wait = self.wait(now, rate);
        self.full_at = self.full_at.max(now) + rate.interval();
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn after_a_burst_one_follows_in_each_interval() {
        let begun = Instant::now();
        let rate = Rate { per_second: 10.0, burst: 3 };
        let mut bucket = Bucket::new(begun);
        let waits: Vec<u128> = (0..6).map(|_| bucket.take(begun, rate).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200, 300]);
        assert_eq!(bucket.wait(begun, rate), Duration::from_millis(400), "to look takes none");
        let later = begun + Duration::from_secs(60);
        let waits: Vec<u128> = (0..4).map(|_| bucket.take(later, rate).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100], "no more than a burst is saved");
    }

    #[tokio::test]
    async fn no_window_sees_more_than_rate_and_burst_allow() {
        let begun = Instant::now();
        let rate = Rate { per_second: 40.0, burst: 5 };
        let mut bucket = Bucket::new(begun);
        let times: Vec<Duration> = (0..500)
            .map(|n| {
                let now = begun + Duration::from_millis(n * 7 % 900 + n * 3);
                now.duration_since(begun) + bucket.take(now, rate)
            })
            .collect();
        for (n, first) in times.iter().enumerate() {
            for (m, last) in times.iter().enumerate().skip(n) {
                let (made, passed) = (m - n + 1, last.saturating_sub(*first).as_secs_f64());
                #[expect(clippy::cast_precision_loss, reason = "a small number")]
                let made = made as f64;
                assert!(made <= passed * 40.0 + 5.0 + 1e-6, "{made} in {passed} s");
            }
        }
    }
}
