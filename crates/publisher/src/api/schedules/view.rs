//! A schedule as the API shows it.

use std::iter;

use bus_core::{
    ids::{ConnectionId, EventUid, ScheduleId},
    pg::{Schedule, ScheduleState},
    schedule::{Missed, Overlap, Recurrence},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::api::{events::CloudEventBody, history::shown, problem::Problem};

/// How many of the next occurrences are shown.
const NEXT: usize = 5;

/// Where a schedule stands: `active`; `paused`, its occurrences are skipped; `ended`, it has no more; `cancelled`
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ScheduleState)]
pub(super) enum StateName {
    Active,
    Paused,
    Ended,
    Cancelled,
}

impl From<ScheduleState> for StateName {
    fn from(state: ScheduleState) -> Self {
        match state {
            ScheduleState::Active => Self::Active,
            ScheduleState::Paused => Self::Paused,
            ScheduleState::Ended => Self::Ended,
            ScheduleState::Cancelled => Self::Cancelled,
        }
    }
}

impl From<StateName> for ScheduleState {
    fn from(state: StateName) -> Self {
        match state {
            StateName::Active => Self::Active,
            StateName::Paused => Self::Paused,
            StateName::Ended => Self::Ended,
            StateName::Cancelled => Self::Cancelled,
        }
    }
}

/// What becomes of occurrences whose time went by while nothing could publish them: `skip`, none is published;
/// `fire_once`, the latest; `catch_up`, the latest ones, up to `catchUpLimit`
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Missed)]
pub(in crate::api) enum MissedName {
    Skip,
    FireOnce,
    CatchUp,
}

impl From<Missed> for MissedName {
    fn from(missed: Missed) -> Self {
        match missed {
            Missed::Skip => Self::Skip,
            Missed::FireOnce => Self::FireOnce,
            Missed::CatchUp => Self::CatchUp,
        }
    }
}

/// What becomes of an occurrence while the one before still has open deliveries: `allow`, it is published all the same;
/// `skip`, it is not
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Overlap)]
pub(in crate::api) enum OverlapName {
    Allow,
    Skip,
}

impl From<Overlap> for OverlapName {
    fn from(overlap: Overlap) -> Self {
        match overlap {
            Overlap::Allow => Self::Allow,
            Overlap::Skip => Self::Skip,
        }
    }
}

/// An event that recurs
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Schedule)]
pub(in crate::api) struct ScheduleView {
    #[schema(value_type = Uuid)]
    id: ScheduleId,
    state: StateName,
    r#type: String,
    source: String,
    /// In upper case, with one space between the fields; `@daily` and the like as fields.
    cron: String,
    timezone: String,
    /// Which version of the time zone data the next occurrence was computed with.
    tz_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    starts_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    ends_at: Option<Timestamp>,
    jitter_ms: u32,
    missed: MissedName,
    /// Only with `catch_up`.
    #[serde(skip_serializing_if = "Option::is_none")]
    catch_up_limit: Option<u32>,
    overlap: OverlapName,
    /// The next five occurrences without their jitter. Of a schedule that is paused, those that are published if it is
    /// resumed by then; of one that is over, none.
    #[schema(value_type = Vec<String>)]
    next: Vec<Timestamp>,
    /// The occurrence that was published last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    last_event: Option<EventUid>,
    /// The connection that publishes, if the key was bound to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    publisher: Option<ConnectionId>,
    /// What each occurrence is, with an `id` and a `time` of its own and the attributes `scheduleid` and
    /// `scheduledtime`; absent in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<CloudEventBody>)]
    event: Option<Box<RawValue>>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
}

impl ScheduleView {
    /// The schedule with its event, as the store gives one alone.
    pub(super) fn with_event(schedule: Schedule) -> Result<Self, Problem> {
        let event = shown(EventUid(schedule.id.0), &schedule.template)?;
        Ok(Self { event: Some(event), ..Self::from(schedule) })
    }
}

impl From<Schedule> for ScheduleView {
    fn from(schedule: Schedule) -> Self {
        let next = next(&schedule);
        let rules = schedule.rules;
        Self {
            id: schedule.id,
            state: schedule.state.into(),
            r#type: schedule.r#type,
            source: schedule.source,
            cron: schedule.cron,
            timezone: schedule.timezone,
            tz_version: schedule.tz_version,
            starts_at: rules.starts_at,
            ends_at: rules.ends_at,
            jitter_ms: rules.jitter_ms,
            missed: rules.missed.into(),
            catch_up_limit: (rules.missed == Missed::CatchUp).then_some(rules.catch_up_limit),
            overlap: rules.overlap.into(),
            next,
            last_event: schedule.last_event,
            publisher: schedule.publisher,
            event: None,
            created_at: schedule.created_at,
            updated_at: schedule.updated_at,
        }
    }
}

/// The next occurrences, from the first one that is not accounted for.
fn next(schedule: &Schedule) -> Vec<Timestamp> {
    let over = matches!(schedule.state, ScheduleState::Ended | ScheduleState::Cancelled);
    let Some(position) = schedule.position.filter(|_| !over) else { return Vec::new() };
    let first = position.next_tick;
    let ends_at = schedule.rules.ends_at;
    // A zone may be gone with new data.
    let Ok(recurrence) = Recurrence::parse(&schedule.cron, &schedule.timezone) else { return vec![first] };
    iter::once(first)
        .chain(recurrence.ticks_after(first))
        .take_while(|tick| ends_at.is_none_or(|end| *tick <= end))
        .take(NEXT)
        .collect()
}
