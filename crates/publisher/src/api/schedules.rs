//! Schedules: events that recur.

mod put;
mod trigger;
mod view;

use axum::{Json as Answer, extract::State};
use bus_core::{
    audit::{By, TargetKind},
    ids::{EventUid, ScheduleId},
    notify::Hint,
    pg::{self, CancelScheduled, Occurrence, OccurrenceQuery, Schedule, Turn, Turned},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use self::view::StateName;
pub(super) use self::{
    put::{__path_put, put, store_schedule},
    trigger::{__path_trigger, trigger},
    view::{MissedName, OverlapName, ScheduleView},
};
use super::{
    Api, audit,
    auth::{Authorized, History, Principal, PublishLater, Recorded},
    extract::{Id, Query},
    history::{find, has_nul},
    openapi::{ListProblems, OneProblems, OngoingProblems, SublistProblems},
    page::{self, Cursor, Limit, Page},
    problem::{Problem, ProblemType},
};

/// Which schedules to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only those in this state.
    #[param(value_type = Option<StateName>, inline)]
    state: Option<StateName>,
    /// Only those of exactly this type.
    r#type: Option<String>,
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// List the schedules, oldest first
///
/// Without the event that each publishes. Those that are over are kept for four days.
#[utoipa::path(
    get,
    path = "/v1/schedules",
    tag = "schedules",
    operation_id = "listSchedules",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<ScheduleView>), ListProblems),
    security(("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<History>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<ScheduleView>>, Problem> {
    if query.r#type.as_deref().is_some_and(has_nul) {
        return Ok(Answer(Page { items: Vec::new(), next_cursor: None }));
    }
    let (state, part) = (query.state.map(Into::into), page::request(query.limit, query.cursor));
    let schedules =
        pg::schedules(&api.pool, principal.publisher(), state, query.r#type.as_deref(), part).await?;
    // Their next occurrences are computed; the other tasks of this thread need not wait for that.
    Ok(Answer(tokio::task::block_in_place(|| Page::of(schedules, ScheduleView::from))))
}

/// Read a schedule
#[utoipa::path(
    get,
    path = "/v1/schedules/{id}",
    tag = "schedules",
    operation_id = "getSchedule",
    params(("id" = Uuid, Path, description = "The schedule")),
    responses((status = 200, description = "The schedule", body = ScheduleView), OneProblems),
    security(("apiKey" = ["read"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<History>>,
    Id(id): Id<ScheduleId>,
) -> Result<Answer<ScheduleView>, Problem> {
    let schedule =
        pg::schedule(&api.pool, principal.publisher(), id).await?.ok_or_else(Problem::not_found)?;
    show(&api, schedule, &by).await.map(Answer)
}

/// A schedule with its event, for somebody who may not have known that.
async fn show(api: &Api, schedule: Schedule, by: &By) -> Result<ScheduleView, Problem> {
    let (organization, id) = (schedule.organization, schedule.id);
    let view = ScheduleView::with_event(schedule)?;
    audit::one_read(api, by, organization, TargetKind::Schedule, id).await?;
    Ok(view)
}

/// What became of an occurrence: `fired`, published; `skipped`, then `reason` says why
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = OccurrenceState)]
enum Became {
    Fired,
    Skipped,
}

/// An occurrence of a schedule, or a run of them within one UTC day that were skipped for one reason
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Occurrence)]
pub(super) struct OccurrenceView {
    state: Became,
    /// Why it was skipped: `missed`, `paused`, `cancelled`, `changed` or `overlap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// When it was to be; the first one of a run.
    #[schema(value_type = String, format = DateTime)]
    tick: Timestamp,
    /// When the last one of a run was to be.
    #[schema(value_type = String, format = DateTime)]
    last_tick: Timestamp,
    /// How many they are.
    ticks: u64,
    /// When it was published or skipped.
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// How much later than `tick` it was published, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    lateness_ms: Option<i64>,
    /// The event that was published.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    event_uid: Option<EventUid>,
    /// It was triggered by hand.
    manual: bool,
}

impl From<Occurrence> for OccurrenceView {
    fn from(occurrence: Occurrence) -> Self {
        let fired = occurrence.skipped.is_none();
        let lateness = occurrence.at.as_millisecond() - occurrence.tick.as_millisecond();
        Self {
            state: if fired { Became::Fired } else { Became::Skipped },
            reason: occurrence.skipped.map(bus_core::schedule::SkipReason::as_str),
            tick: occurrence.tick,
            last_tick: occurrence.last_tick,
            ticks: occurrence.ticks,
            at: occurrence.at,
            lateness_ms: fired.then_some(lateness),
            event_uid: fired.then_some(occurrence.uid),
            manual: occurrence.manual,
        }
    }
}

