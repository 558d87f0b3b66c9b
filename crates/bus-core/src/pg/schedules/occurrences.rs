//! What became of a schedule's ticks.

use jiff::Timestamp;
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    ids::{EventUid, OrganizationId, ScheduleId, uuid_floor},
    pg::{During as _, PageRequest, Paged, StoreError},
    schedule::SkipReason,
};

/// One occurrence, or a run of ticks that were skipped for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occurrence {
    /// Derived from schedule and tick; the event's uid if it was fired.
    pub uid: EventUid,
    /// What became of it: `None` if it was fired, else why not.
    pub skipped: Option<SkipReason>,
    /// It was triggered by hand and stands for no tick.
    pub manual: bool,
    /// The nominal time, of a run the first one's; when it was triggered, if it was.
    pub tick: Timestamp,
    /// The nominal time of a run's last tick.
    pub last_tick: Timestamp,
    /// How many ticks the run has; 1 for one that was fired.
    pub ticks: u64,
    /// When it was fired or skipped, by the database's clock.
    pub at: Timestamp,
}

#[derive(sqlx::FromRow)]
struct OccurrenceRow {
    uid: Uuid,
    state: String,
    reason: Option<String>,
    manual: bool,
    tick: jiff_sqlx::Timestamp,
    last_tick: jiff_sqlx::Timestamp,
    ticks: i64,
    at: jiff_sqlx::Timestamp,
}

impl TryFrom<OccurrenceRow> for Occurrence {
    type Error = StoreError;

    fn try_from(row: OccurrenceRow) -> Result<Self, StoreError> {
        let skipped = match (row.state.as_str(), row.reason.as_deref()) {
            ("fired", None) => None,
            ("skipped", Some(reason)) if let Ok(reason) = reason.parse() => Some(reason),
            (state, reason) => {
                return Err(StoreError::Inconsistent {
                    table: "occurrences",
                    id: row.uid.to_string(),
                    problem: format!("unknown state {state} with reason {reason:?}"),
                });
            }
        };
        Ok(Self {
            uid: EventUid(row.uid),
            skipped,
            manual: row.manual,
            tick: row.tick.to_jiff(),
            last_tick: row.last_tick.to_jiff(),
            ticks: u64::try_from(row.ticks).unwrap_or(0),
            at: row.at.to_jiff(),
        })
    }
}

/// Which occurrences [`occurrences`] gives.
#[derive(Debug, Clone, Copy, Default)]
pub struct OccurrenceQuery {
    /// Only those that were fired, or only those that were skipped.
    pub fired: Option<bool>,
    /// Only those whose (first) tick is at this time or later; fractions of a millisecond are cut off.
    pub since: Option<Timestamp>,
    /// Only those whose (first) tick is before this time; fractions of a millisecond are cut off.
    pub until: Option<Timestamp>,
}

/// The occurrences of a schedule, latest first; `page.after` is the last one of the part before.
pub async fn occurrences(
    pool: &PgPool,
    organization: OrganizationId,
    schedule: ScheduleId,
    query: OccurrenceQuery,
    page: PageRequest,
) -> Result<Paged<Occurrence>, StoreError> {
    let rows: Vec<OccurrenceRow> = sqlx::query_as(
        "SELECT uid, state, reason, manual, tick, last_tick, ticks, at FROM occurrences
         WHERE schedule_id = $1 AND uid < $2 AND uid >= $3 AND organization_id = $6
           AND ($5::text IS NULL OR state = $5)
         ORDER BY schedule_id DESC, uid DESC LIMIT $4",
    )
    .bind(schedule.0)
    .bind(page.after.into_iter().chain(query.until.map(uuid_floor)).min().unwrap_or(Uuid::max()))
    .bind(query.since.map(uuid_floor).unwrap_or_default())
    .bind(page.rows())
    .bind(query.fired.map(|fired| if fired { "fired" } else { "skipped" }))
    .bind(organization.0)
    .fetch_all(pool)
    .await
    .during("list occurrences")?;
    let items = rows.into_iter().map(Occurrence::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &Occurrence| item.uid.0))
}
