//! Reading requests: bodies, query strings and ids, with a bound on each and a pointer to each mistake.

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Path, Request},
};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
    request::Parts,
};
use http_body_util::BodyExt as _;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::error::Category;
use serde_path_to_error::Segment;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    Api,
    problem::{FieldError, Problem, ProblemType},
};

/// The most bytes of a JSON body, unless an operation says otherwise.
pub(super) const MAX_JSON: usize = 64 * 1024;

/// How long a body may take to arrive; a client that dawdles must not hold memory.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The media type of JSON Merge Patch (RFC 7396).
const MERGE_PATCH: &str = "application/merge-patch+json";

const JSON: &str = "application/json";

/// How long a request waits for room before it is turned away.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);

/// The room for bodies is counted in units of this many bytes.
const ROOM_UNIT: usize = 1024;

/// The most bytes of bodies that are in memory at a time, all requests together (invariant I10).
const ROOM_BYTES: usize = 256 * 1024 * 1024;

/// The room for bodies. It is taken as bytes arrive, not as they are announced: an announcement costs
/// the client nothing.
#[derive(Debug, Clone)]
pub(super) struct Room(Arc<Semaphore>);

impl Room {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(ROOM_BYTES / ROOM_UNIT)))
    }

    async fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Problem> {
        let units = u32::try_from(bytes.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX);
        match tokio::time::timeout(ROOM_TIMEOUT, Arc::clone(&self.0).acquire_many_owned(units)).await {
            Ok(Ok(room)) => Ok(room),
            _ => Err(Problem::overloaded("the publisher holds as many requests as it can", ROOM_TIMEOUT)),
        }
    }
}

/// A body, and its room.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// Reads a body of at most `limit` bytes.
pub(super) async fn read_body(
    room: &Room,
    headers: &HeaderMap,
    body: Body,
    limit: usize,
) -> Result<Received, Problem> {
    let announced = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|announced| usize::try_from(announced).map_or(true, |n| n > limit)) {
        return Err(too_large(limit));
    }
    tokio::time::timeout(BODY_TIMEOUT, collect(room, body, limit)).await.unwrap_or_else(|_| {
        let detail = format!("the body was not complete within {} seconds", BODY_TIMEOUT.as_secs());
        Err(Problem::new(ProblemType::RequestTimeout, detail))
    })
}

fn too_large(limit: usize) -> Problem {
    Problem::new(ProblemType::TooLarge, format!("the body must have at most {limit} bytes"))
}

async fn collect(room: &Room, mut body: Body, limit: usize) -> Result<Received, Problem> {
    let mut bytes = BytesMut::new();
    let mut held: Option<OwnedSemaphorePermit> = None;
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|_| Problem::new(ProblemType::MalformedRequest, "the body did not arrive completely"))?;
        let Ok(data) = frame.into_data() else { continue };
        if data.len() > limit - bytes.len() {
            return Err(too_large(limit));
        }
        let more = room.take(data.len()).await?;
        match &mut held {
            Some(held) => held.merge(more),
            None => held = Some(more),
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Received { bytes: bytes.freeze(), _room: held })
}

/// The media type of a request, without parameters, in lower case; empty if there is none.
pub(super) fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Reads a JSON body of at most `limit` bytes in one of the media types.
pub(super) async fn read_json<T: DeserializeOwned>(
    api: &Api,
    request: Request,
    media_types: &[&str],
    limit: usize,
) -> Result<T, Problem> {
    let (parts, body) = request.into_parts();
    check_media_type(&parts.headers, media_types)?;
    decode(&read_body(&api.room, &parts.headers, body, limit).await?.bytes)
}

/// Reads a JSON body of at most [`MAX_JSON`] bytes, where none at all is as good as `{}`. A body needs its
/// media type.
pub(super) async fn read_optional_json(api: &Api, request: Request) -> Result<Bytes, Problem> {
    let (parts, body) = request.into_parts();
    let received = read_body(&api.room, &parts.headers, body, MAX_JSON).await?;
    if received.bytes.is_empty() {
        return Ok(Bytes::from_static(b"{}"));
    }
    check_media_type(&parts.headers, &[JSON])?;
    Ok(received.bytes)
}

fn check_media_type(headers: &HeaderMap, allowed: &[&str]) -> Result<(), Problem> {
    if allowed.contains(&media_type(headers).as_str()) {
        return Ok(());
    }
    let detail = format!("send the body with Content-Type {}", allowed.join(" or "));
    Err(Problem::new(ProblemType::UnsupportedMediaType, detail))
}

/// Reads a JSON text: 400 if it is not JSON, 422 with a pointer if it does not fit `T`.
pub(super) fn decode<T: DeserializeOwned>(text: &[u8]) -> Result<T, Problem> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let at = pointer(error.path());
        match error.into_inner() {
            error if error.classify() == Category::Data => Problem::invalid_at(at, without_line(&error)),
            error => malformed(&error),
        }
    })?;
    deserializer.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn malformed(error: &serde_json::Error) -> Problem {
    Problem::new(ProblemType::MalformedJson, format!("the body is not JSON: {error}"))
}

/// The message without serde_json's " at line 1 column 2": the pointer says it better.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_owned()
}

/// The path as a JSON pointer (RFC 6901).
fn pointer(path: &serde_path_to_error::Path) -> String {
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => push_token(&mut pointer, &index.to_string()),
            Segment::Map { key } => push_token(&mut pointer, key),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    pointer
}

