//! What the API does with schedules: create, change, pause, resume, cancel.

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::{Publisher, Schedule, ScheduleRow, ScheduleState, columns};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    ids::{ConnectionId, OrganizationId, ScheduleId},
    pg::{
        During as _, StoreError, audit, organizations::lock_organization, publish::digest, transaction_time,
    },
    schedule::{Recurrence, Rules, tz_version},
};

/// A schedule to be stored.
#[derive(Debug, Clone)]
pub struct NewSchedule {
    /// Its id, if it is new.
    pub id: ScheduleId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// The connection that publishes, if the key is bound to one.
    pub publisher: Option<ConnectionId>,
    /// The type of its occurrences.
    pub r#type: String,
    /// Their source.
    pub source: String,
    /// When it recurs.
    pub recurrence: Recurrence,
    /// What else it says.
    pub rules: Rules,
    /// What its occurrences are made from; see [`Schedule::template`].
    pub template: Bytes,
}

impl NewSchedule {
    /// What tells the schedules of an organization apart.
    fn identity(&self) -> [u8; 32] {
        digest([&self.r#type, &self.source, self.recurrence.cron(), self.recurrence.timezone()])
    }
}

/// What is to become of a schedule that has the same type, source, cron and time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfThere {
    /// It stays as it is.
    Keep,
    /// It gets the new template and rules.
    Change,
}

/// What [`put_schedule`] found.
#[derive(Debug, Clone)]
pub enum PutSchedule {
    /// It is new.
    Created(Box<Schedule>),
    /// It was there, and is now as given here.
    There(Box<Schedule>),
    /// It was there, and is another connection's.
    Foreign,
    /// There is no tick between its start and its end that is not over.
    NoTick,
    /// The organization has so many already.
    TooMany,
}

/// Creates a schedule, or finds the one that is there. Of two that create the same at once, one finds the other's.
///
/// A new one begins with the first tick that is not over, by the database's clock. One that is changed keeps the ticks
/// that are due already, and takes the others from the new rules.
pub async fn put_schedule(
    pool: &PgPool,
    new: &NewSchedule,
    if_there: IfThere,
    most: u32,
    by: &By,
) -> Result<PutSchedule, StoreError> {
    const OPERATION: &str = "store a schedule";
    let foreign = |there: &Schedule| new.publisher.is_some_and(|own| there.publisher != Some(own));
    if if_there == IfThere::Keep
        && let Some(there) = find(pool, new).await?
    {
        // The usual case, when every process publishes what it needs at its start: nothing is locked.
        let foreign = foreign(&there);
        return Ok(if foreign { PutSchedule::Foreign } else { PutSchedule::There(Box::new(there)) });
    }
    let mut transaction = pool.begin().await.during(OPERATION)?;
    // One at a time, so that the count is exact and the one that is there is found.
    lock_organization(&mut transaction, new.organization).await?;
    let now = transaction_time(&mut transaction).await?;
    let identity = new.identity();
    let there: Option<ScheduleRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM schedules WHERE organization_id = $1 AND identity = $2 AND state IN ('active', 'paused') FOR UPDATE"
    ))
    .bind(new.organization.0)
    .bind(&identity[..])
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    let put = match there.map(Schedule::try_from).transpose()? {
        Some(there) if foreign(&there) => PutSchedule::Foreign,
        Some(there) if if_there == IfThere::Keep => PutSchedule::There(Box::new(there)),
        Some(there) => match change(&mut transaction, new, &there, now).await? {
            Some(changed) => {
                if let Some((before, after)) = shown::changed_schedule(&there, &changed) {
                    let change = Change::new(Action::ScheduleChanged, TargetKind::Schedule, there.id);
                    let change = change.before(before).after(after);
                    audit::record(&mut transaction, by, Some(new.organization), change).await?;
                }
                PutSchedule::There(Box::new(changed))
            }
            None => PutSchedule::NoTick,
        },
        None => match new.rules.first_tick(&new.recurrence, now) {
            None => PutSchedule::NoTick,
            Some(_) if count(&mut transaction, new.organization).await? >= i64::from(most) => {
                PutSchedule::TooMany
            }
            Some(first) => {
                let created = insert(&mut transaction, new, &identity, first).await?;
                let change = Change::new(Action::ScheduleCreated, TargetKind::Schedule, created.id);
                let change = change.after(shown::schedule(&created));
                audit::record(&mut transaction, by, Some(new.organization), change).await?;
                PutSchedule::Created(Box::new(created))
            }
        },
    };
    transaction.commit().await.during("commit a schedule")?;
    Ok(put)
}