/// Which occurrences to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OccurrencesQuery {
    /// Only those of which this became.
    #[param(value_type = Option<Became>, inline)]
    state: Option<Became>,
    /// Only those whose `tick` is at this time or later (RFC 3339, whole milliseconds).
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Only those whose `tick` is before this time (RFC 3339, whole milliseconds).
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// List the occurrences of a schedule, latest first
///
/// Every one that was due is here: published, or skipped with a reason.
#[utoipa::path(
    get,
    path = "/v1/schedules/{id}/occurrences",
    tag = "schedules",
    operation_id = "listOccurrences",
    params(("id" = Uuid, Path, description = "The schedule"), OccurrencesQuery),
    responses((status = 200, description = "A part of the list", body = Page<OccurrenceView>), SublistProblems),
    security(("apiKey" = ["read"]))
)]
pub(super) async fn occurrences(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<History>,
    Id(id): Id<ScheduleId>,
    Query(query): Query<OccurrencesQuery>,
) -> Result<Answer<Page<OccurrenceView>>, Problem> {
    // A bound key may not see every schedule of its organization.
    pg::schedule(&api.pool, principal.publisher(), id).await?.ok_or_else(Problem::not_found)?;
    let part = page::request(query.limit, query.cursor);
    let wanted = OccurrenceQuery {
        fired: query.state.map(|state| state == Became::Fired),
        since: query.since,
        until: query.until,
    };
    let occurrences = pg::occurrences(&api.pool, principal.organization, id, wanted, part).await?;
    Ok(Answer(Page::of(occurrences, OccurrenceView::from)))
}

/// Pause a schedule
///
/// Once this is answered its occurrences are skipped, with the reason `paused`, until it is resumed. One that is paused
/// stays so.
#[utoipa::path(
    post,
    path = "/v1/schedules/{id}/pause",
    tag = "schedules",
    operation_id = "pauseSchedule",
    params(("id" = Uuid, Path, description = "The schedule")),
    responses((status = 200, description = "As it is now", body = ScheduleView), OngoingProblems),
    security(("apiKey" = ["publish"]))
)]
pub(super) async fn pause(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<PublishLater>>,
    Id(id): Id<ScheduleId>,
) -> Result<Answer<ScheduleView>, Problem> {
    turn(&api, &principal, id, Turn::Pause, &by).await
}

/// Resume a schedule
///
/// Its occurrences are published again, from the next one on. One that is active stays so.
#[utoipa::path(
    post,
    path = "/v1/schedules/{id}/resume",
    tag = "schedules",
    operation_id = "resumeSchedule",
    params(("id" = Uuid, Path, description = "The schedule")),
    responses((status = 200, description = "As it is now", body = ScheduleView), OngoingProblems),
    security(("apiKey" = ["publish"]))
)]
pub(super) async fn resume(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<PublishLater>>,
    Id(id): Id<ScheduleId>,
) -> Result<Answer<ScheduleView>, Problem> {
    turn(&api, &principal, id, Turn::Resume, &by).await
}

/// Cancel a schedule
///
/// Once this is answered it publishes nothing any more, for good; what it published before is delivered. The same
/// schedule can be created anew. One that is over stays as it is.
#[utoipa::path(
    post,
    path = "/v1/schedules/{id}/cancel",
    tag = "schedules",
    operation_id = "cancelSchedule",
    params(("id" = Uuid, Path, description = "The schedule")),
    responses((status = 200, description = "As it is now", body = ScheduleView), OneProblems),
    security(("apiKey" = ["publish"]))
)]
pub(super) async fn cancel(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<PublishLater>>,
    Id(id): Id<ScheduleId>,
) -> Result<Answer<ScheduleView>, Problem> {
    turn(&api, &principal, id, Turn::Cancel, &by).await
}

async fn turn(
    api: &Api,
    principal: &Principal,
    id: ScheduleId,
    turn: Turn,
    by: &By,
) -> Result<Answer<ScheduleView>, Problem> {
    match pg::turn_schedule(&api.pool, principal.publisher(), id, turn, by).await? {
        Turned::Done(schedule) => {
            tell(api, &schedule).await;
            show(api, *schedule, by).await.map(Answer)
        }
        Turned::Over(schedule) => Err(over(&schedule)),
        Turned::None => Err(Problem::not_found()),
    }
}

fn over(schedule: &Schedule) -> Problem {
    let detail =
        format!("the schedule is over, it is {}; publish it anew with `cron`", schedule.state.as_str());
    Problem::new(ProblemType::ScheduleOver, detail)
}

/// Has the schedulers look when the next occurrence is due. They do that by themselves, too, but only now and then.
async fn tell(api: &Api, schedule: &Schedule) {
    if schedule.due_at.is_some() {
        api.hints.notify(Hint::Due).await;
    }
}

/// What [`cancel_unpublished`] has cancelled.
#[derive(Debug)]
pub(super) enum Unpublished {
    /// A schedule. It may have been over before.
    Schedule(ScheduleId),
    /// An event that was due later.
    Event(EventUid),
}

/// Cancels what `id` names, if that is a schedule or an event that is due later; once this has returned, nothing of it is
/// published any more. None if it is neither, or was published in the meantime. What the principal may not change does
/// not exist for it.
pub(super) async fn cancel_unpublished(
    api: &Api,
    principal: &Principal,
    id: &str,
    source: Option<&str>,
    by: &By,
) -> Result<Option<Unpublished>, Problem> {
    if source.is_none()
        && let Ok(schedule) = id.parse()
        && let Turned::Done(_) =
            pg::turn_schedule(&api.pool, principal.publisher(), schedule, Turn::Cancel, by).await?
    {
        return Ok(Some(Unpublished::Schedule(schedule)));
    }
    let organization = principal.organization;
    let event = find(api, organization, id, source).await?;
    let Some(waiting) = pg::scheduled_event(&api.pool, organization, event).await? else { return Ok(None) };
    if principal.restricted_to().is_some_and(|own| waiting.event.publisher != Some(own)) {
        return Err(Problem::not_found());
    }
    Ok(match pg::cancel_scheduled(&api.pool, organization, event, by).await? {
        CancelScheduled::Cancelled => Some(Unpublished::Event(event)),
        CancelScheduled::NotThere => None,
    })
}
