//! Deliveries that have left the straight path: waiting for a retry, given up, or closed from outside.
//!
//! Each has one row in `delivery_states`, and every transition is one guarded upsert of it; the state
//! machine is [`State`](crate::lifecycle::State).

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::json;
use sqlx::{PgConnection, PgExecutor, PgPool, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{
    During as _, StoreError, audit, organizations::lock_organization, publish::seconds, storable, stored_lane,
};
use crate::{
    audit::{Action, By, Change, TargetKind},
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId},
    lifecycle::State,
    queue::{Body, MAX_INLINE},
    retry::DeadReason,
};

/// What came of the last attempt, if there was one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastAttempt {
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// The start of the answer, at most 16 KiB.
    pub body: Option<Bytes>,
    /// Why it failed.
    pub error: Option<String>,
    /// When it began.
    pub at: Option<Timestamp>,
    /// How long it took.
    pub duration: Option<Duration>,
}

/// A delivery that waits longer than the queue should hold it.
#[derive(Debug, Clone)]
pub struct Park {
    /// The delivery.
    pub key: DeliveryKey,
    /// What it will be when it returns: the turn after the one that was tried.
    pub next: Progress,
    /// From now on (the database's now).
    pub wait: Duration,
    /// Whether it waits for nothing but room at its endpoint, so that it may come back sooner: [`recall`].
    pub paced: bool,
    /// Why it waits.
    pub reason: String,
    /// What was tried.
    pub last: LastAttempt,
}

/// A parked delivery that is due, held by the caller.
#[derive(Debug, Clone)]
pub struct Due {
    /// The delivery.
    pub key: DeliveryKey,
    /// How far it has come.
    pub progress: Progress,
    /// The lane that its organization has of its own.
    pub lane: Option<u16>,
    /// The event's bytes, as far as the queue carries them, or why there are none any more.
    pub body: Result<Body, DeadReason>,
}

/// A delivery that is given up.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The delivery.
    pub key: DeliveryKey,
    /// How far it came, the last attempt included.
    pub progress: Progress,
    /// Why it is given up.
    pub reason: DeadReason,
    /// What was tried last.
    pub last: LastAttempt,
}

impl DeadLetter {
    /// A delivery given up without a last attempt.
    pub fn new(key: DeliveryKey, progress: Progress, reason: DeadReason) -> Self {
        Self { key, progress, reason, last: LastAttempt::default() }
    }
}

