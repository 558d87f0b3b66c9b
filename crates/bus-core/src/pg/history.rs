//! History: what became of each delivery.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sqlx::{PgPool, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError};
use crate::{
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId},
    receipt::Receipt,
};

/// Where a delivery stands, as far as the database knows. Attempts arrive here about a second after
/// they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryStatus {
    /// In the queue or in flight, and not attempted yet as far as is known.
    Pending,
    /// It failed and will be tried again.
    Waiting,
    /// The subscriber took it.
    Delivered,
    /// It is given up.
    Dead,
}

impl DeliveryStatus {
    /// As the API says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Waiting => "waiting",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
        }
    }
}

/// One finished attempt.
#[derive(Debug, Clone)]
pub struct AttemptRecord {
    /// 1 is the first.
    pub attempt: u32,
    /// `delivered`, `failed` or `dead`.
    pub outcome: String,
    /// The HTTP status, if an answer came.
    pub status: Option<u16>,
    /// Why it failed.
    pub error: Option<String>,
    /// When it began.
    pub at: Timestamp,
    /// How long it took, milliseconds.
    pub duration_ms: u32,
}

/// One delivery of an event.
#[derive(Debug, Clone)]
pub struct DeliveryRecord {
    /// The delivery; its `webhook-id`.
    pub id: DeliveryId,
    /// What matched.
    pub subscription: SubscriptionId,
    /// Where it goes.
    pub connection: ConnectionId,
    /// Where it stands.
    pub status: DeliveryStatus,
    /// When it is tried next, if it waits in the database.
    pub next_attempt_at: Option<Timestamp>,
    /// Why it waits or was given up.
    pub reason: Option<String>,
    /// What was tried.
    pub attempts: Vec<AttemptRecord>,
}

/// Appends finished attempts. Repeated receipts change nothing.
pub async fn insert_attempts(pool: &PgPool, receipts: &[Receipt]) -> Result<(), StoreError> {
    let each = |f: fn(&Receipt) -> Uuid| receipts.iter().map(f).collect::<Vec<_>>();
    let times: Vec<jiff_sqlx::Timestamp> = receipts.iter().map(|receipt| receipt.at.into()).collect();
    let int = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    sqlx::query(
        "INSERT INTO delivery_attempts (delivery_id, attempt, event_uid, organization_id, subscription_id,
                                        connection_id, outcome, status, error, at, duration_ms)
         SELECT * FROM UNNEST($1::uuid[], $2::int4[], $3::uuid[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[],
                              $8::int4[], $9::text[], $10::timestamptz[], $11::int4[])
         ON CONFLICT DO NOTHING",
    )
    .bind(each(|receipt| receipt.delivery.0))
    .bind(receipts.iter().map(|receipt| int(receipt.attempt)).collect::<Vec<_>>())
    .bind(each(|receipt| receipt.event.0))
    .bind(each(|receipt| receipt.organization.0))
    .bind(each(|receipt| receipt.subscription.0))
    .bind(each(|receipt| receipt.connection.0))
    .bind(receipts.iter().map(|receipt| receipt.outcome.as_str()).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.status.map(i32::from)).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.error.as_deref()).collect::<Vec<_>>())
    .bind(times)
    .bind(receipts.iter().map(|receipt| int(receipt.duration_ms)).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("record attempts")?;
    Ok(())
}

