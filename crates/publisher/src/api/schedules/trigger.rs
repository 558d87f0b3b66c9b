//! An occurrence by hand.

use axum::{Json as Answer, extract::State, response::Response};
use bus_core::{
    audit::{Action, Change, TargetKind},
    cloudevent::CloudEvent,
    ids::{EventUid, ScheduleId},
    notify::Hint,
    pg::{self, Identity, NewEvent, Schedule, ScheduleState, ScheduledEvent},
    schedule,
    telemetry::Chain,
};
use jiff::Timestamp;
use metrics::counter;
use serde_json::json;
use tracing::error;

use super::over;
use crate::{
    api::{
        Api, accepted,
        auth::{Authorized, PublishLater, Recorded},
        events::AcceptedEvent,
        extract::Id,
        openapi::OngoingProblems,
        problem::Problem,
    },
    ingest::Accepted,
};

/// Trigger a schedule
///
/// Its event is published now, besides the occurrences to come; also if the schedule is paused. `Location` and the
/// answer name the event. It has `scheduleid` and no `scheduledtime`, and the list of occurrences has it as `manual`.
/// Each request publishes one.
#[utoipa::path(
    post,
    path = "/v1/schedules/{id}/trigger",
    tag = "schedules",
    operation_id = "triggerSchedule",
    params(("id" = Uuid, Path, description = "The schedule")),
    responses((status = 202, description = "Committed", body = AcceptedEvent), OngoingProblems),
    security(("apiKey" = ["publish"]))
)]
pub(in crate::api) async fn trigger(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<PublishLater>>,
    Id(id): Id<ScheduleId>,
) -> Result<Response, Problem> {
    let mut transaction = pg::begin(&api.pool).await?;
    let schedule = pg::hold_schedule(&mut transaction, principal.publisher(), id)
        .await?
        .ok_or_else(Problem::not_found)?;
    if matches!(schedule.state, ScheduleState::Ended | ScheduleState::Cancelled) {
        return Err(over(&schedule));
    }
    // Due is the database's time.
    let now = pg::transaction_time(&mut transaction).await?;
    let event = occurrence(&schedule, EventUid::at(now, api.ids.next()), now)?;
    let identity = Identity {
        uid: event.uid,
        id: event.id.clone(),
        source: event.source.clone(),
        r#type: event.r#type.clone(),
        time: now,
    };
    let scheduled = ScheduledEvent { event, due_at: now, schedule: Some(id), cancelled_at: None };
    pg::insert_scheduled(&mut transaction, &[scheduled]).await?;
    let change = Change::new(Action::ScheduleTriggered, TargetKind::Schedule, id);
    let change = change.after(json!({ "eventUid": identity.uid }));
    pg::audit::record(&mut transaction, &by, Some(principal.organization), change).await?;
    pg::commit(transaction).await?;
    counter!("bus_events_scheduled").increment(1);
    api.hints.notify(Hint::Due).await;
    let path = format!("/v1/events/{}", identity.uid);
    Ok(accepted(&path, Answer(AcceptedEvent::from(Accepted { identity, duplicate: false }))))
}

/// The event of a schedule, now.
fn occurrence(of: &Schedule, uid: EventUid, now: Timestamp) -> Result<NewEvent, Problem> {
    let template = CloudEvent::from_structured(&of.template).map_err(|failed| {
        error!(schedule.id = %of.id, error = %Chain(&failed), "A schedule's template cannot be read");
        Problem::internal()
    })?;
    let event = schedule::occurrence(&template, of.id, uid, now, None);
    let body = event.to_structured();
    Ok(NewEvent::of(&event, body, uid, of.organization, of.publisher, now))
}
