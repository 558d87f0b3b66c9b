//! Events that are due later. They wait in `scheduled_events`, and move into `events` when they are due.

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::json;
use sqlx::{PgConnection, PgPool, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{
    During as _, EVENT_PAGE_BYTES, NewEvent, PageRequest, Paged, StoreError, audit, hold_transaction,
};
use crate::{
    audit::{Action, By, Change, TargetKind},
    ids::{ConnectionId, EventUid, OrganizationId, ScheduleId},
};

/// An event that is due later.
#[derive(Debug, Clone)]
pub struct ScheduledEvent {
    /// The event. Its subscriptions are those that match when it is due.
    pub event: NewEvent,
    /// When it is due.
    pub due_at: Timestamp,
    /// The schedule whose occurrence it is, for one that was triggered by hand.
    pub schedule: Option<ScheduleId>,
    /// When it was cancelled.
    pub cancelled_at: Option<Timestamp>,
}

macro_rules! columns {
    () => {
        columns!("s.body")
    };
    ($body:literal) => {
        concat!(
            "s.uid, s.organization_id, s.id, s.source, s.type, s.subject, s.time, s.publisher, s.received_at, s.due_at, \
             s.schedule_id, s.cancelled_at, ",
            $body
        )
    };
}

fn scheduled(row: &PgRow) -> Result<ScheduledEvent, sqlx::Error> {
    let time =
        |column: &str| row.try_get::<jiff_sqlx::Timestamp, _>(column).map(jiff_sqlx::Timestamp::to_jiff);
    let cancelled_at: Option<jiff_sqlx::Timestamp> = row.try_get("cancelled_at")?;
    Ok(ScheduledEvent {
        event: NewEvent {
            uid: EventUid(row.try_get("uid")?),
            organization: OrganizationId(row.try_get("organization_id")?),
            id: row.try_get("id")?,
            source: row.try_get("source")?,
            r#type: row.try_get("type")?,
            subject: row.try_get("subject")?,
            time: time("time")?,
            publisher: row.try_get::<Option<Uuid>, _>("publisher")?.map(ConnectionId),
            received_at: Some(time("received_at")?),
            subscriptions: Vec::new(),
            body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?),
        },
        due_at: time("due_at")?,
        schedule: row.try_get::<Option<Uuid>, _>("schedule_id")?.map(ScheduleId),
        cancelled_at: cancelled_at.map(jiff_sqlx::Timestamp::to_jiff),
    })
}

