//! The OpenAPI document's common parts; each handler describes itself.

use std::collections::BTreeMap;

use http::StatusCode;
use utoipa::{
    Modify, OpenApi,
    openapi::{
        Content, HeaderBuilder, Object, OpenApi as Document, Ref, RefOr, Response, ResponseBuilder, Type,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::problem::{FieldError, PROBLEM_JSON, ProblemBody, ProblemType};

/// The document without its paths.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Event bus",
        description = "Publish CloudEvents, and say what is to be delivered where. Every error is an \
                       `application/problem+json` (RFC 9457) whose `type` is stable.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "events", description = "Publish events and read what became of them"),
        (name = "schedules", description = "Events that recur"),
        (name = "dead-letters", description = "Deliveries that were given up"),
        (name = "replays", description = "Jobs that bring deliveries back, or discard dead letters"),
        (name = "erasures", description = "Jobs that empty payloads"),
        (name = "connections", description = "Who publishes, and where events go"),
        (name = "subscriptions", description = "What a connection receives"),
        (name = "admin", description = "Organizations and their API keys"),
        (name = "audit", description = "Who changed what"),
        (name = "meta", description = "This document"),
    ),
    components(schemas(ProblemBody<'static>, FieldError)),
    modifiers(&SecuritySchemes),
)]
pub(super) struct Base;

struct SecuritySchemes;

impl Modify for SecuritySchemes {
    fn modify(&self, document: &mut Document) {
        let bearer = |description: &str| {
            let scheme =
                HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(description)).build();
            SecurityScheme::Http(scheme)
        };
        let components = document.components.get_or_insert_default();
        components.add_security_scheme(
            "apiKey",
            bearer(
                "A key of an organization (`ebk_…`); the scopes that an operation needs are listed with it",
            ),
        );
        components
            .add_security_scheme("adminToken", bearer("The administrator's token, from the configuration"));
    }
}

/// The answers to a request that met one of these problems.
pub(super) fn problem_responses(kinds: &[ProblemType]) -> BTreeMap<String, RefOr<Response>> {
    let mut by_status: BTreeMap<u16, Vec<ProblemType>> = BTreeMap::new();
    for kind in kinds {
        by_status.entry(kind.status().as_u16()).or_default().push(*kind);
    }
    by_status
        .into_iter()
        .map(|(status, kinds)| (status.to_string(), problem_response(status, &kinds).into()))
        .collect()
}

