//! The outbox: which fan-outs are not finished yet.
//!
//! A row is held under a lease. Whoever inserted it fans it out; if that process dies or cannot reach
//! the broker, the lease ends and any replica's relay takes the row over.

use std::{collections::HashMap, time::Duration};

use sqlx::{PgPool, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError, publish::seconds, stored_lane};
use crate::{
    delivery::DeliveryKey,
    fanout::Target,
    ids::{ConnectionId, EventUid, OrganizationId, OutboxId, SubscriptionId},
    queue::{Body, MAX_INLINE},
};

/// An unfinished fan-out that this process now holds.
#[derive(Debug, Clone)]
pub struct Unfinished {
    /// The row.
    pub id: OutboxId,
    /// Its events.
    pub events: Vec<EventUid>,
}

/// Takes over at most `limit` rows whose holder did not finish in time, oldest first.
pub async fn take_over(pool: &PgPool, limit: u32, lease_s: u64) -> Result<Vec<Unfinished>, StoreError> {
    const OPERATION: &str = "take over unfinished outbox rows";
    let rows = sqlx::query(
        "UPDATE outbox SET lease_until = now() + make_interval(secs => $2)
         WHERE id IN (
             SELECT id FROM outbox
             WHERE finished_at IS NULL AND lease_until <= now()
             ORDER BY lease_until
             LIMIT $1
             FOR UPDATE SKIP LOCKED
         )
         RETURNING id, event_uids",
    )
    .bind(i64::from(limit))
    .bind(seconds(lease_s))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    rows.iter()
        .map(|row| {
            let events: Vec<Uuid> = row.try_get("event_uids")?;
            Ok(Unfinished {
                id: OutboxId(row.try_get("id")?),
                events: events.into_iter().map(EventUid).collect(),
            })
        })
        .collect::<Result<_, _>>()
        .during(OPERATION)
}

/// Notes how far a fan-out has come: only `left` is still to be done, and the hold is renewed. So a fan-out
/// that is broken off goes on where it was, instead of repeating what the broker may have forgotten by then.
pub async fn advance_outbox(
    pool: &PgPool,
    row: OutboxId,
    left: &[EventUid],
    lease_s: u64,
) -> Result<(), StoreError> {
    let left: Vec<Uuid> = left.iter().map(|uid| uid.0).collect();
    sqlx::query(
        "UPDATE outbox SET event_uids = $2, lease_until = now() + make_interval(secs => $3)
         WHERE id = $1 AND finished_at IS NULL",
    )
    .bind(row.0)
    .bind(left)
    .bind(seconds(lease_s))
    .execute(pool)
    .await
    .during("note a fan-out's progress")?;
    Ok(())
}

/// Marks rows as finished: every one of their deliveries is safely in the queue. A mark that is lost in a crash of the
/// database costs a repetition, which the queue recognises.
pub async fn finish_outbox(pool: &PgPool, rows: &[OutboxId]) -> Result<(), StoreError> {
    let rows: Vec<Uuid> = rows.iter().map(|id| id.0).collect();
    sqlx::query(concat!(
        "UPDATE outbox SET finished_at = now() WHERE id = ANY($1) AND finished_at IS NULL AND ",
        unhurried!()
    ))
    .bind(rows)
    .execute(pool)
    .await
    .during("finish outbox rows")?;
    Ok(())
}

/// Removes at most `limit` rows that were finished longer ago than `keep`, and as many expired
/// deduplication keys. Returns how many of both.
pub async fn sweep_outbox(pool: &PgPool, keep: Duration, limit: u32) -> Result<u64, StoreError> {
    const OPERATION: &str = "sweep the outbox";
    let rows = sqlx::query(
        "DELETE FROM outbox WHERE id IN (
             SELECT id FROM outbox WHERE finished_at < now() - make_interval(secs => $1)
             LIMIT $2 FOR UPDATE SKIP LOCKED)",
    )
    .bind(keep.as_secs_f64())
    .bind(i64::from(limit))
    .execute(pool)
    .await
    .during(OPERATION)?;
    let keys = sqlx::query(
        "DELETE FROM event_keys WHERE (organization_id, key) IN (
             SELECT organization_id, key FROM event_keys WHERE expires_at < now()
             LIMIT $1 FOR UPDATE SKIP LOCKED)",
    )
    .bind(i64::from(limit))
    .execute(pool)
    .await
    .during(OPERATION)?;
    Ok(rows.rows_affected() + keys.rows_affected())
}

