//! What a subscription says about how its deliveries are made, as the API shows and takes it.

use bus_core::{
    retry::RetryOverride,
    subscription::{BatchPolicy, SubscriptionRules},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::{extract::present, problem::FieldError};

/// When failed deliveries are tried again, where that differs from the bus's own policy: by an exponential
/// back-off or by a list of waits. What is absent is as in the bus's own
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = RetryPolicy)]
pub(in crate::api) struct RetryPolicyBody {
    /// Attempts in all, the first included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    max_attempts: Option<u32>,
    /// The wait after the first failure, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86400000)]
    base_ms: Option<u64>,
    /// Each wait is this many times the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10)]
    factor: Option<f64>,
    /// No wait is longer, milliseconds, before jitter.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86400000)]
    cap_ms: Option<u64>,
    /// At most this share of a wait is added to it, at random.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    jitter: Option<f64>,
    /// The waits themselves, milliseconds up to 86400000 each, before jitter; there is one attempt more than
    /// waits. Takes the place of all the others but `jitter`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 100)]
    delays_ms: Option<Vec<u64>>,
}

impl From<RetryOverride> for RetryPolicyBody {
    fn from(retry: RetryOverride) -> Self {
        let RetryOverride { max_attempts, base_ms, factor, cap_ms, jitter, delays_ms } = retry;
        Self { max_attempts, base_ms, factor, cap_ms, jitter, delays_ms }
    }
}

impl From<RetryPolicyBody> for RetryOverride {
    fn from(body: RetryPolicyBody) -> Self {
        let RetryPolicyBody { max_attempts, base_ms, factor, cap_ms, jitter, delays_ms } = body;
        Self { max_attempts, base_ms, factor, cap_ms, jitter, delays_ms }
    }
}

/// How many events one request may bring, and how long the first waits for others
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = BatchPolicy)]
pub(in crate::api) struct BatchBody {
    /// The most events of one request.
    #[schema(minimum = 1, maximum = 100)]
    max_events: u16,
    /// How long the first event waits for others, milliseconds.
    #[schema(minimum = 0, maximum = 5000)]
    max_wait_ms: u16,
}

impl From<BatchPolicy> for BatchBody {
    fn from(batch: BatchPolicy) -> Self {
        Self { max_events: batch.max_events, max_wait_ms: batch.max_wait_ms }
    }
}

impl From<BatchBody> for BatchPolicy {
    fn from(body: BatchBody) -> Self {
        Self { max_events: body.max_events, max_wait_ms: body.max_wait_ms }
    }
}

/// What is wrong with the rules of a subscription; `pointer` leads to the object that says them.
pub(super) fn mistakes(pointer: &str, rules: &SubscriptionRules) -> Vec<FieldError> {
    let at = |member: &str, problem: Option<(&str, String)>| {
        let (name, rule) = problem?;
        Some(FieldError::at(format!("{pointer}/{member}/{name}"), format!("{name} {rule}")))
    };
    let retry = at("retryPolicy", rules.retry.as_ref().and_then(RetryOverride::problem));
    let batch = at("batch", rules.batch.and_then(BatchPolicy::problem));
    retry.into_iter().chain(batch).collect()
}

/// A change of the retry policy: each member is set, or removed by `null`; those that are absent stay
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RetryPolicyPatch {
    #[serde(default, deserialize_with = "present")]
    max_attempts: Option<Option<u32>>,
    #[serde(default, deserialize_with = "present")]
    base_ms: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    factor: Option<Option<f64>>,
    #[serde(default, deserialize_with = "present")]
    cap_ms: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    jitter: Option<Option<f64>>,
    #[serde(default, deserialize_with = "present")]
    delays_ms: Option<Option<Vec<u64>>>,
}

impl RetryPolicyPatch {
    /// The policy as it shall be.
    pub(super) fn apply(self, retry: RetryOverride) -> RetryOverride {
        RetryOverride {
            max_attempts: self.max_attempts.unwrap_or(retry.max_attempts),
            base_ms: self.base_ms.unwrap_or(retry.base_ms),
            factor: self.factor.unwrap_or(retry.factor),
            cap_ms: self.cap_ms.unwrap_or(retry.cap_ms),
            jitter: self.jitter.unwrap_or(retry.jitter),
            delays_ms: self.delays_ms.unwrap_or(retry.delays_ms),
        }
    }
}

/// A change of how events are gathered: what is absent stays
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = BatchPolicyPatch)]
pub(in crate::api) struct BatchPatch {
    /// Needed if there was no `batch`; cannot be `null`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u16>, nullable = false, minimum = 1, maximum = 100)]
    max_events: Option<Option<u16>>,
    /// Needed if there was no `batch`; cannot be `null`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u16>, nullable = false, minimum = 0, maximum = 5000)]
    max_wait_ms: Option<Option<u16>>,
}

impl BatchPatch {
    /// The batch as it shall be, unless a member is missing.
    pub(super) fn apply(self, batch: Option<BatchPolicy>) -> Result<BatchPolicy, FieldError> {
        let needed = |member: Option<u16>, name: &str| {
            member.ok_or_else(|| FieldError::at(format!("/batch/{name}"), format!("a batch needs {name}")))
        };
        let max_events = self.max_events.unwrap_or(batch.map(|batch| batch.max_events));
        let max_wait_ms = self.max_wait_ms.unwrap_or(batch.map(|batch| batch.max_wait_ms));
        Ok(BatchPolicy {
            max_events: needed(max_events, "maxEvents")?,
            max_wait_ms: needed(max_wait_ms, "maxWaitMs")?,
        })
    }
}
