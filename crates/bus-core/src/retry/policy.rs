//! How often and at which intervals a delivery is tried.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The most attempts that a policy may ask for; also the most entries of a list of delays.
pub const MAX_ATTEMPTS: u32 = 100;

/// The longest wait that a policy may ask for, milliseconds: 24 h.
pub const MAX_WAIT_MS: u64 = 24 * 60 * 60 * 1_000;

/// Exponential back-off with a cap, or a list of waits, and jitter that is only ever added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryPolicy {
    /// Attempts in all, the first included, 1–100.
    pub max_attempts: u32,
    /// The wait after the first failure, milliseconds, up to 24 h.
    pub base_ms: u64,
    /// Each wait is this many times the one before, 1–10.
    pub factor: f64,
    /// No wait is longer, milliseconds, before jitter; up to 24 h.
    pub cap_ms: u64,
    /// At most this share of a wait is added to it, 0–1.
    pub jitter: f64,
    /// If there are any, these are the waits, milliseconds, before jitter, and take the place of all of the
    /// above but the jitter: there is one attempt more than waits. Up to 100, each up to 24 h.
    pub delays_ms: Vec<u64>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 20,
            base_ms: 1_000,
            factor: 2.0,
            cap_ms: 3_600_000,
            jitter: 0.1,
            delays_ms: Vec::new(),
        }
    }
}

impl RetryPolicy {
    /// Attempts in all, the first included.
    pub fn attempts(&self) -> u32 {
        match self.delays_ms.len() {
            0 => self.max_attempts,
            delays => u32::try_from(delays).unwrap_or(u32::MAX).saturating_add(1),
        }
    }

    /// The wait after the failure that made it `attempts` failed ones, before jitter; `None` if that was the
    /// last.
    pub fn wait(&self, attempts: u32) -> Option<Duration> {
        (attempts < self.attempts()).then(|| self.wait_after(attempts.saturating_sub(1)))
    }

    /// `wait` with some jitter; never less than `wait`. `random` is in `0.0..1.0` and chooses how much.
    pub fn with_jitter(&self, wait: Duration, random: f64) -> Duration {
        let share = self.jitter.clamp(0.0, 1.0) * random.clamp(0.0, 1.0);
        wait.saturating_add(Duration::try_from_secs_f64(wait.as_secs_f64() * share).unwrap_or_default())
    }

    /// The wait that follows `before` others.
    fn wait_after(&self, before: u32) -> Duration {
        if !self.delays_ms.is_empty() {
            let delay = usize::try_from(before).ok().and_then(|before| self.delays_ms.get(before));
            return Duration::from_millis(delay.copied().unwrap_or_default());
        }
        let (base, cap) = (Duration::from_millis(self.base_ms), Duration::from_millis(self.cap_ms));
        let exponent = i32::try_from(before).unwrap_or(i32::MAX);
        // Above the cap, and with a factor that makes no sense, it is the cap.
        Duration::try_from_secs_f64(base.as_secs_f64() * self.factor.powi(exponent))
            .map_or(cap, |wait| wait.min(cap))
    }

    /// The first value that is out of range, as a sentence that begins with its key.
    pub fn problem(&self) -> Option<String> {
        let all = RetryOverride {
            max_attempts: Some(self.max_attempts),
            base_ms: Some(self.base_ms),
            factor: Some(self.factor),
            cap_ms: Some(self.cap_ms),
            jitter: Some(self.jitter),
            delays_ms: (!self.delays_ms.is_empty()).then(|| self.delays_ms.clone()),
        };
        all.out_of_range().map(|(name, rule)| format!("retry.{} {rule}", name.configured))
    }
}

/// A subscription's own retry policy: what it leaves out is as in the default policy. Either a list of
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
    /// As [`RetryPolicy::delays_ms`]; not empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delays_ms: Option<Vec<u64>>,
}

/// One value's name in the API and in the configuration.
struct Name {
    shown: &'static str,
    configured: &'static str,
}

impl RetryOverride {
    /// The policy that results over `default`.
    pub fn apply(&self, default: &RetryPolicy) -> RetryPolicy {
        let delays_ms = match &self.delays_ms {
            Some(delays) => delays.clone(),
            None if self.is_exponential() => Vec::new(),
            None => default.delays_ms.clone(),
        };
        RetryPolicy {
            max_attempts: self.max_attempts.unwrap_or(default.max_attempts),
            base_ms: self.base_ms.unwrap_or(default.base_ms),
            factor: self.factor.unwrap_or(default.factor),
            cap_ms: self.cap_ms.unwrap_or(default.cap_ms),
            jitter: self.jitter.unwrap_or(default.jitter),
            delays_ms,
        }
    }

