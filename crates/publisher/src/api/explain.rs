//! A dry run of matching.

use std::{sync::Arc, time::Duration};

use axum::{
    Json as Answer,
    extract::{Request, State},
};
use bus_core::{
    cloudevent::{Submission, parse_http},
    ids::{ConnectionId, EventUid, SubscriptionId},
    matcher::{Mismatch, Subject},
    pg,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{
    Api,
    auth::{Authorized, Look},
    events::{CloudEventBody, PlainEvent, complete},
    extract::read_json,
    openapi::ExplainProblems,
    problem::{FieldError, Problem},
};

/// How many explanations are computed at a time. Each runs every filter of an organization, so more of
/// them would only take the processors from the events that are really published.
pub(super) const AT_A_TIME: usize = 2;

/// How long one waits for its turn.
const TURN: Duration = Duration::from_secs(5);

/// What the body may have besides the event, bytes.
const OVERHEAD: usize = 64 * 1024;

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ExplainBody {
    /// A sample event, as plain JSON or as a CloudEvent; it is not published.
    #[schema(value_type = SampleEvent)]
    event: Box<RawValue>,
    /// The connection that would publish it.
    #[schema(value_type = Option<Uuid>)]
    publisher: Option<ConnectionId>,
}

/// A sample event
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "the document's name for the two forms of an event")]
enum SampleEvent {
    Plain(PlainEvent),
    Cloud(CloudEventBody),
}

/// Why a subscription does not take the event
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
enum Reason {
    Disabled,
    Type,
    Publisher,
    Filter,
    PayloadNotJson,
}

/// What one subscription would do with the event
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Explanation {
    #[schema(value_type = Uuid)]
    subscription_id: SubscriptionId,
    #[schema(value_type = Uuid)]
    connection_id: ConnectionId,
    matches: bool,
    /// Absent if it matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<Reason>,
    /// The reason for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

/// What all subscriptions would do with the event, oldest first
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Explanations {
    items: Vec<Explanation>,
}

/// Explain which subscriptions would take an event, and why the others would not
#[utoipa::path(
    post,
    path = "/v1/subscriptions/explain",
    tag = "subscriptions",
    operation_id = "explainSubscriptions",
    request_body = ExplainBody,
    responses((status = 200, description = "One for each subscription", body = Explanations), ExplainProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn explain(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    request: Request,
) -> Result<Answer<Explanations>, Problem> {
    let limit = api.limits.max_event_bytes + OVERHEAD;
    let body: ExplainBody = read_json(&api, request, &["application/json"], limit).await?;
    let draft = match parse_sample(&api, &body.event)? {
        Submission::Single(draft) => draft,
        Submission::Batch(_) => return Err(Problem::invalid_at("/event", "send one event, not a batch")),
    };
    let publisher = body.publisher;
    if let Some(id) = publisher
        && pg::connection(&api.pool, principal.organization, id).await?.is_none()
    {
        return Err(Problem::invalid_at("/publisher", "there is no such connection"));
    }
    let event = complete(draft, EventUid(api.ids.next()), &principal, api.clock.now());
    let turn = tokio::time::timeout(TURN, Arc::clone(&api.explains).acquire_owned()).await;
    let Ok(Ok(turn)) = turn else {
        return Err(Problem::overloaded("too many explanations are under way", TURN));
    };
    let snapshot = api.snapshots.fresh(principal.organization).await?;
    let explained = tokio::task::spawn_blocking(move || {
        // Until this is done, even if the client is gone.
        let _turn = turn;
        let subject = Subject { event_type: &event.r#type, publisher, payload: event.json_payload() };
        let candidates = snapshot.explain(subject);
        candidates
            .into_iter()
            .filter(|(candidate, _)| principal.sees(candidate.connection))
            .map(|(candidate, mismatch)| {
                let detail = mismatch.map(|why| match why {
                    Mismatch::Disabled => "the subscription or its connection is disabled".to_owned(),
                    Mismatch::Type => {
                        format!("{:?} does not match {:?}", candidate.event_type.as_str(), event.r#type)
                    }
                    Mismatch::Publisher => "it wants the events of another publisher".to_owned(),
                    Mismatch::Filter => "the filter selects nothing of the payload".to_owned(),
                    Mismatch::NoJson => "it has a filter, and the payload is not JSON".to_owned(),
                });
                Explanation {
                    subscription_id: candidate.subscription,
                    connection_id: candidate.connection,
                    matches: mismatch.is_none(),
                    reason: mismatch.map(Reason::from),
                    detail,
                }
            })
            .collect()
    });
    let items = explained.await.map_err(|panic| {
        tracing::error!(%panic, "Explanation panicked");
        Problem::internal()
    })?;
    Ok(Answer(Explanations { items }))
}

/// Reads the event as if it were a request's body, in the mode that it looks like.
fn parse_sample(api: &Api, event: &RawValue) -> Result<Submission, Problem> {
    #[derive(Deserialize)]
    struct Probe<'a> {
        #[serde(borrow)]
        specversion: Option<&'a RawValue>,
    }
    let probe: Result<Probe<'_>, _> = serde_json::from_str(event.get());
    let structured = probe.is_ok_and(|probe| probe.specversion.is_some());
    let media_type = if structured { "application/cloudevents+json" } else { "application/json" };
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(media_type))]);
    let body = Bytes::copy_from_slice(event.get().as_bytes());
    parse_http(&headers, &body, &api.limits).map_err(|error| {
        let mut problem = Problem::from(error);
        for error in &mut problem.errors {
            error.pointer = Some(format!("/event{}", error.pointer.take().unwrap_or_default()));
        }
        if problem.errors.is_empty() {
            problem.errors.push(FieldError::at("/event", problem.detail.clone()));
        }
        problem
    })
}

impl From<Mismatch> for Reason {
    fn from(mismatch: Mismatch) -> Self {
        match mismatch {
            Mismatch::Disabled => Self::Disabled,
            Mismatch::Type => Self::Type,
            Mismatch::Publisher => Self::Publisher,
            Mismatch::Filter => Self::Filter,
            Mismatch::NoJson => Self::PayloadNotJson,
        }
    }
}
