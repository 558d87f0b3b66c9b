//! A delivery: one event on its way to one subscription.

use bytes::Bytes;
use jiff::Timestamp;

use crate::ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId};

/// What a delivery is about: everything but the event's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeliveryKey {
    /// Names the delivery, the same for all its attempts.
    pub id: DeliveryId,
    /// The event.
    pub event: EventUid,
    /// Whose it is.
    pub organization: OrganizationId,
    /// What matched.
    pub subscription: SubscriptionId,
    /// Where it goes.
    pub connection: ConnectionId,
    /// The connection's version when the event was matched; a worker whose copy is older reloads it.
    pub connection_version: i64,
}

/// How far a delivery has come. It travels with the delivery, so that whoever takes it next knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Failed attempts. Deferrals and the crashes of workers count none (invariant I4).
    pub attempts: u32,
    /// Which entry into the queue this is: each return adds one, a replay begins at the current time in
    /// milliseconds, which is later than every turn before it. Of two results about one delivery the one
    /// with the higher turn wins.
    pub turn: i64,
    /// When its lifetime began, whole milliseconds: when it was first put into the queue, or replayed.
    pub since: Timestamp,
}

/// The first millisecond of 2001; no turn that was counted comes near it.
const FIRST_REPLAY: i64 = 978_307_200_000;

impl Progress {
    /// A delivery that enters the queue for the first time.
    pub fn new(since: Timestamp) -> Self {
        Self { attempts: 0, turn: 0, since: truncated(since) }
    }

    /// Whether this turn, or one that led to it, began with a replay: the turns that are counted stay far below
    /// the time in milliseconds.
    pub fn is_replayed(&self) -> bool {
        self.turn >= FIRST_REPLAY
    }

    /// What it is when it comes back with so many failed attempts.
    #[must_use]
    pub fn next(self, attempts: u32) -> Self {
        Self { attempts, turn: self.turn.saturating_add(1), since: self.since }
    }
}

/// Queues carry milliseconds.
fn truncated(at: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(at.as_millisecond()).unwrap_or(at)
}

/// One event for one subscription, ready to be attempted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// What it is about.
    pub key: DeliveryKey,
    /// The CloudEvent in the JSON event format, the exact bytes that every subscriber gets.
    pub body: Bytes,
}
