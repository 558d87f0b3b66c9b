//! Audit records: who changed what, and when.
//!
//! Every change of an organization, a key, a connection, a subscription, a schedule, a delivery or a job leaves one record,
//! in its own transaction ([`crate::pg::audit::record`]): no change without a record, and no record without its change. A change
//! takes a [`By`], so that none can be made without saying who makes it. Publishing, acknowledging and delivering are no
//! changes in this sense: events, attempts and states of deliveries are their own history.
//!
//! A record never holds a secret. What a thing looks like in one is decided in `audit/shown.rs` alone.

pub(crate) mod shown;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::{
    ids::{AuditId, ConnectionId, KeyId, OrganizationId},
    words::words,
};

/// Who did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", rename_all_fields = "camelCase")]
pub enum Actor {
    /// Somebody with an API key.
    Key {
        /// The key.
        key_id: KeyId,
        /// The connection that it was bound to.
        connection_id: Option<ConnectionId>,
    },
    /// The bearer of the admin token.
    Admin,
    /// A process of the bus, by itself.
    System,
}

/// Who makes a change. A change makes one record at most, so that the record's id comes along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct By {
    /// The id of the record; a new UUIDv7.
    pub record: AuditId,
    /// Who.
    pub actor: Actor,
    /// The id of the HTTP request.
    pub request: Option<String>,
}

impl By {
    /// The bus itself makes the change; `record` is a new UUIDv7.
    pub fn system(record: Uuid) -> Self {
        Self { record: AuditId(record), actor: Actor::System, request: None }
    }
}

words! {
    /// What was done.
    Action {
        /// An organization was created.
        OrganizationCreated = "organization.created",
        /// An organization got another lane, or other limits.
        OrganizationChanged = "organization.changed",
        /// A key was created.
        KeyCreated = "key.created",
        /// A key was revoked.
        KeyRevoked = "key.revoked",
        /// A connection was created.
        ConnectionCreated = "connection.created",
        /// A connection was changed.
        ConnectionChanged = "connection.changed",
        /// A connection was deleted, with what belonged to it.
        ConnectionDeleted = "connection.deleted",
        /// The bus disabled a connection whose receiver is gone.
        ConnectionDisabled = "connection.disabled",
        /// A subscription was created.
        SubscriptionCreated = "subscription.created",
        /// A subscription was changed.
        SubscriptionChanged = "subscription.changed",
        /// A subscription was deleted.
        SubscriptionDeleted = "subscription.deleted",
        /// All subscriptions of a connection were replaced.
        SubscriptionsReplaced = "subscriptions.replaced",
        /// A schedule was created.
        ScheduleCreated = "schedule.created",
        /// A schedule got other rules, another event or another publisher.
        ScheduleChanged = "schedule.changed",
        /// A schedule was paused.
        SchedulePaused = "schedule.paused",
        /// A schedule was resumed.
        ScheduleResumed = "schedule.resumed",
        /// A schedule's event was published by hand.
        ScheduleTriggered = "schedule.triggered",
        /// A schedule was cancelled.
        ScheduleCancelled = "schedule.cancelled",
        /// An event that was due later, or deliveries of one that was published, were cancelled.
        EventCancelled = "event.cancelled",
        /// A dead letter was replayed.
        DeadLetterReplayed = "dead_letter.replayed",
        /// A dead letter was discarded.
        DeadLetterDiscarded = "dead_letter.discarded",
        /// A job was created that brings deliveries back, or discards dead letters.
        ReplayCreated = "replay.created",
        /// A job was cancelled.
        ReplayCancelled = "replay.cancelled",
        /// A job was created that empties payloads.
        ErasureCreated = "erasure.created",
        /// The bus has emptied the payloads.
        ErasureDone = "erasure.done",
        /// An operator brought rows back from cold storage.
        RowsRestored = "rows.restored",
        /// An operator changed streams to what the configuration describes.
        StreamsApplied = "streams.applied",
        /// An operator moved what was pending from one backend's queue into the other's.
        QueueDrained = "queue.drained",
        /// Deliveries that the queue had lost were put back, by `cargo xtask reconcile`.
        QueueReconciled = "queue.reconciled",
        /// Events were read with what they say; recorded where the configuration asks for it.
        PayloadRead = "payload.read",
    }
}