    /// Why this cannot be used, if so: the member at fault, as the API names it, and the rule it breaks.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        if self.delays_ms.is_some() && self.is_exponential() {
            let rule = "takes the place of maxAttempts, baseMs, factor and capMs; give either";
            return Some(("delaysMs", rule.into()));
        }
        self.out_of_range().map(|(name, rule)| (name.shown, rule))
    }

    fn is_exponential(&self) -> bool {
        self.max_attempts.is_some()
            || self.base_ms.is_some()
            || self.factor.is_some()
            || self.cap_ms.is_some()
    }

    fn out_of_range(&self) -> Option<(Name, String)> {
        let wrong = |shown, configured, rule: String| Some((Name { shown, configured }, rule));
        let waits = 1..=MAX_WAIT_MS;
        let wait_rule = || format!("must be between 1 and {MAX_WAIT_MS} (24 h)");
        if self.max_attempts.is_some_and(|attempts| !(1..=MAX_ATTEMPTS).contains(&attempts)) {
            return wrong("maxAttempts", "max_attempts", format!("must be between 1 and {MAX_ATTEMPTS}"));
        }
        if self.base_ms.is_some_and(|base| !waits.contains(&base)) {
            return wrong("baseMs", "base_ms", wait_rule());
        }
        if self.factor.is_some_and(|factor| !(1.0..=10.0).contains(&factor)) {
            return wrong("factor", "factor", "must be between 1 and 10".into());
        }
        if self.cap_ms.is_some_and(|cap| !waits.contains(&cap)) {
            return wrong("capMs", "cap_ms", wait_rule());
        }
        if self.jitter.is_some_and(|jitter| !(0.0..=1.0).contains(&jitter)) {
            return wrong("jitter", "jitter", "must be between 0 and 1".into());
        }
        let delays = self.delays_ms.as_ref()?;
        let most = usize::try_from(MAX_ATTEMPTS).unwrap_or(usize::MAX);
        if !(1..=most).contains(&delays.len()) {
            return wrong("delaysMs", "delays_ms", format!("must have between 1 and {MAX_ATTEMPTS} entries"));
        }
        if delays.iter().any(|delay| *delay > MAX_WAIT_MS) {
            return wrong("delaysMs", "delays_ms", format!("must have no entry above {MAX_WAIT_MS} (24 h)"));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn seconds(policy: &RetryPolicy, attempts: u32) -> Option<f64> {
        policy.wait(attempts).map(|wait| wait.as_secs_f64())
    }

    #[test]
    fn the_default_waits_double_up_to_an_hour_and_end_after_twenty_attempts() {
        let policy = RetryPolicy::default();
        for (attempts, wait) in [(1, 1.0), (2, 2.0), (3, 4.0), (12, 2_048.0), (13, 3_600.0), (19, 3_600.0)] {
            assert_eq!(seconds(&policy, attempts), Some(wait), "after attempt {attempts}");
        }
        assert_eq!(policy.wait(20), None);
    }

    #[test]
    fn a_list_of_delays_has_one_attempt_more() {
        let delays = RetryOverride { delays_ms: Some(vec![200, 5_000]), ..RetryOverride::default() };
        let policy = delays.apply(&RetryPolicy::default());
        assert_eq!(policy.attempts(), 3);
        assert_eq!([1, 2, 3].map(|n| seconds(&policy, n)), [Some(0.2), Some(5.0), None]);
    }

    #[test]
    fn an_override_changes_what_it_names() {
        let default = RetryPolicy { cap_ms: 9_000, ..RetryPolicy::default() };
        assert_eq!(RetryOverride::default().apply(&default), default);
        let own: RetryOverride =
            serde_json::from_str(r#"{"maxAttempts": 3, "baseMs": 10, "jitter": 0}"#).unwrap();
        let policy = own.apply(&default);
        assert_eq!(policy, RetryPolicy { max_attempts: 3, base_ms: 10, jitter: 0.0, ..default });
        assert_eq!(serde_json::to_string(&own).unwrap(), r#"{"maxAttempts":3,"baseMs":10,"jitter":0.0}"#);
    }

    #[test]
    fn an_override_replaces_the_delays_of_the_default_only_with_waits_of_its_own() {
        let default = RetryPolicy { delays_ms: vec![7], ..RetryPolicy::default() };
        let jitter = RetryOverride { jitter: Some(0.5), ..RetryOverride::default() };
        assert_eq!(jitter.apply(&default).delays_ms, [7]);
        let base = RetryOverride { base_ms: Some(5), ..RetryOverride::default() };
        assert!(base.apply(&default).delays_ms.is_empty());
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (json, at_fault) in [
            (r#"{"maxAttempts": 0}"#, "maxAttempts"),
            (r#"{"maxAttempts": 101}"#, "maxAttempts"),
            (r#"{"baseMs": 0}"#, "baseMs"),
            (r#"{"baseMs": 86400001}"#, "baseMs"),
            (r#"{"factor": 0.9}"#, "factor"),
            (r#"{"capMs": 86400001}"#, "capMs"),
            (r#"{"jitter": 1.1}"#, "jitter"),
            (r#"{"jitter": -0.1}"#, "jitter"),
            (r#"{"delaysMs": []}"#, "delaysMs"),
            (r#"{"delaysMs": [86400001]}"#, "delaysMs"),
            (r#"{"delaysMs": [1], "factor": 2}"#, "delaysMs"),
        ] {
            let own: RetryOverride = serde_json::from_str(json).unwrap();
            assert_eq!(own.problem().map(|(member, _)| member), Some(at_fault), "{json}");
        }
        let many = RetryOverride { delays_ms: Some(vec![1; 101]), ..RetryOverride::default() };
        assert!(many.problem().is_some());
        for json in
            [r#"{"delaysMs": [0, 86400000], "jitter": 1}"#, r#"{"maxAttempts": 100, "factor": 1}"#, "{}"]
        {
            let own: RetryOverride = serde_json::from_str(json).unwrap();
            assert_eq!(own.problem(), None, "{json}");
        }
        assert!(serde_json::from_str::<RetryOverride>(r#"{"max_attempts": 3}"#).is_err());
    }

    #[test]
    fn the_configuration_names_its_own_keys() {
        assert_eq!(RetryPolicy::default().problem(), None);
        let policy = RetryPolicy { max_attempts: 0, ..RetryPolicy::default() };
        assert_eq!(policy.problem().unwrap(), "retry.max_attempts must be between 1 and 100");
        let policy = RetryPolicy { factor: f64::NAN, ..RetryPolicy::default() };
        assert!(policy.problem().unwrap().starts_with("retry.factor"));
    }
}
