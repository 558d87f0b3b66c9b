//! A delivery: one event on its way to one subscription.

use bytes::Bytes;

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

/// One event for one subscription, ready to be attempted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// What it is about.
    pub key: DeliveryKey,
    /// Attempts made before it was put in the queue this time.
    pub attempts: u32,
    /// The CloudEvent in the JSON event format, the exact bytes that every subscriber gets.
    pub body: Bytes,
}
