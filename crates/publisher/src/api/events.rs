//! Publishing.

pub(super) mod idempotency;

use std::time::Duration;

use axum::{
    Json as Answer,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use bus_core::{
    cloudevent::{CloudEvent, Draft, EventError, EventErrorKind, Limits, Submission, parse_http},
    ids::EventUid,
    pg::IfThere,
};
use bytes::Bytes;
use http::{Extensions, HeaderMap, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use self::idempotency::{read_idempotency, unwanted_key};
use super::{
    Api,
    auth::{Principal, PublishAccess, by},
    extract::read_body,
    limits::{refusal, with_standings},
    openapi::PublishProblems,
    problem::{FieldError, Problem, ProblemType},
    schedules::{MissedName, OverlapName, ScheduleView, store_schedule},
};
use crate::ingest::{Accepted, Idempotency, Publish, PublishError};

/// When to try again while too much waits to be fanned out.
const BACKLOG_RETRY: Duration = Duration::from_secs(5);

/// What became of an event
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct AcceptedEvent {
    /// The CloudEvents `id`; the `uid` if the event had none.
    id: String,
    /// The bus's own id, unique.
    #[schema(value_type = Uuid)]
    uid: EventUid,
    /// The CloudEvents `source`.
    source: String,
    r#type: String,
    /// The CloudEvents `time`; when the event arrived if it had none.
    #[schema(value_type = String, format = DateTime)]
    time: Timestamp,
    /// It had been published before, and nothing is delivered again; absent if not.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    duplicate: bool,
}

impl From<Accepted> for AcceptedEvent {
    fn from(accepted: Accepted) -> Self {
        let identity = accepted.identity;
        Self {
            id: identity.id,
            uid: identity.uid,
            source: identity.source,
            r#type: identity.r#type,
            time: microseconds(identity.time),
            duplicate: accepted.duplicate,
        }
    }
}

/// What became of the events of a batch, in its order
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct AcceptedBatch {
    items: Vec<AcceptedEvent>,
}

/// One event or several
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "the document's name for the two forms of the answer")]
pub(super) enum AcceptedAnswer {
    /// The answer to one event.
    One(AcceptedEvent),
    /// The answer to a batch.
    Batch(AcceptedBatch),
}

/// An event as plain JSON. Members that are not listed are CloudEvents extension attributes: 1 to 20 of
/// a–z and 0–9, with a string, a boolean or a 32-bit integer
#[derive(Serialize, ToSchema)]
#[allow(dead_code, reason = "describes what bus_core::cloudevent reads")]
pub(super) struct PlainEvent {
    #[schema(min_length = 1, max_length = 255)]
    r#type: String,
    /// The payload: any JSON value. `null` is one too.
    #[schema(required = false)]
    data: serde_json::Value,
    /// The payload as Base64, instead of `data`.
    data_base64: Option<String>,
    #[schema(max_length = 1024)]
    subject: Option<String>,
    /// A URI reference; `/connections/<id>` or `/organizations/<id>` of the key if absent.
    #[schema(max_length = 1024, format = "uri-reference")]
    source: Option<String>,
    /// Unique within the source; generated if absent.
    #[schema(max_length = 255)]
    id: Option<String>,
    /// Now if absent.
    #[schema(value_type = Option<String>, format = DateTime)]
    time: Option<String>,
    datacontenttype: Option<String>,
    #[schema(format = "uri")]
    dataschema: Option<String>,
    /// When the event is to be delivered, with an offset or `Z`, at most 366 days ahead unless configured otherwise. The
    /// subscriptions that match then get it. At once if it is over. The extension attribute `deliverat` is the same.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(rename = "deliverAt")]
    deliver_at: Option<String>,
    /// The event recurs: five fields, or six with the seconds first. Goes with a single event without `id`, `time` and
    /// `deliverAt`; the members below go with `cron`.
    #[schema(max_length = 255)]
    cron: Option<String>,
    /// The IANA name of the time zone that `cron` is in; `UTC` if absent.
    #[schema(max_length = 255)]
    timezone: Option<String>,
    /// No occurrence before this time.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(rename = "startsAt")]
    starts_at: Option<String>,
    /// No occurrence after this time.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(rename = "endsAt")]
    ends_at: Option<String>,
    /// Each occurrence comes up to so many milliseconds later; 0 if absent.
    #[schema(maximum = 86_400_000)]
    #[serde(rename = "jitterMs")]
    jitter_ms: Option<u32>,
    /// What becomes of occurrences whose time went by while nothing could publish them; `fire_once` if absent.
    missed: Option<MissedName>,
    /// How many of them are published with `catch_up`; 100 if absent.
    #[schema(minimum = 1, maximum = 1000)]
    #[serde(rename = "catchUpLimit")]
    catch_up_limit: Option<u32>,
    /// What becomes of an occurrence while the one before still has open deliveries; `allow` if absent.
    overlap: Option<OverlapName>,
}

