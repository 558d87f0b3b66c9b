//! Replays: durable jobs that bring deliveries back. The scheduler works them off.

use axum::{
    Json as Answer,
    extract::{FromRequest, Request, State},
    response::Response,
};
use bus_core::{
    audit::By,
    cloudevent::CloudEvent,
    ids::{ConnectionId, EventUid, ReplayId, SubscriptionId},
    matcher::{Mismatch, Subject},
    notify::Hint,
    pg::{
        self, CreateReplay, DeadLetterAction, MAX_OPEN_REPLAYS, MAX_PER_SECOND, NewReplay, Replay,
        ReplayState, Selection, StoredEvent, Whose,
    },
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api, accepted,
    auth::{Authorized, Look, Manage, Principal, Recorded},
    events::idempotency::read_key,
    extract::{Id, Query, decode, read_optional_json},
    history::{SourceQuery, find},
    openapi::{EventJobProblems, ListProblems, OneProblems, SubscriptionJobProblems},
    page::{self, Cursor, Limit, Page},
    problem::{Problem, ProblemType},
};

/// What a job is about: one `event`; a `subscription` since a time; `deadLetters` that are replayed; a `discard`
/// of dead letters
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum ReplayKind {
    Event,
    Subscription,
    DeadLetters,
    Discard,
}

/// Where a job stands: `pending`, not begun; `running`; `done`; `cancelled`; `failed`, then `failure` says why
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ReplayState)]
enum StateName {
    Pending,
    Running,
    Done,
    Cancelled,
    Failed,
}

impl From<ReplayState> for StateName {
    fn from(state: ReplayState) -> Self {
        match state {
            ReplayState::Pending => Self::Pending,
            ReplayState::Running => Self::Running,
            ReplayState::Done => Self::Done,
            ReplayState::Cancelled => Self::Cancelled,
            ReplayState::Failed => Self::Failed,
        }
    }
}

/// How much of a job is done
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ReplayProgress {
    /// Stored events, matching deliveries of one event, or dead letters that it has looked at.
    looked: u64,
    /// Deliveries that it has brought back, or discarded.
    replayed: u64,
    /// The others: those that do not match, are cancelled, or are no dead letters any more.
    skipped: u64,
}

/// A job that brings deliveries back, or discards dead letters
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Replay)]
pub(super) struct ReplayView {
    #[schema(value_type = Uuid)]
    id: ReplayId,
    kind: ReplayKind,
    state: StateName,
    /// Why it failed: a short stable word.
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
    progress: ReplayProgress,
    /// The time of what it looked at last: when the event arrived, or the dead letter died.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    position: Option<Timestamp>,
    /// At most so many deliveries come back in a second.
    per_second: u32,
    /// The one event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    event_uid: Option<EventUid>,
    /// The one subscription.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    subscription_id: Option<SubscriptionId>,
    /// The only connection whose deliveries it touches.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
    /// Events that arrived at this time or later.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Events that arrived before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    finished_at: Option<Timestamp>,
}

impl From<Replay> for ReplayView {
    fn from(replay: Replay) -> Self {
        let (kind, event_uid, subscription_id, range) = match replay.selection {
            Selection::Event { event, subscription } => (ReplayKind::Event, Some(event), subscription, None),
            Selection::Subscription { subscription, since, until } => {
                (ReplayKind::Subscription, None, Some(subscription), Some((since, until)))
            }
            Selection::DeadLetters { action: DeadLetterAction::Replay, .. } => {
                (ReplayKind::DeadLetters, None, None, None)
            }
            Selection::DeadLetters { action: DeadLetterAction::Discard, .. } => {
                (ReplayKind::Discard, None, None, None)
            }
        };
        let (looked, replayed) = (replay.looked, replay.replayed);
        Self {
            id: replay.id,
            kind,
            state: replay.state.into(),
            failure: replay.failure,
            progress: ReplayProgress { looked, replayed, skipped: looked.saturating_sub(replayed) },
            position: replay.cursor.at,
            per_second: replay.per_second,
            event_uid,
            subscription_id,
            connection_id: replay.whose.only,
            since: range.map(|(since, _)| since),
            until: range.map(|(_, until)| until),
            created_at: replay.created_at,
            finished_at: replay.finished_at,
        }
    }
}

/// How a request for a job may be told from others.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "describes what Keyed reads")]
pub(super) struct JobKeyHeader {
    /// The same key with the same path and body gives the job that the first request created, as long as that is
    /// kept. A structured-field string (`"…"`) or a bare token of 1 to 255 printable ASCII characters.
    #[param(rename = "Idempotency-Key", value_type = Option<String>, nullable = false)]
    idempotency_key: Option<String>,
}

/// A JSON body, where none at all is as good as `{}`, with the request's `Idempotency-Key`.
pub(super) struct Keyed<T> {
    pub(super) value: T,
    /// The key, and the SHA-256 of path, query and body.
    pub(super) request: Option<(String, [u8; 32])>,
}