/// Stores events that are due later: one statement, whatever their number.
pub async fn insert_scheduled(
    connection: &mut PgConnection,
    events: &[ScheduledEvent],
) -> Result<(), StoreError> {
    let each = |f: fn(&NewEvent) -> Uuid| events.iter().map(|e| f(&e.event)).collect::<Vec<_>>();
    let text = |f: fn(&NewEvent) -> &str| events.iter().map(|e| f(&e.event)).collect::<Vec<_>>();
    let times = |f: fn(&ScheduledEvent) -> Timestamp| {
        events.iter().map(|event| jiff_sqlx::Timestamp::from(f(event))).collect::<Vec<_>>()
    };
    sqlx::query(
        "INSERT INTO scheduled_events (uid, organization_id, id, source, type, subject, time, publisher, due_at,
                                       schedule_id, body)
         SELECT * FROM UNNEST($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
                              $7::timestamptz[], $8::uuid[], $9::timestamptz[], $10::uuid[], $11::bytea[])",
    )
    .bind(each(|event| event.uid.0))
    .bind(each(|event| event.organization.0))
    .bind(text(|event| &event.id))
    .bind(text(|event| &event.source))
    .bind(text(|event| &event.r#type))
    .bind(events.iter().map(|e| e.event.subject.as_deref()).collect::<Vec<_>>())
    .bind(times(|scheduled| scheduled.event.time))
    .bind(events.iter().map(|e| e.event.publisher.map(|id| id.0)).collect::<Vec<_>>())
    .bind(times(|scheduled| scheduled.due_at))
    .bind(events.iter().map(|e| e.schedule.map(|id| id.0)).collect::<Vec<_>>())
    .bind(events.iter().map(|e| &e.event.body[..]).collect::<Vec<_>>())
    .execute(connection)
    .await
    .during("store events that are due later")?;
    Ok(())
}

/// Claims the events that are due, the longest due first, or this one only, for this transaction: at most `limit`, and
/// none more once their bodies have `max_bytes`. Should this process be cut off from the database, the database ends the transaction
/// after `hold_s` seconds.
pub async fn claim_due_events(
    connection: &mut PgConnection,
    only: Option<EventUid>,
    limit: u32,
    max_bytes: i64,
    hold_s: u64,
) -> Result<Vec<ScheduledEvent>, StoreError> {
    const OPERATION: &str = "claim due events";
    hold_transaction(connection, hold_s).await?;
    sqlx::query(concat!(
        "WITH due AS (
             SELECT uid, due_at, octet_length(body) AS size FROM scheduled_events
             WHERE due_at <= now() AND cancelled_at IS NULL AND ($3::uuid IS NULL OR uid = $3)
             ORDER BY due_at, uid LIMIT $1 FOR UPDATE SKIP LOCKED
         ), fitting AS (
             SELECT uid, sum(size) OVER (ORDER BY due_at, uid) - size AS before FROM due
         )
         SELECT ",
        columns!(),
        " FROM fitting f JOIN scheduled_events s ON s.uid = f.uid WHERE f.before < $2 ORDER BY s.due_at, s.uid"
    ))
    .bind(i64::from(limit))
    .bind(max_bytes)
    .bind(only.map(|uid| uid.0))
    .fetch_all(connection)
    .await
    .during(OPERATION)?
    .iter()
    .map(scheduled)
    .collect::<Result<_, _>>()
    .during(OPERATION)
}

/// Puts off an event that cannot be published, so that it does not keep others from their turn.
pub async fn put_off_event(pool: &PgPool, event: EventUid, seconds: u32) -> Result<(), StoreError> {
    sqlx::query("UPDATE scheduled_events SET due_at = now() + make_interval(secs => $2) WHERE uid = $1")
        .bind(event.0)
        .bind(f64::from(seconds))
        .execute(pool)
        .await
        .during("put off an event")?;
    Ok(())
}

/// Takes events out that were claimed and are stored in `events` now; those that a schedule triggered become
/// occurrences of it.
pub async fn remove_scheduled(connection: &mut PgConnection, events: &[EventUid]) -> Result<(), StoreError> {
    sqlx::query(
        "WITH moved AS (DELETE FROM scheduled_events WHERE uid = ANY($1) RETURNING *)
         INSERT INTO occurrences (uid, schedule_id, organization_id, state, manual, tick, last_tick, ticks, at)
         SELECT uid, schedule_id, organization_id, 'fired', true, due_at, due_at, 1, now()
         FROM moved WHERE schedule_id IS NOT NULL",
    )
    .bind(events.iter().map(|uid| uid.0).collect::<Vec<_>>())
    .execute(connection)
    .await
    .during("take out events that were due")?;
    Ok(())
}

/// The event of that uid that is due later, or was cancelled.
pub async fn scheduled_event(
    pool: &PgPool,
    organization: OrganizationId,
    uid: EventUid,
) -> Result<Option<ScheduledEvent>, StoreError> {
    const OPERATION: &str = "read an event that is due later";
    let row = sqlx::query(concat!(
        "SELECT ",
        columns!(),
        " FROM scheduled_events s WHERE s.uid = $1 AND s.organization_id = $2"
    ))
    .bind(uid.0)
    .bind(organization.0)
    .fetch_optional(pool)
    .await
    .during(OPERATION)?;
    row.as_ref().map(scheduled).transpose().during(OPERATION)
}

