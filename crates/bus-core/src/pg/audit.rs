//! Audit records: written in the transaction of the change that they tell of, and read newest first.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use sqlx::{PgConnection, PgPool, Postgres, QueryBuilder, types::Json};
use uuid::Uuid;

use super::{During as _, Paged, StoreError, dead_letters::read_in_order};
use crate::{
    audit::{Action, Actor, By, Change, Record, Target, TargetKind},
    ids::{AuditId, ConnectionId, KeyId, OrganizationId, uuid_floor},
};

/// How many records one call of [`records`] looks at, at most, to find those of an action, a key, or a target that is
/// not named completely.
pub const AUDIT_SCAN: i64 = 5_000;

/// A record's id is of the clock of the process that made it, its time of the database's. They differ by less than this.
const SKEW: SignedDuration = SignedDuration::from_hours(24);

/// Writes the record of a change. Belongs in the change's own transaction.
pub async fn record(
    transaction: &mut PgConnection,
    by: &By,
    organization: Option<OrganizationId>,
    change: Change,
) -> Result<(), StoreError> {
    let (actor, key, connection) = match by.actor {
        Actor::Key { key_id, connection_id } => ("key", Some(key_id), connection_id),
        Actor::Admin => ("admin", None, None),
        Actor::System => ("system", None, None),
    };
    sqlx::query(
        "INSERT INTO audit_records (id, organization_id, actor, key_id, connection_id, action, target_kind, target_id,
                                    before, after, request_id)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
    )
    .bind(by.record.0)
    .bind(organization.map(|id| id.0))
    .bind(actor)
    .bind(key.map(|id| id.0))
    .bind(connection.map(|id| id.0))
    .bind(change.action.as_str())
    .bind(change.target_kind.as_str())
    .bind(change.target_id)
    .bind(change.before.map(Json))
    .bind(change.after.map(Json))
    .bind(&by.request)
    .execute(transaction)
    .await
    .during("write an audit record")?;
    Ok(())
}

/// Which records; all conditions hold at once.
#[derive(Debug, Clone, Default)]
pub struct RecordQuery {
    /// Only those about an organization's things. Without it those of all, and those of none.
    pub organization: Option<OrganizationId>,
    /// Only those about this kind of thing.
    pub target_kind: Option<TargetKind>,
    /// Only those about the thing with this id.
    pub target_id: Option<String>,
    /// Only those of this action.
    pub action: Option<Action>,
    /// Only what was done with this key.
    pub key: Option<KeyId>,
    /// Only those of this time or later.
    pub since: Option<Timestamp>,
    /// Only those before this time.
    pub until: Option<Timestamp>,
    /// Only those before this one in the list.
    pub before: Option<AuditId>,
    /// At most so many.
    pub limit: u32,
}

impl RecordQuery {
    /// Whether an index answers for kind and id together; otherwise they are looked at row by row.
    fn names_target(&self) -> bool {
        self.organization.is_some() && self.target_kind.is_some() && self.target_id.is_some()
    }

    /// Whether rows have to be looked at that may not be wanted.
    fn searches(&self) -> bool {
        let target = self.target_kind.is_some() || self.target_id.is_some();
        self.action.is_some() || self.key.is_some() || (target && !self.names_target())
    }

    /// The part of the question that an index answers, in its order.
    fn push_range(&self, builder: &mut QueryBuilder<Postgres>) {
        let bound = |time: Timestamp, skew| uuid_floor(time.saturating_add(skew).unwrap_or(time));
        let ends = [self.before.map(|id| id.0), self.until.map(|until| bound(until, SKEW))];
        builder.push(" FROM audit_records WHERE id < ");
        builder.push_bind(ends.into_iter().flatten().min().unwrap_or(Uuid::max()));
        if let Some(since) = self.since {
            builder.push(" AND id >= ").push_bind(bound(since, -SKEW));
            builder.push(" AND at >= ").push_bind(jiff_sqlx::Timestamp::from(since));
        }
        if let Some(until) = self.until {
            builder.push(" AND at < ").push_bind(jiff_sqlx::Timestamp::from(until));
        }
        if let Some(organization) = self.organization {
            builder.push(" AND organization_id = ").push_bind(organization.0);
        }
        if self.names_target() {
            self.push_target(builder);
        }
        builder.push(" ORDER BY id DESC");
    }

    fn push_target(&self, builder: &mut QueryBuilder<Postgres>) {
        if let Some(kind) = self.target_kind {
            builder.push(" AND target_kind = ").push_bind(kind.as_str());
        }
        if let Some(id) = &self.target_id {
            builder.push(" AND target_id = ").push_bind(id.clone());
        }
    }