impl<T: DeserializeOwned> FromRequest<Api> for Keyed<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let key = read_key(request.headers())?;
        let mut hash = Sha256::new_with_prefix(request.uri().to_string());
        let body = read_optional_json(api, request).await?;
        hash.update([0]);
        hash.update(&body);
        Ok(Self { value: decode(&body)?, request: key.map(|key| (key, hash.finalize().into())) })
    }
}

/// A job that a request asks for.
pub(super) struct Wanted {
    pub(super) whose: Whose,
    pub(super) selection: Selection,
    pub(super) per_second: Option<u32>,
    pub(super) request: Option<(String, [u8; 32])>,
}

/// What a key stands for: the same request for another connection is another one.
fn fingerprint(whose: Whose, request: [u8; 32]) -> [u8; 32] {
    let mut hash = Sha256::new_with_prefix(request);
    if let Some(connection) = whose.only {
        hash.update(connection.0.as_bytes());
    }
    hash.finalize().into()
}

/// Stores the job, and answers with it.
pub(super) async fn start(api: &Api, wanted: Wanted, by: &By) -> Result<Response, Problem> {
    let per_second = wanted.per_second.unwrap_or(api.replays_per_second);
    if !(1..=MAX_PER_SECOND).contains(&per_second) {
        let detail = format!("perSecond must be from 1 to {MAX_PER_SECOND}");
        return Err(Problem::invalid_at("/perSecond", detail));
    }
    let new = NewReplay {
        id: ReplayId(api.ids.next()),
        whose: wanted.whose,
        selection: wanted.selection,
        per_second,
        request: wanted.request.map(|(key, request)| (key, fingerprint(wanted.whose, request))),
    };
    match pg::create_replay(&api.pool, &new, by).await? {
        CreateReplay::Stored(replay) => {
            api.hints.notify(Hint::Due).await;
            Ok(accepted(&format!("/v1/replays/{}", replay.id), Answer(ReplayView::from(*replay))))
        }
        CreateReplay::KeyReused => Err(Problem::new(
            ProblemType::IdempotencyKeyReused,
            "this Idempotency-Key was used with another request; use a new key for a new request",
        )),
        CreateReplay::TooMany => Err(Problem::new(
            ProblemType::LimitReached,
            format!("an organization has at most {MAX_OPEN_REPLAYS} replays that are not finished"),
        )),
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = EventReplay)]
pub(super) struct EventReplayBody {
    /// Only to this subscription, which must match the event now; to all that match it now if absent.
    #[schema(value_type = Option<Uuid>)]
    subscription_id: Option<SubscriptionId>,
}