fn problem_response(status: u16, kinds: &[ProblemType]) -> Response {
    let lines: Vec<_> = kinds.iter().map(|kind| format!("`{}`: {}", kind.slug(), kind.meaning())).collect();
    let mut response = ResponseBuilder::new()
        .description(lines.join("\n\n"))
        .content(PROBLEM_JSON, Content::new(Some(Ref::from_schema_name("Problem"))));
    let header = |description: &str, r#type: Type| {
        HeaderBuilder::new().schema(Some(Object::with_type(r#type))).description(Some(description)).build()
    };
    if status == StatusCode::SERVICE_UNAVAILABLE || status == StatusCode::TOO_MANY_REQUESTS {
        response = response.header("Retry-After", header("When to try again, seconds", Type::Integer));
    }
    if status == StatusCode::UNAUTHORIZED {
        response = response.header("WWW-Authenticate", header("`Bearer`", Type::String));
    }
    response.build()
}

/// Names sets of problems, for the `responses(…)` of handlers. What any authenticated request may meet
/// is in every set.
macro_rules! problem_sets {
    ($($(#[$doc:meta])* $name:ident = $($kind:ident),*;)*) => {
        $(
            $(#[$doc])*
            pub(super) struct $name;

            impl utoipa::IntoResponses for $name {
                fn responses() -> BTreeMap<String, RefOr<Response>> {
                    problem_responses(&[
                        $(ProblemType::$kind,)*
                        ProblemType::Unauthorized,
                        ProblemType::Forbidden,
                        ProblemType::Internal,
                        ProblemType::Unavailable,
                    ])
                }
            }
        )*
    };
}

problem_sets! {
    /// Reading or deleting one thing.
    OneProblems = NotFound;
    /// Reading a list.
    ListProblems = InvalidFields;
    /// Reading a list that belongs to one thing.
    SublistProblems = NotFound, InvalidFields;
    /// Creating something with a unique name.
    NamedProblems = MalformedRequest, MalformedJson, RequestTimeout, NameTaken, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Changing something with a unique name.
    RenameProblems = MalformedRequest, MalformedJson, NotFound, RequestTimeout, NameTaken, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Creating something below something else.
    ChildProblems = MalformedRequest, MalformedJson, NotFound, RequestTimeout, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Changing something of which there is a limit.
    ChildLimitProblems = MalformedRequest, MalformedJson, NotFound, RequestTimeout, LimitReached, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Creating a subscription.
    SubscribeProblems = MalformedRequest, MalformedJson, RequestTimeout, LimitReached, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Changing a subscription.
    ResubscribeProblems = MalformedRequest, MalformedJson, NotFound, RequestTimeout, SubscriptionExists,
        LimitReached, TooLarge, UnsupportedMediaType, InvalidFields, Overloaded;
    /// Replacing a connection's subscriptions.
    SyncProblems = MalformedRequest, MalformedJson, NotFound, RequestTimeout, LimitReached, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Publishing.
    PublishProblems = MalformedRequest, MalformedJson, MalformedEvent, InvalidIdempotencyKey, RequestTimeout,
        LimitReached, ScheduleTaken, TooLarge, UnsupportedMediaType, InvalidFields, IdempotencyKeyReused,
        QuotaExceeded, Backlog, Overloaded;
    /// Changing a schedule.
    PutScheduleProblems = MalformedRequest, MalformedJson, MalformedEvent, InvalidIdempotencyKey, RequestTimeout,
        LimitReached, ScheduleTaken, TooLarge, UnsupportedMediaType, InvalidFields, Overloaded;
    /// Doing something with a schedule that is not over.
    OngoingProblems = NotFound, ScheduleOver;
    /// Explaining.
    ExplainProblems = MalformedRequest, MalformedJson, MalformedEvent, RequestTimeout, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Reading an event.
    EventProblems = NotFound, AmbiguousEvent, InvalidFields;
    /// Cancelling an event.
    CancelProblems = NotFound, AmbiguousEvent, InvalidFields, Unconfirmed;
    /// Acknowledging an event.
    AckProblems = MalformedRequest, MalformedJson, NotFound, RequestTimeout, AmbiguousEvent, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Starting a job over many things.
    JobProblems = MalformedRequest, MalformedJson, InvalidIdempotencyKey, RequestTimeout, LimitReached, TooLarge,
        UnsupportedMediaType, InvalidFields, IdempotencyKeyReused, Overloaded;
    /// Starting a job about a subscription.
    SubscriptionJobProblems = MalformedRequest, MalformedJson, InvalidIdempotencyKey, NotFound, RequestTimeout,
        LimitReached, TooLarge, UnsupportedMediaType, InvalidFields, IdempotencyKeyReused, Overloaded;
    /// Erasing payloads.
    ErasureProblems = MalformedRequest, MalformedJson, RequestTimeout, LimitReached, NotPublished, TooLarge,
        UnsupportedMediaType, InvalidFields, Overloaded;
    /// Erasing an event's payload.
    EventErasureProblems = NotFound, AmbiguousEvent, LimitReached, NotPublished, InvalidFields;
    /// Replaying a dead letter.
    DeadLetterJobProblems = NotFound, Expunged;
    /// Starting a job about an event.
    EventJobProblems = MalformedRequest, MalformedJson, InvalidIdempotencyKey, NotFound, RequestTimeout,
        AmbiguousEvent, LimitReached, NotPublished, Expunged, TooLarge, UnsupportedMediaType, InvalidFields,
        IdempotencyKeyReused, Overloaded;
}