/// Every delivery of an event, ordered by subscription; `None` if the organization has no such event.
pub async fn event_deliveries(
    pool: &PgPool,
    organization: OrganizationId,
    event: EventUid,
) -> Result<Option<Vec<DeliveryRecord>>, StoreError> {
    const OPERATION: &str = "read an event's deliveries";
    let matched = sqlx::query(
        "SELECT s.id, s.connection_id
         FROM events e
         LEFT JOIN LATERAL UNNEST(e.subscriptions) AS m (id) ON true
         LEFT JOIN subscriptions s ON s.id = m.id
         WHERE e.uid = $1 AND e.organization_id = $2
         ORDER BY s.id",
    )
    .bind(event.0)
    .bind(organization.0)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    if matched.is_empty() {
        return Ok(None);
    }
    let mut attempts = attempts(pool, event).await.during(OPERATION)?;
    let parked = waiting(pool, event).await.during(OPERATION)?;
    let dead = dead(pool, event).await.during(OPERATION)?;
    let mut records = Vec::with_capacity(matched.len());
    for row in &matched {
        // An event that matched nothing has one row without a subscription.
        let Some(subscription) = row.try_get::<Option<Uuid>, _>("id").during(OPERATION)? else { continue };
        let subscription = SubscriptionId(subscription);
        let id = DeliveryId::derive(event, subscription);
        let attempts = attempts.remove(&id).unwrap_or_default();
        let delivered = attempts.iter().any(|attempt| attempt.outcome == "delivered");
        let (mut next_attempt_at, mut reason) = (None, None);
        let status = if delivered {
            DeliveryStatus::Delivered
        } else if let Some(why) = dead.get(&id) {
            reason = Some(why.clone());
            DeliveryStatus::Dead
        } else if let Some((at, why)) = parked.get(&id) {
            (next_attempt_at, reason) = (Some(*at), Some(why.clone()));
            DeliveryStatus::Waiting
        } else if attempts.is_empty() {
            DeliveryStatus::Pending
        } else {
            DeliveryStatus::Waiting
        };
        let connection = row.try_get::<Uuid, _>("connection_id").during(OPERATION)?.into();
        records.push(DeliveryRecord {
            id,
            subscription,
            connection,
            status,
            next_attempt_at,
            reason,
            attempts,
        });
    }
    Ok(Some(records))
}

async fn attempts(
    pool: &PgPool,
    event: EventUid,
) -> Result<BTreeMap<DeliveryId, Vec<AttemptRecord>>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT delivery_id, attempt, outcome, status, error, at, duration_ms
         FROM delivery_attempts WHERE event_uid = $1 ORDER BY delivery_id, attempt",
    )
    .bind(event.0)
    .fetch_all(pool)
    .await?;
    let mut attempts: BTreeMap<DeliveryId, Vec<AttemptRecord>> = BTreeMap::new();
    for row in rows {
        let number = |n: i32| u32::try_from(n).unwrap_or(0);
        attempts.entry(DeliveryId(row.try_get("delivery_id")?)).or_default().push(AttemptRecord {
            attempt: number(row.try_get("attempt")?),
            outcome: row.try_get("outcome")?,
            status: row.try_get::<Option<i32>, _>("status")?.and_then(|status| u16::try_from(status).ok()),
            error: row.try_get("error")?,
            at: row.try_get::<jiff_sqlx::Timestamp, _>("at")?.to_jiff(),
            duration_ms: number(row.try_get("duration_ms")?),
        });
    }
    Ok(attempts)
}

async fn waiting(
    pool: &PgPool,
    event: EventUid,
) -> Result<BTreeMap<DeliveryId, (Timestamp, String)>, sqlx::Error> {
    sqlx::query("SELECT delivery_id, due_at, reason FROM parked_deliveries WHERE event_uid = $1")
        .bind(event.0)
        .fetch_all(pool)
        .await?
        .iter()
        .map(|row| {
            let due: jiff_sqlx::Timestamp = row.try_get("due_at")?;
            Ok((DeliveryId(row.try_get("delivery_id")?), (due.to_jiff(), row.try_get("reason")?)))
        })
        .collect()
}

async fn dead(pool: &PgPool, event: EventUid) -> Result<BTreeMap<DeliveryId, String>, sqlx::Error> {
    sqlx::query("SELECT delivery_id, reason FROM dead_letters WHERE event_uid = $1")
        .bind(event.0)
        .fetch_all(pool)
        .await?
        .iter()
        .map(|row| Ok((DeliveryId(row.try_get("delivery_id")?), row.try_get("reason")?)))
        .collect()
}
