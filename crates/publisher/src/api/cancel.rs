//! Cancellations: a publisher takes an event back, or a schedule.
//!
//! What is not published yet is cancelled by a row alone: see [`cancel_unpublished`]. About what is published,
//! what is promised is that no delivery starts once the request is answered. A row alone does not do that, since a
//! worker makes a first attempt from memory: it must have heard of it. So the cancellation is announced, which
//! succeeds or fails for certain, and answered when no worker acts any more on what it knew before; see
//! [`bus_core::notify::Current`].

use axum::{Json as Answer, extract::State};
use bus_core::{
    audit::By,
    ids::{DeliveryId, EventUid, ScheduleId},
    notify::{Hint, SETTLED},
    pg::{self, Closed},
    telemetry::Chain,
};
use serde::Serialize;
use tracing::warn;
use utoipa::ToSchema;

use super::{
    Api,
    auth::{Authorized, Principal, Recorded, TakeBack},
    extract::{Id, Query},
    history::{SourceQuery, find},
    openapi::CancelProblems,
    problem::Problem,
    schedules::{Unpublished, cancel_unpublished},
};

/// What was cancelled
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CancelResult {
    /// The event, if it was one; of one that was due later nothing is published.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    event: Option<EventUid>,
    /// The schedule, if it was one; no further tick of it is fired.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    schedule: Option<ScheduleId>,
    /// The deliveries that are cancelled now, by this request or an earlier one; one that was just delivered may be
    /// among them. Those that were given up or acknowledged are not.
    #[schema(value_type = Vec<Uuid>)]
    cancelled: Vec<DeliveryId>,
}

/// Cancel an event or a schedule
///
/// An event that is due later is never published then, and of a schedule no further tick is fired. No delivery of a
/// published event starts once this is answered, to any connection of the organization; the answer takes
/// half a second. An attempt that has begun by then may still arrive, and is not retried. It is for good: a replay
/// does not bring a cancelled delivery back. A key that is bound to a connection
/// may cancel what it has published. Repeating it gives the same answer, and after 503 `unconfirmed` it makes sure.
#[utoipa::path(
    post,
    path = "/v1/events/{id}/cancel",
    tag = "events",
    operation_id = "cancelEvent",
    params(("id" = String, Path, description = "The event's `uid` or CloudEvents `id`, or a schedule's `id`"), SourceQuery),
    responses((status = 200, description = "It is cancelled", body = CancelResult), CancelProblems),
    security(("apiKey" = ["publish"]))
)]
pub(super) async fn cancel(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<TakeBack>>,
    Id(id): Id<String>,
    Query(query): Query<SourceQuery>,
) -> Result<Answer<CancelResult>, Problem> {
    let source = query.source.as_deref();
    let (event, schedule) = match cancel_unpublished(&api, &principal, &id, source, &by).await? {
        Some(Unpublished::Schedule(schedule)) => (None, Some(schedule)),
        Some(Unpublished::Event(event)) => (Some(event), None),
        None => {
            let event = find(&api, principal.organization, &id, source).await?;
            let cancelled = cancel_deliveries(&api, &principal, event, &by).await?;
            make_known(&api, &cancelled).await?;
            return Ok(Answer(CancelResult { event: Some(event), schedule: None, cancelled }));
        }
    };
    Ok(Answer(CancelResult { event, schedule, cancelled: Vec::new() }))
}

/// Records that the open deliveries of an event are cancelled.
async fn cancel_deliveries(
    api: &Api,
    principal: &Principal,
    event: EventUid,
    by: &By,
) -> Result<Vec<DeliveryId>, Problem> {
    let organization = principal.organization;
    if let Some(own) = principal.restricted_to() {
        let stored = pg::event(&api.pool, organization, event).await?;
        if stored.and_then(|stored| stored.publisher) != Some(own) {
            return Err(Problem::not_found());
        }
    }
    let cancelled = pg::close_deliveries(&api.pool, organization, event, None, Closed::Cancelled, by).await?;
    cancelled.ok_or_else(Problem::not_found)
}

/// Returns when no worker begins an attempt of these any more.
async fn make_known(api: &Api, cancelled: &[DeliveryId]) -> Result<(), Problem> {
    if cancelled.is_empty() {
        return Ok(());
    }
    if let Err(failed) = api.queue.withdraw(cancelled).await {
        warn!(error = %Chain(&failed), deliveries = cancelled.len(), "Cancelled deliveries stay in the queue");
    }
    let hints: Vec<Hint> = cancelled.iter().map(|delivery| Hint::Cancelled(*delivery)).collect();
    if let Err(failed) = api.hints.announce(&hints).await {
        warn!(error = %Chain(&failed), deliveries = cancelled.len(), "A cancellation could not be announced");
        // It is sent as soon as that can be done, whether or not the request is repeated.
        for hint in hints {
            api.hints.notify(hint).await;
        }
        let detail = "the cancellation is recorded, but not every worker could be told; a delivery may still start \
                      until the request is repeated and answered 200";
        return Err(Problem::unconfirmed(detail));
    }
    tokio::time::sleep(SETTLED).await;
    Ok(())
}
