//! The one place that decides what follows from an attempt.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::RetryPolicy;
use crate::sink::{Failure, Outcome};

/// What the decision goes by, apart from the attempt and what came before it.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// The subscription's policy.
    pub policy: &'a RetryPolicy,
    /// The connection's: an answer with one of these statuses is not worth a retry. A `Retry-After` that
    /// makes an answer a deferral is more to the point than they are, and 410 is final anyway.
    pub final_statuses: &'a [u16],
    /// No deferral is shorter, so that none can make a hot loop.
    pub defer_min: Duration,
    /// No deferral is longer, and no `Retry-After` with a failure is heeded for longer.
    pub defer_max: Duration,
    /// No attempt is made later than this after the delivery's lifetime began.
    pub lifetime: Duration,
}

/// How a delivery stood when the attempt was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Failed attempts before.
    pub attempts: u32,
    /// Since its lifetime began.
    pub age: Duration,
}

/// What follows from an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing more: the subscriber has it.
    Delivered,
    /// Another attempt.
    Retry {
        /// Not earlier than after this.
        wait: Duration,
        /// Failed attempts, this one included if it was one; a deferral is none.
        attempts: u32,
        /// Why, for those who look.
        reason: String,
    },
    /// There will be no other attempt.
    Dead {
        /// Why not.
        reason: DeadReason,
        /// Failed attempts, this one included if it was one.
        attempts: u32,
    },
    /// The endpoint answered 410: the delivery is dead for [`DeadReason::EndpointGone`], and the connection
    /// is to be disabled.
    Gone {
        /// Failed attempts, this one included.
        attempts: u32,
    },
}

/// Why a delivery is dead. The words are stored and shown; they never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    /// It failed as often as its retry policy allows.
    AttemptsExhausted,
    /// Its lifetime would have been over before the next attempt.
    Expired,
    /// The endpoint answered with a status that its connection calls final.
    FinalStatus,
    /// The endpoint answered 410.
    EndpointGone,
    /// Its connection was deleted.
    ConnectionDeleted,
    /// Its connection was disabled.
    ConnectionDisabled,
    /// Its connection only publishes.
    ConnectionReceivesNothing,
    /// Its event is no longer stored.
    EventExpired,
    /// Its event's payload was erased.
    Expunged,
    /// It was handed out time and again without any result: it takes its workers down with it.
    RedeliveredTooOften,
}

impl DeadReason {
    /// All reasons.
    pub const ALL: [Self; 10] = [
        Self::AttemptsExhausted,
        Self::Expired,
        Self::FinalStatus,
        Self::EndpointGone,
        Self::ConnectionDeleted,
        Self::ConnectionDisabled,
        Self::ConnectionReceivesNothing,
        Self::EventExpired,
        Self::Expunged,
        Self::RedeliveredTooOften,
    ];

    /// As it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AttemptsExhausted => "attempts_exhausted",
            Self::Expired => "expired",
            Self::FinalStatus => "final_status",
            Self::EndpointGone => "endpoint_gone",
            Self::ConnectionDeleted => "connection_deleted",
            Self::ConnectionDisabled => "connection_disabled",
            Self::ConnectionReceivesNothing => "connection_receives_nothing",
            Self::EventExpired => "event_expired",
            Self::Expunged => "expunged",
            Self::RedeliveredTooOften => "redelivered_too_often",
        }
    }
}

impl fmt::Display for DeadReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Decides what follows from an attempt. `random` is in `0.0..1.0` and chooses the jitter, which is only
/// ever added: the next attempt is never made before the wait that the policy or the subscriber named.
///
/// - A deferral costs no attempt. Its wait is brought between [`Rules::defer_min`] and [`Rules::defer_max`].
/// - A failure costs one. Its wait is the policy's, or what the endpoint asked for if that is longer.
/// - Either is death instead if the next attempt would come after the lifetime's end.
pub fn verdict(outcome: &Outcome, rules: &Rules<'_>, standing: &Standing, random: f64) -> Verdict {
    match outcome {
        Outcome::Delivered => Verdict::Delivered,
        Outcome::Deferred { wait, why } => {
            let wait = (*wait).min(rules.defer_max).max(rules.defer_min);
            again(wait, why, standing.attempts, rules, standing, random)
        }
        Outcome::Failed { failure, not_before } => {
            let attempts = standing.attempts.saturating_add(1);
            match failure {
                Failure::Status(410) => return Verdict::Gone { attempts },
                Failure::Status(status) if rules.final_statuses.contains(status) => {
                    return Verdict::Dead { reason: DeadReason::FinalStatus, attempts };
                }
                _ => {}
            }
            let Some(wait) = rules.policy.wait(attempts) else {
                return Verdict::Dead { reason: DeadReason::AttemptsExhausted, attempts };
            };
            let asked = not_before.unwrap_or_default().min(rules.defer_max);
            again(wait.max(asked), failure, attempts, rules, standing, random)
        }
    }
}

fn again(
    wait: Duration,
    reason: &impl ToString,
    attempts: u32,
    rules: &Rules<'_>,
    standing: &Standing,
    random: f64,
) -> Verdict {
    let wait = rules.policy.with_jitter(wait, random);
    if standing.age.saturating_add(wait) > rules.lifetime {
        return Verdict::Dead { reason: DeadReason::Expired, attempts };
    }
    Verdict::Retry { wait, attempts, reason: reason.to_string() }
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
