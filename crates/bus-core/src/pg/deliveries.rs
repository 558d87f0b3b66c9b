//! What the delivery path keeps in the database: parked retries and dead letters, and what a worker
//! reads of connections and bodies.

use bytes::Bytes;
use sqlx::{PgPool, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError, publish::seconds};
use crate::{
    delivery::DeliveryKey,
    ids::{DeliveryId, EventUid},
    queue::{Body, MAX_INLINE},
};

/// A retry that waits longer than the queue should hold it.
#[derive(Debug, Clone)]
pub struct Park {
    /// The delivery.
    pub key: DeliveryKey,
    /// Attempts made so far.
    pub attempts: u32,
    /// From now on, seconds (the database's now).
    pub wait_s: f64,
    /// Why it waits.
    pub reason: String,
}

/// A parked delivery that is due, held by the caller.
#[derive(Debug, Clone)]
pub struct Due {
    /// The delivery.
    pub key: DeliveryKey,
    /// Attempts made so far.
    pub attempts: u32,
    /// The event's bytes, as far as the queue carries them; `None` if it has expired meanwhile.
    pub body: Option<Body>,
}

/// A delivery that is given up.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The delivery.
    pub key: DeliveryKey,
    /// Attempts made.
    pub attempts: u32,
    /// Why it is given up: a short stable word.
    pub reason: &'static str,
    /// The last HTTP status, if there was an answer.
    pub last_status: Option<u16>,
    /// The start of the last answer.
    pub last_body: Option<Bytes>,
    /// The last failure.
    pub last_error: Option<String>,
}

impl DeadLetter {
    /// A delivery given up without a last answer.
    pub fn new(key: DeliveryKey, attempts: u32, reason: &'static str) -> Self {
        Self { key, attempts, reason, last_status: None, last_body: None, last_error: None }
    }
}

/// Parks deliveries. One that is parked already keeps the later state: the higher number of attempts.
pub async fn park(pool: &PgPool, parked: &[Park]) -> Result<(), StoreError> {
    let each = |f: fn(&DeliveryKey) -> Uuid| parked.iter().map(|park| f(&park.key)).collect::<Vec<_>>();
    sqlx::query(
        "INSERT INTO parked_deliveries AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                             connection_version, attempts, due_at, reason)
         SELECT d, e, o, s, c, v, n, now() + make_interval(secs => wait), reason
         FROM UNNEST($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int8[], $7::int4[],
                     $8::float8[], $9::text[]) AS u (d, e, o, s, c, v, n, wait, reason)
         ON CONFLICT (delivery_id) DO UPDATE
             SET attempts = excluded.attempts, due_at = excluded.due_at, reason = excluded.reason,
                 connection_version = excluded.connection_version, lease_until = '-infinity'
             WHERE p.attempts < excluded.attempts",
    )
    .bind(each(|key| key.id.0))
    .bind(each(|key| key.event.0))
    .bind(each(|key| key.organization.0))
    .bind(each(|key| key.subscription.0))
    .bind(each(|key| key.connection.0))
    .bind(parked.iter().map(|park| park.key.connection_version).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| i32::try_from(park.attempts).unwrap_or(i32::MAX)).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| park.wait_s).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| park.reason.as_str()).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("park deliveries")?;
    Ok(())
}