/// Appends a reference token.
pub(super) fn push_token(pointer: &mut String, token: &str) {
    pointer.push('/');
    pointer.push_str(&token.replace('~', "~0").replace('/', "~1"));
}

/// A JSON body of at most `MAX` bytes.
pub(super) struct Json<T, const MAX: usize = MAX_JSON>(pub(super) T);

impl<T: DeserializeOwned, const MAX: usize> FromRequest<Api> for Json<T, MAX> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        read_json(api, request, &[JSON], MAX).await.map(Self)
    }
}

/// A JSON body, where none at all is as good as `{}`.
pub(super) struct OptionalJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Api> for OptionalJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        decode(&read_optional_json(api, request).await?).map(Self)
    }
}

/// A JSON Merge Patch (RFC 7396).
pub(super) struct MergePatch<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Api> for MergePatch<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        read_json(api, request, &[MERGE_PATCH, JSON], MAX_JSON).await.map(Self)
    }
}

/// For the members of a patch: absent is `None`, `null` is `Some(None)`.
pub(super) fn present<'de, T, D>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

/// The query string.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let pairs = url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
        let mut seen = HashSet::new();
        if let Some((name, _)) = pairs.clone().find(|(name, _)| !seen.insert(name.clone())) {
            return Err(Problem::invalid(vec![FieldError::parameter(
                name,
                "this parameter can be given once",
            )]));
        }
        let deserializer = serde_urlencoded::Deserializer::new(pairs);
        serde_path_to_error::deserialize(deserializer).map(Self).map_err(|error| {
            let name = match error.path().iter().next() {
                Some(Segment::Map { key }) => key.clone(),
                _ => String::new(),
            };
            Problem::invalid(vec![FieldError::parameter(name, error.inner().to_string())])
        })
    }
}

/// What the path names. Something that cannot be an id names nothing.
pub(super) struct Id<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Id<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(id) = Path::from_request_parts(parts, state).await.map_err(|_| Problem::not_found())?;
        Ok(Self(id))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only its reading is of interest")]
    struct Sample {
        count: u8,
        #[serde(default)]
        map: BTreeMap<String, Vec<bool>>,
        #[serde(default, deserialize_with = "present")]
        gone: Option<Option<u8>>,
    }

    fn problem(text: &str) -> (ProblemType, Option<String>) {
        let problem = decode::<Sample>(text.as_bytes()).unwrap_err();
        (problem.kind, problem.errors.first().and_then(|error| error.pointer.clone()))
    }

    #[test]
    fn mistakes_are_pointed_at() {
        let at = |pointer: &str| (ProblemType::InvalidFields, Some(pointer.to_owned()));
        assert_eq!(problem(r#"{"count": 300}"#), at("/count"));
        assert_eq!(problem(r#"{"count": 3, "other": 1}"#), at("/other"));
        assert_eq!(problem(r#"{"count": 3, "map": {"a/b~c": [true, 1]}}"#), at("/map/a~1b~0c/1"));
        assert_eq!(problem("{}"), at(""));
        assert_eq!(problem("[]"), at(""));
        for text in ["", "{", "{\"count\": 3} x", "{\"count\": 3,}", "\u{7f}"] {
            assert_eq!(problem(text), (ProblemType::MalformedJson, None), "{text:?}");
        }
    }

    #[test]
    fn null_and_absent_differ_in_a_patch() {
        let gone = |text: &str| decode::<Sample>(text.as_bytes()).unwrap().gone;
        assert_eq!(gone(r#"{"count": 1}"#), None);
        assert_eq!(gone(r#"{"count": 1, "gone": null}"#), Some(None));
        assert_eq!(gone(r#"{"count": 1, "gone": 2}"#), Some(Some(2)));
    }

    #[tokio::test]
    async fn a_body_has_a_limit_with_and_without_an_announced_length() {
        let stream = || Body::from_stream(futures::stream::iter([Ok::<_, std::io::Error>("123"), Ok("45")]));
        let (room, mut headers) = (Room::new(), HeaderMap::new());
        let read = async |headers: &HeaderMap, body, limit| {
            read_body(&room, headers, body, limit).await.map(|received| received.bytes).map_err(|p| p.kind)
        };
        assert_eq!(read(&headers, Body::from("12345"), 5).await.unwrap(), "12345");
        assert_eq!(read(&headers, stream(), 5).await.unwrap(), "12345");
        assert_eq!(read(&headers, stream(), 4).await, Err(ProblemType::TooLarge));
        headers.insert(CONTENT_LENGTH, "5".parse().unwrap());
        assert_eq!(read(&headers, Body::empty(), 4).await, Err(ProblemType::TooLarge));
        let broken = Body::from_stream(futures::stream::iter([Ok("1"), Err(std::io::Error::other("gone"))]));
        assert_eq!(read(&HeaderMap::new(), broken, 5).await, Err(ProblemType::MalformedRequest));
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_share_a_bounded_room_and_give_it_back() {
        let room = Room(Arc::new(Semaphore::new(2)));
        let read =
            async || read_body(&room, &HeaderMap::new(), Body::from(vec![0; 2 * ROOM_UNIT]), 1 << 20).await;
        let first = read().await.unwrap();
        let refused = read().await.unwrap_err();
        assert_eq!(refused.kind, ProblemType::Overloaded);
        assert!(refused.retry_after.is_some());
        drop(first);
        assert!(read().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_dawdles_is_given_up() {
        let body = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        let refused = read_body(&Room::new(), &HeaderMap::new(), body, 5).await.unwrap_err();
        assert_eq!(refused.kind, ProblemType::RequestTimeout);
    }
}