words! {
    /// What kind of thing something was done to.
    TargetKind {
        /// An organization; for [`Action::PayloadRead`] the list of its events.
        Organization = "organization",
        /// A key.
        Key = "key",
        /// A connection.
        Connection = "connection",
        /// A subscription.
        Subscription = "subscription",
        /// A schedule.
        Schedule = "schedule",
        /// An event, by its uid.
        Event = "event",
        /// A delivery that was given up.
        DeadLetter = "dead_letter",
        /// A job that brings deliveries back, or discards dead letters.
        Replay = "replay",
        /// A job that empties payloads.
        Erasure = "erasure",
        /// A table, by its name.
        Table = "table",
        /// The streams and queues of a deployment, by its prefix.
        Deployment = "deployment",
    }
}

/// What a record tells, apart from who and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// What was done.
    pub action: Action,
    /// What kind of thing it was done to.
    pub target_kind: TargetKind,
    /// Which one.
    pub target_id: String,
    /// As it was, as far as it is shown.
    pub before: Option<Value>,
    /// As it is now, as far as it is shown; or how much was done.
    pub after: Option<Value>,
}

impl Change {
    /// Something that was done to `target_id`.
    pub fn new(action: Action, target_kind: TargetKind, target_id: impl ToString) -> Self {
        Self { action, target_kind, target_id: target_id.to_string(), before: None, after: None }
    }

    /// The same, with the thing as it was.
    #[must_use]
    pub fn before(self, before: Value) -> Self {
        Self { before: Some(before), ..self }
    }

    /// The same, with the thing as it is now, or how much was done.
    #[must_use]
    pub fn after(self, after: Value) -> Self {
        Self { after: Some(after), ..self }
    }
}

/// A record, as it is stored, shown by the API, and passed on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Its id, a UUIDv7.
    pub id: AuditId,
    /// Whose thing it was; none for what belongs to no organization alone.
    pub organization_id: Option<OrganizationId>,
    /// When, by the database's clock.
    pub at: Timestamp,
    /// Who.
    pub actor: Actor,
    /// What was done: an [`Action`]. As text, because records outlive the programs that write them, and an older program
    /// may read what a newer one wrote.
    pub action: String,
    /// What it was done to.
    pub target: Target,
    /// As it was, as far as it is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// As it was afterwards, as far as it is shown; or how much was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
    /// The id of the HTTP request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// What something was done to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// A [`TargetKind`], as text like [`Record::action`].
    pub kind: String,
    /// Which one.
    pub id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_of_a_record_is_what_the_stream_and_the_storage_keep() {
        let id = Uuid::from_u128(7);
        let record = Record {
            id: AuditId(id),
            organization_id: Some(OrganizationId(id)),
            at: Timestamp::UNIX_EPOCH,
            actor: Actor::Key { key_id: KeyId(id), connection_id: None },
            action: Action::KeyRevoked.as_str().to_owned(),
            target: Target { kind: TargetKind::Key.as_str().to_owned(), id: id.to_string() },
            before: None,
            after: Some(serde_json::json!({ "name": "ci" })),
            request_id: Some("r-1".into()),
        };
        let text = id.to_string();
        let json = serde_json::json!({
            "id": text,
            "organizationId": text,
            "at": "1970-01-01T00:00:00Z",
            "actor": { "kind": "key", "keyId": text, "connectionId": null },
            "action": "key.revoked",
            "target": { "kind": "key", "id": text },
            "after": { "name": "ci" },
            "requestId": "r-1",
        });
        assert_eq!(serde_json::to_value(&record).expect("a record is JSON"), json);
        assert_eq!(serde_json::from_value::<Record>(json).expect("its own JSON"), record);
    }
}