/// One event or a batch
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code, clippy::large_enum_variant, reason = "the document's name for the two forms of the body")]
enum PlainBody {
    One(PlainEvent),
    Batch(Vec<PlainEvent>),
}

/// The payload of an event in binary mode; its attributes are in the `ce-` headers
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(dead_code, reason = "the document's name for bytes")]
struct BinaryPayload(Vec<u8>);

/// How a request may be told from others.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "describes what read_idempotency reads")]
struct IdempotencyHeader {
    /// For plain JSON: the same key with the same body publishes once within the deduplication window. A
    /// structured-field string (`"…"`) or a bare token of 1 to 255 printable ASCII characters.
    #[param(rename = "Idempotency-Key", value_type = Option<String>, nullable = false)]
    idempotency_key: Option<String>,
}

/// An event in the JSON format of CloudEvents 1.0, with any extension attributes
#[derive(Serialize, ToSchema)]
#[schema(as = CloudEvent)]
#[allow(dead_code, reason = "describes what bus_core::cloudevent reads")]
pub(super) struct CloudEventBody {
    #[schema(pattern = "^1\\.0$")]
    specversion: String,
    #[schema(min_length = 1, max_length = 255)]
    id: String,
    #[schema(min_length = 1, max_length = 1024, format = "uri-reference")]
    source: String,
    #[schema(min_length = 1, max_length = 255)]
    r#type: String,
    #[schema(max_length = 1024)]
    subject: Option<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    time: Option<String>,
    datacontenttype: Option<String>,
    #[schema(format = "uri")]
    dataschema: Option<String>,
    /// When the event is to be delivered: see `deliverAt` of plain JSON.
    #[schema(value_type = Option<String>, format = DateTime)]
    deliverat: Option<String>,
    /// The payload: any JSON value.
    #[schema(required = false)]
    data: serde_json::Value,
    /// The payload as Base64, instead of `data`.
    data_base64: Option<String>,
}

