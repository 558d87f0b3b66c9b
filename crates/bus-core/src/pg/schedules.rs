//! Schedules: events that recur.
//!
//! The publisher creates and changes them; the scheduler [visits](visits) those that are due. Both lock the row first, so
//! that a change is never mixed with a visit.

mod changes;
mod occurrences;
mod visits;

use bytes::Bytes;
use jiff::Timestamp;
use sqlx::PgPool;
use uuid::Uuid;

pub use self::{changes::*, occurrences::*, visits::*};
use super::{During as _, PageRequest, Paged, StoreError};
use crate::{
    ids::{ConnectionId, EventUid, OrganizationId, ScheduleId},
    schedule::{Position, Rules},
};

/// Where a schedule stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScheduleState {
    /// Its ticks are fired.
    Active,
    /// Its ticks are skipped until it is resumed.
    Paused,
    /// It has no more ticks.
    Ended,
    /// Somebody ended it, for good.
    Cancelled,
}

impl ScheduleState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Active, Self::Paused, Self::Ended, Self::Cancelled];

    /// As it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Ended => "ended",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Its id.
    pub id: ScheduleId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// The connection that publishes, if the key was bound to one.
    pub publisher: Option<ConnectionId>,
    /// The CloudEvents type of its occurrences.
    pub r#type: String,
    /// Their source.
    pub source: String,
    /// When it recurs, normalised; see [`Recurrence`](crate::schedule::Recurrence).
    pub cron: String,
    /// Where: an IANA name.
    pub timezone: String,
    /// What its occurrences are made from: a CloudEvent in the JSON event format. Each has an id and a time of its own.
    /// Empty in a list.
    pub template: Bytes,
    /// What else it says.
    pub rules: Rules,
    /// Where it stands.
    pub state: ScheduleState,
    /// Which time zone data the next tick was computed with.
    pub tz_version: String,
    /// How far it has come; `None` if there are no more ticks.
    pub position: Option<Position>,
    /// When the next tick is due: its own time, and jitter.
    pub due_at: Option<Timestamp>,
    /// When it was resumed last.
    pub resumed_at: Option<Timestamp>,
    /// The latest occurrence that was published.
    pub last_event: Option<EventUid>,
    /// The row of the latest occurrence, if that was skipped.
    pub open_skip: Option<EventUid>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last changed through the API.
    pub updated_at: Timestamp,
}

#[derive(sqlx::FromRow)]
struct ScheduleRow {
    id: Uuid,
    organization_id: Uuid,
    publisher: Option<Uuid>,
    r#type: String,
    source: String,
    cron: String,
    timezone: String,
    template: Vec<u8>,
    starts_at: Option<jiff_sqlx::Timestamp>,
    ends_at: Option<jiff_sqlx::Timestamp>,
    jitter_ms: i32,
    missed: String,
    catch_up_limit: i32,
    overlap: String,
    state: String,
    tz_version: String,
    next_tick: Option<jiff_sqlx::Timestamp>,
    due_at: Option<jiff_sqlx::Timestamp>,
    catch_up_until: Option<jiff_sqlx::Timestamp>,
    resumed_at: Option<jiff_sqlx::Timestamp>,
    last_event: Option<Uuid>,
    open_skip: Option<Uuid>,
    created_at: jiff_sqlx::Timestamp,
    updated_at: jiff_sqlx::Timestamp,
}

macro_rules! columns {
    () => {
        columns!("template")
    };
    ($template:literal) => {
        concat!(
            "id, organization_id, publisher, type, source, cron, timezone, ",
            $template,
            ", starts_at, ends_at, jitter_ms, missed, catch_up_limit, overlap, state, tz_version, next_tick, due_at, \
             catch_up_until, resumed_at, last_event, open_skip, created_at, updated_at"
        )
    };
}
use columns;

impl TryFrom<ScheduleRow> for Schedule {
    type Error = StoreError;

    fn try_from(row: ScheduleRow) -> Result<Self, StoreError> {
        let unknown = |column: &str, text: &str| StoreError::Inconsistent {
            table: "schedules",
            id: row.id.to_string(),
            problem: format!("unknown {column} {text}"),
        };
        let time = |time: Option<jiff_sqlx::Timestamp>| time.map(jiff_sqlx::Timestamp::to_jiff);
        let state = ScheduleState::ALL.into_iter().find(|state| state.as_str() == row.state);
        Ok(Self {
            id: ScheduleId(row.id),
            organization: OrganizationId(row.organization_id),
            publisher: row.publisher.map(ConnectionId),
            rules: Rules {
                starts_at: time(row.starts_at),
                ends_at: time(row.ends_at),
                jitter_ms: u32::try_from(row.jitter_ms).unwrap_or(0),
                missed: row.missed.parse().map_err(|()| unknown("missed", &row.missed))?,
                catch_up_limit: u32::try_from(row.catch_up_limit).unwrap_or(1),
                overlap: row.overlap.parse().map_err(|()| unknown("overlap", &row.overlap))?,
            },
            state: state.ok_or_else(|| unknown("state", &row.state))?,
            position: time(row.next_tick)
                .map(|next_tick| Position { next_tick, catch_up_until: time(row.catch_up_until) }),
            due_at: time(row.due_at),
            r#type: row.r#type,
            source: row.source,
            cron: row.cron,
            timezone: row.timezone,
            template: row.template.into(),
            tz_version: row.tz_version,
            resumed_at: time(row.resumed_at),
            last_event: row.last_event.map(EventUid),
            open_skip: row.open_skip.map(EventUid),
            created_at: row.created_at.to_jiff(),
            updated_at: row.updated_at.to_jiff(),
        })
    }
}

/// Whose schedules a key may see: an organization's, or only those that one of its connections publishes.
#[derive(Debug, Clone, Copy)]
pub struct Publisher {
    /// The organization.
    pub organization: OrganizationId,
    /// The one connection.
    pub only: Option<ConnectionId>,
}

/// The schedule of that id.
pub async fn schedule(
    pool: &PgPool,
    whose: Publisher,
    id: ScheduleId,
) -> Result<Option<Schedule>, StoreError> {
    let row: Option<ScheduleRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM schedules WHERE id = $3 AND organization_id = $1 AND ($2::uuid IS NULL OR publisher = $2)"
    ))
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .fetch_optional(pool)
    .await
    .during("read a schedule")?;
    row.map(Schedule::try_from).transpose()
}

/// The schedules of an organization without their templates, oldest first; only those in one state, or of one type, if
/// asked for.
pub async fn schedules(
    pool: &PgPool,
    whose: Publisher,
    state: Option<ScheduleState>,
    event_type: Option<&str>,
    page: PageRequest,
) -> Result<Paged<Schedule>, StoreError> {
    let rows: Vec<ScheduleRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!("''::bytea AS template"),
        " FROM schedules
          WHERE organization_id = $1 AND id > $3 AND ($2::uuid IS NULL OR publisher = $2)
            AND ($5::text IS NULL OR state = $5) AND ($6::text IS NULL OR type = $6)
          ORDER BY id LIMIT $4"
    ))
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(page.bound())
    .bind(page.rows())
    .bind(state.map(ScheduleState::as_str))
    .bind(event_type)
    .fetch_all(pool)
    .await
    .during("list schedules")?;
    let items = rows.into_iter().map(Schedule::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &Schedule| item.id.0))
}