/// Parks deliveries. One that is closed or dead, or has come further than this turn, stays as it is. If one is
/// among them twice, because a hold ended before its holder knew, its later turn counts.
pub async fn park(pool: &PgPool, parked: &[Park]) -> Result<(), StoreError> {
    let each = |f: fn(&DeliveryKey) -> Uuid| parked.iter().map(|park| f(&park.key)).collect::<Vec<_>>();
    let int = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    let since: Vec<jiff_sqlx::Timestamp> = parked.iter().map(|park| park.next.since.into()).collect();
    let at: Vec<Option<jiff_sqlx::Timestamp>> =
        parked.iter().map(|park| park.last.at.map(Into::into)).collect();
    sqlx::query(
        "INSERT INTO delivery_states AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                           connection_version, state, attempts, turn, since, due_at, paced_turn, reason,
                                           last_status, last_error, last_attempt_at, last_duration_ms)
         SELECT DISTINCT ON (d) d, e, o, s, c, v, 'waiting', n, t, a, now() + make_interval(secs => wait),
                CASE WHEN paced THEN t END, reason, status, error, at, duration
         FROM UNNEST($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int8[], $7::int4[],
                     $8::int8[], $9::timestamptz[], $10::float8[], $11::bool[], $12::text[], $13::int4[],
                     $14::text[], $15::timestamptz[], $16::int4[])
              AS u (d, e, o, s, c, v, n, t, a, wait, paced, reason, status, error, at, duration)
         -- In the same order everywhere, so that two workers do not wait for each other.
         ORDER BY d, t DESC
         ON CONFLICT (delivery_id) DO UPDATE
             SET state = 'waiting', attempts = excluded.attempts, turn = excluded.turn, since = excluded.since,
                 due_at = excluded.due_at, paced_turn = excluded.paced_turn, lease_until = '-infinity',
                 reason = excluded.reason,
                 connection_version = excluded.connection_version, last_body = NULL, changed_at = now(),
                 -- What is parked without an attempt keeps the last one.
                 last_status = CASE WHEN excluded.last_attempt_at IS NULL THEN p.last_status ELSE excluded.last_status END,
                 last_error = CASE WHEN excluded.last_attempt_at IS NULL THEN p.last_error ELSE excluded.last_error END,
                 last_duration_ms = CASE WHEN excluded.last_attempt_at IS NULL THEN p.last_duration_ms ELSE excluded.last_duration_ms END,
                 last_attempt_at = coalesce(excluded.last_attempt_at, p.last_attempt_at)
             WHERE p.state IN ('waiting', 'queued') AND p.turn < excluded.turn",
    )
    .bind(each(|key| key.id.0))
    .bind(each(|key| key.event.0))
    .bind(each(|key| key.organization.0))
    .bind(each(|key| key.subscription.0))
    .bind(each(|key| key.connection.0))
    .bind(parked.iter().map(|park| park.key.connection_version).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| int(park.next.attempts)).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| park.next.turn).collect::<Vec<_>>())
    .bind(since)
    .bind(parked.iter().map(|park| park.wait.as_secs_f64()).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| park.paced).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| storable(&park.reason)).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| park.last.status.map(i32::from)).collect::<Vec<_>>())
    .bind(parked.iter().map(|park| park.last.error.as_deref().map(storable)).collect::<Vec<_>>())
    .bind(at)
    .bind(parked.iter().map(|park| park.last.duration.map(millis)).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("park deliveries")?;
    Ok(())
}

fn millis(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX)
}

/// What [`recall`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recalled {
    /// Deliveries that were looked at; fewer than the limit if these were all.
    pub seen: u32,
    /// Those of them that come sooner now.
    pub moved: u32,
}

/// Lets parked deliveries of a connection that wait for nothing but room come back from now on (the database's now), one
/// in each `interval`, at most `limit` of them, the earliest due first. None is put off.
pub async fn recall(
    executor: impl PgExecutor<'_>,
    connection: ConnectionId,
    interval: Duration,
    limit: u32,
) -> Result<Recalled, StoreError> {
    let (seen, moved): (i64, i64) = sqlx::query_as(
        "WITH waiting AS (
             SELECT delivery_id, due_at FROM delivery_states
             WHERE connection_id = $1 AND state = 'waiting' AND paced_turn = turn AND due_at > now()
             ORDER BY due_at
             LIMIT $2
             -- Whoever holds one closes it, parks it anew, or is doing the same.
             FOR UPDATE SKIP LOCKED
         ), placed AS (
             SELECT delivery_id,
                    now() + make_interval(secs => $3 * row_number() OVER (ORDER BY due_at, delivery_id)) AS due_at
             FROM waiting
         ), moved AS (
             UPDATE delivery_states p SET due_at = placed.due_at
             FROM placed
             WHERE p.delivery_id = placed.delivery_id AND placed.due_at < p.due_at
             RETURNING 1
         )
         SELECT (SELECT count(*) FROM waiting), (SELECT count(*) FROM moved)",
    )
    .bind(connection.0)
    .bind(i64::from(limit))
    .bind(interval.as_secs_f64())
    .fetch_one(executor)
    .await
    .during("recall parked deliveries")?;
    let count = |n: i64| u32::try_from(n).unwrap_or(limit);
    Ok(Recalled { seen: count(seen), moved: count(moved) })
}