/// Publish one event or a batch
///
/// Plain JSON (an object, or an array for a batch), or CloudEvents 1.0 in structured, batch or binary
/// mode (`ce-` headers, the payload as the body). The answer comes when the events are committed: from
/// then on they reach every subscription that matches. An event with an `id` that was published before
/// from the same `source`, within the deduplication window, is not published again.
///
/// An event with `deliverAt` is stored now and published then. A single event in plain JSON with `cron` makes a
/// schedule, or finds the one with the same `type`, `source`, `cron` and `timezone`, which stays as it is.
#[utoipa::path(
    post,
    path = "/v1/events",
    tag = "events",
    operation_id = "publishEvents",
    params(IdempotencyHeader),
    request_body(content(
        (PlainBody = "application/json"),
        (CloudEventBody = "application/cloudevents+json"),
        (Vec<CloudEventBody> = "application/cloudevents-batch+json"),
        (BinaryPayload = "*/*")
    )),
    responses(
        (status = 202, description = "Committed", body = AcceptedAnswer),
        (status = 201, description = "The new schedule", body = ScheduleView),
        (status = 200, description = "The schedule that was there", body = ScheduleView),
        PublishProblems
    ),
    security(("apiKey" = ["publish"]))
)]
pub(super) async fn publish(
    State(api): State<Api>,
    access: PublishAccess,
    request: Request,
) -> Result<Response, Problem> {
    if api.backlog.is_full() {
        let detail = "too many events wait to be fanned out; nothing was published";
        return Err(Problem {
            retry_after: Some(BACKLOG_RETRY),
            ..Problem::new(ProblemType::Backlog, detail)
        });
    }
    let (parts, body) = request.into_parts();
    let body = read_body(&api.room, &parts.headers, body, api.max_body_bytes).await?;
    let idempotency = read_idempotency(&parts.headers, &body.bytes)?;
    let now = microseconds(api.clock.now());
    let submission = submission(&api, &parts.headers, &body.bytes, now)?;
    if matches!(&submission, Submission::Single(draft) if draft.schedule.is_some()) && idempotency.is_some() {
        return Err(unwanted_key());
    }
    let count = match &submission {
        Submission::Single(_) => 1,
        Submission::Batch(drafts) => drafts.len(),
    };
    let verdict = api.publish_limits.judge(access.principal.organization, count as u64).await;
    let answer = match refusal(&verdict) {
        Some(refused) => Err(refused),
        None => store(&api, access, submission, idempotency, now, &parts.extensions).await,
    };
    Ok(with_standings(&verdict, answer))
}

/// Publishes what the organization's limits let through.
async fn store(
    api: &Api,
    access: PublishAccess,
    submission: Submission,
    idempotency: Option<Idempotency>,
    now: Timestamp,
    extensions: &Extensions,
) -> Result<Response, Problem> {
    let (drafts, batch) = match submission {
        Submission::Single(draft) if draft.schedule.is_some() => {
            let principal = access.confirmed(api).await?;
            let by = by(api, principal.actor(), extensions);
            return store_schedule(api, &principal, draft, IfThere::Keep, &by).await;
        }
        Submission::Single(draft) => (vec![draft], false),
        Submission::Batch(drafts) => (drafts, true),
    };
    let explicit_id = drafts.iter().map(|draft| draft.id.is_some()).collect();
    let deliver_at: Vec<Option<Timestamp>> =
        drafts.iter().map(|draft| draft.deliver_at.map(not_early)).collect();
    // Of an event that is due later, the uid is of that time: see `EventUid::received_at`.
    let uids: Vec<EventUid> = deliver_at
        .iter()
        .map(|at| match at.filter(|at| *at > now) {
            Some(at) => EventUid::at(at, api.ids.next()),
            None => EventUid(api.ids.next()),
        })
        .collect();
    let events = drafts
        .into_iter()
        .zip(&uids)
        .map(|(draft, uid)| complete(draft, *uid, &access.principal, now))
        .collect();
    let publish =
        Publish { principal: access.principal, at: now, events, explicit_id, deliver_at, uids, idempotency };
    let accepted = match api.ingest.publish(publish).await {
        Ok(accepted) => accepted,
        Err(refused) => return Err(not_published(api, access, refused).await),
    };
    let mut items = accepted.into_iter().map(AcceptedEvent::from);
    let answer = match (batch, items.next()) {
        (false, Some(one)) => Answer(one).into_response(),
        (_, first) => {
            Answer(AcceptedBatch { items: first.into_iter().chain(items).collect() }).into_response()
        }
    };
    Ok((StatusCode::ACCEPTED, answer).into_response())
}

/// Reads the events of a request that arrived `now`.
pub(super) fn submission(
    api: &Api,
    headers: &HeaderMap,
    body: &Bytes,
    now: Timestamp,
) -> Result<Submission, EventError> {
    let limits = Limits { deliver_before: Some(api.schedules.deliver_before(now)), ..api.limits };
    parse_http(headers, body, &limits)
}

