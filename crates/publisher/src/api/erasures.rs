//! Erasures: durable jobs that empty payloads and leave what happened. The archiver works them off.

use axum::{Json as Answer, extract::State, response::Response};
use bus_core::{
    audit::By,
    ids::{ErasureId, EventUid, OrganizationId},
    pg::{self, CreateErasure, Emptied, Erasure, ErasureState, MAX_OPEN_ERASURES},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api, accepted,
    auth::{Authorized, Erase, Recorded},
    extract::{Id, Json, Query},
    history::{SourceQuery, find},
    openapi::{ErasureProblems, EventErasureProblems, ListProblems, OneProblems},
    page::{self, Cursor, Limit, Page},
    problem::{Problem, ProblemType},
};

/// Where an erasure stands: `pending`, not begun; `running`; `done`
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ErasureState)]
enum StateName {
    Pending,
    Running,
    Done,
}

impl From<ErasureState> for StateName {
    fn from(state: ErasureState) -> Self {
        match state {
            ErasureState::Pending => Self::Pending,
            ErasureState::Running => Self::Running,
            ErasureState::Done => Self::Done,
        }
    }
}

/// How much was emptied so far
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct EmptiedView {
    /// Events in the database.
    events: u64,
    /// Answers of subscribers that were kept with deliveries: they may echo the payload.
    answers: u64,
    /// Messages of the dead-letter stream, which are removed.
    dead_letters: u64,
    /// Rows in cold storage.
    archived: u64,
}

impl From<Emptied> for EmptiedView {
    fn from(Emptied { events, answers, dead_letters, archived }: Emptied) -> Self {
        Self { events, answers, dead_letters, archived }
    }
}

/// A job that empties payloads
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Erasure)]
pub(super) struct ErasureView {
    #[schema(value_type = Uuid)]
    id: ErasureId,
    /// The one event; absent if it is about all events that had arrived by `requestedAt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    event_uid: Option<EventUid>,
    state: StateName,
    /// How many events were due later when it was asked for. Those are left: they are to be published.
    waiting: u64,
    emptied: EmptiedView,
    #[schema(value_type = String, format = DateTime)]
    requested_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    finished_at: Option<Timestamp>,
}

impl From<Erasure> for ErasureView {
    fn from(erasure: Erasure) -> Self {
        Self {
            id: erasure.id,
            event_uid: erasure.event,
            state: erasure.state.into(),
            waiting: erasure.waiting,
            emptied: erasure.emptied.into(),
            requested_at: erasure.requested_at,
            finished_at: erasure.finished_at,
        }
    }
}

/// Stores the job, and answers with it.
async fn start(
    api: &Api,
    organization: OrganizationId,
    event: Option<EventUid>,
    by: &By,
) -> Result<Response, Problem> {
    let id = ErasureId(api.ids.next());
    match pg::create_erasure(&api.pool, id, organization, event, by).await? {
        CreateErasure::Stored(erasure) => {
            Ok(accepted(&format!("/v1/erasures/{}", erasure.id), Answer(ErasureView::from(*erasure))))
        }
        CreateErasure::Waiting => Err(Problem::new(
            ProblemType::NotPublished,
            "the event is due later and would be published without its payload; cancel it first",
        )),
        CreateErasure::TooMany => Err(Problem::new(
            ProblemType::LimitReached,
            format!("an organization has at most {MAX_OPEN_ERASURES} erasures that are not done"),
        )),
    }
}

/// Erase an event's payload
///
/// The payload is emptied wherever the bus keeps it: in the database, among dead letters, and in cold storage. That
/// there was an event, and what became of it, stays. A job does it; `Location` and the answer say where to follow it.
/// While one for the event is open, it is the answer. An event that the database does not have any more, but cold
/// storage does, is erased by `POST /v1/erasures` with its uid.
#[utoipa::path(
    post,
    path = "/v1/events/{id}/expunge",
    tag = "erasures",
    operation_id = "expungeEvent",
    params(("id" = String, Path, description = "The event's `uid` or CloudEvents `id`"), SourceQuery),
    responses((status = 202, description = "The job", body = ErasureView), EventErasureProblems),
    security(("apiKey" = ["admin"]))
)]
pub(super) async fn expunge(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Erase>>,
    Id(id): Id<String>,
    Query(query): Query<SourceQuery>,
) -> Result<Response, Problem> {
    let event = find(&api, principal.organization, &id, query.source.as_deref()).await?;
    start(&api, principal.organization, Some(event), &by).await
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = NewErasure)]
pub(super) struct NewErasureBody {
    /// Only the payload of this event, by its uid, which need not be in the database any more. If absent those of all
    /// events of the organization that have arrived by now.
    #[schema(value_type = Option<Uuid>)]
    event_uid: Option<EventUid>,
}

/// Erase payloads
///
/// Those of all events of the organization that have arrived by now, or that of one. Events that are due later are
/// left: cancel them first if they are to be erased, too.
#[utoipa::path(
    post,
    path = "/v1/erasures",
    tag = "erasures",
    operation_id = "createErasure",
    request_body = NewErasureBody,
    responses((status = 202, description = "The job", body = ErasureView), ErasureProblems),
    security(("apiKey" = ["admin"]))
)]
pub(super) async fn create(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Erase>>,
    Json(body): Json<NewErasureBody>,
) -> Result<Response, Problem> {
    start(&api, principal.organization, body.event_uid, &by).await
}

/// Which erasures to list.
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

/// List the erasures, oldest first
///
/// Finished ones are kept for 365 days at least.
#[utoipa::path(
    get,
    path = "/v1/erasures",
    tag = "erasures",
    operation_id = "listErasures",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<ErasureView>), ListProblems),
    security(("apiKey" = ["admin"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Erase>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<ErasureView>>, Problem> {
    let page = page::request(query.limit, query.cursor);
    Ok(Answer(Page::of(pg::erasures(&api.pool, principal.organization, page).await?, ErasureView::from)))
}

/// Read an erasure
#[utoipa::path(
    get,
    path = "/v1/erasures/{id}",
    tag = "erasures",
    operation_id = "getErasure",
    params(("id" = Uuid, Path, description = "The job")),
    responses((status = 200, description = "The job", body = ErasureView), OneProblems),
    security(("apiKey" = ["admin"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Erase>,
    Id(id): Id<ErasureId>,
) -> Result<Answer<ErasureView>, Problem> {
    let found = pg::erasure(&api.pool, principal.organization, id).await?;
    found.map(|erasure| Answer(erasure.into())).ok_or_else(Problem::not_found)
}
