//! History, as it is read: what became of each delivery. `receipts` writes it.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use sqlx::{PgPool, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError};
use crate::{
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId},
    lifecycle::State,
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

/// How many deliveries of an event stand where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// [`DeliveryStatus::Pending`]
    pub pending: u64,
    /// [`DeliveryStatus::Waiting`]
    pub waiting: u64,
    /// [`DeliveryStatus::Delivered`]
    pub delivered: u64,
    /// [`DeliveryStatus::Dead`]
    pub dead: u64,
    /// [`DeliveryStatus::Acked`]
    pub acked: u64,
    /// [`DeliveryStatus::Cancelled`]
    pub cancelled: u64,
}

impl FromIterator<DeliveryStatus> for Tally {
    fn from_iter<I: IntoIterator<Item = DeliveryStatus>>(statuses: I) -> Self {
        let mut tally = Self::default();
        for status in statuses {
            *match status {
                DeliveryStatus::Pending => &mut tally.pending,
                DeliveryStatus::Waiting => &mut tally.waiting,
                DeliveryStatus::Delivered => &mut tally.delivered,
                DeliveryStatus::Dead => &mut tally.dead,
                DeliveryStatus::Acked => &mut tally.acked,
                DeliveryStatus::Cancelled => &mut tally.cancelled,
            } += 1;
        }
        tally
    }
}

/// Every delivery of an event, ordered by subscription; `None` if the organization has no such event.
pub async fn event_deliveries(
    pool: &PgPool,
    organization: OrganizationId,
    event: EventUid,
) -> Result<Option<Vec<DeliveryRecord>>, StoreError> {
    const OPERATION: &str = "read an event's deliveries";
    let Some(standings) = standings(pool, organization, event).await.during(OPERATION)? else {
        return Ok(None);
    };
    let mut attempts = attempts(pool, event).await.during(OPERATION)?;
    let records = standings.into_iter().map(|standing| {
        let id = DeliveryId::derive(event, standing.subscription);
        let status = standing.status();
        let shown = matches!(status, DeliveryStatus::Waiting | DeliveryStatus::Dead);
        DeliveryRecord {
            id,
            subscription: standing.subscription,
            connection: standing.connection,
            status,
            next_attempt_at: standing.due_at.filter(|_| shown),
            reason: standing.reason.filter(|_| shown),
            attempts: attempts.remove(&id).unwrap_or_default(),
        }
    });
    Ok(Some(records.collect()))
}

/// How many deliveries of an event stand where; `None` if the organization has no such event.
pub async fn event_tally(
    pool: &PgPool,
    organization: OrganizationId,
    event: EventUid,
) -> Result<Option<Tally>, StoreError> {
    let standings = standings(pool, organization, event).await.during("count an event's deliveries")?;
    Ok(standings.map(|standings| standings.iter().map(Standing::status).collect()))
}

/// What the database knows of where one delivery stands.
struct Standing {
    subscription: SubscriptionId,
    connection: ConnectionId,
    /// Its row in `delivery_states`, with its turn.
    stray: Option<(State, i64)>,
    due_at: Option<Timestamp>,
    reason: Option<String>,
    /// Whether any attempt is known.
    tried: bool,
    /// The latest turn in which the subscriber took it.
    delivered_in: Option<i64>,
}

impl Standing {
    fn status(&self) -> DeliveryStatus {
        match self.stray {
            // What happened in a later turn, a replay for example, is news.
            Some((state, turn)) if self.delivered_in.is_none_or(|delivered| delivered < turn) => {
                match state {
                    State::Queued => DeliveryStatus::Pending,
                    State::Waiting => DeliveryStatus::Waiting,
                    State::Delivered => DeliveryStatus::Delivered,
                    State::Dead => DeliveryStatus::Dead,
                    State::Acked => DeliveryStatus::Acked,
                    State::Cancelled => DeliveryStatus::Cancelled,
                }
            }
            _ if self.delivered_in.is_some() => DeliveryStatus::Delivered,
            _ if self.tried => DeliveryStatus::Waiting,
            _ => DeliveryStatus::Pending,
        }
    }
}

/// One for each delivery, ordered by subscription; `None` if the organization has no such event.
async fn standings(
    pool: &PgPool,
    organization: OrganizationId,
    event: EventUid,
) -> Result<Option<Vec<Standing>>, sqlx::Error> {
    let rows = sqlx::query(
        "WITH tried AS (
             SELECT subscription_id, max(turn) FILTER (WHERE outcome = 'delivered') AS delivered_in
             FROM delivery_attempts WHERE event_uid = $1 AND organization_id = $2
             GROUP BY subscription_id
         ),
         strays AS (
             SELECT subscription_id, state, turn, due_at, reason
             FROM delivery_states WHERE event_uid = $1 AND organization_id = $2
         ),
         wanted AS (
             SELECT m.id FROM events e CROSS JOIN LATERAL UNNEST(e.subscriptions) AS m (id)
             WHERE e.uid = $1 AND e.organization_id = $2
             UNION
             -- replayed to a subscription that did not match when the event was published
             SELECT subscription_id FROM strays
             UNION
             SELECT subscription_id FROM tried
         )
         SELECT s.id, s.connection_id, strays.state, strays.turn, strays.due_at, strays.reason,
                tried.subscription_id IS NOT NULL AS tried, tried.delivered_in
         FROM events e
         LEFT JOIN wanted w ON true
         LEFT JOIN subscriptions s ON s.id = w.id
         LEFT JOIN strays ON strays.subscription_id = s.id
         LEFT JOIN tried ON tried.subscription_id = s.id
         WHERE e.uid = $1 AND e.organization_id = $2
         ORDER BY s.id",
    )
    .bind(event.0)
    .bind(organization.0)
    .fetch_all(pool)
    .await?;
    if rows.is_empty() {
        return Ok(None);
    }
    let mut standings = Vec::with_capacity(rows.len());
    for row in &rows {
        // An event that matched nothing has one row without a subscription.
        let Some(subscription) = row.try_get::<Option<Uuid>, _>("id")? else { continue };
        let stray = match row.try_get::<Option<String>, _>("state")? {
            Some(state) => {
                let state = state.parse().map_err(|()| sqlx::Error::Decode("unknown state".into()))?;
                Some((state, row.try_get("turn")?))
            }
            None => None,
        };
        standings.push(Standing {
            subscription: SubscriptionId(subscription),
            connection: row.try_get::<Uuid, _>("connection_id")?.into(),
            stray,
            due_at: row.try_get::<Option<jiff_sqlx::Timestamp>, _>("due_at")?.map(|due| due.to_jiff()),
            reason: row.try_get("reason")?,
            tried: row.try_get("tried")?,
            delivered_in: row.try_get("delivered_in")?,
        });
    }
    Ok(Some(standings))
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

/// Everything that workers had reported by this time is in history, as far as the archiver has said; the second value is
/// how long ago that was by the database's clock.
pub async fn history_through(pool: &PgPool) -> Result<Option<(Timestamp, Duration)>, StoreError> {
    const OPERATION: &str = "read how far history goes";
    let row = sqlx::query(
        "SELECT through, greatest(0, extract(epoch FROM now() - through)::float8) AS behind FROM history_progress",
    )
    .fetch_optional(pool)
    .await
    .during(OPERATION)?;
    let Some(row) = row else { return Ok(None) };
    let through: jiff_sqlx::Timestamp = row.try_get("through").during(OPERATION)?;
    let behind: f64 = row.try_get("behind").during(OPERATION)?;
    Ok(Some((through.to_jiff(), Duration::from_secs_f64(behind))))
}
