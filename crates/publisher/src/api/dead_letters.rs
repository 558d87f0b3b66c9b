//! Dead letters: deliveries that were given up.

use std::{collections::BTreeSet, str::FromStr};

use axum::{Json as Answer, extract::State, response::Response};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bus_core::{
    audit::By,
    ids::{ConnectionId, DeliveryId, EventUid, SubscriptionId},
    notify::Hint,
    pattern::TypePattern,
    pg::{
        self, DeadLetterAction, DeadLetterFilter, DeadLetterRecord, DeadLetters, DeadPlace, LastAttempt,
        Selection,
    },
};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    Api,
    auth::{Authorized, Look, Manage, Principal, Recorded},
    extract::{Id, Query},
    openapi::{DeadLetterJobProblems, JobProblems, ListProblems, OneProblems},
    page::{Limit, Page},
    problem::{FieldError, Problem},
    replays::{JobKeyHeader, Keyed, ReplayView, Wanted, expunged, start},
};

/// The most dead letters that one request names.
const MAX_IDS: usize = 1_000;

/// A delivery that was given up
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = DeadLetter)]
pub(super) struct DeadLetterView {
    /// The delivery, the `webhook-id` of all its attempts.
    #[schema(value_type = Uuid)]
    id: DeliveryId,
    event: DeadEvent,
    #[schema(value_type = Uuid)]
    subscription_id: SubscriptionId,
    #[schema(value_type = Uuid)]
    connection_id: ConnectionId,
    /// Why it was given up: a short stable word.
    reason: String,
    /// Failed attempts.
    attempts: u32,
    #[schema(value_type = String, format = DateTime)]
    died_at: Timestamp,
    last: LastView,
}

/// The event of a dead letter; only its `uid` is known if it has expired
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct DeadEvent {
    #[schema(value_type = Uuid)]
    uid: EventUid,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<String>,
}

/// The last attempt, as far as there was one
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = LastAttempt)]
struct LastView {
    /// The HTTP status, if an answer came.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    /// The start of the answer, at most 16 KiB; what is not UTF-8 is replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    at: Option<Timestamp>,
    /// How long it took, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
}