    /// The part that has to be looked at row by row.
    fn push_fits(&self, builder: &mut QueryBuilder<Postgres>) {
        builder.push(" WHERE true");
        if let Some(action) = self.action {
            builder.push(" AND action = ").push_bind(action.as_str());
        }
        if let Some(key) = self.key {
            builder.push(" AND key_id = ").push_bind(key.0);
        }
        if !self.names_target() {
            self.push_target(builder);
        }
    }
}

macro_rules! columns {
    () => {
        "id, organization_id, at, actor, key_id, connection_id, action, target_kind, target_id, before, after, request_id"
    };
}

#[derive(sqlx::FromRow)]
pub(super) struct RecordRow {
    id: Uuid,
    organization_id: Option<Uuid>,
    at: jiff_sqlx::Timestamp,
    actor: String,
    key_id: Option<Uuid>,
    connection_id: Option<Uuid>,
    action: String,
    target_kind: String,
    target_id: String,
    before: Option<Json<Value>>,
    after: Option<Json<Value>>,
    request_id: Option<String>,
}

impl TryFrom<RecordRow> for Record {
    type Error = StoreError;

    fn try_from(row: RecordRow) -> Result<Self, StoreError> {
        let actor = match (row.actor.as_str(), row.key_id) {
            ("key", Some(key)) => {
                Actor::Key { key_id: KeyId(key), connection_id: row.connection_id.map(ConnectionId) }
            }
            ("admin", _) => Actor::Admin,
            ("system", _) => Actor::System,
            (other, _) => {
                return Err(StoreError::Inconsistent {
                    table: "audit_records",
                    id: row.id.to_string(),
                    problem: format!("unknown actor {other}"),
                });
            }
        };
        Ok(Self {
            id: AuditId(row.id),
            organization_id: row.organization_id.map(OrganizationId),
            at: row.at.to_jiff(),
            actor,
            action: row.action,
            target: Target { kind: row.target_kind, id: row.target_id },
            before: row.before.map(|Json(value)| value),
            after: row.after.map(|Json(value)| value),
            request_id: row.request_id,
        })
    }
}

/// Audit records, newest first. A part may have fewer than asked for, or none, and still name a next one: see
/// [`AUDIT_SCAN`].
pub async fn records(pool: &PgPool, query: &RecordQuery) -> Result<Paged<Record>, StoreError> {
    const OPERATION: &str = "list audit records";
    // What is looked at and where that ends are two statements, which must see the same records.
    let mut transaction =
        pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await.during(OPERATION)?;
    read_in_order(&mut transaction).await?;
    let wanted = i64::from(query.limit) + 1;
    let scan = if query.searches() { AUDIT_SCAN.max(wanted) } else { wanted };
    let mut list = QueryBuilder::<Postgres>::new(concat!("SELECT ", columns!(), " FROM (SELECT *"));
    query.push_range(&mut list);
    list.push(" LIMIT ").push_bind(scan).push(") AS looked_at");
    query.push_fits(&mut list);
    list.push(" ORDER BY id DESC LIMIT ").push_bind(wanted);
    let rows: Vec<RecordRow> = list.build_query_as().fetch_all(&mut *transaction).await.during(OPERATION)?;
    let mut items: Vec<Record> = rows.into_iter().map(Record::try_from).collect::<Result<_, _>>()?;
    let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
    let next = if items.len() > limit {
        items.truncate(limit);
        items.last().map(|item| item.id.0)
    } else if query.searches() {
        let mut end = QueryBuilder::<Postgres>::new("SELECT id");
        query.push_range(&mut end);
        end.push(" LIMIT 1 OFFSET ").push_bind(scan - 1);
        end.build_query_scalar().fetch_optional(&mut *transaction).await.during(OPERATION)?
    } else {
        None
    };
    Ok(Paged { items, next })
}

/// The oldest records that the audit stream does not have yet, at most `limit`, held by this transaction.
pub async fn take_open(transaction: &mut PgConnection, limit: u32) -> Result<Vec<Record>, StoreError> {
    let rows: Vec<RecordRow> = sqlx::query_as(
        "SELECT id, organization_id, at, actor, key_id, connection_id, action, target_kind, target_id, before, after,
                request_id
         FROM audit_records WHERE relayed_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED",
    )
    .bind(i64::from(limit))
    .fetch_all(transaction)
    .await
    .during("take audit records for the stream")?;
    rows.into_iter().map(Record::try_from).collect()
}

/// Notes that the audit stream has these records.
pub async fn note_relayed(transaction: &mut PgConnection, ids: &[AuditId]) -> Result<(), StoreError> {
    sqlx::query("UPDATE audit_records SET relayed_at = now() WHERE id = ANY($1)")
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .execute(transaction)
        .await
        .during("note audit records that the stream has")?;
    Ok(())
}
