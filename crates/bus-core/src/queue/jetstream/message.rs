//! Deliveries as messages: their headers, and back.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    jetstream::{Message, message::PublishMessage},
};
use bytes::Bytes;
use jiff::Timestamp;

use super::{
    super::{Body, Enqueue},
    pack,
};
use crate::{
    delivery::{DeliveryKey, Progress},
    ids::DeliveryId,
};

/// `<delivery>` or, from the second turn on, `<delivery>:<turn>`, or `pack:<id>`: whoever repeats a step is recognised.
pub(super) const MESSAGE_ID: &str = "Nats-Msg-Id";
pub(super) const EVENT: &str = "Bus-Event";
pub(super) const SUBSCRIPTION: &str = "Bus-Subscription";
const CONNECTION_VERSION: &str = "Bus-Connection-Version";
const STORED: &str = "Bus-Body-Stored";
/// When the delivery's lifetime began, milliseconds since 1970.
const SINCE: &str = "Bus-Since";
/// Failed attempts so far; absent for none.
pub(super) const ATTEMPTS: &str = "Bus-Attempts";
/// Not before this many milliseconds from when it is first handed out. JetStream has no delayed publish that
/// deduplicates, so the message goes in at once and whoever gets it first postpones it.
const WAIT: &str = "Bus-Wait";
/// How many deliveries the message has, if it is a pack.
const PACK: &str = "Bus-Pack";

/// The message of these deliveries: of one alone, or a pack of several that belong together.
pub(super) fn write(deliveries: &[&Enqueue]) -> PublishMessage {
    if let [one] = deliveries {
        return alone(&one.key, one.progress, &one.body, Duration::ZERO);
    }
    let mut headers = HeaderMap::new();
    headers.insert(MESSAGE_ID, pack::id(deliveries));
    headers.insert(PACK, deliveries.len().to_string());
    if let Some(first) = deliveries.first() {
        headers.insert(CONNECTION_VERSION, first.key.connection_version.to_string());
        headers.insert(SINCE, first.progress.since.as_millisecond().to_string());
    }
    PublishMessage::build().headers(headers).payload(pack::encode(deliveries))
}

/// The message of one delivery, not to be handed out before `wait` is over.
pub(super) fn alone(key: &DeliveryKey, progress: Progress, body: &Body, wait: Duration) -> PublishMessage {
    let mut headers = HeaderMap::new();
    headers.insert(EVENT, key.event.to_string());
    headers.insert(SUBSCRIPTION, key.subscription.to_string());
    headers.insert(CONNECTION_VERSION, key.connection_version.to_string());
    let id = match progress.turn {
        0 => key.id.to_string(),
        turn => format!("{}:{turn}", key.id),
    };
    headers.insert(MESSAGE_ID, id);
    headers.insert(SINCE, progress.since.as_millisecond().to_string());
    if progress.attempts > 0 {
        headers.insert(ATTEMPTS, progress.attempts.to_string());
    }
    if !wait.is_zero() {
        // Rounded up: not a moment early.
        headers.insert(WAIT, wait.as_nanos().div_ceil(1_000_000).to_string());
    }
    let body = match body {
        Body::Inline(body) => body.clone(),
        Body::Stored => {
            headers.insert(STORED, "1");
            Bytes::new()
        }
    };
    PublishMessage::build().headers(headers).payload(body)
}

/// What a message says.
pub(super) struct Read {
    /// What it has: one delivery, or those of a pack.
    pub(super) contents: Vec<Content>,
    pub(super) wait: Option<Duration>,
    /// How often it was handed out.
    pub(super) delivered: u32,
}

/// One delivery of a message.
#[derive(Debug, Clone)]
pub(super) struct Content {
    pub(super) key: DeliveryKey,
    pub(super) progress: Progress,
    pub(super) body: Body,
}

pub(super) fn read(message: &Message) -> Result<Read, &'static str> {
    let headers = message.headers.as_ref().ok_or("no headers")?;
    let optional = |name: &'static str| headers.get(name).map(|value| value.as_str());
    let header = |name: &'static str, problem| optional(name).ok_or(problem);
    let message_id = header(MESSAGE_ID, "no Nats-Msg-Id")?;
    let info = message.info().map_err(|_| "not a JetStream message")?;
    let since = match optional(SINCE) {
        Some(millis) => millis
            .parse()
            .ok()
            .filter(|millis| *millis >= 0)
            .and_then(|millis| Timestamp::from_millisecond(millis).ok())
            .ok_or("Bus-Since: not a time")?,
        // Put in by a version that did not write it.
        None => {
            Timestamp::from_second(info.published.unix_timestamp()).map_err(|_| "not published in time")?
        }
    };
    let connection_version = header(CONNECTION_VERSION, "no Bus-Connection-Version")?
        .parse()
        .map_err(|_| "Bus-Connection-Version: not a number")?;
    let mut tokens = message.subject.rsplit('.');
    let connection = tokens.next().and_then(|token| token.parse().ok()).ok_or("subject: no connection id")?;
    let organization =
        tokens.next().and_then(|token| token.parse().ok()).ok_or("subject: no organization id")?;
    let delivered = u32::try_from(info.delivered).unwrap_or(u32::MAX);
    if optional(PACK).is_some() {
        let common = pack::Common { organization, connection, connection_version, since };
        let progress = Progress::new(since);
        let contents = pack::decode(message.payload.clone(), &common)?
            .into_iter()
            .map(|(key, body)| Content { key, progress, body: Body::Inline(body) })
            .collect();
        return Ok(Read { contents, wait: None, delivered });
    }
    let (id, turn) = match message_id.split_once(':') {
        Some((id, turn)) => (id, turn.parse::<i64>().ok().filter(|turn| *turn >= 0)),
        None => (message_id, Some(0)),
    };
    let turn = turn.ok_or("Nats-Msg-Id: not a turn")?;
    let id = id.parse().map_err(|_| "Nats-Msg-Id: not a delivery id")?;
    let attempts = optional(ATTEMPTS).map_or(Ok(0), str::parse).map_err(|_| "Bus-Attempts: not a number")?;
    let wait = optional(WAIT).map(str::parse).transpose().map_err(|_| "Bus-Wait: not a number")?;
    let event = header(EVENT, "no Bus-Event")?.parse().map_err(|_| "Bus-Event: not an event uid")?;
    let subscription = header(SUBSCRIPTION, "no Bus-Subscription")?
        .parse()
        .map_err(|_| "Bus-Subscription: not a subscription id")?;
    let body = match optional(STORED) {
        Some(_) => Body::Stored,
        None => Body::Inline(message.payload.clone()),
    };
    let key = DeliveryKey { id, event, organization, subscription, connection, connection_version };
    let progress = Progress { attempts, turn, since };
    Ok(Read {
        contents: vec![Content { key, progress, body }],
        wait: wait.map(Duration::from_millis),
        delivered,
    })
}

/// The deliveries that a stored message has, as far as it says.
pub(super) fn deliveries_in(headers: &HeaderMap, payload: &Bytes) -> Vec<DeliveryId> {
    if headers.get(PACK).is_some() {
        // Only the ids count here.
        let common = pack::Common {
            organization: uuid::Uuid::nil().into(),
            connection: uuid::Uuid::nil().into(),
            connection_version: 0,
            since: Timestamp::UNIX_EPOCH,
        };
        let contents = pack::decode(payload.clone(), &common).unwrap_or_default();
        return contents.into_iter().map(|(key, _)| key.id).collect();
    }
    let id = headers.get(MESSAGE_ID).and_then(|id| id.as_str().split(':').next()?.parse().ok());
    id.into_iter().collect()
}
