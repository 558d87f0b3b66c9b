//! Receipts: what a worker reports of each attempt, for history.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId};

/// How an attempt ended, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiptOutcome {
    /// The subscriber took the event.
    Delivered,
    /// It did not; there will be another attempt.
    Failed,
    /// It asked to be asked again later. No attempt is counted.
    Deferred,
    /// It did not, and there will be none.
    Dead,
}

impl ReceiptOutcome {
    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Deferred => "deferred",
            Self::Dead => "dead",
        }
    }
}

/// One finished attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Receipt {
    /// The delivery.
    pub delivery: DeliveryId,
    /// The failed attempts before this one, plus one. After a deferral, or a crash that nobody counted, it
    /// bears the number of the attempt before it.
    pub attempt: u32,
    /// The delivery's turn (see [`Progress`](crate::delivery::Progress)).
    #[serde(default)]
    pub turn: i64,
    /// The event.
    pub event: EventUid,
    /// Whose it is.
    pub organization: OrganizationId,
    /// What matched.
    pub subscription: SubscriptionId,
    /// Where it went.
    pub connection: ConnectionId,
    /// How it ended.
    pub outcome: ReceiptOutcome,
    /// The HTTP status, if an answer came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When the attempt began.
    pub at: Timestamp,
    /// How long it took, milliseconds.
    pub duration_ms: u32,
}