/// The events of an organization that are due later, and those that were cancelled lately, in the order in which they
/// are due. Without `bodies` their bodies are empty; with them, the event that passes [`EVENT_PAGE_BYTES`] is the last
/// of its part.
pub async fn scheduled_events(
    pool: &PgPool,
    organization: OrganizationId,
    bodies: bool,
    page: PageRequest,
) -> Result<Paged<ScheduledEvent>, StoreError> {
    const OPERATION: &str = "list events that are due later";
    let rows = sqlx::query(concat!(
        "SELECT ",
        columns!("CASE WHEN $4 THEN s.body ELSE ''::bytea END AS body"),
        ", s.found FROM (
             SELECT *, count(*) OVER () AS found, sum(octet_length(body)) OVER (ORDER BY uid) - octet_length(body) AS before
             FROM (SELECT * FROM scheduled_events
                   WHERE organization_id = $1 AND uid > $2 ORDER BY uid LIMIT $3) AS part
         ) AS s
         WHERE NOT $4 OR s.before < $5
         ORDER BY s.uid"
    ))
    .bind(organization.0)
    .bind(page.bound())
    .bind(page.rows())
    .bind(bodies)
    .bind(EVENT_PAGE_BYTES)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let found = rows.first().map(|row| row.try_get::<i64, _>("found")).transpose().during(OPERATION)?;
    let items: Vec<_> = rows.iter().map(scheduled).collect::<Result<_, _>>().during(OPERATION)?;
    let cut = found.is_some_and(|found| usize::try_from(found).is_ok_and(|found| found > items.len()));
    let id = |item: &ScheduledEvent| item.event.uid.0;
    let last = items.last().map(id);
    let mut paged = Paged::cut(items, page, id);
    if cut {
        paged.next = last;
    }
    Ok(paged)
}

/// What [`cancel_scheduled`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelScheduled {
    /// It will not be published: cancelled by this call or an earlier one.
    Cancelled,
    /// There is none that is due later; it may have been published.
    NotThere,
}

/// Cancels an event that is due later, so that it is never published. If it is being published at this moment, this
/// waits for that.
pub async fn cancel_scheduled(
    pool: &PgPool,
    organization: OrganizationId,
    uid: EventUid,
    by: &By,
) -> Result<CancelScheduled, StoreError> {
    const OPERATION: &str = "cancel an event that is due later";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let cancelled: Option<bool> = sqlx::query_scalar(
        "SELECT cancelled_at IS NOT NULL FROM scheduled_events WHERE uid = $1 AND organization_id = $2 FOR UPDATE",
    )
    .bind(uid.0)
    .bind(organization.0)
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    match cancelled {
        None => return Ok(CancelScheduled::NotThere),
        Some(true) => return Ok(CancelScheduled::Cancelled),
        Some(false) => {}
    }
    sqlx::query("UPDATE scheduled_events SET cancelled_at = now() WHERE uid = $1")
        .bind(uid.0)
        .execute(&mut *transaction)
        .await
        .during(OPERATION)?;
    let change = Change::new(Action::EventCancelled, TargetKind::Event, uid);
    let change = change.before(json!({ "status": "scheduled" })).after(json!({ "status": "cancelled" }));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during(OPERATION)?;
    Ok(CancelScheduled::Cancelled)
}

/// Deletes at most `limit` events that were cancelled longer than `keep_s` seconds ago, and as many schedules that are
/// over for so long.
pub async fn sweep_scheduled(pool: &PgPool, keep_s: u64, limit: u32) -> Result<u64, StoreError> {
    let mut swept = 0;
    for (operation, statement) in [
        (
            "sweep cancelled events",
            "DELETE FROM scheduled_events WHERE uid IN (
                 SELECT uid FROM scheduled_events WHERE cancelled_at < now() - make_interval(secs => $1)
                 LIMIT $2 FOR UPDATE SKIP LOCKED)",
        ),
        (
            "sweep schedules that are over",
            "DELETE FROM schedules WHERE id IN (
                 SELECT id FROM schedules
                 WHERE state IN ('ended', 'cancelled') AND due_at IS NULL
                   AND updated_at < now() - make_interval(secs => $1)
                 LIMIT $2 FOR UPDATE SKIP LOCKED)",
        ),
    ] {
        let deleted = sqlx::query(statement)
            .bind(super::publish::seconds(keep_s))
            .bind(i64::from(limit))
            .execute(pool)
            .await
            .during(operation)?;
        swept += deleted.rows_affected();
    }
    Ok(swept)
}