/// Takes at most `limit` due deliveries for `lease_s` seconds, the longest due first.
pub async fn take_due(pool: &PgPool, limit: u32, lease_s: u64) -> Result<Vec<Due>, StoreError> {
    const OPERATION: &str = "take due deliveries";
    let rows = sqlx::query(
        concat!(
            "WITH due AS (
             SELECT delivery_id FROM delivery_states
             WHERE state = 'waiting' AND greatest(due_at, lease_until) <= now() AND ", unhurried!(), "
             ORDER BY greatest(due_at, lease_until)
             LIMIT $1
             FOR UPDATE SKIP LOCKED
         ), taken AS (
             UPDATE delivery_states p SET lease_until = now() + make_interval(secs => $2)
             FROM due
             WHERE p.delivery_id = due.delivery_id
             RETURNING p.*
         )
         SELECT t.*, (SELECT e.expunged_at IS NOT NULL FROM events e WHERE e.uid = t.event_uid) AS expunged,
                (SELECT e.body FROM events e WHERE e.uid = t.event_uid AND octet_length(e.body) <= $3) AS body,
                (SELECT o.lane FROM organizations o WHERE o.id = t.organization_id) AS lane
         FROM taken t ORDER BY t.due_at, t.delivery_id"
        ),
    )
    .bind(i64::from(limit))
    .bind(seconds(lease_s))
    .bind(i32::try_from(MAX_INLINE).unwrap_or(i32::MAX))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    rows.iter().map(due).collect::<Result<_, _>>().during(OPERATION)
}

fn due(row: &PgRow) -> Result<Due, sqlx::Error> {
    let body: Option<Vec<u8>> = row.try_get("body")?;
    let body = match row.try_get::<Option<bool>, _>("expunged")? {
        None => Err(DeadReason::EventExpired),
        Some(true) => Err(DeadReason::Expunged),
        Some(false) => Ok(body.map_or(Body::Stored, |body| Body::Inline(body.into()))),
    };
    let lane = row.try_get::<Option<i16>, _>("lane")?.and_then(stored_lane);
    Ok(Due { key: key(row)?, progress: progress(row)?, lane, body })
}

/// The key in a row with the columns of `delivery_states` or `delivery_queue`.
pub(crate) fn key(row: &PgRow) -> Result<DeliveryKey, sqlx::Error> {
    Ok(DeliveryKey {
        id: DeliveryId(row.try_get("delivery_id")?),
        event: EventUid(row.try_get("event_uid")?),
        organization: row.try_get::<Uuid, _>("organization_id")?.into(),
        subscription: row.try_get::<Uuid, _>("subscription_id")?.into(),
        connection: row.try_get::<Uuid, _>("connection_id")?.into(),
        connection_version: row.try_get("connection_version")?,
    })
}

/// The progress in a row with the columns of `delivery_states` or `delivery_queue`.
pub(crate) fn progress(row: &PgRow) -> Result<Progress, sqlx::Error> {
    Ok(Progress {
        attempts: u32::try_from(row.try_get::<i32, _>("attempts")?).unwrap_or(0),
        turn: row.try_get("turn")?,
        since: row.try_get::<jiff_sqlx::Timestamp, _>("since")?.to_jiff(),
    })
}

