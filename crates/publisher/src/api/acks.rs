//! Acknowledgements: a subscriber says that it has an event, however it came by it.

use axum::{Json as Answer, extract::State};
use bus_core::{
    ids::{ConnectionId, DeliveryId},
    notify::Hint,
    pg::{self, Closed},
    telemetry::Chain,
};
use serde::{Deserialize, Serialize};
use tracing::warn;
use utoipa::ToSchema;

use super::{
    Api,
    auth::{Authorized, Manage, Principal, Recorded},
    extract::{Id, OptionalJson, Query},
    history::{SourceQuery, find},
    openapi::AckProblems,
    problem::Problem,
};

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = Ack)]
pub(super) struct AckBody {
    /// The connection that has the event; that of the key if absent.
    #[schema(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
}

/// What was acknowledged
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct AckResult {
    /// The deliveries that are acknowledged now, by this request or an earlier one; one that was just delivered may
    /// be among them. Those that were given up or cancelled are not.
    #[schema(value_type = Vec<Uuid>)]
    acked: Vec<DeliveryId>,
}

/// Acknowledge an event
///
/// Every open delivery of the event to the connection counts as delivered, whether it waits, is in the queue or
/// is under way. An attempt that has begun may still arrive; its result changes nothing any more. Deliveries to
/// other connections are not touched. 404 if the event was not for this connection. Repeating it gives the same
/// answer.
#[utoipa::path(
    post,
    path = "/v1/events/{id}/ack",
    tag = "events",
    operation_id = "ackEvent",
    params(("id" = String, Path, description = "The event's `uid` or CloudEvents `id`"), SourceQuery),
    request_body = Option<AckBody>,
    responses((status = 200, description = "It is acknowledged", body = AckResult), AckProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn ack(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<String>,
    Query(query): Query<SourceQuery>,
    OptionalJson(body): OptionalJson<AckBody>,
) -> Result<Answer<AckResult>, Problem> {
    let organization = principal.organization;
    let event = find(&api, organization, &id, query.source.as_deref()).await?;
    let connection = acting_for(&api, &principal, body.connection_id).await?;
    // What is acknowledged is in history, and leaves no audit record.
    let acked = pg::close_deliveries(&api.pool, organization, event, Some(connection), Closed::Acked, &by)
        .await?
        .ok_or_else(Problem::not_found)?;
    if acked.is_empty() {
        let deliveries = pg::event_deliveries(&api.pool, organization, event).await?.unwrap_or_default();
        if deliveries.iter().all(|delivery| delivery.connection != connection) {
            return Err(Problem::not_found());
        }
    }
    tell(&api, &acked).await;
    Ok(Answer(AckResult { acked }))
}

/// The connection for which this principal speaks. What it may not see does not exist for it.
async fn acting_for(
    api: &Api,
    principal: &Principal,
    named: Option<ConnectionId>,
) -> Result<ConnectionId, Problem> {
    let Some(connection) = named.or(principal.connection) else {
        let detail = "name the connection: the key is not bound to one";
        return Err(Problem::invalid_at("/connectionId", detail));
    };
    if !principal.sees(connection)
        || pg::connection(&api.pool, principal.organization, connection).await?.is_none()
    {
        return Err(Problem::invalid_at("/connectionId", "there is no such connection"));
    }
    Ok(connection)
}

/// Spares the workers attempts that would be in vain. Nothing depends on it: whoever holds one of them sees in
/// the database that it is closed.
async fn tell(api: &Api, closed: &[DeliveryId]) {
    if let Err(failed) = api.queue.withdraw(closed).await {
        warn!(error = %Chain(&failed), deliveries = closed.len(), "Closed deliveries stay in the queue");
    }
    for delivery in closed {
        api.hints.notify(Hint::Closed(*delivery)).await;
    }
}
