//! What every request and every answer has: an id, a log line, metrics, and an error in one form.

use std::{any::Any, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bus_core::telemetry::Chain;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tracing::Instrument as _;

use super::{
    Api, drain,
    problem::{Problem, ProblemType},
};

/// Names a request, in the answer and in the log.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that is taken from a client.
const MAX_REQUEST_ID: usize = 128;

/// Answers so far, by `method`, `route` and `status`.
const REQUESTS: &str = "bus_http_requests";

/// How long they took, by `method` and `route`.
const DURATION: &str = "bus_http_request_duration_seconds";

/// Declares the metrics of this module.
pub(super) fn describe_metrics() {
    metrics::describe_counter!(REQUESTS, "Answered HTTP requests");
    metrics::describe_histogram!(
        DURATION,
        metrics::Unit::Seconds,
        "From the head of an HTTP request to the head of its answer"
    );
}

/// The id of a request, among its extensions.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Runs around everything else, the fallbacks included.
pub(super) async fn finish(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(request.headers()).unwrap_or_else(|| {
        HeaderValue::try_from(api.ids.next().to_string()).expect("a UUID is visible ASCII")
    });
    // The pattern, not the path: a label must have few values.
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let method = method_label(request.method());
    let text = id.to_str().expect("request_id lets only visible ASCII pass").to_owned();
    let span = tracing::info_span!("request", request.id = %text, http.method = method, http.route = %route);
    request.extensions_mut().insert(RequestId(text.clone()));
    let (request, leftover) = drain::lend(request);
    let mut response = next.run(request).instrument(span.clone()).await;

    let status = response.status();
    let problem = response.extensions_mut().remove::<Problem>().or_else(|| {
        (status.is_client_error() || status.is_server_error()).then(|| Problem::from_status(status))
    });
    if let Some(problem) = &problem {
        problem.render(&mut response, &text);
        span.in_scope(|| log(problem));
        if let Some(leftover) = leftover {
            leftover.drain().await;
        }
    }
    response.headers_mut().insert(REQUEST_ID, id);
    // The browser must neither guess the type of what it gets nor keep it.
    response.headers_mut().insert(http::header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response.headers_mut().entry(http::header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));

    let duration = begun.elapsed();
    let status = response.status();
    span.in_scope(|| {
        tracing::debug!(
            http.status = status.as_u16(),
            duration_ms = duration.as_millis(),
            "Request answered"
        );
    });
    metrics::counter!(REQUESTS, "method" => method, "route" => route.clone(), "status" => status_label(status))
        .increment(1);
    metrics::histogram!(DURATION, "method" => method, "route" => route).record(duration.as_secs_f64());
    response
}

/// A client's own id, if it is short and harmless in a log line.
fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(REQUEST_ID)?;
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
    (!value.is_empty() && value.len() <= MAX_REQUEST_ID && value.as_bytes().iter().all(harmless))
        .then(|| value.clone())
}

/// A client may send any token as a method; only those that we have become labels.
fn method_label(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        _ => "other",
    }
}

fn status_label(status: StatusCode) -> String {
    status.as_str().to_owned()
}

/// Errors are logged once, here. What the client did wrong is the client's to read.
fn log(problem: &Problem) {
    match (&problem.cause, problem.kind) {
        (Some(cause), ProblemType::Unavailable) => {
            tracing::warn!(error = %Chain(&**cause), "Request failed: the database is away");
        }
        (Some(cause), _) => tracing::error!(error = %Chain(&**cause), "Request failed"),
        (None, kind) => tracing::debug!(problem = kind.slug(), "Request refused"),
    }
}

/// A handler that panicked.
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = message, "Request handler panicked");
    Problem::internal().into_response()
}

/// No route.
pub(super) async fn not_found() -> Problem {
    Problem::not_found()
}

/// A route without this method. The router adds `Allow`.
pub(super) async fn method_not_allowed() -> Problem {
    Problem::from_status(StatusCode::METHOD_NOT_ALLOWED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_internal_problem_that_says_nothing_of_it() {
        for panic in [Box::new("secret") as Box<dyn Any + Send>, Box::new("secret".to_owned()), Box::new(7)] {
            let response = panicked(panic);
            let problem = response.extensions().get::<Problem>().expect("a problem");
            assert_eq!(problem.kind, ProblemType::Internal);
            assert!(!format!("{problem:?}").contains("secret"));
        }
    }

    #[test]
    fn only_short_harmless_request_ids_are_taken() {
        let id = |text: &str| {
            let headers = [(REQUEST_ID, HeaderValue::from_str(text).expect("a header value"))];
            request_id(&HeaderMap::from_iter(headers)).is_some()
        };
        assert!(id("01J-abc_1.2:3/4+5="));
        assert!(id(&"a".repeat(MAX_REQUEST_ID)));
        assert!(!id(""));
        assert!(!id(&"a".repeat(MAX_REQUEST_ID + 1)));
        assert!(!id("a b"));
        assert!(!id("a\"b"));
        assert!(!id("a\tb"));
    }
}
