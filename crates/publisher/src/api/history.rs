//! Stored events.

use axum::{Json as Answer, extract::State};
use bus_core::{
    audit::TargetKind,
    ids::{ConnectionId, EventUid, OrganizationId, SubscriptionId},
    pattern::TypePattern,
    pg::{self, EventQuery, ScheduledEvent, StoredEvent, Tally},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};

use super::{
    Api, audit,
    auth::{Authorized, History, Recorded},
    events::CloudEventBody,
    extract::{Id, Query},
    openapi::{EventProblems, ListProblems},
    page::{self, Cursor, Limit, Page, cursor},
    problem::{FieldError, Problem, ProblemType},
};

/// How many events the answer to an ambiguous id names.
const MAX_CANDIDATES: u32 = 20;

/// Where an event stands: `scheduled`, due at its `deliverAt`; `pending` as long as any of its deliveries is pending or
/// waiting; then `failed` if any is dead; `cancelled` before it was due, or with all of its deliveries; `delivered`
/// otherwise, also if it matched nothing
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum EventStatus {
    Scheduled,
    Pending,
    Delivered,
    Failed,
    Cancelled,
}

impl From<Tally> for EventStatus {
    fn from(tally: Tally) -> Self {
        if tally.pending + tally.waiting > 0 {
            Self::Pending
        } else if tally.dead > 0 {
            Self::Failed
        } else if tally.cancelled > 0 && tally.delivered + tally.acked == 0 {
            Self::Cancelled
        } else {
            Self::Delivered
        }
    }
}

/// How many deliveries of an event stand where
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeliveryCounts)]
struct CountsView {
    pending: u64,
    waiting: u64,
    delivered: u64,
    dead: u64,
    acked: u64,
    cancelled: u64,
}

impl From<Tally> for CountsView {
    fn from(tally: Tally) -> Self {
        let Tally { pending, waiting, delivered, dead, acked, cancelled } = tally;
        Self { pending, waiting, delivered, dead, acked, cancelled }
    }
}

/// A stored event
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = StoredEvent)]
pub(super) struct EventView {
    /// The bus's own id, unique.
    #[schema(value_type = Uuid)]
    uid: EventUid,
    /// The CloudEvents `id`, unique together with `source`.
    id: String,
    /// Absent in lists of published events.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<EventStatus>,
    /// How many of its deliveries stand where; absent in lists, and of an event that is not published.
    #[serde(skip_serializing_if = "Option::is_none")]
    deliveries: Option<CountsView>,
    source: String,
    r#type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    time: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    received_at: Timestamp,
    /// When it is due; only of one that is not published.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    deliver_at: Option<Timestamp>,
    /// The connection that published it, if the key was bound to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    publisher: Option<ConnectionId>,
    /// The subscriptions that matched; of an event that is due later those that match then.
    #[schema(value_type = Vec<Uuid>)]
    subscriptions: Vec<SubscriptionId>,
    /// When its payload was erased: there is no `event` then.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    expunged_at: Option<Timestamp>,
    /// The CloudEvent in the JSON format, as it is delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<CloudEventBody>)]
    event: Option<Box<RawValue>>,
}

/// A body as it stands in an answer.
pub(super) fn shown(uid: EventUid, body: &[u8]) -> Result<Box<RawValue>, Problem> {
    serde_json::from_slice(body).map_err(|error| {
        tracing::error!(event.uid = %uid, %error, "Stored event is not JSON");
        Problem::internal()
    })
}

impl TryFrom<ScheduledEvent> for EventView {
    type Error = Problem;

    fn try_from(scheduled: ScheduledEvent) -> Result<Self, Problem> {
        let ScheduledEvent { event, due_at, cancelled_at, .. } = scheduled;
        let status = if cancelled_at.is_some() { EventStatus::Cancelled } else { EventStatus::Scheduled };
        let body = (!event.body.is_empty()).then(|| shown(event.uid, &event.body)).transpose()?;
        Ok(Self {
            uid: event.uid,
            id: event.id,
            status: Some(status),
            deliveries: None,
            source: event.source,
            r#type: event.r#type,
            subject: event.subject,
            time: event.time,
            received_at: event.received_at.unwrap_or(event.time),
            deliver_at: Some(due_at),
            publisher: event.publisher,
            subscriptions: Vec::new(),
            expunged_at: None,
            event: body,
        })
    }
}

