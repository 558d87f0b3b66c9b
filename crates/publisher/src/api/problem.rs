//! Errors, as `application/problem+json` (RFC 9457).

use std::{sync::Arc, time::Duration};

use axum::response::{IntoResponse, Response};
use bus_core::{ids::EventUid, pg::StoreError};
use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde::Serialize;
use utoipa::ToSchema;

/// The media type of a problem.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What every problem's `type` starts with. A URN of our own needs no server and never moves.
pub const TYPE_PREFIX: &str = "urn:event-bus:problem:";

/// The registered type of this problem (draft-ietf-httpapi-ratelimit-headers-10).
const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";

/// How long a client waits when the database, or what carries hints, is away.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(2);

macro_rules! problems {
    ($($name:ident $slug:literal $status:ident $title:literal $meaning:literal;)*) => {
        /// Every kind of problem that the API answers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ProblemType {
            $(#[doc = $meaning] $name,)*
        }

        impl ProblemType {
            /// All of them, by status.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The last part of `type`; stable.
            pub fn slug(self) -> &'static str {
                match self { $(Self::$name => $slug,)* }
            }

            /// What a problem of this kind has as its `type`.
            pub fn uri(self) -> String {
                match self {
                    // It has a name that everybody knows.
                    Self::QuotaExceeded => QUOTA_EXCEEDED.to_owned(),
                    _ => format!("{TYPE_PREFIX}{}", self.slug()),
                }
            }

            /// The HTTP status.
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)* }
            }

            /// A short text for people, the same for every occurrence.
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }

            /// When it is answered, for the documentation.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }
        }
    };
}

problems! {
    MalformedRequest "malformed-request" BAD_REQUEST "The request cannot be read"
        "The body did not arrive completely, or the request breaks HTTP.";
    MalformedJson "malformed-json" BAD_REQUEST "The body is not JSON"
        "The body is not JSON (RFC 8259).";
    MalformedEvent "malformed-event" BAD_REQUEST "The body is not an event"
        "The body, or the headers in binary mode, cannot be read as CloudEvents or plain JSON events.";
    InvalidIdempotencyKey "invalid-idempotency-key" BAD_REQUEST "The Idempotency-Key cannot be used"
        "`Idempotency-Key` is not a string of 1 to 255 printable ASCII characters, the events are not plain JSON, or one recurs.";
    Unauthorized "unauthorized" UNAUTHORIZED "No valid credential"
        "The request has no `Authorization: Bearer` header, or the key is unknown, revoked or has expired.";
    Forbidden "forbidden" FORBIDDEN "The credential does not allow this"
        "The credential is valid, but lacks the scope for this operation.";
    NotFound "not-found" NOT_FOUND "There is no such thing"
        "The path is unknown, or the organization has nothing with this id.";
    MethodNotAllowed "method-not-allowed" METHOD_NOT_ALLOWED "The path does not have this method"
        "`Allow` says which methods the path has.";
    RequestTimeout "request-timeout" REQUEST_TIMEOUT "The body took too long"
        "The body was not complete within 30 seconds.";
    NameTaken "name-taken" CONFLICT "The name is taken"
        "Another organization, or another connection of the organization, has this name.";
    SubscriptionExists "subscription-exists" CONFLICT "There is a subscription like that already"
        "The change would make the subscription equal to another one of its connection.";
    LimitReached "limit-reached" CONFLICT "A limit of the organization is reached"
        "The organization has the most subscriptions, the most memory for their filters, the most unfinished replays or erasures, or the most schedules that it can have; or no lane is free.";
    AmbiguousEvent "ambiguous-event" CONFLICT "Several events have this id"
        "Several events have this CloudEvents id; `uids` names them, newest first, at most 20.";
    NotPublished "not-published" CONFLICT "The event is not published"
        "The event is due later, or was cancelled before it was due.";
    Expunged "expunged" CONFLICT "The event's payload was erased"
        "The payload of the event was erased, so that nothing can be delivered.";
    ScheduleTaken "schedule-taken" CONFLICT "The schedule belongs to another connection"
        "Another connection of the organization has a schedule with this type, source, cron and time zone.";
    ScheduleOver "schedule-over" CONFLICT "The schedule is over"
        "The schedule has ended, or was cancelled.";
    TooLarge "too-large" PAYLOAD_TOO_LARGE "The request is too large"
        "The body, an event, or a batch is larger than its limit, or a batch would make too many deliveries.";
    UnsupportedMediaType "unsupported-media-type" UNSUPPORTED_MEDIA_TYPE "The content type is not supported"
        "The operation does not take this `Content-Type`.";
    InvalidFields "invalid-fields" UNPROCESSABLE_ENTITY "Some values cannot be used"
        "`errors` says which values, and what to change.";
    IdempotencyKeyReused "idempotency-key-reused" UNPROCESSABLE_ENTITY "The Idempotency-Key belongs to another request"
        "The key was used with another body within the deduplication window.";
    QuotaExceeded "quota-exceeded" TOO_MANY_REQUESTS "The organization publishes more than it may"
        "The organization publishes faster, or more in this period, than it may; nothing was published. `violated-policies` names the limit, and `Retry-After` says when to try again.";
    Internal "internal" INTERNAL_SERVER_ERROR "Something is wrong with the event bus"
        "An error of the event bus itself; the log has it under the `requestId`.";
    Backlog "backlog" SERVICE_UNAVAILABLE "Too much waits to be fanned out"
        "Nothing was published: too many events that were accepted before are still waiting for the broker. `Retry-After` says when to try again.";
    Overloaded "overloaded" SERVICE_UNAVAILABLE "There is too much to do"
        "Nothing was done, for want of room. `Retry-After` says when to try again.";
    Unconfirmed "unconfirmed" SERVICE_UNAVAILABLE "It is not certain yet that everyone knows"
        "What was asked for is recorded, but not every process could be told. `Retry-After` says when to repeat the request, which makes sure.";
    Unavailable "unavailable" SERVICE_UNAVAILABLE "The database is away"
        "It is not known whether the request took effect. `Retry-After` says when to try again.";
}

