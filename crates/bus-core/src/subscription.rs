//! Subscriptions: what a connection wants to receive.

use jiff::Timestamp;

use crate::{
    filter::PayloadFilter,
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pattern::TypePattern,
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
    /// It matches nothing while this is false.
    pub enabled: bool,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
}
