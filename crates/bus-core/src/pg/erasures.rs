//! Erasures: durable jobs that empty payloads and leave what happened.
//!
//! The publisher creates a job, the archiver works it off. Every statement empties what is not empty yet and counts it in
//! the job's row, so that whoever is killed in between can begin anew, and nothing is counted twice.

use jiff::Timestamp;
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use super::{
    During as _, PageRequest, Paged, StoreError, audit, dead_letters::read_in_order,
    organizations::lock_organization,
};
use crate::{
    audit::{Action, By, Change, TargetKind},
    ids::{ErasureId, EventUid, OrganizationId},
};

/// The most jobs of one organization that are not done.
pub const MAX_OPEN_ERASURES: i64 = 100;

/// How long a finished job is kept, days. It goes when the organization creates the next one; its audit records stay.
pub const ERASURES_KEPT_DAYS: i32 = 365;

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErasureState {
    /// Not begun.
    Pending,
    /// Something may be emptied already.
    Running,
    /// All of it is.
    Done,
}

impl ErasureState {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Pending, "pending"), (Self::Running, "running"), (Self::Done, "done")];
}

/// How much a job has emptied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Emptied {
    /// Events.
    pub events: u64,
    /// Answers of subscribers that were kept with a delivery: they may echo the payload.
    pub answers: u64,
    /// Messages of the dead-letter stream.
    pub dead_letters: u64,
    /// Rows in cold storage.
    pub archived: u64,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    /// Its id.
    pub id: ErasureId,
    /// Whose payloads.
    pub organization: OrganizationId,
    /// Only that of this event; otherwise those of all events that had arrived by `requested_at`.
    pub event: Option<EventUid>,
    /// Where it stands.
    pub state: ErasureState,
    /// How many events waited for their time when it was asked for; those are left.
    pub waiting: u64,
    /// How much it has emptied.
    pub emptied: Emptied,
    /// When it was asked for, by the database's clock.
    pub requested_at: Timestamp,
    /// When it was done.
    pub finished_at: Option<Timestamp>,
}

/// What [`create_erasure`] found.
#[derive(Debug, Clone)]
pub enum CreateErasure {
    /// It is there now; for an event perhaps by an earlier request.
    Stored(Box<Erasure>),
    /// The event is due later: it would be published without its payload.
    Waiting,
    /// The organization has [`MAX_OPEN_ERASURES`] already.
    TooMany,
}

#[derive(sqlx::FromRow)]
struct ErasureRow {
    id: Uuid,
    organization_id: Uuid,
    event_uid: Option<Uuid>,
    state: String,
    waiting: i64,
    events: i64,
    answers: i64,
    dead_letters: i64,
    archived: i64,
    requested_at: jiff_sqlx::Timestamp,
    finished_at: Option<jiff_sqlx::Timestamp>,
}

macro_rules! columns {
    () => {
        "id, organization_id, event_uid, state, waiting, events, answers, dead_letters, archived, requested_at, \
         finished_at"
    };
}

impl TryFrom<ErasureRow> for Erasure {
    type Error = StoreError;

    fn try_from(row: ErasureRow) -> Result<Self, StoreError> {
        let state = ErasureState::ALL.into_iter().find(|(_, name)| *name == row.state);
        let (state, _) = state.ok_or_else(|| StoreError::Inconsistent {
            table: "erasures",
            id: row.id.to_string(),
            problem: format!("unknown state {}", row.state),
        })?;
        Ok(Self {
            id: ErasureId(row.id),
            organization: OrganizationId(row.organization_id),
            event: row.event_uid.map(EventUid),
            state,
            waiting: row.waiting.unsigned_abs(),
            emptied: Emptied {
                events: row.events.unsigned_abs(),
                answers: row.answers.unsigned_abs(),
                dead_letters: row.dead_letters.unsigned_abs(),
                archived: row.archived.unsigned_abs(),
            },
            requested_at: row.requested_at.to_jiff(),
            finished_at: row.finished_at.map(jiff_sqlx::Timestamp::to_jiff),
        })
    }
}

