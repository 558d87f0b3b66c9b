//! Subscriptions: what a connection wants to receive.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    filter::PayloadFilter,
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pattern::TypePattern,
    retry::RetryOverride,
};

/// A subscription, as stored.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Its id.
    pub id: SubscriptionId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// Where its deliveries go. Never changes.
    pub connection: ConnectionId,
    /// Which event types it takes.
    pub event_type: TypePattern,
    /// Only events that were published by this connection.
    pub publisher: Option<ConnectionId>,
    /// Only events whose payload this selects something of.
    pub filter: Option<PayloadFilter>,
    /// How its deliveries are made.
    pub rules: SubscriptionRules,
    /// It matches nothing while this is false.
    pub enabled: bool,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
}

/// What a subscription says about how its deliveries are made. It is no part of what makes a
/// subscription unique, and a worker keeps it with the connection ([`crate::connection::Receiver`]).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SubscriptionRules {
    /// Where its retries differ from the configured policy.
    pub retry: Option<RetryOverride>,
    /// How its events are gathered; one by one if `None`.
    pub batch: Option<BatchPolicy>,
}

/// How many events a subscription wants in one request, and how long the first of them may wait for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BatchPolicy {
    /// The most events in a request, 1–100.
    pub max_events: u16,
    /// The longest wait for more, milliseconds, 0–5,000.
    pub max_wait_ms: u16,
}

impl BatchPolicy {
    /// The most that [`BatchPolicy::max_events`] may be. The answer's results for so many events, each with
    /// an error text of its own, stay below what a worker reads of an answer.
    pub const MAX_EVENTS: u16 = 100;
    /// The most that [`BatchPolicy::max_wait_ms`] may be: events that wait are held by one worker, and take
    /// slots of its lane.
    pub const MAX_WAIT_MS: u16 = 5_000;

    /// The longest wait for more.
    pub fn max_wait(self) -> Duration {
        Duration::from_millis(self.max_wait_ms.into())
    }

    /// Why this cannot be used, if so: the member at fault, as the API names it, and the rule it breaks.
    pub fn problem(self) -> Option<(&'static str, String)> {
        if !(1..=Self::MAX_EVENTS).contains(&self.max_events) {
            return Some(("maxEvents", format!("must be between 1 and {}", Self::MAX_EVENTS)));
        }
        if self.max_wait_ms > Self::MAX_WAIT_MS {
            return Some(("maxWaitMs", format!("must be at most {}", Self::MAX_WAIT_MS)));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_policies_have_bounds() {
        let problem = |max_events, max_wait_ms| {
            BatchPolicy { max_events, max_wait_ms }.problem().map(|(member, _)| member)
        };
        assert_eq!((problem(1, 0), problem(100, 5_000)), (None, None));
        assert_eq!((problem(0, 0), problem(101, 0)), (Some("maxEvents"), Some("maxEvents")));
        assert_eq!(problem(1, 5_001), Some("maxWaitMs"));
        let policy: BatchPolicy =
            serde_json::from_str(r#"{"maxEvents":50,"maxWaitMs":200}"#).expect("two members");
        assert_eq!(policy, BatchPolicy { max_events: 50, max_wait_ms: 200 });
    }
}
