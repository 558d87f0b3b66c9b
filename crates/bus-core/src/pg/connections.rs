//! Connections. Each change counts up the connection's own version, which travels with the
//! deliveries, and the organization's, which matching reads.

use std::{collections::BTreeMap, time::Duration};

use jiff_sqlx::ToSqlx as _;
use serde_json::json;
use sqlx::{PgConnection, PgPool, types::Json};
use url::Url;
use uuid::Uuid;

use super::{
    During as _, PageRequest, Paged, StoreError, audit,
    deliveries::recall,
    organizations::{bump_organization, lock_organization},
    schedules::cancel_schedules_of,
};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    connection::{Connection, ContentMode, Limits, RateLimit, Target, Webhook},
    ids::{ConnectionId, OrganizationId},
    signature::SigningSecret,
};

/// As many parked deliveries find out how a changed connection does, one after another.
const RECALLED: u32 = 10;

/// Between two of them, at least.
const RECALL_INTERVAL: Duration = Duration::from_millis(100);

/// A connection that is to be stored.
#[derive(Debug, Clone)]
pub struct NewConnection {
    /// Its id.
    pub id: ConnectionId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// Unique within the organization.
    pub name: String,
    /// Whether anything is delivered.
    pub enabled: bool,
    /// Where it receives.
    pub target: Target,
}

/// What [`create_connection`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum CreateConnection {
    /// It is there now.
    Created(Box<Connection>),
    /// The organization has another one of that name.
    NameTaken,
}

/// What [`change_connection`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum ChangeConnection<E> {
    /// It is stored as it shall be; the version tells whether that needed a change.
    Stored(Box<Connection>),
    /// The organization has no such connection.
    NotFound,
    /// The organization has another one of that name.
    NameTaken,
    /// The caller's function refused; nothing changed.
    Refused(E),
}

#[derive(sqlx::FromRow)]
struct ConnectionRow {
    id: Uuid,
    organization_id: Uuid,
    name: String,
    kind: String,
    version: i64,
    enabled: bool,
    disabled_reason: Option<String>,
    failing_since: Option<jiff_sqlx::Timestamp>,
    url: Option<String>,
    headers: Json<BTreeMap<String, String>>,
    timeout_ms: i32,
    content_mode: String,
    final_statuses: Vec<i16>,
    max_in_flight: Option<i32>,
    rate_per_second: Option<f64>,
    burst: Option<i32>,
    secret: Option<String>,
    previous_secret: Option<String>,
    previous_secret_until: Option<jiff_sqlx::Timestamp>,
    created_at: jiff_sqlx::Timestamp,
    updated_at: jiff_sqlx::Timestamp,
}

macro_rules! columns {
    () => {
        "id, organization_id, name, kind, version, enabled, disabled_reason, failing_since, url, headers, timeout_ms, \
         content_mode, final_statuses, max_in_flight, rate_per_second, burst, secret, previous_secret, \
         previous_secret_until, created_at, updated_at"
    };
}

impl TryFrom<ConnectionRow> for Connection {
    type Error = StoreError;

    fn try_from(row: ConnectionRow) -> Result<Self, StoreError> {
        // The problem names the column only: values may be secret.
        let unfit = |column: &str| StoreError::Inconsistent {
            table: "connections",
            id: row.id.to_string(),
            problem: format!("{column} does not fit"),
        };
        let target = match row.kind.as_str() {
            "publisher" => Target::Publisher,
            "webhook" => {
                let secret = |text: &str, column| SigningSecret::parse(text).map_err(|_| unfit(column));
                Target::Webhook(Box::new(Webhook {
                    url: row
                        .url
                        .as_deref()
                        .and_then(|url| Url::parse(url).ok())
                        .ok_or_else(|| unfit("url"))?,
                    headers: row.headers.0.clone(),
                    timeout: Duration::from_millis(
                        u64::try_from(row.timeout_ms).map_err(|_| unfit("timeout_ms"))?,
                    ),
                    content_mode: match row.content_mode.as_str() {
                        "structured" => ContentMode::Structured,
                        "binary" => ContentMode::Binary,
                        _ => return Err(unfit("content_mode")),
                    },
                    final_statuses: row
                        .final_statuses
                        .iter()
                        .map(|status| u16::try_from(*status).map_err(|_| unfit("final_statuses")))
                        .collect::<Result<_, _>>()?,
                    limits: row.limits().ok_or_else(|| unfit("max_in_flight or burst"))?,
                    secret: secret(row.secret.as_deref().unwrap_or_default(), "secret")?,
                    previous_secret: match (&row.previous_secret, row.previous_secret_until) {
                        (Some(text), Some(until)) => {
                            Some((secret(text, "previous_secret")?, until.to_jiff()))
                        }
                        _ => None,
                    },
                }))
            }
            _ => return Err(unfit("kind")),
        };
        Ok(Self {
            id: ConnectionId(row.id),
            organization: OrganizationId(row.organization_id),
            version: row.version,
            enabled: row.enabled,
            target,
            created_at: row.created_at.to_jiff(),
            updated_at: row.updated_at.to_jiff(),
            name: row.name,
            disabled_reason: row.disabled_reason,
            failing_since: row.failing_since.map(jiff_sqlx::Timestamp::to_jiff),
        })
    }
}

