//! Creating and changing schedules: an event with `cron`.

use std::time::Duration;

use axum::{
    Json as Answer,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use bus_core::{
    audit::By,
    cloudevent::{CloudEvent, Draft, ScheduleDraft, Submission},
    ids::{EventUid, ScheduleId},
    pg::{self, IfThere, NewSchedule, PutSchedule},
    schedule::{Recurrence, RecurrenceError, SCHEDULE_ID, SCHEDULED_TIME, occurrence},
};
use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;

use super::{show, tell, view::ScheduleView};
use crate::api::{
    Api,
    auth::{Authorized, Principal, PublishLater, Recorded},
    created,
    events::{
        PlainEvent, default_source,
        idempotency::{read_key, unwanted_key},
        submission,
    },
    extract::read_body,
    openapi::PutScheduleProblems,
    problem::{Problem, ProblemType},
};

/// Stands in a template where each occurrence has an id of its own.
const TEMPLATE_ID: &str = "occurrence";

/// Create or change a schedule
///
/// The body is that of `POST /v1/events` for an event with `cron`. If there is a schedule with the same `type`,
/// `source`, `cron` and `timezone` that is not over, it gets this payload, these other attributes and these rules, and
/// stays paused if it is. From then on it publishes as the connection of this key. Occurrences whose time has come by then are still published or skipped, as the new rules say.
#[utoipa::path(
    put,
    path = "/v1/events",
    tag = "schedules",
    operation_id = "putSchedule",
    request_body = PlainEvent,
    responses(
        (status = 201, description = "The new schedule", body = ScheduleView),
        (status = 200, description = "The schedule as it is now", body = ScheduleView),
        PutScheduleProblems
    ),
    security(("apiKey" = ["publish"]))
)]
pub(in crate::api) async fn put(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<PublishLater>>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let body = read_body(&api.room, &parts.headers, body, api.max_body_bytes).await?;
    if read_key(&parts.headers)?.is_some() {
        return Err(unwanted_key());
    }
    match submission(&api, &parts.headers, &body.bytes, api.clock.now())? {
        Submission::Single(draft) => store_schedule(&api, &principal, draft, IfThere::Change, &by).await,
        Submission::Batch(_) => Err(Problem::invalid_at("", "send one event with `cron`, not a batch")),
    }
}

/// Creates the schedule that an event with `cron` asks for, or finds the one that is there, and answers with it.
pub(in crate::api) async fn store_schedule(
    api: &Api,
    principal: &Principal,
    mut draft: Draft,
    if_there: IfThere,
    by: &By,
) -> Result<Response, Problem> {
    let Some(schedule) = draft.schedule.take() else {
        let detail = "only an event that recurs can be put: give `cron`, or publish it once with POST";
        return Err(Problem::invalid_at("/cron", detail));
    };
    let ScheduleDraft { cron, timezone, rules } = *schedule;
    // The ticks that are compared may be centuries apart; the other tasks of this thread need not wait for them.
    let recurrence = tokio::task::block_in_place(|| {
        let recurrence = Recurrence::parse(&cron, &timezone).map_err(refused)?;
        check_interval(api, &recurrence, rules.starts_at)?;
        Ok::<_, Problem>(recurrence)
    })?;
    let new = NewSchedule {
        id: ScheduleId(api.ids.next()),
        organization: principal.organization,
        publisher: principal.connection,
        r#type: draft.r#type.clone(),
        source: draft.source.clone().unwrap_or_else(|| default_source(principal)),
        recurrence,
        rules,
        template: template(api, principal, draft)?,
    };
    let most = api.schedules.max_per_organization;
    match pg::put_schedule(&api.pool, &new, if_there, most, by).await? {
        PutSchedule::Created(schedule) => {
            tell(api, &schedule).await;
            let path = format!("/v1/schedules/{}", schedule.id);
            Ok(created(&path, Answer(ScheduleView::with_event(*schedule)?)))
        }
        PutSchedule::There(schedule) => {
            tell(api, &schedule).await;
            Ok(Answer(show(api, *schedule, by).await?).into_response())
        }
        PutSchedule::Foreign => Err(Problem::new(
            ProblemType::ScheduleTaken,
            "another connection has a schedule with this type, source, cron and timezone; give another source",
        )),
        PutSchedule::NoTick => {
            let pointer = if new.rules.ends_at.is_some() { "/endsAt" } else { "/startsAt" };
            Err(Problem::invalid_at(
                pointer,
                "the schedule would have no occurrence: there is none between now, or `startsAt`, and `endsAt`",
            ))
        }
        PutSchedule::TooMany => Err(Problem::new(
            ProblemType::LimitReached,
            format!("an organization has at most {most} schedules that are not over; cancel one"),
        )),
    }
}

fn refused(error: RecurrenceError) -> Problem {
    let pointer = match error {
        RecurrenceError::UnknownTimezone(_) => "/timezone",
        _ => "/cron",
    };
    Problem::invalid_at(pointer, error.to_string())
}

/// Refuses what recurs too often, which is nearly always a mistake.
fn check_interval(api: &Api, recurrence: &Recurrence, starts_at: Option<Timestamp>) -> Result<(), Problem> {
    let now = api.clock.now();
    let shortest = recurrence.shortest_interval(starts_at.map_or(now, |start| start.max(now)));
    let least = Duration::from_secs(api.schedules.min_interval_s);
    match shortest.filter(|shortest| *shortest < least) {
        None => Ok(()),
        Some(shortest) => {
            let detail = format!(
                "two occurrences would be {} s apart, and at least {} s are asked for; with six fields the first one is \
                 the seconds, so that `* * * * * *` is every second, and `* * * * *` every minute",
                shortest.as_secs(),
                least.as_secs()
            );
            Err(Problem::invalid_at("/cron", detail))
        }
    }
}

/// What every occurrence is made from. Each must still be an event that the bus takes.
fn template(api: &Api, principal: &Principal, draft: Draft) -> Result<Bytes, Problem> {
    let given = [
        ("id", draft.id.is_some()),
        ("time", draft.time.is_some()),
        (SCHEDULE_ID, draft.extensions.contains_key(SCHEDULE_ID)),
        (SCHEDULED_TIME, draft.extensions.contains_key(SCHEDULED_TIME)),
    ];
    if let Some((name, _)) = given.into_iter().find(|(_, given)| *given) {
        let detail = format!("each occurrence has a `{name}` of its own; leave it out");
        return Err(Problem::invalid_at(format!("/{name}"), detail));
    }
    let completed = draft.complete(|| TEMPLATE_ID.into(), || default_source(principal), Timestamp::MAX);
    let (id, uid, time) = (ScheduleId(Uuid::max()), EventUid(Uuid::max()), Timestamp::MAX);
    let largest = occurrence(&completed, id, uid, time, Some(time));
    let (largest, most) = (largest.to_structured(), api.limits.max_event_bytes);
    CloudEvent::from_structured(&largest).map_err(|error| {
        let detail =
            format!("with what each occurrence has besides, `{SCHEDULE_ID}` and `{SCHEDULED_TIME}`: {error}");
        Problem::invalid_at("", detail)
    })?;
    if largest.len() > most {
        let detail = format!(
            "an event has at most {most} bytes in the JSON format, and an occurrence of this one would have {}; send a \
             reference to what is large",
            largest.len()
        );
        return Err(Problem::new(ProblemType::TooLarge, detail));
    }
    Ok(CloudEvent { time: None, ..completed }.to_structured())
}