impl From<DeadLetterRecord> for DeadLetterView {
    fn from(record: DeadLetterRecord) -> Self {
        let (id, source, r#type) = match record.attributes {
            Some(known) => (Some(known.id), Some(known.source), Some(known.r#type)),
            None => (None, None, None),
        };
        Self {
            id: record.id,
            event: DeadEvent { uid: record.event, id, source, r#type },
            subscription_id: record.subscription,
            connection_id: record.connection,
            reason: record.reason,
            attempts: record.attempts,
            died_at: record.died_at,
            last: record.last.into(),
        }
    }
}

impl From<LastAttempt> for LastView {
    fn from(last: LastAttempt) -> Self {
        Self {
            status: last.status,
            body: last.body.map(|body| String::from_utf8_lossy(&body).into_owned()),
            error: last.error,
            at: last.at,
            duration_ms: last.duration.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

/// Where a part of the list starts: time of death and id of the last item of the part before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct DeadCursor(DeadPlace);

impl TryFrom<String> for DeadCursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let place = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| {
            let (at, id) = bytes.split_first_chunk()?;
            let at = Timestamp::from_microsecond(i64::from_be_bytes(*at)).ok()?;
            Some(DeadPlace { at, id: Uuid::from_slice(id).ok()? })
        });
        place.map(Self).ok_or("cursor must be a nextCursor that this list gave")
    }
}

impl From<DeadPlace> for DeadCursor {
    fn from(place: DeadPlace) -> Self {
        Self(place)
    }
}

impl DeadCursor {
    fn encode(self) -> String {
        let at = self.0.at.as_microsecond().to_be_bytes();
        URL_SAFE_NO_PAD.encode([&at[..], self.0.id.as_bytes()].concat())
    }
}

/// Which dead letters to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only those of this connection.
    #[param(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
    /// Only those of this subscription.
    #[param(value_type = Option<Uuid>)]
    subscription_id: Option<SubscriptionId>,
    /// Only those whose event has this type; may have wildcards like the `eventType` of a subscription.
    r#type: Option<String>,
    /// Only those that were given up for this reason.
    reason: Option<String>,
    /// Only those that died at this time or later (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Only those that died before this time (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<DeadCursor>,
}

fn read_type(
    text: Option<&str>,
    at: impl FnOnce(String) -> FieldError,
) -> Result<Option<TypePattern>, Problem> {
    let pattern = text.map(TypePattern::from_str).transpose();
    pattern.map_err(|error| Problem::invalid(vec![at(error.to_string())]))
}

/// Postgres's text cannot hold it, and no reason has it.
fn check_reason(reason: Option<&str>, at: impl FnOnce(String) -> FieldError) -> Result<(), Problem> {
    if reason.is_some_and(|reason| reason.contains('\0')) {
        return Err(Problem::invalid(vec![at("a reason has no such character".into())]));
    }
    Ok(())
}

/// List dead letters, the latest first
///
/// With `type` or `reason` one request looks at a bounded number of dead letters: a part may have fewer items
/// than `limit`, or none, and still a `nextCursor`. A dead letter that is replayed or discarded leaves the list.
#[utoipa::path(
    get,
    path = "/v1/dead-letters",
    tag = "dead-letters",
    operation_id = "listDeadLetters",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<DeadLetterView>), ListProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<DeadLetterView>>, Problem> {
    check_reason(query.reason.as_deref(), |detail| FieldError::parameter("reason", detail))?;
    let filter = DeadLetterFilter {
        connection: query.connection_id,
        subscription: query.subscription_id,
        event_type: read_type(query.r#type.as_deref(), |detail| FieldError::parameter("type", detail))?,
        reason: query.reason,
        since: query.since,
        until: query.until,
    };
    let (before, limit) = (query.cursor.map(|cursor| cursor.0), query.limit.unwrap_or_default().0);
    let page = pg::dead_letters(&api.pool, principal.whose(), &filter, before, limit).await?;
    let next_cursor = page.next.map(|place| DeadCursor::from(place).encode());
    Ok(Answer(Page { items: page.items.into_iter().map(DeadLetterView::from).collect(), next_cursor }))
}

/// Read a dead letter
#[utoipa::path(
    get,
    path = "/v1/dead-letters/{id}",
    tag = "dead-letters",
    operation_id = "getDeadLetter",
    params(("id" = Uuid, Path, description = "The delivery")),
    responses((status = 200, description = "The dead letter", body = DeadLetterView), OneProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Id(id): Id<DeliveryId>,
) -> Result<Answer<DeadLetterView>, Problem> {
    let found = pg::dead_letter(&api.pool, principal.whose(), id).await?;
    found.map(|record| Answer(record.into())).ok_or_else(Problem::not_found)
}

/// Discard a dead letter
///
/// Its delivery is cancelled, for good: neither a replay nor a late result brings it back.
#[utoipa::path(
    delete,
    path = "/v1/dead-letters/{id}",
    tag = "dead-letters",
    operation_id = "discardDeadLetter",
    params(("id" = Uuid, Path, description = "The delivery")),
    responses((status = 204, description = "It is gone"), OneProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn discard(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<DeliveryId>,
) -> Result<StatusCode, Problem> {
    settle(&api, &principal, id, DeadLetterAction::Discard, &by).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Replay a dead letter
///
/// At once, without a job: its delivery waits to be tried again, due now, with no attempts and a new lifetime, and
/// is no dead letter any more. Repeating the request therefore answers 404.
#[utoipa::path(
    post,
    path = "/v1/dead-letters/{id}/replay",
    tag = "dead-letters",
    operation_id = "replayDeadLetter",
    params(("id" = Uuid, Path, description = "The delivery")),
    responses((status = 202, description = "It will be tried again"), DeadLetterJobProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn replay(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<DeliveryId>,
) -> Result<StatusCode, Problem> {
    settle(&api, &principal, id, DeadLetterAction::Replay, &by).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn settle(
    api: &Api,
    principal: &Principal,
    id: DeliveryId,
    action: DeadLetterAction,
    by: &By,
) -> Result<(), Problem> {
    if !pg::settle_dead_letter(&api.pool, principal.whose(), id, action, by).await? {
        return Err(not_settled(api, principal, id).await?);
    }
    api.hints.notify(Hint::Due).await;
    Ok(())
}

/// Why there was nothing to do.
async fn not_settled(api: &Api, principal: &Principal, id: DeliveryId) -> Result<Problem, Problem> {
    let Some(dead) = pg::dead_letter(&api.pool, principal.whose(), id).await? else {
        return Ok(Problem::not_found());
    };
    let event = pg::event(&api.pool, principal.organization, dead.event).await?;
    let gone = event.is_some_and(|event| event.expunged_at.is_some());
    Ok(if gone { expunged() } else { Problem::not_found() })
}

/// Which dead letters: either `ids` or `filter`
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = DeadLetterSelection)]
pub(super) struct SelectionBody {
    /// These. Ids that are not those of dead letters are skipped.
    #[schema(value_type = Option<Vec<Uuid>>, min_items = 1, max_items = 1000)]
    ids: Option<BTreeSet<DeliveryId>>,
    /// Those that fit; `{}` for all. What dies after the request is not among them.
    filter: Option<FilterBody>,
    /// The most dead letters a second; the configured value, 500 unless changed, if absent.
    #[schema(minimum = 1, maximum = 10000)]
    per_second: Option<u32>,
}

/// Which dead letters; all conditions hold at once
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = DeadLetterFilter)]
struct FilterBody {
    /// Only those of this connection.
    #[schema(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
    /// Only those of this subscription.
    #[schema(value_type = Option<Uuid>)]
    subscription_id: Option<SubscriptionId>,
    /// Only those whose event has this type; may have wildcards.
    r#type: Option<String>,
    /// Only those that were given up for this reason.
    reason: Option<String>,
    /// Only those that died at this time or later.
    #[schema(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Only those that died before this time.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
}

impl SelectionBody {
    fn read(self) -> Result<DeadLetters, Problem> {
        match (self.ids, self.filter) {
            (Some(ids), None) if ids.is_empty() || ids.len() > MAX_IDS => {
                Err(Problem::invalid_at("/ids", format!("name 1 to {MAX_IDS} dead letters")))
            }
            (Some(ids), None) => Ok(DeadLetters::Ids(ids.into_iter().collect())),
            (None, Some(filter)) => filter.read().map(DeadLetters::Filter),
            _ => Err(Problem::invalid_at("", "give either `ids` or `filter`; an empty filter means all")),
        }
    }
}

impl FilterBody {
    fn read(self) -> Result<DeadLetterFilter, Problem> {
        check_reason(self.reason.as_deref(), |detail| FieldError::at("/filter/reason", detail))?;
        Ok(DeadLetterFilter {
            connection: self.connection_id,
            subscription: self.subscription_id,
            event_type: read_type(self.r#type.as_deref(), |detail| FieldError::at("/filter/type", detail))?,
            reason: self.reason,
            since: self.since,
            until: self.until,
        })
    }
}

/// Replay many dead letters
///
/// A job does it; `Location` and the answer say where to follow it.
#[utoipa::path(
    post,
    path = "/v1/dead-letters/replay",
    tag = "dead-letters",
    operation_id = "replayDeadLetters",
    params(JobKeyHeader),
    request_body = SelectionBody,
    responses((status = 202, description = "The job", body = ReplayView), JobProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn replay_many(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    body: Keyed<SelectionBody>,
) -> Result<Response, Problem> {
    settle_many(&api, &principal, body, DeadLetterAction::Replay, &by).await
}

/// Discard many dead letters
///
/// A job does it; `Location` and the answer say where to follow it. The job's `replayed` counts the discarded.
#[utoipa::path(
    post,
    path = "/v1/dead-letters/discard",
    tag = "dead-letters",
    operation_id = "discardDeadLetters",
    params(JobKeyHeader),
    request_body = SelectionBody,
    responses((status = 202, description = "The job", body = ReplayView), JobProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn discard_many(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    body: Keyed<SelectionBody>,
) -> Result<Response, Problem> {
    settle_many(&api, &principal, body, DeadLetterAction::Discard, &by).await
}

async fn settle_many(
    api: &Api,
    principal: &Principal,
    body: Keyed<SelectionBody>,
    action: DeadLetterAction,
    by: &By,
) -> Result<Response, Problem> {
    let Keyed { value: body, request } = body;
    let per_second = body.per_second;
    let selection = Selection::DeadLetters { action, which: body.read()? };
    start(api, Wanted { whose: principal.whose(), selection, per_second, request }, by).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_cursor_keeps_microseconds_and_anything_else_is_refused() {
        let place = DeadPlace { at: Timestamp::from_microsecond(1_234_567).unwrap(), id: Uuid::from_u128(7) };
        assert_eq!(DeadCursor::try_from(DeadCursor(place).encode()), Ok(DeadCursor(place)));
        for text in ["", "x", "%%%", &URL_SAFE_NO_PAD.encode([0; 16]), &URL_SAFE_NO_PAD.encode([0x7f; 24])] {
            assert!(DeadCursor::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
