//! Watching audit records come.

use std::collections::BTreeSet;

use bus_core::{
    audit::{Actor, Record},
    ids::AuditId,
    pg::{self, audit::RecordQuery},
};
use devkit::client::Reply;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{Bus, Caller, Tenant};

/// Every scope, the most that a key can have.
pub(crate) const EVERYTHING: &[&str] = &["publish", "subscribe", "read", "admin"];

/// An event that recurs each day at that hour.
pub(crate) fn daily(hour: u8) -> Value {
    json!({ "type": "day.began", "source": "/s", "cron": format!("0 {hour} * * *"), "data": { "n": 1 } })
}

/// Sees each record once, and remembers which operations were tried.
pub(crate) struct Watch {
    pub(crate) pool: PgPool,
    seen: BTreeSet<AuditId>,
    pub(crate) tried: BTreeSet<&'static str>,
}

impl Watch {
    pub(crate) async fn new(pool: PgPool) -> Self {
        let mut watch = Self { pool, seen: BTreeSet::new(), tried: BTreeSet::new() };
        watch.fresh().await;
        watch
    }

    /// The records that are new since the last call.
    pub(crate) async fn fresh(&mut self) -> Vec<Record> {
        let query = RecordQuery { limit: 10_000, ..RecordQuery::default() };
        let all = pg::audit::records(&self.pool, &query).await.unwrap().items;
        all.into_iter().filter(|record| self.seen.insert(record.id)).collect()
    }

    /// The operation has left one record, of this action and target, by this actor and for this request.
    pub(crate) async fn left(
        &mut self,
        operation: &'static str,
        reply: &Reply,
        by: Actor,
        (action, kind, id): (&str, &str, &str),
    ) -> Record {
        self.tried.insert(operation);
        let fresh = self.fresh().await;
        let [record] = fresh.as_slice() else { panic!("{operation} leaves one record: {fresh:#?}") };
        assert_eq!((record.action.as_str(), record.target.kind.as_str()), (action, kind), "{operation}");
        assert_eq!(record.target.id, id, "{operation}");
        assert_eq!(record.actor, by, "{operation}");
        let request = reply.headers["x-request-id"].to_str().unwrap();
        assert_eq!(record.request_id.as_deref(), Some(request), "{operation}");
        record.clone()
    }

    /// The operation, which is tried by this, leaves no record, and this is why.
    pub(crate) async fn left_nothing(&mut self, operation: &'static str, why: &str) {
        self.tried.insert(operation);
        assert_eq!(self.fresh().await, [], "{operation}: {why}");
    }

    /// Nothing that has happened since the last call is a change.
    pub(crate) async fn nothing_happened(&mut self, what: &str) {
        assert_eq!(self.fresh().await, [], "{what}");
    }
}

/// Creates a key and gives a client with it, and who that is in records.
pub(crate) async fn key(
    bus: &Bus,
    tenant: &Tenant,
    scopes: &[&str],
    connection: Option<&str>,
) -> (Caller, Actor) {
    let new = json!({ "name": "a key", "scopes": scopes, "connectionId": connection });
    let created = bus.admin.post(&tenant.keys(), new).await.expect(201);
    let actor = Actor::Key {
        key_id: created.id().parse().unwrap(),
        connection_id: connection.map(|id| id.parse().unwrap()),
    };
    (Caller(bus.admin.0.with_token(created.text("/key"))), actor)
}