/// Notes that due deliveries are back in the queue, unless something happened to them meanwhile.
pub async fn returned(pool: &PgPool, back: &[(DeliveryId, i64)]) -> Result<(), StoreError> {
    sqlx::query(concat!(
        "WITH back AS (
             SELECT p.delivery_id
             FROM delivery_states p
             JOIN UNNEST($1::uuid[], $2::int8[]) AS b (delivery_id, turn)
               ON p.delivery_id = b.delivery_id AND p.turn = b.turn
             WHERE p.state = 'waiting' AND ",
        unhurried!(),
        "
             ORDER BY p.delivery_id
             FOR UPDATE OF p
         )
         UPDATE delivery_states p
         SET state = 'queued', due_at = NULL, lease_until = '-infinity', changed_at = now()
         FROM back WHERE p.delivery_id = back.delivery_id"
    ))
    .bind(back.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
    .bind(back.iter().map(|(_, turn)| *turn).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("note that deliveries are back in the queue")?;
    Ok(())
}

/// Records a delivery as given up. One that is closed, dead already, or has come further than this turn,
/// stays as it is; false then.
pub async fn bury(pool: &PgPool, dead: &DeadLetter) -> Result<bool, StoreError> {
    let buried = sqlx::query(
        "INSERT INTO delivery_states AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                           connection_version, state, attempts, turn, since, reason, last_status,
                                           last_body, last_error, last_attempt_at, last_duration_ms)
         VALUES ($1, $2, $3, $4, $5, $6, 'dead', $7, $8, $9, $10, $11, $12, $13, $14, $15)
         ON CONFLICT (delivery_id) DO UPDATE
             SET state = 'dead', attempts = excluded.attempts, turn = excluded.turn, since = excluded.since,
                 due_at = NULL, lease_until = '-infinity', reason = excluded.reason,
                 connection_version = excluded.connection_version,
                 last_status = coalesce(excluded.last_status, p.last_status),
                 last_body = coalesce(excluded.last_body, p.last_body),
                 last_error = coalesce(excluded.last_error, p.last_error),
                 last_attempt_at = coalesce(excluded.last_attempt_at, p.last_attempt_at),
                 last_duration_ms = coalesce(excluded.last_duration_ms, p.last_duration_ms), changed_at = now()
             WHERE p.state IN ('waiting', 'queued') AND p.turn <= excluded.turn",
    )
    .bind(dead.key.id.0)
    .bind(dead.key.event.0)
    .bind(dead.key.organization.0)
    .bind(dead.key.subscription.0)
    .bind(dead.key.connection.0)
    .bind(dead.key.connection_version)
    .bind(i32::try_from(dead.progress.attempts).unwrap_or(i32::MAX))
    .bind(dead.progress.turn)
    .bind(jiff_sqlx::Timestamp::from(dead.progress.since))
    .bind(dead.reason.as_str())
    .bind(dead.last.status.map(i32::from))
    .bind(dead.last.body.as_deref())
    .bind(dead.last.error.as_deref().map(storable))
    .bind(dead.last.at.map(jiff_sqlx::Timestamp::from))
    .bind(dead.last.duration.map(millis))
    .execute(pool)
    .await
    .during("record a dead letter")?;
    Ok(buried.rows_affected() > 0)
}

/// Where a delivery stands, and since which turn; `None` if it never left the straight path.
pub async fn standing(pool: &PgPool, delivery: DeliveryId) -> Result<Option<(State, i64)>, StoreError> {
    Ok(standings(pool, &[delivery]).await?.remove(&delivery))
}

/// Where these deliveries stand, and since which turn. Those that never left the straight path are not among them.
pub async fn standings(
    pool: &PgPool,
    deliveries: &[DeliveryId],
) -> Result<HashMap<DeliveryId, (State, i64)>, StoreError> {
    const OPERATION: &str = "read where deliveries stand";
    let rows =
        sqlx::query("SELECT delivery_id, state, turn FROM delivery_states WHERE delivery_id = ANY($1)")
            .bind(deliveries.iter().map(|id| id.0).collect::<Vec<_>>())
            .fetch_all(pool)
            .await
            .during(OPERATION)?;
    rows.iter()
        .map(|row| {
            let delivery = DeliveryId(row.try_get("delivery_id").during(OPERATION)?);
            let text: String = row.try_get("state").during(OPERATION)?;
            let state = text.parse().map_err(|()| StoreError::Inconsistent {
                table: "delivery_states",
                id: delivery.to_string(),
                problem: format!("unknown state {text}"),
            })?;
            Ok((delivery, (state, row.try_get("turn").during(OPERATION)?)))
        })
        .collect()
}