/// Stores a job about an event, or about all that the organization has published; for an event that has an open job
/// already, finds that one.
pub async fn create_erasure(
    pool: &PgPool,
    id: ErasureId,
    organization: OrganizationId,
    event: Option<EventUid>,
    by: &By,
) -> Result<CreateErasure, StoreError> {
    const OPERATION: &str = "create an erasure";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    // One at a time, so that a repeated request finds the first one's job, and the count is exact.
    lock_organization(&mut transaction, organization).await?;
    sqlx::query(
        "DELETE FROM erasures WHERE organization_id = $1 AND finished_at < now() - make_interval(days => $2)",
    )
    .bind(organization.0)
    .bind(ERASURES_KEPT_DAYS)
    .execute(&mut *transaction)
    .await
    .during(OPERATION)?;
    if let Some(event) = event {
        let open: Option<ErasureRow> = sqlx::query_as(concat!(
            "SELECT ",
            columns!(),
            " FROM erasures WHERE organization_id = $1 AND event_uid = $2 AND state <> 'done'"
        ))
        .bind(organization.0)
        .bind(event.0)
        .fetch_optional(&mut *transaction)
        .await
        .during(OPERATION)?;
        if let Some(open) = open {
            return Ok(CreateErasure::Stored(Box::new(open.try_into()?)));
        }
    }
    let (open, waiting): (i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM erasures WHERE organization_id = $1 AND state <> 'done'),
                (SELECT count(*) FROM scheduled_events
                 WHERE organization_id = $1 AND cancelled_at IS NULL AND ($2::uuid IS NULL OR uid = $2))",
    )
    .bind(organization.0)
    .bind(event.map(|event| event.0))
    .fetch_one(&mut *transaction)
    .await
    .during(OPERATION)?;
    if event.is_some() && waiting > 0 {
        return Ok(CreateErasure::Waiting);
    }
    if open >= MAX_OPEN_ERASURES {
        return Ok(CreateErasure::TooMany);
    }
    let row: ErasureRow = sqlx::query_as(concat!(
        "INSERT INTO erasures (id, organization_id, event_uid, waiting) VALUES ($1, $2, $3, $4) RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(organization.0)
    .bind(event.map(|event| event.0))
    .bind(waiting)
    .fetch_one(&mut *transaction)
    .await
    .during(OPERATION)?;
    let change = Change::new(Action::ErasureCreated, TargetKind::Erasure, id);
    let change = change.after(json!({ "eventUid": event, "waiting": waiting }));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during("commit a new erasure")?;
    Ok(CreateErasure::Stored(Box::new(row.try_into()?)))
}

/// The job of that id.
pub async fn erasure(
    pool: &PgPool,
    organization: OrganizationId,
    id: ErasureId,
) -> Result<Option<Erasure>, StoreError> {
    let row: Option<ErasureRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM erasures WHERE id = $2 AND organization_id = $1"
    ))
    .bind(organization.0)
    .bind(id.0)
    .fetch_optional(pool)
    .await
    .during("read an erasure")?;
    row.map(Erasure::try_from).transpose()
}

/// The jobs of an organization, oldest first.
pub async fn erasures(
    pool: &PgPool,
    organization: OrganizationId,
    page: PageRequest,
) -> Result<Paged<Erasure>, StoreError> {
    let rows: Vec<ErasureRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM erasures WHERE organization_id = $1 AND id > $2 ORDER BY id LIMIT $3"
    ))
    .bind(organization.0)
    .bind(page.bound())
    .bind(page.rows())
    .fetch_all(pool)
    .await
    .during("list erasures")?;
    let items = rows.into_iter().map(Erasure::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &Erasure| item.id.0))
}

