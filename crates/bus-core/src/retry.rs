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

/// A subscription's own retry policy: what it leaves out is as in the configured one. Either a list of
/// delays, or any of the values of the exponential back-off; the jitter goes with both.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetryOverride {
    /// As [`RetryPolicy::max_attempts`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    /// As [`RetryPolicy::base_ms`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_ms: Option<u64>,
    /// As [`RetryPolicy::factor`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// As [`RetryPolicy::cap_ms`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cap_ms: Option<u64>,
    /// As [`RetryPolicy::jitter`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<f64>,
    /// The waits, milliseconds; there is one attempt more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delays_ms: Option<Vec<u64>>,
}

impl RetryOverride {
    /// Why this cannot be used, if so: the member at fault, as the API names it, and the rule it breaks.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        const LONGEST: u64 = 86_400_000;
        let wrong = |member, rule: &str| Some((member, rule.to_owned()));
        let exponential = self.max_attempts.is_some()
            || self.base_ms.is_some()
            || self.factor.is_some()
            || self.cap_ms.is_some();
        let out_of = |wait: Option<u64>| wait.is_some_and(|wait| !(1..=LONGEST).contains(&wait));
        if self.delays_ms.is_some() && exponential {
            wrong("delaysMs", "takes the place of maxAttempts, baseMs, factor and capMs; give either")
        } else if self.max_attempts.is_some_and(|attempts| !(1..=100).contains(&attempts)) {
            wrong("maxAttempts", "must be between 1 and 100")
        } else if out_of(self.base_ms) {
            wrong("baseMs", "must be between 1 and 86400000 (24 h)")
        } else if self.factor.is_some_and(|factor| !(1.0..=10.0).contains(&factor)) {
            wrong("factor", "must be between 1 and 10")
        } else if out_of(self.cap_ms) {
            wrong("capMs", "must be between 1 and 86400000 (24 h)")
        } else if self.jitter.is_some_and(|jitter| !(0.0..=1.0).contains(&jitter)) {
            wrong("jitter", "must be between 0 and 1")
        } else if self.delays_ms.as_ref().is_some_and(|delays| !(1..=100).contains(&delays.len())) {
            wrong("delaysMs", "must have between 1 and 100 entries")
        } else if self.delays_ms.iter().flatten().any(|delay| *delay > LONGEST) {
            wrong("delaysMs", "must have no entry above 86400000 (24 h)")
        } else {
            None
        }
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
