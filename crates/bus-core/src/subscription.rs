//! Subscriptions: what a connection wants to receive.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    filter::PayloadFilter,
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pattern::TypePattern,
    retry::RetryOverride,
};

/// The most events that one call of a subscriber may bring.
pub const MAX_BATCH_EVENTS: u16 = 100;

/// The longest that an event waits for others to come with it, milliseconds. A worker holds what it
/// gathers, so this is part of how long it holds a delivery.
pub const MAX_BATCH_WAIT_MS: u16 = 5_000;

/// How a subscription gathers events, so that one call brings several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BatchPolicy {
    /// The most events of one call, 1 to [`MAX_BATCH_EVENTS`].
    pub max_events: u16,
    /// How long the first event waits for others, milliseconds, at most [`MAX_BATCH_WAIT_MS`]. With 0 only
    /// what is there already goes together.
    pub max_wait_ms: u16,
}

impl BatchPolicy {
    /// Why this cannot be used, if so: the member at fault, as the API names it, and the rule it breaks.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        if !(1..=MAX_BATCH_EVENTS).contains(&self.max_events) {
            Some(("maxEvents", format!("must be between 1 and {MAX_BATCH_EVENTS}")))
        } else if self.max_wait_ms > MAX_BATCH_WAIT_MS {
            Some(("maxWaitMs", format!("must be between 0 and {MAX_BATCH_WAIT_MS}")))
        } else {
            None
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_has_bounds() {
        let problem = |max_events, max_wait_ms| {
            BatchPolicy { max_events, max_wait_ms }.problem().map(|(member, _)| member)
        };
        for (max_events, max_wait_ms) in [(1, 0), (100, 5_000)] {
            assert_eq!(problem(max_events, max_wait_ms), None);
        }
        assert_eq!(problem(0, 0), Some("maxEvents"));
        assert_eq!(problem(101, 0), Some("maxEvents"));
        assert_eq!(problem(1, 5_001), Some("maxWaitMs"));
    }
}