/// The one that is there, if any is.
async fn find(pool: &PgPool, new: &NewSchedule) -> Result<Option<Schedule>, StoreError> {
    let row: Option<ScheduleRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM schedules WHERE organization_id = $1 AND identity = $2 AND state IN ('active', 'paused')"
    ))
    .bind(new.organization.0)
    .bind(&new.identity()[..])
    .fetch_optional(pool)
    .await
    .during("find a schedule")?;
    row.map(Schedule::try_from).transpose()
}

/// How many schedules of an organization are not over.
async fn count(transaction: &mut PgConnection, organization: OrganizationId) -> Result<i64, StoreError> {
    sqlx::query_scalar(
        "SELECT count(*) FROM schedules WHERE organization_id = $1 AND state IN ('active', 'paused')",
    )
    .bind(organization.0)
    .fetch_one(transaction)
    .await
    .during("count schedules")
}

async fn insert(
    transaction: &mut PgConnection,
    new: &NewSchedule,
    identity: &[u8],
    first: Timestamp,
) -> Result<Schedule, StoreError> {
    let row: ScheduleRow = sqlx::query_as(concat!(
        "INSERT INTO schedules (id, organization_id, publisher, type, source, cron, timezone, identity, template,
                                starts_at, ends_at, jitter_ms, missed, catch_up_limit, overlap, state, tz_version,
                                next_tick, due_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, 'active', $16, $17, $18)
         RETURNING ",
        columns!()
    ))
    .bind(new.id.0)
    .bind(new.organization.0)
    .bind(new.publisher.map(|id| id.0))
    .bind(&new.r#type)
    .bind(&new.source)
    .bind(new.recurrence.cron())
    .bind(new.recurrence.timezone())
    .bind(identity)
    .bind(&new.template[..])
    .bind(new.rules.starts_at.map(jiff_sqlx::Timestamp::from))
    .bind(new.rules.ends_at.map(jiff_sqlx::Timestamp::from))
    .bind(i32::try_from(new.rules.jitter_ms).unwrap_or(i32::MAX))
    .bind(new.rules.missed.as_str())
    .bind(i32::try_from(new.rules.catch_up_limit).unwrap_or(i32::MAX))
    .bind(new.rules.overlap.as_str())
    .bind(tz_version())
    .bind(jiff_sqlx::Timestamp::from(first))
    .bind(jiff_sqlx::Timestamp::from(new.rules.due(new.id, first)))
    .fetch_one(transaction)
    .await
    .during("create a schedule")?;
    row.try_into()
}

/// Gives a schedule new rules and a new template; `None` if it would have no tick then.
async fn change(
    transaction: &mut PgConnection,
    new: &NewSchedule,
    there: &Schedule,
    now: Timestamp,
) -> Result<Option<Schedule>, StoreError> {
    // What is due already is still to be accounted for; the rest follows the new rules.
    let due = there.position.map(|position| position.next_tick).filter(|tick| *tick <= now);
    let Some(next) = due.or_else(|| new.rules.first_tick(&new.recurrence, now)) else { return Ok(None) };
    let row: ScheduleRow = sqlx::query_as(concat!(
        "UPDATE schedules
         SET template = $2, starts_at = $3, ends_at = $4, jitter_ms = $5, missed = $6, catch_up_limit = $7, overlap = $8,
             tz_version = $9, next_tick = $10, due_at = $11, publisher = $12, catch_up_until = NULL, updated_at = now()
         WHERE id = $1
         RETURNING ",
        columns!()
    ))
    .bind(there.id.0)
    .bind(&new.template[..])
    .bind(new.rules.starts_at.map(jiff_sqlx::Timestamp::from))
    .bind(new.rules.ends_at.map(jiff_sqlx::Timestamp::from))
    .bind(i32::try_from(new.rules.jitter_ms).unwrap_or(i32::MAX))
    .bind(new.rules.missed.as_str())
    .bind(i32::try_from(new.rules.catch_up_limit).unwrap_or(i32::MAX))
    .bind(new.rules.overlap.as_str())
    .bind(tz_version())
    .bind(jiff_sqlx::Timestamp::from(next))
    .bind(jiff_sqlx::Timestamp::from(new.rules.due(there.id, next)))
    // Whoever says what is published is who publishes it.
    .bind(new.publisher.map(|id| id.0))
    .fetch_one(transaction)
    .await
    .during("change a schedule")?;
    row.try_into().map(Some)
}

/// The schedule of that id. Nobody pauses, resumes, changes or cancels it before the transaction ends.
pub async fn hold_schedule(
    transaction: &mut PgConnection,
    whose: Publisher,
    id: ScheduleId,
) -> Result<Option<Schedule>, StoreError> {
    let row: Option<ScheduleRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM schedules WHERE id = $3 AND organization_id = $1 AND ($2::uuid IS NULL OR publisher = $2) FOR SHARE"
    ))
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .fetch_optional(transaction)
    .await
    .during("hold a schedule")?;
    row.map(Schedule::try_from).transpose()
}