impl TryFrom<StoredEvent> for EventView {
    type Error = Problem;

    fn try_from(stored: StoredEvent) -> Result<Self, Problem> {
        let event = stored.body.map(|body| shown(stored.uid, &body)).transpose()?;
        Ok(Self {
            uid: stored.uid,
            id: stored.id,
            status: None,
            deliveries: None,
            deliver_at: None,
            source: stored.source,
            r#type: stored.r#type,
            subject: stored.subject,
            time: stored.time,
            received_at: stored.received_at,
            publisher: stored.publisher,
            subscriptions: stored.subscriptions,
            expunged_at: stored.expunged_at,
            event,
        })
    }
}

/// Tells events with one CloudEvents `id` apart.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SourceQuery {
    /// The CloudEvents `source`; with it, `id` in the path is the CloudEvents `id`.
    pub(super) source: Option<String>,
}

/// Postgres's text cannot hold it, and no attribute of an event can.
pub(super) fn has_nul(text: &str) -> bool {
    text.contains('\0')
}

/// The event that is meant by a uid, or by a CloudEvents id and perhaps its source.
pub(super) async fn find(
    api: &Api,
    organization: OrganizationId,
    id: &str,
    source: Option<&str>,
) -> Result<EventUid, Problem> {
    if has_nul(id) || source.is_some_and(has_nul) {
        return Err(Problem::not_found());
    }
    // A producer may use UUIDs too, so a UUID is not always a uid.
    if source.is_none()
        && let Ok(uid) = id.parse()
        && pg::has_event(&api.pool, organization, uid).await?
    {
        return Ok(uid);
    }
    let uids = pg::event_uids(&api.pool, organization, id, source, MAX_CANDIDATES).await?;
    match uids.as_slice() {
        [] => Err(Problem::not_found()),
        [uid] => Ok(*uid),
        _ => {
            let detail = "several events have this id; name one by its uid, or give its source";
            Err(Problem { uids, ..Problem::new(ProblemType::AmbiguousEvent, detail) })
        }
    }
}

/// Read an event
#[utoipa::path(
    get,
    path = "/v1/events/{id}",
    tag = "events",
    operation_id = "getEvent",
    params(("id" = String, Path, description = "The event's `uid` or CloudEvents `id`"), SourceQuery),
    responses((status = 200, description = "The event", body = EventView), EventProblems),
    security(("apiKey" = ["read"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<History>>,
    Id(id): Id<String>,
    Query(query): Query<SourceQuery>,
) -> Result<Answer<EventView>, Problem> {
    let organization = principal.organization;
    let uid = find(&api, organization, &id, query.source.as_deref()).await?;
    let view = read(&api, organization, uid).await?;
    audit::one_read(&api, &by, organization, TargetKind::Event, uid).await?;
    Ok(Answer(view))
}

/// The event, wherever it is.
async fn read(api: &Api, organization: OrganizationId, uid: EventUid) -> Result<EventView, Problem> {
    if let Some(published) = published_event(api, organization, uid).await? {
        return Ok(published);
    }
    if let Some(waiting) = pg::scheduled_event(&api.pool, organization, uid).await? {
        return EventView::try_from(waiting);
    }
    // It was due just now.
    published_event(api, organization, uid).await?.ok_or_else(Problem::not_found)
}

async fn published_event(
    api: &Api,
    organization: OrganizationId,
    uid: EventUid,
) -> Result<Option<EventView>, Problem> {
    let Some(stored) = pg::event(&api.pool, organization, uid).await? else { return Ok(None) };
    let tally = pg::event_tally(&api.pool, organization, uid).await?.unwrap_or_default();
    let view = EventView::try_from(stored)?;
    Ok(Some(EventView { status: Some(tally.into()), deliveries: Some(tally.into()), ..view }))
}

/// Which events there are to list: those that are `published`, or those that are `scheduled` for later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Listed {
    Published,
    Scheduled,
}

/// What a list shows besides the attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Include {
    /// The CloudEvents themselves.
    Event,
}