/// The jobs that are not done, of all organizations, oldest first, at most `limit`.
pub async fn open_erasures(pool: &PgPool, limit: u32) -> Result<Vec<Erasure>, StoreError> {
    // Those that were not tried for the longest time: one that fails again and again stands behind the others.
    let rows: Vec<ErasureRow> = sqlx::query_as(concat!(
        "UPDATE erasures SET tried_at = clock_timestamp() WHERE id IN (
             SELECT id FROM erasures WHERE state <> 'done' ORDER BY tried_at NULLS FIRST, id LIMIT $1)
         RETURNING ",
        columns!(),
    ))
    .bind(i64::from(limit))
    .fetch_all(pool)
    .await
    .during("look for open erasures")?;
    rows.into_iter().map(Erasure::try_from).collect()
}

/// Empties what the database has of it, `batch` rows at a time: events, those that were cancelled before they were due,
/// and the answers of subscribers. What is archived or delivered from then on is without it.
pub async fn empty_tables(pool: &PgPool, erasure: &Erasure, batch: u32) -> Result<(), StoreError> {
    match erasure.event {
        Some(event) => empty_event(pool, erasure, event).await,
        None => {
            let mut after = Uuid::nil();
            while let Some(last) = empty_events(pool, erasure, after, batch).await? {
                after = last;
            }
            while empty_cancelled(pool, erasure, batch).await? == i64::from(batch) {}
            after = Uuid::nil();
            while let Some(last) = empty_answers(pool, erasure, after, batch).await? {
                after = last;
            }
            Ok(())
        }
    }
}

/// One event, wherever it is, with the answers to it.
async fn empty_event(pool: &PgPool, erasure: &Erasure, event: EventUid) -> Result<(), StoreError> {
    sqlx::query(
        "WITH published AS (
             UPDATE events SET body = '', expunged_at = now()
             WHERE uid = $3 AND organization_id = $2 AND expunged_at IS NULL RETURNING uid
         ), cancelled AS (
             UPDATE scheduled_events SET body = ''
             WHERE uid = $3 AND organization_id = $2 AND cancelled_at IS NOT NULL AND body <> '' RETURNING uid
         ), answers AS (
             UPDATE delivery_states SET last_body = NULL
             WHERE event_uid = $3 AND organization_id = $2 AND last_body IS NOT NULL RETURNING delivery_id
         )
         UPDATE erasures
         SET state = 'running', answers = answers + (SELECT count(*) FROM answers),
             events = events + (SELECT count(*) FROM published) + (SELECT count(*) FROM cancelled)
         WHERE id = $1",
    )
    .bind(erasure.id.0)
    .bind(erasure.organization.0)
    .bind(event.0)
    .execute(pool)
    .await
    .during("empty an event")?;
    Ok(())
}

/// Events behind `after`, in the order of their uids; the last that was looked at, if there was any.
async fn empty_events(
    pool: &PgPool,
    erasure: &Erasure,
    after: Uuid,
    batch: u32,
) -> Result<Option<Uuid>, StoreError> {
    const OPERATION: &str = "empty events";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    read_in_order(&mut transaction).await?;
    let last: Option<Uuid> = sqlx::query_scalar(
        "WITH looked AS (
             SELECT uid, expunged_at IS NULL AND received_at <= $4 AS concerned FROM events
             WHERE (organization_id, uid) > ($2, $3) AND (organization_id, uid) <= ($2, $6)
             ORDER BY organization_id, uid LIMIT $5
         ), emptied AS (
             UPDATE events e SET body = '', expunged_at = now()
             FROM looked WHERE e.uid = looked.uid AND looked.concerned AND e.expunged_at IS NULL RETURNING e.uid
         ), counted AS (
             UPDATE erasures SET state = 'running', events = events + (SELECT count(*) FROM emptied) WHERE id = $1
         )
         SELECT uid FROM looked ORDER BY uid DESC LIMIT 1",
    )
    .bind(erasure.id.0)
    .bind(erasure.organization.0)
    .bind(after)
    .bind(jiff_sqlx::Timestamp::from(erasure.requested_at))
    .bind(i64::from(batch))
    .bind(Uuid::max())
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    transaction.commit().await.during(OPERATION)?;
    Ok(last)
}

