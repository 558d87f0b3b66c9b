//! What became of an event.

use axum::{Json as Answer, extract::State};
use bus_core::{
    ids::{ConnectionId, DeliveryId, SubscriptionId},
    pg::{self, AttemptRecord, DeliveryRecord, DeliveryStatus},
};
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Api,
    auth::{Authorized, History},
    extract::{Id, Query},
    history::{SourceQuery, find},
    openapi::EventProblems,
    problem::Problem,
};

/// Where a delivery stands: `pending`, not attempted yet as far as is known; `waiting` for another
/// attempt; `delivered`; `dead`, given up; `acked` by the subscriber through the API; `cancelled`
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = DeliveryStatus)]
enum StatusName {
    Pending,
    Waiting,
    Delivered,
    Dead,
    Acked,
    Cancelled,
}

impl From<DeliveryStatus> for StatusName {
    fn from(status: DeliveryStatus) -> Self {
        match status {
            DeliveryStatus::Pending => Self::Pending,
            DeliveryStatus::Waiting => Self::Waiting,
            DeliveryStatus::Delivered => Self::Delivered,
            DeliveryStatus::Dead => Self::Dead,
            DeliveryStatus::Acked => Self::Acked,
            DeliveryStatus::Cancelled => Self::Cancelled,
        }
    }
}

/// One event for one subscription
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Delivery)]
pub(super) struct DeliveryView {
    /// The `webhook-id` of all its attempts.
    #[schema(value_type = Uuid)]
    id: DeliveryId,
    #[schema(value_type = Uuid)]
    subscription_id: SubscriptionId,
    #[schema(value_type = Uuid)]
    connection_id: ConnectionId,
    status: StatusName,
    /// When it is tried next, if that is more than a few seconds away.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    next_attempt_at: Option<Timestamp>,
    /// Why it waits or was given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    attempts: Vec<AttemptView>,
}

/// One finished attempt
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Attempt)]
struct AttemptView {
    /// The failed attempts before this one, plus one; a deferral counts none.
    attempt: u32,
    /// `delivered`, `failed`, `deferred` or `dead`.
    outcome: String,
    /// The HTTP status, if an answer came.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// When it began.
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// How long it took, milliseconds.
    duration_ms: u32,
}

impl From<DeliveryRecord> for DeliveryView {
    fn from(record: DeliveryRecord) -> Self {
        Self {
            id: record.id,
            subscription_id: record.subscription,
            connection_id: record.connection,
            status: record.status.into(),
            next_attempt_at: record.next_attempt_at,
            reason: record.reason,
            attempts: record.attempts.into_iter().map(AttemptView::from).collect(),
        }
    }
}

impl From<AttemptRecord> for AttemptView {
    fn from(record: AttemptRecord) -> Self {
        Self {
            attempt: record.attempt,
            outcome: record.outcome,
            status: record.status,
            error: record.error,
            at: record.at,
            duration_ms: record.duration_ms,
        }
    }
}

/// The deliveries of an event
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Deliveries)]
pub(super) struct DeliveriesView {
    items: Vec<DeliveryView>,
    history: HistoryView,
}

/// How far history goes
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = History)]
struct HistoryView {
    /// Every attempt that workers had reported by this time is in history; absent as long as nothing is known of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    through: Option<Timestamp>,
    /// How long ago that was, milliseconds: about 1000 when all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    behind_ms: Option<u64>,
}

impl HistoryView {
    async fn now(api: &Api) -> Result<Self, Problem> {
        if !api.history_lags {
            return Ok(Self { through: Some(api.clock.now()), behind_ms: Some(0) });
        }
        let known = pg::history_through(&api.pool).await?;
        let behind_ms = known.map(|(_, behind)| u64::try_from(behind.as_millis()).unwrap_or(u64::MAX));
        Ok(Self { through: known.map(|(through, _)| through), behind_ms })
    }
}

/// List the deliveries of an event
///
/// One for each subscription that matched, all in one part. Attempts appear about a second after they
/// were made; `history` says how far behind it is now. An event that is due later has none.
#[utoipa::path(
    get,
    path = "/v1/events/{id}/deliveries",
    tag = "events",
    operation_id = "listDeliveries",
    params(("id" = String, Path, description = "The event's `uid` or CloudEvents `id`"), SourceQuery),
    responses((status = 200, description = "The deliveries", body = DeliveriesView), EventProblems),
    security(("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<History>,
    Id(id): Id<String>,
    Query(query): Query<SourceQuery>,
) -> Result<Answer<DeliveriesView>, Problem> {
    let uid = find(&api, principal.organization, &id, query.source.as_deref()).await?;
    let organization = principal.organization;
    // Before the attempts are read: those that come meanwhile are more than was promised.
    let history = HistoryView::now(&api).await?;
    let records = match pg::event_deliveries(&api.pool, organization, uid).await? {
        Some(records) => records,
        None if pg::scheduled_event(&api.pool, organization, uid).await?.is_some() => Vec::new(),
        // It was due just now.
        None => pg::event_deliveries(&api.pool, organization, uid).await?.ok_or_else(Problem::not_found)?,
    };
    Ok(Answer(DeliveriesView { items: records.into_iter().map(DeliveryView::from).collect(), history }))
}