/// What is still to be fanned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOutbox {
    /// How many events.
    pub events: u64,
    /// There are more rows than were looked at.
    pub more: bool,
    /// The age of the oldest row that was looked at; 0 if there is none.
    pub age: Duration,
}

/// Rows that [`open_outbox`] looks at.
const LOOKED_AT: i64 = 200_000;

/// How much is still to be fanned out.
pub async fn open_outbox(pool: &PgPool) -> Result<OpenOutbox, StoreError> {
    const OPERATION: &str = "measure the outbox";
    let (events, rows, age): (i64, i64, f64) = sqlx::query_as(
        "SELECT coalesce(sum(cardinality(o.event_uids)), 0)::int8, count(*),
                coalesce(extract(epoch FROM now() - min(o.created_at)), 0)::float8
         FROM (SELECT event_uids, created_at FROM outbox WHERE finished_at IS NULL LIMIT $1) AS o",
    )
    .bind(LOOKED_AT)
    .fetch_one(pool)
    .await
    .during(OPERATION)?;
    Ok(OpenOutbox {
        events: u64::try_from(events).unwrap_or(0),
        more: rows == LOOKED_AT,
        age: Duration::try_from_secs_f64(age).unwrap_or_default(),
    })
}

/// An event read again for its fan-out.
#[derive(Debug, Clone)]
pub struct StoredFanOut {
    /// The event's bytes, as far as the queue carries them.
    pub body: Body,
    /// The lane that its organization has of its own.
    pub lane: Option<u16>,
    /// Its deliveries.
    pub deliveries: Vec<DeliveryKey>,
}

/// The deliveries of stored events, from the subscriptions that matched when they were published. A
/// subscription that was deleted since is still among them.
pub async fn load_fan_out(pool: &PgPool, events: &[EventUid]) -> Result<Vec<StoredFanOut>, StoreError> {
    const OPERATION: &str = "read a fan-out";
    let uids: Vec<Uuid> = events.iter().map(|uid| uid.0).collect();
    let events = sqlx::query(
        // Of an event that was expunged there is nothing to carry: whoever reads it from the store is told.
        "SELECT e.uid, e.organization_id, e.subscriptions, o.lane,
                CASE WHEN octet_length(e.body) <= $2 AND e.expunged_at IS NULL THEN e.body END AS body
         FROM events e JOIN organizations o ON o.id = e.organization_id
         WHERE e.uid = ANY($1) ORDER BY e.uid",
    )
    .bind(&uids)
    .bind(i32::try_from(MAX_INLINE).unwrap_or(i32::MAX))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let targets = sqlx::query(
        "SELECT DISTINCT s.id, s.connection_id, c.version
         FROM events e
         CROSS JOIN LATERAL UNNEST(e.subscriptions) AS m (id)
         JOIN subscriptions s ON s.id = m.id
         JOIN connections c ON c.id = s.connection_id
         WHERE e.uid = ANY($1)",
    )
    .bind(&uids)
    .bind(i32::try_from(MAX_INLINE).unwrap_or(i32::MAX))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let targets: HashMap<Uuid, (Uuid, i64)> = targets
        .iter()
        .map(|row| Ok((row.try_get("id")?, (row.try_get("connection_id")?, row.try_get("version")?))))
        .collect::<Result<_, sqlx::Error>>()
        .during(OPERATION)?;
    events.iter().map(|row| fan_out(row, &targets)).collect::<Result<_, _>>().during(OPERATION)
}

fn fan_out(
    row: &sqlx::postgres::PgRow,
    targets: &HashMap<Uuid, (Uuid, i64)>,
) -> Result<StoredFanOut, sqlx::Error> {
    let event = EventUid(row.try_get("uid")?);
    let organization = OrganizationId(row.try_get("organization_id")?);
    let subscriptions: Vec<Uuid> = row.try_get("subscriptions")?;
    let body: Option<Vec<u8>> = row.try_get("body")?;
    let deliveries = subscriptions
        .into_iter()
        .filter_map(|subscription| {
            let (connection, connection_version) = *targets.get(&subscription)?;
            let subscription = SubscriptionId(subscription);
            let target = Target { subscription, connection: ConnectionId(connection), connection_version };
            Some(target.delivery(event, organization))
        })
        .collect();
    let lane = row.try_get::<Option<i16>, _>("lane")?.and_then(stored_lane);
    Ok(StoredFanOut { body: body.map_or(Body::Stored, |body| Body::Inline(body.into())), lane, deliveries })
}
