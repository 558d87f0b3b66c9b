//! History: what became of each delivery.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sqlx::{PgPool, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError, storable};
use crate::{
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId},
    lifecycle::State,
    receipt::{Receipt, ReceiptOutcome},
};

/// Where a delivery stands, as far as the database knows. Attempts arrive here about a second after
/// they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryStatus {
    /// In the queue or in flight, and not attempted yet in this turn as far as is known.
    Pending,
    /// It failed or was deferred and will be tried again.
    Waiting,
    /// The subscriber took it.
    Delivered,
    /// It is given up.
    Dead,
    /// The subscriber said through the API that it has it.
    Acked,
    /// It is not to be delivered.
    Cancelled,
}

/// One finished attempt.
#[derive(Debug, Clone)]
pub struct AttemptRecord {
    /// The failed attempts before this one, plus one.
    pub attempt: u32,
    /// The delivery's turn.
    pub turn: i64,
    /// `delivered`, `failed`, `deferred` or `dead`.
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

/// Appends finished attempts, and notes of deliveries that had left the straight path that they are over.
/// Repeated receipts change nothing.
pub async fn insert_attempts(pool: &PgPool, receipts: &[Receipt]) -> Result<(), StoreError> {
    let each = |f: fn(&Receipt) -> Uuid| receipts.iter().map(f).collect::<Vec<_>>();
    let times: Vec<jiff_sqlx::Timestamp> = receipts.iter().map(|receipt| receipt.at.into()).collect();
    let int = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    sqlx::query(
        "INSERT INTO delivery_attempts (delivery_id, attempt, event_uid, organization_id, subscription_id,
                                        connection_id, outcome, status, error, at, duration_ms, turn)
         SELECT * FROM UNNEST($1::uuid[], $2::int4[], $3::uuid[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[],
                              $8::int4[], $9::text[], $10::timestamptz[], $11::int4[], $12::int8[])
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
    .bind(receipts.iter().map(|receipt| receipt.error.as_deref().map(storable)).collect::<Vec<_>>())
    .bind(times)
    .bind(receipts.iter().map(|receipt| int(receipt.duration_ms)).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.turn).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("record attempts")?;
    let over: Vec<&Receipt> = receipts
        .iter()
        .filter(|receipt| receipt.turn > 0 && receipt.outcome == ReceiptOutcome::Delivered)
        .collect();
    if over.is_empty() { Ok(()) } else { mark_delivered(pool, &over).await }
}

async fn mark_delivered(pool: &PgPool, receipts: &[&Receipt]) -> Result<(), StoreError> {
    sqlx::query(
        "WITH over AS (
             SELECT p.delivery_id, r.turn
             FROM delivery_states p
             JOIN (SELECT delivery_id, max(turn) AS turn FROM UNNEST($1::uuid[], $2::int8[]) AS r (delivery_id, turn)
                   GROUP BY delivery_id) r ON p.delivery_id = r.delivery_id
             WHERE p.turn <= r.turn AND p.state IN ('waiting', 'queued')
             ORDER BY p.delivery_id
             FOR UPDATE OF p
         )
         UPDATE delivery_states p
         SET state = 'delivered', turn = over.turn, due_at = NULL, lease_until = '-infinity', changed_at = now()
         FROM over WHERE p.delivery_id = over.delivery_id",
    )
    .bind(receipts.iter().map(|receipt| receipt.delivery.0).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.turn).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("note deliveries that are over")?;
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
        "WITH wanted AS (
             SELECT m.id FROM events e CROSS JOIN LATERAL UNNEST(e.subscriptions) AS m (id)
             WHERE e.uid = $1 AND e.organization_id = $2
             UNION
             -- replayed to a subscription that did not match when the event was published
             SELECT subscription_id FROM delivery_states WHERE event_uid = $1 AND organization_id = $2
             UNION
             SELECT subscription_id FROM delivery_attempts WHERE event_uid = $1 AND organization_id = $2
         )
         SELECT s.id, s.connection_id
         FROM events e
         LEFT JOIN wanted w ON true
         LEFT JOIN subscriptions s ON s.id = w.id
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
    let mut stray = stray(pool, event).await.during(OPERATION)?;
    let mut records = Vec::with_capacity(matched.len());
    for row in &matched {
        // An event that matched nothing has one row without a subscription.
        let Some(subscription) = row.try_get::<Option<Uuid>, _>("id").during(OPERATION)? else { continue };
        let subscription = SubscriptionId(subscription);
        let id = DeliveryId::derive(event, subscription);
        let attempts = attempts.remove(&id).unwrap_or_default();
        let stray = stray.remove(&id);
        let status = status(stray.as_ref(), &attempts);
        let shown = |status| matches!(status, DeliveryStatus::Waiting | DeliveryStatus::Dead);
        let (next_attempt_at, reason) =
            stray.filter(|_| shown(status)).map_or((None, None), |stray| (stray.due_at, stray.reason));
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

/// A delivery's row in `delivery_states`.
struct Stray {
    state: State,
    turn: i64,
    due_at: Option<Timestamp>,
    reason: Option<String>,
}

fn status(stray: Option<&Stray>, attempts: &[AttemptRecord]) -> DeliveryStatus {
    let delivered_in =
        attempts.iter().filter(|attempt| attempt.outcome == "delivered").map(|attempt| attempt.turn).max();
    match stray {
        // What happened in a later turn, a replay for example, is news.
        Some(stray) if delivered_in.is_none_or(|turn| turn < stray.turn) => match stray.state {
            State::Queued => DeliveryStatus::Pending,
            State::Waiting => DeliveryStatus::Waiting,
            State::Delivered => DeliveryStatus::Delivered,
            State::Dead => DeliveryStatus::Dead,
            State::Acked => DeliveryStatus::Acked,
            State::Cancelled => DeliveryStatus::Cancelled,
        },
        _ if delivered_in.is_some() => DeliveryStatus::Delivered,
        _ if attempts.is_empty() => DeliveryStatus::Pending,
        _ => DeliveryStatus::Waiting,
    }
}

async fn attempts(
    pool: &PgPool,
    event: EventUid,
) -> Result<BTreeMap<DeliveryId, Vec<AttemptRecord>>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT delivery_id, attempt, turn, outcome, status, error, at, duration_ms
         FROM delivery_attempts WHERE event_uid = $1 ORDER BY delivery_id, turn, at, attempt",
    )
    .bind(event.0)
    .fetch_all(pool)
    .await?;
    let mut attempts: BTreeMap<DeliveryId, Vec<AttemptRecord>> = BTreeMap::new();
    for row in rows {
        let number = |n: i32| u32::try_from(n).unwrap_or(0);
        attempts.entry(DeliveryId(row.try_get("delivery_id")?)).or_default().push(AttemptRecord {
            attempt: number(row.try_get("attempt")?),
            turn: row.try_get("turn")?,
            outcome: row.try_get("outcome")?,
            status: row.try_get::<Option<i32>, _>("status")?.and_then(|status| u16::try_from(status).ok()),
            error: row.try_get("error")?,
            at: row.try_get::<jiff_sqlx::Timestamp, _>("at")?.to_jiff(),
            duration_ms: number(row.try_get("duration_ms")?),
        });
    }
    Ok(attempts)
}

async fn stray(pool: &PgPool, event: EventUid) -> Result<BTreeMap<DeliveryId, Stray>, sqlx::Error> {
    sqlx::query("SELECT delivery_id, state, turn, due_at, reason FROM delivery_states WHERE event_uid = $1")
        .bind(event.0)
        .fetch_all(pool)
        .await?
        .iter()
        .map(|row| {
            let state: String = row.try_get("state")?;
            let stray = Stray {
                state: state.parse().map_err(|()| sqlx::Error::Decode("unknown state".into()))?,
                turn: row.try_get("turn")?,
                due_at: row.try_get::<Option<jiff_sqlx::Timestamp>, _>("due_at")?.map(|due| due.to_jiff()),
                reason: row.try_get("reason")?,
            };
            Ok((DeliveryId(row.try_get("delivery_id")?), stray))
        })
        .collect()
}