/// Which events to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// `published`, which is the default; or `scheduled`: those that are due later, and for four days those of them
    /// that were cancelled, the first due first. `scheduled` goes with `include`, `limit` and `cursor` only.
    #[param(value_type = Option<Listed>, inline)]
    status: Option<Listed>,
    /// Only those of this type; may have wildcards like the `eventType` of a subscription.
    r#type: Option<String>,
    /// Only those of this source.
    source: Option<String>,
    /// Only those received at this time or later (RFC 3339, whole milliseconds).
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Only those received before this time (RFC 3339, whole milliseconds).
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// `event` to have the CloudEvents themselves in the list.
    #[param(value_type = Option<Include>, inline)]
    include: Option<Include>,
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// List events, newest first
///
/// The order is that of arrival at the millisecond, not of the events' own `time`; an event with a `deliverAt`
/// arrives then. One request looks at a bounded number of events and bytes: a part may have fewer items than
/// `limit`, or none, and still a `nextCursor`.
#[utoipa::path(
    get,
    path = "/v1/events",
    tag = "events",
    operation_id = "listEvents",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<EventView>), ListProblems),
    security(("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<History>>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<EventView>>, Problem> {
    let organization = principal.organization;
    let page = match query.status {
        Some(Listed::Scheduled) => scheduled(&api, organization, query).await?,
        Some(Listed::Published) | None => published(&api, organization, query).await?,
    };
    let shown: Vec<EventUid> =
        page.items.iter().filter(|item| item.event.is_some()).map(|item| item.uid).collect();
    audit::list_read(&api, &by, organization, &shown).await?;
    Ok(Answer(page))
}

/// The part of the list that is published.
async fn published(
    api: &Api,
    organization: OrganizationId,
    query: ListQuery,
) -> Result<Page<EventView>, Problem> {
    let event_type = query.r#type.as_deref().map(TypePattern::parse).transpose();
    let event_type = event_type
        .map_err(|error| Problem::invalid(vec![FieldError::parameter("type", error.to_string())]))?;
    if query.source.as_deref().is_some_and(has_nul) {
        return Ok(Page { items: Vec::new(), next_cursor: None });
    }
    let query = EventQuery {
        event_type,
        source: query.source,
        since: query.since,
        until: query.until,
        before: query.cursor.map(|cursor| EventUid(cursor.0)),
        limit: query.limit.unwrap_or_default().0,
        bodies: query.include == Some(Include::Event),
    };
    let page = pg::events(&api.pool, organization, &query).await?;
    let items = page.items.into_iter().map(EventView::try_from).collect::<Result<_, _>>()?;
    Ok(Page { items, next_cursor: page.next.map(|uid| cursor(uid.0)) })
}

/// The part of the list that is due later.
async fn scheduled(
    api: &Api,
    organization: OrganizationId,
    query: ListQuery,
) -> Result<Page<EventView>, Problem> {
    let filters = [
        ("type", query.r#type.is_some()),
        ("source", query.source.is_some()),
        ("since", query.since.is_some()),
        ("until", query.until.is_some()),
    ];
    let refused = filters.into_iter().filter(|(_, given)| *given).map(|(name, _)| {
        FieldError::parameter(name, format!("`{name}` does not go with `status=scheduled`; leave it out"))
    });
    let refused: Vec<FieldError> = refused.collect();
    if !refused.is_empty() {
        return Err(Problem::invalid(refused));
    }
    let bodies = query.include == Some(Include::Event);
    let part = page::request(query.limit, query.cursor);
    let waiting = pg::scheduled_events(&api.pool, organization, bodies, part).await?;
    let items = waiting.items.into_iter().map(EventView::try_from).collect::<Result<_, _>>()?;
    Ok(Page { items, next_cursor: waiting.next.map(cursor) })
}