/// Replay an event
///
/// It is delivered once more, with the same `webhook-id` as before, to the subscriptions that match it now. A job
/// does it; `Location` and the answer say where to follow it.
#[utoipa::path(
    post,
    path = "/v1/events/{id}/replay",
    tag = "replays",
    operation_id = "replayEvent",
    params(
        ("id" = String, Path, description = "The event's `uid` or CloudEvents `id`"),
        SourceQuery, JobKeyHeader
    ),
    request_body = Option<EventReplayBody>,
    responses((status = 202, description = "The job", body = ReplayView), EventJobProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn replay_event(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<String>,
    Query(query): Query<SourceQuery>,
    body: Keyed<EventReplayBody>,
) -> Result<Response, Problem> {
    let event = find(&api, principal.organization, &id, query.source.as_deref()).await?;
    if pg::scheduled_event(&api.pool, principal.organization, event).await?.is_some() {
        return Err(Problem::new(
            ProblemType::NotPublished,
            "the event is due later, or was cancelled; there is nothing to replay before it is published",
        ));
    }
    let stored = pg::event(&api.pool, principal.organization, event).await?.ok_or_else(Problem::not_found)?;
    if stored.expunged_at.is_some() {
        return Err(expunged());
    }
    let (mut whose, subscription) = (principal.whose(), body.value.subscription_id);
    if let Some(subscription) = subscription {
        whose.only = Some(check_match(&api, &principal, stored, subscription).await?);
    }
    let selection = Selection::Event { event, subscription };
    start(&api, Wanted { whose, selection, per_second: None, request: body.request }, &by).await
}

/// There is nothing to deliver any more.
pub(super) fn expunged() -> Problem {
    Problem::new(ProblemType::Expunged, "the event's payload was erased; there is nothing to replay")
}

/// Refuses if the subscription does not match the event now; gives its connection.
async fn check_match(
    api: &Api,
    principal: &Principal,
    stored: StoredEvent,
    subscription: SubscriptionId,
) -> Result<ConnectionId, Problem> {
    let refused = |detail: &str| Problem::invalid_at("/subscriptionId", detail);
    let mut connection = pg::acquire(&api.pool).await?;
    let snapshot = pg::load_snapshot_of(&mut connection, principal.organization, Some(subscription)).await?;
    drop(connection);
    let found = snapshot.candidate(subscription).filter(|found| principal.sees(found.connection));
    let Some(candidate) = found else { return Err(refused("there is no such subscription")) };
    let body = CloudEvent::from_structured(&stored.body.unwrap_or_default()).map_err(|error| {
        tracing::error!(event.uid = %stored.uid, %error, "Stored event cannot be read");
        Problem::internal()
    })?;
    let subject =
        Subject { event_type: &stored.r#type, publisher: stored.publisher, payload: body.json_payload() };
    let mismatch = snapshot.explain(subject).into_iter().find_map(|(_, mismatch)| mismatch);
    match mismatch {
        None => Ok(candidate.connection),
        Some(Mismatch::Disabled) => Err(refused("the subscription or its connection is disabled")),
        Some(Mismatch::Type) => Err(refused("the subscription wants other types")),
        Some(Mismatch::Publisher) => Err(refused("the subscription wants the events of another publisher")),
        Some(Mismatch::Filter) => Err(refused("the subscription's filter selects nothing of the payload")),
        Some(Mismatch::NoJson) => Err(refused("the subscription has a filter, and the payload is not JSON")),
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = SubscriptionReplay)]
pub(super) struct SubscriptionReplayBody {
    /// Events that arrived at this time or later; whole milliseconds.
    #[schema(value_type = String, format = DateTime)]
    since: Timestamp,
    /// Events that arrived before this time; whole milliseconds. The time of the request if absent or later.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// The most deliveries a second; the configured value, 500 unless changed, if absent.
    #[schema(minimum = 1, maximum = 10000)]
    per_second: Option<u32>,
}

/// Replay to a subscription since a time
///
/// Every stored event of that time that the subscription matches now is delivered to it, once more if it was
/// before, with the same `webhook-id`. A job does it; `Location` and the answer say where to follow it.
#[utoipa::path(
    post,
    path = "/v1/subscriptions/{id}/replay",
    tag = "replays",
    operation_id = "replaySubscription",
    params(("id" = Uuid, Path, description = "The subscription"), JobKeyHeader),
    request_body = SubscriptionReplayBody,
    responses((status = 202, description = "The job", body = ReplayView), SubscriptionJobProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn replay_subscription(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<SubscriptionId>,
    Keyed { value: body, request }: Keyed<SubscriptionReplayBody>,
) -> Result<Response, Problem> {
    let mut connection = pg::acquire(&api.pool).await?;
    let snapshot = pg::load_snapshot_of(&mut connection, principal.organization, Some(id)).await?;
    drop(connection);
    let found = snapshot.candidate(id).filter(|found| principal.sees(found.connection));
    let candidate = found.ok_or_else(Problem::not_found)?;
    if !candidate.enabled {
        return Err(Problem::invalid_at("", "the subscription or its connection is disabled"));
    }
    let now = after_this_millisecond(api.clock.now());
    let until = body.until.map_or(now, |until| until.min(now));
    if body.since >= until {
        return Err(Problem::invalid_at("/since", "since must be before until, and in the past"));
    }
    let whose = Whose { organization: principal.organization, only: Some(candidate.connection) };
    let selection = Selection::Subscription { subscription: id, since: body.since, until };
    start(&api, Wanted { whose, selection, per_second: body.per_second, request }, &by).await
}

/// Events are told apart by the millisecond of their arrival: those of the present one arrived before, too.
fn after_this_millisecond(now: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(now.as_millisecond().saturating_add(1)).unwrap_or(now)
}

/// Which replays to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// List the replays, oldest first
///
/// Finished ones are kept for 7 days at least.
#[utoipa::path(
    get,
    path = "/v1/replays",
    tag = "replays",
    operation_id = "listReplays",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<ReplayView>), ListProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<ReplayView>>, Problem> {
    let page = page::request(query.limit, query.cursor);
    Ok(Answer(Page::of(pg::replays(&api.pool, principal.whose(), page).await?, ReplayView::from)))
}

/// Read a replay
#[utoipa::path(
    get,
    path = "/v1/replays/{id}",
    tag = "replays",
    operation_id = "getReplay",
    params(("id" = Uuid, Path, description = "The job")),
    responses((status = 200, description = "The job", body = ReplayView), OneProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Id(id): Id<ReplayId>,
) -> Result<Answer<ReplayView>, Problem> {
    let found = pg::replay(&api.pool, principal.whose(), id).await?;
    found.map(|replay| Answer(replay.into())).ok_or_else(Problem::not_found)
}

/// Cancel a replay
///
/// When the answer comes, the job brings nothing back any more; what it has brought back before is delivered. A
/// job that is finished stays as it is.
#[utoipa::path(
    post,
    path = "/v1/replays/{id}/cancel",
    tag = "replays",
    operation_id = "cancelReplay",
    params(("id" = Uuid, Path, description = "The job")),
    responses((status = 200, description = "As it is now", body = ReplayView), OneProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn cancel(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<ReplayId>,
) -> Result<Answer<ReplayView>, Problem> {
    let found = pg::cancel_replay(&api.pool, principal.whose(), id, &by).await?;
    found.map(|replay| Answer(replay.into())).ok_or_else(Problem::not_found)
}