/// Events that were cancelled before they were due; how many there were.
async fn empty_cancelled(pool: &PgPool, erasure: &Erasure, batch: u32) -> Result<i64, StoreError> {
    sqlx::query_scalar(
        "WITH emptied AS (
             UPDATE scheduled_events SET body = '' WHERE uid IN (
                 SELECT uid FROM scheduled_events
                 WHERE organization_id = $2 AND cancelled_at IS NOT NULL AND received_at <= $3 AND body <> ''
                 ORDER BY uid LIMIT $4)
             RETURNING uid
         ), counted AS (
             UPDATE erasures SET state = 'running', events = events + (SELECT count(*) FROM emptied) WHERE id = $1
         )
         SELECT count(*) FROM emptied",
    )
    .bind(erasure.id.0)
    .bind(erasure.organization.0)
    .bind(jiff_sqlx::Timestamp::from(erasure.requested_at))
    .bind(i64::from(batch))
    .fetch_one(pool)
    .await
    .during("empty cancelled events")
}

/// Answers to events that have no payload any more, of deliveries behind `after`; the last that was looked at, if there
/// was any. No index leads to them: the table, which holds only what left the straight path, is walked through.
async fn empty_answers(
    pool: &PgPool,
    erasure: &Erasure,
    after: Uuid,
    batch: u32,
) -> Result<Option<Uuid>, StoreError> {
    const OPERATION: &str = "empty answers of subscribers";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    read_in_order(&mut transaction).await?;
    let last: Option<Uuid> = sqlx::query_scalar(
        "WITH looked AS (
             SELECT delivery_id, organization_id, event_uid FROM delivery_states
             WHERE delivery_id > $3 ORDER BY delivery_id LIMIT $4
         ), emptied AS (
             UPDATE delivery_states s SET last_body = NULL
             FROM looked l
             WHERE s.delivery_id = l.delivery_id AND l.organization_id = $2 AND s.last_body IS NOT NULL
               AND NOT EXISTS (SELECT FROM events e WHERE e.uid = l.event_uid AND e.expunged_at IS NULL)
             RETURNING s.delivery_id
         ), counted AS (
             UPDATE erasures SET state = 'running', answers = answers + (SELECT count(*) FROM emptied) WHERE id = $1
         )
         SELECT delivery_id FROM looked ORDER BY delivery_id DESC LIMIT 1",
    )
    .bind(erasure.id.0)
    .bind(erasure.organization.0)
    .bind(after)
    .bind(i64::from(batch))
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    transaction.commit().await.during(OPERATION)?;
    Ok(last)
}

/// Counts what was emptied outside of the database.
pub async fn count_emptied(
    pool: &PgPool,
    id: ErasureId,
    dead_letters: u64,
    archived: u64,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE erasures SET state = 'running', dead_letters = dead_letters + $2, archived = archived + $3
         WHERE id = $1 AND state <> 'done'",
    )
    .bind(id.0)
    .bind(i64::try_from(dead_letters).unwrap_or(i64::MAX))
    .bind(i64::try_from(archived).unwrap_or(i64::MAX))
    .execute(pool)
    .await
    .during("count what an erasure has emptied")?;
    Ok(())
}

/// Notes that a job is done, and leaves a record of it; `None` if that was noted before.
pub async fn finish_erasure(pool: &PgPool, id: ErasureId, by: &By) -> Result<Option<Erasure>, StoreError> {
    const OPERATION: &str = "finish an erasure";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let row: Option<ErasureRow> = sqlx::query_as(concat!(
        "UPDATE erasures SET state = 'done', finished_at = now() WHERE id = $1 AND state <> 'done' RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    let Some(row) = row else { return Ok(None) };
    let erasure = Erasure::try_from(row)?;
    let Emptied { events, answers, dead_letters, archived } = erasure.emptied;
    let change = Change::new(Action::ErasureDone, TargetKind::Erasure, id).after(json!({
        "eventUid": erasure.event, "events": events, "answers": answers, "deadLetters": dead_letters,
        "archived": archived,
    }));
    audit::record(&mut transaction, by, Some(erasure.organization), change).await?;
    transaction.commit().await.during(OPERATION)?;
    Ok(Some(erasure))
}