/// Closes the deliveries of an event to a connection, or to all of them, that are still open, as far as is known:
/// those without a row may be delivered already. Answers which are closed now, by this call or an earlier one;
/// `None` if the organization has no such event. A cancellation leaves an audit record if it closes any; what is
/// acknowledged is in history.
pub async fn close_deliveries(
    pool: &PgPool,
    organization: OrganizationId,
    event: EventUid,
    only: Option<ConnectionId>,
    closed: Closed,
    by: &By,
) -> Result<Option<Vec<DeliveryId>>, StoreError> {
    const OPERATION: &str = "close an event's deliveries";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let mut cancelled_before = 0;
    if closed == Closed::Cancelled {
        // Of two cancellations at once, one finds what the other has done.
        lock_organization(&mut transaction, organization).await?;
        cancelled_before = count_cancelled(&mut transaction, organization, event, only).await?;
    }
    let only = only.map(|connection| connection.0);
    let matched = sqlx::query(
        "SELECT s.id, s.connection_id
         FROM events e
         LEFT JOIN LATERAL UNNEST(e.subscriptions) AS m (id) ON true
         LEFT JOIN subscriptions s ON s.id = m.id AND ($3::uuid IS NULL OR s.connection_id = $3)
         WHERE e.uid = $1 AND e.organization_id = $2",
    )
    .bind(event.0)
    .bind(organization.0)
    .bind(only)
    .fetch_all(&mut *transaction)
    .await
    .during(OPERATION)?;
    if matched.is_empty() {
        return Ok(None);
    }
    let (mut deliveries, mut subscriptions, mut connections) = (Vec::new(), Vec::new(), Vec::new());
    for row in &matched {
        // An event that matched none of them has one row without a subscription.
        let Some(subscription) = row.try_get::<Option<Uuid>, _>("id").during(OPERATION)? else { continue };
        deliveries.push(DeliveryId::derive(event, subscription.into()).0);
        subscriptions.push(subscription);
        connections.push(row.try_get::<Uuid, _>("connection_id").during(OPERATION)?);
    }
    let rows = sqlx::query(
        "WITH wanted AS (
             SELECT d, s, c FROM UNNEST($4::uuid[], $5::uuid[], $6::uuid[]) AS m (d, s, c)
             UNION
             -- replayed to a subscription that did not match when the event was published
             SELECT delivery_id, subscription_id, connection_id FROM delivery_states
             WHERE event_uid = $1 AND organization_id = $2 AND ($3::uuid IS NULL OR connection_id = $3)
         )
         INSERT INTO delivery_states AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                           connection_version, state, turn, attempts, since)
         SELECT DISTINCT ON (w.d) w.d, $1, $2, w.s, w.c, 0, $7, 0, 0, now() FROM wanted w
         ORDER BY w.d
         ON CONFLICT (delivery_id) DO UPDATE
             SET state = excluded.state, due_at = NULL, lease_until = '-infinity', changed_at = now()
             WHERE p.state IN ('waiting', 'queued') OR p.state = excluded.state
         RETURNING p.delivery_id",
    )
    .bind(event.0)
    .bind(organization.0)
    .bind(only)
    .bind(deliveries)
    .bind(subscriptions)
    .bind(connections)
    .bind(State::from(closed).as_str())
    .fetch_all(&mut *transaction)
    .await
    .during(OPERATION)?;
    let are_closed: Vec<DeliveryId> = rows
        .iter()
        .map(|row| row.try_get("delivery_id").map(DeliveryId))
        .collect::<Result<_, _>>()
        .during(OPERATION)?;
    let newly = i64::try_from(are_closed.len()).unwrap_or(i64::MAX) - cancelled_before;
    if closed == Closed::Cancelled && newly > 0 {
        let change = Change::new(Action::EventCancelled, TargetKind::Event, event);
        let change = change.after(json!({ "deliveriesCancelled": newly }));
        audit::record(&mut transaction, by, Some(organization), change).await?;
    }
    transaction.commit().await.during(OPERATION)?;
    Ok(Some(are_closed))
}

