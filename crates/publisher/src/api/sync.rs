//! All subscriptions of a connection at once.

use std::collections::HashMap;

use axum::{Json as Answer, extract::State};
use bus_core::{
    ids::{ConnectionId, SubscriptionId},
    notify::Hint,
    pg::{self, SubscriptionRefused, SyncSubscriptions, Wanted},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Api,
    auth::{Authorized, Manage, Recorded},
    extract::{Id, Json},
    openapi::SyncProblems,
    problem::{FieldError, Problem},
    subscriptions::{SubscriptionView, WantedSubscription, refused},
};

/// The most subscriptions of one request.
const MAX_SYNC: usize = 1_000;

/// The most bytes of a request: room for that many of the longest subscriptions that people write.
const MAX_SYNC_BYTES: usize = 4 * 1024 * 1024;

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SubscriptionSet {
    /// What the connection shall receive; no two with the same `eventType`, `publisher` and `filter`.
    #[schema(max_items = 1000)]
    subscriptions: Vec<WantedSubscription>,
}

/// What a sync did, and what the connection has now
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SyncResult {
    /// How many were added.
    created: usize,
    /// How many were enabled or disabled, or got another `retryPolicy` or `batch`.
    updated: usize,
    /// How many were removed.
    deleted: usize,
    /// How many stayed as they were.
    unchanged: usize,
    /// The connection's subscriptions, oldest first.
    items: Vec<SubscriptionView>,
}

/// Replace all subscriptions of a connection
///
/// In one transaction: those that are not named are deleted, new ones are created, and those that are
/// there already keep their ids.
#[utoipa::path(
    put,
    path = "/v1/connections/{id}/subscriptions",
    tag = "subscriptions",
    operation_id = "syncSubscriptions",
    params(("id" = Uuid, Path, description = "The connection")),
    request_body = SubscriptionSet,
    responses((status = 200, description = "As it is now", body = SyncResult), SyncProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn sync(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(connection): Id<ConnectionId>,
    Json(set): Json<SubscriptionSet, MAX_SYNC_BYTES>,
) -> Result<Answer<SyncResult>, Problem> {
    if !principal.sees(connection) {
        return Err(Problem::not_found());
    }
    let wanted = read_set(set)?;
    let wanted: Vec<_> = wanted.into_iter().map(|wanted| (SubscriptionId(api.ids.next()), wanted)).collect();
    match pg::sync_subscriptions(&api.pool, principal.organization, connection, &wanted, &by).await? {
        SyncSubscriptions::Synced(synced) => {
            // Some of them may have brought rules, which the workers keep with the connection.
            if synced.created + synced.updated > 0 {
                api.hints.notify(Hint::ConnectionChanged(connection)).await;
            }
            Ok(Answer(SyncResult {
                created: synced.created,
                updated: synced.updated,
                deleted: synced.deleted,
                unchanged: synced.unchanged,
                items: synced.items.into_iter().map(SubscriptionView::from).collect(),
            }))
        }
        SyncSubscriptions::Refused(SubscriptionRefused::NoSuchConnection) => Err(Problem::not_found()),
        SyncSubscriptions::Refused(why) => Err(refused(why, "", &publisher_pointer(why, &wanted))),
    }
}

fn read_set(set: SubscriptionSet) -> Result<Vec<Wanted>, Problem> {
    if set.subscriptions.len() > MAX_SYNC {
        let detail = format!("at most {MAX_SYNC} subscriptions can be replaced at once");
        return Err(Problem::invalid_at("/subscriptions", detail));
    }
    let mut errors = Vec::new();
    let mut seen = HashMap::new();
    let mut all = Vec::with_capacity(set.subscriptions.len());
    for (index, one) in set.subscriptions.into_iter().enumerate() {
        let pointer = format!("/subscriptions/{index}");
        let identity = (one.event_type.clone(), one.publisher, one.filter.clone());
        match one.read(&pointer) {
            Err(wrong) => errors.extend(wrong),
            Ok(wanted) => {
                all.push(wanted);
                if let Some(first) = seen.insert(identity, index) {
                    errors.push(FieldError::at(pointer, format!("the same as /subscriptions/{first}")));
                }
            }
        }
    }
    if errors.is_empty() { Ok(all) } else { Err(Problem::invalid(errors)) }
}

/// Where the request names the publisher that does not exist.
fn publisher_pointer(why: SubscriptionRefused, wanted: &[(SubscriptionId, Wanted)]) -> String {
    let SubscriptionRefused::NoSuchPublisher(unknown) = why else { return String::new() };
    let index = wanted.iter().position(|(_, wanted)| wanted.publisher == Some(unknown));
    index.map_or_else(String::new, |index| format!("/subscriptions/{index}/publisher"))
}