/// What is wrong with one value of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FieldError {
    /// Where in the body: a JSON pointer (RFC 6901).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pointer: Option<String>,
    /// Which query parameter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameter: Option<String>,
    /// Which header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// What to change.
    pub detail: String,
    /// At which character of the value, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<usize>,
}

impl FieldError {
    fn new(detail: impl Into<String>) -> Self {
        Self { pointer: None, parameter: None, header: None, detail: detail.into(), position: None }
    }

    /// At a place in the body.
    pub fn at(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: Some(pointer.into()), ..Self::new(detail) }
    }

    /// In the query.
    pub fn parameter(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { parameter: Some(name.into()), ..Self::new(detail) }
    }

    /// In the headers.
    pub fn header(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { header: Some(name.into()), ..Self::new(detail) }
    }
}

/// An error on its way to the client. The outermost layer of the router renders it, because only it
/// knows the request's id.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What kind.
    pub kind: ProblemType,
    /// This occurrence, for people. Nothing internal: the client reads it.
    pub detail: String,
    /// What is wrong with which value.
    pub errors: Vec<FieldError>,
    /// Which events an ambiguous id may mean.
    pub uids: Vec<EventUid>,
    /// Which limit stands against the request.
    pub violated_policy: Option<&'static str>,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// What went wrong inside, for the log.
    pub cause: Option<Arc<StoreError>>,
}

/// A problem's body.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Problem)]
pub struct ProblemBody<'a> {
    /// `urn:event-bus:problem:` and the name of the kind of problem, but for the registered
    /// `https://iana.org/assignments/http-problem-types#quota-exceeded`. Stable: programs may test it.
    #[schema(example = "urn:event-bus:problem:invalid-fields")]
    r#type: String,
    /// The kind of problem, for people.
    title: &'a str,
    /// The HTTP status.
    status: u16,
    /// This occurrence, for people.
    detail: &'a str,
    /// The request's id, as in `x-request-id` and in the log.
    request_id: &'a str,
    /// What is wrong with which value.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    #[schema(required = false)]
    errors: &'a [FieldError],
    /// Which events an ambiguous id may mean, newest first.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    #[schema(value_type = Vec<uuid::Uuid>, required = false)]
    uids: &'a [EventUid],
    /// Which limits stand against the request: names of `RateLimit-Policy`.
    #[serde(rename = "violated-policies", skip_serializing_if = "<[_]>::is_empty")]
    #[schema(value_type = Vec<String>, required = false)]
    violated_policies: &'a [&'static str],
}