/// The database keeps microseconds, and the answer to a repeated request must be the first one's.
pub(super) fn microseconds(time: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time)
}

/// As the database keeps it: a time between two microseconds is not cut off but rounded up (invariant I5).
fn not_early(due: Timestamp) -> Timestamp {
    let cut = microseconds(due);
    if cut < due { cut.saturating_add(SignedDuration::from_micros(1)).unwrap_or(due) } else { due }
}

/// Fills in what plain JSON may leave out.
pub(super) fn complete(draft: Draft, uid: EventUid, principal: &Principal, now: Timestamp) -> CloudEvent {
    draft.complete(|| uid.to_string(), || default_source(principal), now)
}

/// The source of events that name none.
pub(super) fn default_source(principal: &Principal) -> String {
    match principal.connection {
        Some(connection) => format!("/connections/{connection}"),
        None => format!("/organizations/{}", principal.organization),
    }
}

async fn not_published(api: &Api, access: PublishAccess, refused: PublishError) -> Problem {
    match refused {
        PublishError::KeyRevoked => {
            api.key_cache.forget(&access.credential).await;
            Problem::new(ProblemType::Unauthorized, "the key was revoked or has expired")
        }
        PublishError::IdempotencyMismatch => Problem::new(
            ProblemType::IdempotencyKeyReused,
            "this Idempotency-Key was used with another body; use a new key for a new request",
        ),
        PublishError::Busy { retry_after } => {
            Problem::overloaded("too many events wait for their commit; nothing was published", retry_after)
        }
        PublishError::TooManyDeliveries { limit } => Problem::new(
            ProblemType::TooLarge,
            format!(
                "the events of this request would make more than {limit} deliveries; nothing was published: split the \
                 batch and publish its parts one after the other"
            ),
        ),
        PublishError::Interrupted { retry_after } => {
            let unknown = Problem::new(
                ProblemType::Unavailable,
                "publishing was interrupted, and it is not known whether the events were published; repeating the \
                 request with the same event ids or the same Idempotency-Key is safe and publishes them once",
            );
            Problem { retry_after: Some(retry_after), ..unknown }
        }
        // The committer has logged it, once for all requests that failed together.
        PublishError::Store(cause) => Problem { cause: None, ..Problem::store(cause) },
    }
}

impl From<EventError> for Problem {
    fn from(error: EventError) -> Self {
        let kind = match error.kind {
            EventErrorKind::Malformed => ProblemType::MalformedEvent,
            EventErrorKind::UnsupportedMedia => ProblemType::UnsupportedMediaType,
            EventErrorKind::TooLarge | EventErrorKind::TooMany => ProblemType::TooLarge,
            EventErrorKind::InvalidAttribute | EventErrorKind::InvalidData | EventErrorKind::NotSupported => {
                ProblemType::InvalidFields
            }
        };
        let place = match (error.pointer, error.header) {
            (Some(pointer), _) => Some(FieldError::at(pointer, error.detail.clone())),
            (None, Some(header)) => Some(FieldError::header(header, error.detail.clone())),
            (None, None) if kind == ProblemType::InvalidFields => {
                Some(FieldError::at("", error.detail.clone()))
            }
            (None, None) => None,
        };
        Self { errors: place.into_iter().collect(), ..Self::new(kind, error.detail) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i5_what_the_database_cannot_keep_makes_no_event_early() {
        for (due, kept) in [
            ("2030-01-01T00:00:00.123456Z", "2030-01-01T00:00:00.123456Z"),
            ("2030-01-01T00:00:00.123456001Z", "2030-01-01T00:00:00.123457Z"),
            ("2030-01-01T00:00:00.999999999Z", "2030-01-01T00:00:01Z"),
        ] {
            let due: Timestamp = due.parse().expect("a time");
            assert_eq!(not_early(due).to_string(), kept);
        }
    }
}