impl ConnectionRow {
    fn limits(&self) -> Option<Limits> {
        let number = |value: Option<i32>| value.map(u32::try_from).transpose().ok();
        let burst = number(self.burst)?;
        let rate = self.rate_per_second.map(|per_second| RateLimit { per_second, burst });
        Some(Limits { max_in_flight: number(self.max_in_flight)?, rate })
    }
}

/// The columns that hold a [`Target`].
struct TargetColumns {
    kind: &'static str,
    url: Option<String>,
    headers: Json<BTreeMap<String, String>>,
    timeout_ms: i32,
    content_mode: &'static str,
    final_statuses: Vec<i16>,
    max_in_flight: Option<i32>,
    rate_per_second: Option<f64>,
    burst: Option<i32>,
    secret: Option<String>,
    previous_secret: Option<String>,
    previous_secret_until: Option<jiff_sqlx::Timestamp>,
}

impl From<&Target> for TargetColumns {
    fn from(target: &Target) -> Self {
        let mut columns = Self {
            kind: "publisher",
            url: None,
            headers: Json(BTreeMap::new()),
            timeout_ms: 15_000,
            content_mode: "structured",
            final_statuses: Vec::new(),
            max_in_flight: None,
            rate_per_second: None,
            burst: None,
            secret: None,
            previous_secret: None,
            previous_secret_until: None,
        };
        if let Target::Webhook(webhook) = target {
            let previous = webhook.previous_secret.as_ref();
            columns.kind = "webhook";
            columns.url = Some(webhook.url.to_string());
            columns.headers = Json(webhook.headers.clone());
            // The table's CHECK refuses what is out of range, so saturation hides nothing.
            columns.timeout_ms = i32::try_from(webhook.timeout.as_millis()).unwrap_or(i32::MAX);
            columns.content_mode = match webhook.content_mode {
                ContentMode::Structured => "structured",
                ContentMode::Binary => "binary",
            };
            let statuses = webhook.final_statuses.iter();
            columns.final_statuses =
                statuses.map(|status| i16::try_from(*status).unwrap_or(i16::MAX)).collect();
            let number = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
            let Limits { max_in_flight, rate } = webhook.limits;
            columns.max_in_flight = max_in_flight.map(number);
            columns.rate_per_second = rate.map(|rate| rate.per_second);
            columns.burst = rate.and_then(|rate| rate.burst).map(number);
            columns.secret = Some(webhook.secret.expose());
            columns.previous_secret = previous.map(|(secret, _)| secret.expose());
            columns.previous_secret_until = previous.map(|(_, until)| until.to_sqlx());
        }
        columns
    }
}

/// Stores a connection.
pub async fn create_connection(
    pool: &PgPool,
    new: NewConnection,
    by: &By,
) -> Result<CreateConnection, StoreError> {
    let target = TargetColumns::from(&new.target);
    let mut transaction = pool.begin().await.during("begin to create a connection")?;
    lock_organization(&mut transaction, new.organization).await?;
    let row: Option<ConnectionRow> = sqlx::query_as(concat!(
        "INSERT INTO connections (id, organization_id, name, kind, enabled, url, headers, timeout_ms,
                content_mode, final_statuses, secret, max_in_flight, rate_per_second, burst)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
         ON CONFLICT (organization_id, name) WHERE deleted_at IS NULL DO NOTHING
         RETURNING ",
        columns!()
    ))
    .bind(new.id.0)
    .bind(new.organization.0)
    .bind(new.name)
    .bind(target.kind)
    .bind(new.enabled)
    .bind(target.url)
    .bind(target.headers)
    .bind(target.timeout_ms)
    .bind(target.content_mode)
    .bind(target.final_statuses)
    .bind(target.secret)
    .bind(target.max_in_flight)
    .bind(target.rate_per_second)
    .bind(target.burst)
    .fetch_optional(&mut *transaction)
    .await
    .during("create a connection")?;
    let Some(row) = row else { return Ok(CreateConnection::NameTaken) };
    bump_organization(&mut transaction, new.organization).await?;
    let connection = Connection::try_from(row)?;
    let change = Change::new(Action::ConnectionCreated, TargetKind::Connection, new.id);
    let change = change.after(shown::connection(&connection));
    audit::record(&mut transaction, by, Some(new.organization), change).await?;
    transaction.commit().await.during("commit a new connection")?;
    Ok(CreateConnection::Created(Box::new(connection)))
}