/// How many deliveries of an event, to a connection or to all of them, are cancelled.
async fn count_cancelled(
    transaction: &mut PgConnection,
    organization: OrganizationId,
    event: EventUid,
    only: Option<ConnectionId>,
) -> Result<i64, StoreError> {
    sqlx::query_scalar(
        "SELECT count(*) FROM delivery_states
         WHERE event_uid = $1 AND organization_id = $2 AND ($3::uuid IS NULL OR connection_id = $3)
           AND state = 'cancelled'",
    )
    .bind(event.0)
    .bind(organization.0)
    .bind(only.map(|connection| connection.0))
    .fetch_one(transaction)
    .await
    .during("count an event's cancelled deliveries")
}

/// How a delivery is closed from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// The subscriber says that it has the event.
    Acked,
    /// The event is not to be delivered.
    Cancelled,
}

impl From<Closed> for State {
    fn from(closed: Closed) -> Self {
        match closed {
            Closed::Acked => Self::Acked,
            Closed::Cancelled => Self::Cancelled,
        }
    }
}

/// At most `limit` deliveries that were closed in the last `within` seconds, the latest first, and how.
pub async fn closed_lately(
    pool: &PgPool,
    within_s: u64,
    limit: u32,
) -> Result<Vec<(DeliveryId, Closed)>, StoreError> {
    const OPERATION: &str = "read the closed deliveries";
    let rows = sqlx::query(
        "SELECT delivery_id, state = 'cancelled' AS cancelled FROM delivery_states
         WHERE state IN ('acked', 'cancelled') AND changed_at > now() - make_interval(secs => $1)
         ORDER BY changed_at DESC LIMIT $2",
    )
    .bind(seconds(within_s))
    .bind(i64::from(limit))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    rows.iter()
        .map(|row| {
            let closed = if row.try_get("cancelled")? { Closed::Cancelled } else { Closed::Acked };
            Ok((DeliveryId(row.try_get("delivery_id")?), closed))
        })
        .collect::<Result<_, _>>()
        .during(OPERATION)
}

/// Removes at most `limit` rows of deliveries that are over: what they say is in history, or was never more
/// than a guard against late results. What was closed stays so as long as its event is stored: it would be
/// replayed, and shown as open, without its row.
pub async fn sweep_states(pool: &PgPool, keep: Duration, limit: u32) -> Result<u64, StoreError> {
    let swept = sqlx::query(
        "DELETE FROM delivery_states WHERE delivery_id IN (
             SELECT delivery_id FROM delivery_states
             WHERE state IN ('queued', 'delivered', 'acked', 'cancelled')
               AND changed_at < now() - make_interval(secs => $1)
               AND (state IN ('queued', 'delivered')
                    OR NOT EXISTS (SELECT e.uid FROM events e WHERE e.uid = event_uid))
             LIMIT $2 FOR UPDATE SKIP LOCKED)",
    )
    .bind(keep.as_secs_f64())
    .bind(i64::from(limit))
    .execute(pool)
    .await
    .during("sweep deliveries that are over")?;
    Ok(swept.rows_affected())
}

/// The CloudEvent of a delivery that travels without it, or why there is none any more.
pub async fn load_body(pool: &PgPool, event: EventUid) -> Result<Result<Bytes, DeadReason>, StoreError> {
    let found: Option<(Vec<u8>, bool)> =
        sqlx::query_as("SELECT body, expunged_at IS NOT NULL FROM events WHERE uid = $1")
            .bind(event.0)
            .fetch_optional(pool)
            .await
            .during("read an event's body")?;
    Ok(match found {
        None => Err(DeadReason::EventExpired),
        Some((_, true)) => Err(DeadReason::Expunged),
        Some((body, false)) => Ok(body.into()),
    })
}