impl Problem {
    /// A problem without particulars.
    pub fn new(kind: ProblemType, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            errors: Vec::new(),
            uids: Vec::new(),
            violated_policy: None,
            retry_after: None,
            cause: None,
        }
    }

    /// The organization has nothing with this id, or the path is unknown.
    pub fn not_found() -> Self {
        Self::new(ProblemType::NotFound, "there is nothing at this path that this credential may see")
    }

    /// Some values cannot be used.
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let detail = match errors.as_slice() {
            [one] => one.detail.clone(),
            several => format!("{} values cannot be used; see `errors`", several.len()),
        };
        Self { errors, ..Self::new(ProblemType::InvalidFields, detail) }
    }

    /// One value of the body cannot be used.
    pub fn invalid_at(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::invalid(vec![FieldError::at(pointer, detail)])
    }

    /// There is no room now. Nothing was done.
    pub fn overloaded(detail: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(ProblemType::Overloaded, detail) }
    }

    /// It is recorded, but not certain to be known everywhere.
    pub fn unconfirmed(detail: impl Into<String>) -> Self {
        Self { retry_after: Some(UNAVAILABLE_RETRY), ..Self::new(ProblemType::Unconfirmed, detail) }
    }

    /// Something that is needed is away.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self { retry_after: Some(UNAVAILABLE_RETRY), ..Self::new(ProblemType::Unavailable, detail) }
    }

    /// The fault of the event bus.
    pub fn internal() -> Self {
        Self::new(
            ProblemType::Internal,
            "the request could not be handled; the requestId finds the reason in the log",
        )
    }

    /// The database failed.
    pub fn store(cause: Arc<StoreError>) -> Self {
        let mut problem = if cause.is_unavailable() {
            Self::unavailable("the database did not answer; it is not known whether the request took effect")
        } else {
            Self::internal()
        };
        problem.cause = Some(cause);
        problem
    }

    /// What a bare error status of the HTTP machinery means.
    pub(super) fn from_status(status: StatusCode) -> Self {
        match status {
            StatusCode::NOT_FOUND => Self::not_found(),
            StatusCode::METHOD_NOT_ALLOWED => Self::new(
                ProblemType::MethodNotAllowed,
                "this path does not have this method; see the Allow header",
            ),
            StatusCode::PAYLOAD_TOO_LARGE => Self::new(ProblemType::TooLarge, "the body is too large"),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                Self::new(ProblemType::UnsupportedMediaType, "this operation does not take this content type")
            }
            StatusCode::REQUEST_TIMEOUT => Self::new(ProblemType::RequestTimeout, "the body took too long"),
            status if status.is_client_error() => {
                Self::new(ProblemType::MalformedRequest, "the request cannot be read")
            }
            _ => Self::internal(),
        }
    }

    /// Writes the problem into `response`, whose own headers stay.
    pub(super) fn render(&self, response: &mut Response, request_id: &str) {
        let status = self.kind.status();
        let body = ProblemBody {
            r#type: self.kind.uri(),
            title: self.kind.title(),
            status: status.as_u16(),
            detail: &self.detail,
            request_id,
            errors: &self.errors,
            uids: &self.uids,
            violated_policies: self.violated_policy.as_slice(),
        };
        let body = serde_json::to_vec(&body).expect("a problem has no map and no failing serializer");
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some(after) = self.retry_after {
            // Whole seconds, never earlier than meant (RFC 9110 §10.2.3).
            let seconds = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0));
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.kind == ProblemType::Unauthorized {
            let challenge = HeaderValue::from_static(r#"Bearer realm="event-bus""#);
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        // The router has counted the empty body already.
        response.headers_mut().remove(CONTENT_LENGTH);
        *response.body_mut() = body.into();
    }
}

impl From<StoreError> for Problem {
    fn from(cause: StoreError) -> Self {
        Self::store(Arc::new(cause))
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn slugs_are_distinct_and_fit_a_urn() {
        let slugs: HashSet<_> = ProblemType::ALL.iter().map(|kind| kind.slug()).collect();
        assert_eq!(slugs.len(), ProblemType::ALL.len());
        assert!(slugs.iter().all(|slug| slug.chars().all(|c| c.is_ascii_lowercase() || c == '-')));
    }

    #[test]
    fn the_catalogue_in_the_documentation_is_complete() {
        let documented = include_str!("../../../../docs/api.md");
        for kind in ProblemType::ALL {
            let line = format!("| `{}` | {} | {} |", kind.slug(), kind.status().as_u16(), kind.meaning());
            assert!(documented.contains(&line), "docs/api.md lacks this line:\n{line}");
        }
        let lines = documented.lines().filter(|line| {
            line.starts_with("| `") && line.contains("` | 4")
                || line.starts_with("| `") && line.contains("` | 5")
        });
        assert_eq!(lines.count(), ProblemType::ALL.len(), "docs/api.md has a problem that does not exist");
    }

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        let mut problem = Problem::internal();
        problem.retry_after = Some(Duration::from_millis(1_200));
        let mut response = StatusCode::OK.into_response();
        problem.render(&mut response, "x");
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        problem.retry_after = Some(Duration::MAX);
        problem.render(&mut response, "x");
        assert_eq!(response.headers()[RETRY_AFTER], u64::MAX.to_string());
        assert_eq!(response.headers()[CONTENT_TYPE], PROBLEM_JSON);
    }
}