/// The connection of that id.
pub async fn connection(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
) -> Result<Option<Connection>, StoreError> {
    let row: Option<ConnectionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM connections WHERE id = $1 AND organization_id = $2 AND deleted_at IS NULL"
    ))
    .bind(id.0)
    .bind(organization.0)
    .fetch_optional(pool)
    .await
    .during("read a connection")?;
    row.map(Connection::try_from).transpose()
}

/// The connections of an organization, oldest first; `only` leaves out all others.
pub async fn connections(
    pool: &PgPool,
    organization: OrganizationId,
    only: Option<ConnectionId>,
    page: PageRequest,
) -> Result<Paged<Connection>, StoreError> {
    let rows: Vec<ConnectionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM connections
          WHERE organization_id = $1 AND id > $2 AND ($4::uuid IS NULL OR id = $4) AND deleted_at IS NULL
          ORDER BY id LIMIT $3"
    ))
    .bind(organization.0)
    .bind(page.bound())
    .bind(page.rows())
    .bind(only.map(|id| id.0))
    .fetch_all(pool)
    .await
    .during("list connections")?;
    let items = rows.into_iter().map(Connection::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &Connection| item.id.0))
}

/// Changes a connection: `change` gets it as it is, with all other writers shut out, and says what it
/// shall be. What `change` does to ids, version and times is ignored; what changes nothing is not
/// written and not counted.
pub async fn change_connection<E>(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
    change: impl FnOnce(Connection) -> Result<Connection, E>,
    by: &By,
) -> Result<ChangeConnection<E>, StoreError> {
    let mut transaction = pool.begin().await.during("begin to change a connection")?;
    lock_organization(&mut transaction, organization).await?;
    let row: Option<ConnectionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM connections WHERE id = $1 AND organization_id = $2 AND deleted_at IS NULL FOR UPDATE"
    ))
    .bind(id.0)
    .bind(organization.0)
    .fetch_optional(&mut *transaction)
    .await
    .during("read a connection that is to change")?;
    let Some(row) = row else { return Ok(ChangeConnection::NotFound) };
    let before = Connection::try_from(row)?;
    let after = match change(before.clone()) {
        Ok(after) => after,
        Err(refused) => return Ok(ChangeConnection::Refused(refused)),
    };
    if after == before {
        return Ok(ChangeConnection::Stored(Box::new(before)));
    }
    let target = TargetColumns::from(&after.target);
    let written: Result<ConnectionRow, StoreError> = sqlx::query_as(concat!(
        "UPDATE connections
            SET name = $3, kind = $4, enabled = $5, disabled_reason = $6, url = $7, headers = $8,
                timeout_ms = $9, content_mode = $10, final_statuses = $11, secret = $12,
                previous_secret = $13, previous_secret_until = $14, max_in_flight = $15, rate_per_second = $16,
                burst = $17, failing_since = $18, version = version + 1, updated_at = now()
          WHERE id = $1 AND organization_id = $2
          RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(organization.0)
    .bind(after.name)
    .bind(target.kind)
    .bind(after.enabled)
    .bind(after.disabled_reason)
    .bind(target.url)
    .bind(target.headers)
    .bind(target.timeout_ms)
    .bind(target.content_mode)
    .bind(target.final_statuses)
    .bind(target.secret)
    .bind(target.previous_secret)
    .bind(target.previous_secret_until)
    .bind(target.max_in_flight)
    .bind(target.rate_per_second)
    .bind(target.burst)
    .bind(after.failing_since.map(jiff_sqlx::Timestamp::from))
    .fetch_one(&mut *transaction)
    .await
    .during("change a connection");
    let row = match written {
        Err(error) if error.constraint() == Some("connections_name") => {
            return Ok(ChangeConnection::NameTaken);
        }
        other => other?,
    };
    bump_organization(&mut transaction, organization).await?;
    let changed = Connection::try_from(row)?;
    if before.disabled_reason.is_some() && changed.enabled {
        announce_enabled(&mut transaction, &changed).await?;
    }
    if changed.enabled && (changed.target != before.target || !before.enabled) {
        // What waits for room may find it at the new address, or with the new limits; the rest follows.
        let rate = match &changed.target {
            Target::Webhook(webhook) => webhook.limits.rate,
            Target::Publisher => None,
        };
        let interval = rate.and_then(|rate| Duration::try_from_secs_f64(rate.per_second.recip()).ok());
        let interval = interval.unwrap_or_default().max(RECALL_INTERVAL);
        recall(&mut *transaction, id, interval, RECALLED).await?;
    }
    let (before, after) = shown::changed_connection(&before, &changed);
    let change = Change::new(Action::ConnectionChanged, TargetKind::Connection, id);
    audit::record(&mut transaction, by, Some(organization), change.before(before).after(after)).await?;
    transaction.commit().await.during("commit a changed connection")?;
    Ok(ChangeConnection::Stored(Box::new(changed)))
}

/// Says by an event that a connection that the bus had disabled is enabled again.
async fn announce_enabled(transaction: &mut PgConnection, connection: &Connection) -> Result<(), StoreError> {
    let about = json!({ "connectionId": connection.id, "name": connection.name });
    sqlx::query("SELECT announce_connection($1, $2, 'eventbus.connection.enabled', $3::json)")
        .bind(connection.organization.0)
        .bind(connection.id.0)
        .bind(about.to_string())
        .execute(transaction)
        .await
        .during("announce a connection that is enabled again")?;
    Ok(())
}

/// Counts a change of what workers keep with a connection. Belongs in the change's own transaction, whose
/// caller holds the organization's lock.
pub(super) async fn bump_connection(
    transaction: &mut PgConnection,
    id: ConnectionId,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE connections SET version = version + 1 WHERE id = $1")
        .bind(id.0)
        .execute(transaction)
        .await
        .during("count a change of a connection")?;
    Ok(())
}

/// Deletes a connection with its subscriptions, revokes the keys that are bound to it, and cancels the schedules that it
/// publishes. The rows stay, so that history can name them. False if the organization has no such connection.
pub async fn delete_connection(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
    by: &By,
) -> Result<bool, StoreError> {
    let mut transaction = pool.begin().await.during("begin to delete a connection")?;
    lock_organization(&mut transaction, organization).await?;
    let row: Option<ConnectionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM connections WHERE id = $1 AND organization_id = $2 AND deleted_at IS NULL FOR UPDATE"
    ))
    .bind(id.0)
    .bind(organization.0)
    .fetch_optional(&mut *transaction)
    .await
    .during("read a connection that is to be deleted")?;
    let Some(row) = row else { return Ok(false) };
    let before = Connection::try_from(row)?;
    sqlx::query(
        "UPDATE connections
            SET deleted_at = now(), updated_at = now(), version = version + 1, enabled = false
          WHERE id = $1 AND organization_id = $2",
    )
    .bind(id.0)
    .bind(organization.0)
    .execute(&mut *transaction)
    .await
    .during("delete a connection")?;
    let subscriptions = sqlx::query(
        "UPDATE subscriptions SET deleted_at = now(), updated_at = now()
          WHERE connection_id = $1 AND deleted_at IS NULL",
    )
    .bind(id.0)
    .execute(&mut *transaction)
    .await
    .during("delete the subscriptions of a connection")?;
    let keys = sqlx::query(
        "UPDATE api_keys SET revoked_at = now()
          WHERE organization_id = $1 AND connection_id = $2 AND revoked_at IS NULL",
    )
    .bind(organization.0)
    .bind(id.0)
    .execute(&mut *transaction)
    .await
    .during("revoke the keys of a connection")?;
    let schedules = cancel_schedules_of(&mut transaction, organization, id).await?;
    bump_organization(&mut transaction, organization).await?;
    let change = Change::new(Action::ConnectionDeleted, TargetKind::Connection, id);
    let change = change.before(shown::connection(&before)).after(json!({
        "subscriptionsDeleted": subscriptions.rows_affected(),
        "keysRevoked": keys.rows_affected(),
        "schedulesCancelled": schedules,
    }));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during("commit a deleted connection")?;
    Ok(true)
}
