//! When a failed delivery is tried again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Exponential back-off with a cap and jitter that is only ever added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryPolicy {
    /// Attempts in all, the first included.
    pub max_attempts: u32,
    /// The wait after the first failure, milliseconds.
    pub base_ms: u64,
    /// Each wait is this many times the one before.
    pub factor: f64,
    /// No wait is longer, milliseconds, before jitter.
    pub cap_ms: u64,
    /// At most this share of a wait is added to it, 0–1.
    pub jitter: f64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { max_attempts: 20, base_ms: 1_000, factor: 2.0, cap_ms: 3_600_000, jitter: 0.1 }
    }
}

/// What follows from a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Try again after this wait.
    Retry(Duration),
    /// Give up.
    Dead,
}

impl RetryPolicy {
    /// What follows when `attempts` attempts, the failed one included, have been made. `random` is in
    /// `0.0..1.0` and chooses the jitter.
    pub fn after_failure(&self, attempts: u32, random: f64) -> Verdict {
        if attempts >= self.max_attempts {
            return Verdict::Dead;
        }
        let cap = Duration::from_millis(self.cap_ms).as_secs_f64();
        let exponent = i32::try_from(attempts.saturating_sub(1)).unwrap_or(i32::MAX);
        let wait = (Duration::from_millis(self.base_ms).as_secs_f64() * self.factor.powi(exponent)).min(cap);
        Verdict::Retry(Duration::from_secs_f64(wait * (1.0 + self.jitter * random.clamp(0.0, 1.0))))
    }

    /// Why this policy cannot be used, if so.
    pub fn problem(&self) -> Option<&'static str> {
        if self.max_attempts == 0 {
            Some("retry.max_attempts must be at least 1")
        } else if !(1.0..=10.0).contains(&self.factor) {
            Some("retry.factor must be between 1 and 10")
        } else if !(0.0..=1.0).contains(&self.jitter) {
            Some("retry.jitter must be between 0 and 1")
        } else if self.cap_ms > 86_400_000 {
            Some("retry.cap_ms must be at most 86400000 (24 h)")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_default_waits_double_up_to_an_hour_and_end_after_twenty_attempts() {
        let policy = RetryPolicy::default();
        let waits: Vec<_> = (1..=20).map(|n| policy.after_failure(n, 0.0)).collect();
        for (n, seconds) in [(1, 1), (2, 2), (3, 4), (12, 2_048), (13, 3_600), (19, 3_600)] {
            assert_eq!(waits[n - 1], Verdict::Retry(Duration::from_secs(seconds)), "after attempt {n}");
        }
        assert_eq!(waits[19], Verdict::Dead);
    }

    proptest! {
        #[test]
        fn jitter_is_only_added_and_stays_within_its_share(attempts in 1u32..200, random in 0.0f64..1.0) {
            let policy = RetryPolicy { max_attempts: 1_000, ..RetryPolicy::default() };
            let (Verdict::Retry(plain), Verdict::Retry(jittered)) =
                (policy.after_failure(attempts, 0.0), policy.after_failure(attempts, random))
            else {
                panic!("there are attempts left")
            };
            prop_assert!(jittered >= plain && jittered <= plain.mul_f64(1.1001));
        }
    }
}