/// What somebody wants of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Skip its ticks until it is resumed.
    Pause,
    /// Fire its ticks again.
    Resume,
    /// End it for good.
    Cancel,
}

/// What [`turn_schedule`] found.
#[derive(Debug, Clone)]
pub enum Turned {
    /// It is as wanted now.
    Done(Box<Schedule>),
    /// It is over, and cannot be paused or resumed.
    Over(Box<Schedule>),
    /// There is none.
    None,
}

/// Pauses, resumes or cancels a schedule. A visit that is under way ends first; after this call no tick is decided
/// otherwise. Doing it twice changes nothing.
///
/// Ticks that are due at a pause or a cancellation are skipped for that reason, if no scheduler came to them before. So
/// are those of a pause, whether or not one came to them. What was triggered by hand and waits is cancelled with its
/// schedule.
pub async fn turn_schedule(
    pool: &PgPool,
    whose: Publisher,
    id: ScheduleId,
    turn: Turn,
    by: &By,
) -> Result<Turned, StoreError> {
    const OPERATION: &str = "turn a schedule";
    let (action, state, from): (_, _, &[&str]) = match turn {
        Turn::Pause => (Action::SchedulePaused, ScheduleState::Paused, &["active"]),
        Turn::Resume => (Action::ScheduleResumed, ScheduleState::Active, &["paused"]),
        Turn::Cancel => (Action::ScheduleCancelled, ScheduleState::Cancelled, &["active", "paused"]),
    };
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let before: Option<String> = sqlx::query_scalar(
        "SELECT state FROM schedules
         WHERE id = $3 AND organization_id = $1 AND ($2::uuid IS NULL OR publisher = $2) FOR UPDATE",
    )
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    let turned = sqlx::query(
        "UPDATE schedules
         SET state = $4, updated_at = now(),
             resumed_at = CASE WHEN $4 = 'active' THEN now() ELSE resumed_at END,
             next_tick = CASE WHEN $4 <> 'cancelled' OR next_tick <= now() THEN next_tick END,
             due_at = CASE WHEN $4 <> 'cancelled' OR next_tick <= now() THEN due_at END
         WHERE id = $3 AND organization_id = $1 AND ($2::uuid IS NULL OR publisher = $2) AND state = ANY($5)",
    )
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .bind(state.as_str())
    .bind(from)
    .execute(&mut *transaction)
    .await
    .during(OPERATION)?;
    let turned = turned.rows_affected() > 0;
    if turned && turn == Turn::Cancel {
        // A statement of its own: it sees what was triggered while the one before waited for the row.
        sqlx::query(
            "UPDATE scheduled_events SET cancelled_at = now() WHERE schedule_id = $1 AND cancelled_at IS NULL",
        )
        .bind(id.0)
        .execute(&mut *transaction)
        .await
        .during(OPERATION)?;
    }
    if turned {
        let change = Change::new(action, TargetKind::Schedule, id);
        let change = change.before(json!({ "state": before })).after(json!({ "state": state.as_str() }));
        audit::record(&mut transaction, by, Some(whose.organization), change).await?;
    }
    transaction.commit().await.during(OPERATION)?;
    let Some(schedule) = super::schedule(pool, whose, id).await? else { return Ok(Turned::None) };
    let schedule = Box::new(schedule);
    let over = matches!(schedule.state, ScheduleState::Ended | ScheduleState::Cancelled);
    Ok(if over && turn != Turn::Cancel { Turned::Over(schedule) } else { Turned::Done(schedule) })
}

/// Cancels what a connection publishes that is to be deleted, in the same transaction: nobody can speak for it any more.
/// Ticks that are due by now are noted as cancelled. Says how many schedules they were.
pub(in crate::pg) async fn cancel_schedules_of(
    transaction: &mut PgConnection,
    organization: OrganizationId,
    publisher: ConnectionId,
) -> Result<u64, StoreError> {
    let cancelled = sqlx::query(
        "UPDATE schedules
            SET state = 'cancelled', updated_at = now(),
                next_tick = CASE WHEN next_tick <= now() THEN next_tick END,
                due_at = CASE WHEN next_tick <= now() THEN due_at END
          WHERE organization_id = $1 AND publisher = $2 AND state IN ('active', 'paused')",
    )
    .bind(organization.0)
    .bind(publisher.0)
    .execute(transaction)
    .await
    .during("cancel the schedules of a connection")?;
    Ok(cancelled.rows_affected())
}
