//! A token bucket that may go into debt.

use std::time::Duration;

use tokio::time::Instant;

/// What a bucket may hold, and how fast it fills.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    /// Tokens a second, more than 0.
    pub(crate) per_second: f64,
    /// The most tokens, at least 1.
    pub(crate) burst: f64,
}

/// How full a bucket was, and when. It begins full.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bucket(Option<(f64, Instant)>);

impl Bucket {
    /// What is in it now; less than 0 is a debt.
    pub(crate) fn tokens(&self, rate: Rate, now: Instant) -> f64 {
        match self.0 {
            None => rate.burst,
            Some((tokens, at)) => {
                let filled = now.saturating_duration_since(at).as_secs_f64() * rate.per_second;
                (tokens + filled).min(rate.burst)
            }
        }
    }

    /// Takes `n` tokens, or says how long to wait. What is larger than the bucket is let through when that is full, and
    /// paid off afterwards: so nothing is refused for ever, and the rate holds all the same.
    pub(crate) fn take(&mut self, n: f64, rate: Rate, now: Instant) -> Result<(), Duration> {
        let tokens = self.tokens(rate, now);
        let needed = n.min(rate.burst);
        // Within the precision of what has filled it.
        if tokens + 1e-6 < needed {
            return Err(until(needed - tokens, rate));
        }
        self.0 = Some((tokens - n, now));
        Ok(())
    }

    /// Until it is full.
    pub(crate) fn full_in(&self, rate: Rate, now: Instant) -> Duration {
        until(rate.burst - self.tokens(rate, now), rate)
    }
}

fn until(missing: f64, rate: Rate) -> Duration {
    Duration::try_from_secs_f64(missing.max(0.0) / rate.per_second).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: Rate = Rate { per_second: 2.0, burst: 10.0 };

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_comes_back_with_time() {
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        assert_eq!(bucket.take(8.0, RATE, start), Ok(()));
        assert_eq!(bucket.take(4.0, RATE, start), Err(Duration::from_secs(1)));
        assert_eq!(bucket.full_in(RATE, start), Duration::from_secs(4));
        let later = start + Duration::from_secs(1);
        assert_eq!(bucket.take(4.0, RATE, later), Ok(()));
        // Larger than the bucket: when it is full, and then it has to be paid off.
        assert_eq!(bucket.take(30.0, RATE, later), Err(Duration::from_secs(5)));
        let full = later + Duration::from_secs(60);
        assert_eq!(bucket.take(30.0, RATE, full), Ok(()));
        assert_eq!(bucket.take(1.0, RATE, full), Err(Duration::from_millis(10_500)));
    }

    proptest! {
        /// Whatever is asked, and when: what is let through never exceeds the burst, what came in since, and the part of the
        /// last request that was larger than the bucket.
        #[test]
        fn the_rate_holds(requests in prop::collection::vec((0u32..40, 0u64..3_000), 1..60)) {
            let start = Instant::now();
            let (mut bucket, mut now, mut taken) = (Bucket::default(), start, 0.0);
            for (n, pause_ms) in requests {
                now += Duration::from_millis(pause_ms);
                let n = f64::from(n);
                if let Err(wait) = bucket.take(n, RATE, now) {
                    // Not a moment longer than needed.
                    now += wait + Duration::from_micros(1);
                    prop_assert!(bucket.take(n, RATE, now).is_ok());
                }
                taken += n;
                let allowed = RATE.burst + (now - start).as_secs_f64() * RATE.per_second;
                prop_assert!(taken <= allowed + (n - RATE.burst).max(0.0) + 1e-3);
            }
        }
    }
}
