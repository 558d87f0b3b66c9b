//! What a subscriber's HTTP answer says about the deliveries that it answers.
//!
//! A 2xx answer is success unless its body says otherwise. What it may say is a JSON object, whatever its
//! content type, with these members, all of them optional:
//!
//! | member | type | meaning |
//! |---|---|---|
//! | `success` | boolean | `true`: taken. `false`: failed |
//! | `retryAfter` | number ≥ 0 | call again after so many milliseconds; costs no attempt |
//! | `error` | text that is not blank | failed, and why |
//! | `results` | object | for each CloudEvents `id`, an object with the three above |
//!
//! `success: true` wins over `retryAfter`, and that wins over failure. An event that `results` does not list
//! takes what the outer object says; one that it lists takes nothing from there. That holds for a single
//! delivery as for a batch. A member of another type than its own is as if it were not there, and a body
//! that is no such object, or was cut off at the limit of what is read, says nothing at all: many endpoints
//! answer 2xx with a body of their own, which must not turn into failures.
//!
//! Any other status speaks for itself, and for all deliveries alike. Its body is not read: proxies write
//! such answers too. Its `Retry-After` (RFC 9110 §10.2.3) is a deferral with 429 and 503, and with other
//! statuses the earliest time of the next attempt, which is counted.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use http::{
    HeaderMap,
    header::{DATE, HeaderName, RETRY_AFTER},
};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    cloudevent::CloudEvent,
    sink::{Failure, Outcome},
};

/// The most of an `error` that is kept, bytes.
pub const MAX_ERROR: usize = 1024;

/// An answer as it came.
#[derive(Debug, Clone, Copy)]
pub struct HttpAnswer<'a> {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// Its whole body; `None` if that was longer than what is read.
    pub body: Option<&'a [u8]>,
    /// The time of the attempt: what an HTTP-date is relative to if the answer has no `Date`.
    pub at: Timestamp,
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    outer: Outcome,
    listed: BTreeMap<String, Outcome>,
}

impl Answer {
    /// Reads an answer. There is none that cannot be read.
    pub fn read(http: &HttpAnswer<'_>) -> Self {
        if !(200..300).contains(&http.status) {
            return Self { outer: by_status(http), listed: BTreeMap::new() };
        }
        let members = http.body.and_then(members).unwrap_or_default();
        let results: Members<'_> = member(&members, "results").unwrap_or_default();
        let listed = results
            .into_iter()
            .filter_map(|(id, result)| Some((id, said(&serde_json::from_str(result.get()).ok()?))));
        Self { outer: said(&members), listed: listed.collect() }
    }

    /// What it says of the delivery of `event`, a CloudEvent in the JSON event format.
    pub fn about(&self, event: &[u8]) -> &Outcome {
        if self.listed.is_empty() {
            return &self.outer;
        }
        CloudEvent::id_of(event).and_then(|id| self.listed.get(&id)).unwrap_or(&self.outer)
    }
}

/// The members of an object, unread: unrelated ones cost nothing but their length. Of two with one name the
/// last counts.
type Members<'a> = BTreeMap<String, &'a RawValue>;

fn members(body: &[u8]) -> Option<Members<'_>> {
    serde_json::from_slice(body).ok()
}

/// A member, if it is there and of the right type.
fn member<'a, T: Deserialize<'a>>(members: &Members<'a>, name: &str) -> Option<T> {
    serde_json::from_str(members.get(name)?.get()).ok()
}

fn said(members: &Members<'_>) -> Outcome {
    let success: Option<bool> = member(members, "success");
    if success == Some(true) {
        return Outcome::Delivered;
    }
    let error =
        member::<String>(members, "error").map(|error| kept(&error)).filter(|error| !error.is_empty());
    if let Some(millis) = member::<f64>(members, "retryAfter").filter(|millis| *millis >= 0.0) {
        let wait = Duration::try_from_secs_f64(millis / 1_000.0).unwrap_or(Duration::MAX);
        let why = error.map_or_else(String::new, |error| format!(": {error}"));
        return Outcome::Deferred { wait, why: format!("the subscriber asked to be called later{why}") };
    }
    match (success, error) {
        (_, Some(error)) => Failure::Reported(error).into(),
        (Some(false), None) => Failure::Reported("no reason given".into()).into(),
        _ => Outcome::Delivered,
    }
}

/// What is kept of an error's text: its start, without control characters, since it goes into log lines,
/// message headers, and columns that refuse NUL.
fn kept(error: &str) -> String {
    let end = error.floor_char_boundary(MAX_ERROR);
    error[..end].replace(char::is_control, " ").trim().to_owned()
}

fn by_status(http: &HttpAnswer<'_>) -> Outcome {
    match (http.status, retry_after(http.headers, http.at)) {
        (status @ (429 | 503), Some(wait)) => {
            Outcome::Deferred { wait, why: format!("the endpoint answered {status} with Retry-After") }
        }
        (status, not_before) => Outcome::Failed { failure: Failure::Status(status), not_before },
    }
}

/// How long `Retry-After` asks to wait, in any of its forms; a date that is over asks for nothing.
fn retry_after(headers: &HeaderMap, at: Timestamp) -> Option<Duration> {
    let value = text(headers, RETRY_AFTER)?;
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than a u64 has are a long time, too.
        return Some(value.parse().map_or(Duration::MAX, Duration::from_secs));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    // The endpoint's own clock, so that it does not matter if that clock is wrong.
    let now = text(headers, DATE).and_then(|date| httpdate::parse_http_date(date).ok());
    Some(until.duration_since(now.unwrap_or_else(|| SystemTime::from(at))).unwrap_or_default())
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