/// Takes at most `limit` due deliveries for `lease_s` seconds, the longest due first.
pub async fn take_due(pool: &PgPool, limit: u32, lease_s: u64) -> Result<Vec<Due>, StoreError> {
    const OPERATION: &str = "take due deliveries";
    let rows = sqlx::query(
        "WITH due AS (
             SELECT delivery_id FROM parked_deliveries
             WHERE greatest(due_at, lease_until) <= now()
             ORDER BY greatest(due_at, lease_until)
             LIMIT $1
             FOR UPDATE SKIP LOCKED
         )
         UPDATE parked_deliveries p SET lease_until = now() + make_interval(secs => $2)
         FROM due
         WHERE p.delivery_id = due.delivery_id
         RETURNING p.delivery_id, p.event_uid, p.organization_id, p.subscription_id, p.connection_id,
                   p.connection_version, p.attempts, EXISTS (SELECT FROM events e WHERE e.uid = p.event_uid) AS stored,
                   (SELECT e.body FROM events e WHERE e.uid = p.event_uid AND octet_length(e.body) <= $3) AS body",
    )
    .bind(i64::from(limit))
    .bind(seconds(lease_s))
    .bind(i32::try_from(MAX_INLINE).unwrap_or(i32::MAX))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    rows.iter().map(due).collect::<Result<_, _>>().during(OPERATION)
}

fn due(row: &sqlx::postgres::PgRow) -> Result<Due, sqlx::Error> {
    let body: Option<Vec<u8>> = row.try_get("body")?;
    let stored: bool = row.try_get("stored")?;
    Ok(Due {
        key: DeliveryKey {
            id: DeliveryId(row.try_get("delivery_id")?),
            event: EventUid(row.try_get("event_uid")?),
            organization: row.try_get::<Uuid, _>("organization_id")?.into(),
            subscription: row.try_get::<Uuid, _>("subscription_id")?.into(),
            connection: row.try_get::<Uuid, _>("connection_id")?.into(),
            connection_version: row.try_get("connection_version")?,
        },
        attempts: u32::try_from(row.try_get::<i32, _>("attempts")?).unwrap_or(0),
        body: body.map(|body| Body::Inline(body.into())).or_else(|| stored.then_some(Body::Stored)),
    })
}

/// Removes deliveries that are back in the queue, unless they were parked again since.
pub async fn unpark(pool: &PgPool, back: &[(DeliveryId, u32)]) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM parked_deliveries p
         USING UNNEST($1::uuid[], $2::int4[]) AS b (delivery_id, attempts)
         WHERE p.delivery_id = b.delivery_id AND p.attempts = b.attempts",
    )
    .bind(back.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
    .bind(back.iter().map(|(_, attempts)| i32::try_from(*attempts).unwrap_or(i32::MAX)).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("remove parked deliveries")?;
    Ok(())
}

/// Seconds until the next parked delivery is due, if any is parked; negative when overdue.
pub async fn next_due_in(pool: &PgPool) -> Result<Option<f64>, StoreError> {
    sqlx::query_scalar(
        "SELECT extract(epoch FROM min(greatest(due_at, lease_until)) - now())::float8 FROM parked_deliveries",
    )
    .fetch_one(pool)
    .await
    .during("read the next due time")
}

/// Records a delivery as given up. Repeated for the same delivery, it keeps the first record.
pub async fn insert_dead_letter(pool: &PgPool, dead: &DeadLetter) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dead_letters (delivery_id, event_uid, organization_id, subscription_id, connection_id, attempts,
                                   reason, last_status, last_body, last_error)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         ON CONFLICT (delivery_id) DO NOTHING",
    )
    .bind(dead.key.id.0)
    .bind(dead.key.event.0)
    .bind(dead.key.organization.0)
    .bind(dead.key.subscription.0)
    .bind(dead.key.connection.0)
    .bind(i32::try_from(dead.attempts).unwrap_or(i32::MAX))
    .bind(dead.reason)
    .bind(dead.last_status.map(i32::from))
    .bind(dead.last_body.as_deref())
    .bind(dead.last_error.as_deref())
    .execute(pool)
    .await
    .during("record a dead letter")?;
    Ok(())
}

/// The CloudEvent of a delivery that travels without it.
pub async fn load_body(pool: &PgPool, event: EventUid) -> Result<Option<Bytes>, StoreError> {
    let body: Option<Vec<u8>> = sqlx::query_scalar("SELECT body FROM events WHERE uid = $1")
        .bind(event.0)
        .fetch_optional(pool)
        .await
        .during("read an event's body")?;
    Ok(body.map(Bytes::from))
}
