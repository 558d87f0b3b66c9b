//! The delivery queue on JetStream.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_nats::{
    HeaderMap,
    jetstream::{AckKind, Message, consumer::PullConsumer, message::PublishMessage},
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _,
    future::join_all,
    stream::{BoxStream, FuturesUnordered},
};
use tokio::sync::Mutex;
use tracing::{error, warn};

use super::{Body, DeliveryQueue, Enqueue, Lease, Leased, QueueError};
use crate::{
    delivery::DeliveryKey,
    ids::{DeliveryId, EventUid},
    nats::{During as _, Nats},
    receipt::Receipt,
    telemetry::Chain,
};

/// A delivery that waits for a negative acknowledgement to expire stays in the consumer's ack-pending
/// window, so only short waits may.
const LONGEST_NAK: Duration = Duration::from_secs(5);

/// Publishes of one call that wait for their acknowledgement. An acknowledgement that is out holds a permit
/// of the client; a call that took more permits while it waits for others would, beside others like it,
/// wait for ever.
const WINDOW: usize = 256;

/// Receipts of one message; a receipt is about 300 bytes.
const RECEIPTS_PER_MESSAGE: usize = 500;

/// `<delivery>` or, put in again after attempts, `<delivery>:<attempts>`. One per delivery and number
/// of attempts, so that whoever repeats a fan-out is recognised.
const MESSAGE_ID: &str = "Nats-Msg-Id";
const EVENT: &str = "Bus-Event";
const SUBSCRIPTION: &str = "Bus-Subscription";
const CONNECTION_VERSION: &str = "Bus-Connection-Version";
const STORED: &str = "Bus-Body-Stored";

/// The delivery queue on JetStream: a work-queue stream, one durable pull consumer per lane.
#[derive(Debug, Clone)]
pub struct JetStreamQueue {
    nats: Nats,
    lanes: u16,
    consumers: Arc<Mutex<HashMap<u16, PullConsumer>>>,
}

impl JetStreamQueue {
    /// A queue of `lanes` lanes.
    pub fn new(nats: Nats, lanes: u16) -> Self {
        Self { nats, lanes, consumers: Arc::default() }
    }

    fn message(&self, delivery: &Enqueue) -> (String, PublishMessage) {
        let key = &delivery.key;
        let subject =
            self.nats.names.deliver(key.organization.lane(self.lanes), key.organization, key.connection);
        let mut headers = HeaderMap::new();
        let id = match delivery.attempts {
            0 => key.id.to_string(),
            attempts => format!("{}:{attempts}", key.id),
        };
        headers.insert(MESSAGE_ID, id);
        headers.insert(EVENT, key.event.to_string());
        headers.insert(SUBSCRIPTION, key.subscription.to_string());
        headers.insert(CONNECTION_VERSION, key.connection_version.to_string());
        let body = match &delivery.body {
            Body::Inline(body) => body.clone(),
            Body::Stored => {
                headers.insert(STORED, "1");
                Bytes::new()
            }
        };
        (subject, PublishMessage::build().headers(headers).payload(body))
    }

    async fn consumer(&self, lane: u16) -> Result<PullConsumer, QueueError> {
        if let Some(consumer) = self.consumers.lock().await.get(&lane) {
            return Ok(consumer.clone());
        }
        let consumer = self.nats.lane_consumer(lane).await?;
        self.consumers.lock().await.insert(lane, consumer.clone());
        Ok(consumer)
    }

    /// After an error the consumer may be gone; the next pull looks it up, and creates it if it is.
    async fn forget(&self, lane: u16) {
        self.consumers.lock().await.remove(&lane);
    }
}

#[async_trait]
impl DeliveryQueue for JetStreamQueue {
    async fn enqueue(&self, deliveries: &[Enqueue]) -> Result<(), QueueError> {
        let mut acks = FuturesUnordered::new();
        for delivery in deliveries {
            if acks.len() == WINDOW {
                acks.next().await.transpose().during("enqueue a delivery")?;
            }
            let (subject, message) = self.message(delivery);
            let ack =
                self.nats.jetstream.send_publish(subject, message).await.during("enqueue a delivery")?;
            acks.push(ack.into_future());
        }
        while acks.next().await.transpose().during("enqueue a delivery")?.is_some() {}
        Ok(())
    }

    async fn pull(
        &self,
        lane: u16,
        max: usize,
        wait: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError> {
        let consumer = self.consumer(lane).await?;
        // No idle heartbeats: async-nats 0.51 answers `Pending` to one without asking to be woken again, and
        // the batch then hangs. It ends by itself 5 s after `wait` if the broker says nothing.
        let batch =
            match consumer.batch().max_messages(max).expires(wait).messages().await.during("pull deliveries")
            {
                Ok(batch) => batch,
                Err(failed) => {
                    self.forget(lane).await;
                    return Err(failed.into());
                }
            };
        let queue = self.clone();
        let leased = batch.filter_map(move |message| {
            let queue = queue.clone();
            async move {
                match message.during("pull deliveries") {
                    Ok(message) => queue.lease(message).await,
                    Err(failed) => {
                        queue.forget(lane).await;
                        Some(Err(failed.into()))
                    }
                }
            }
        });
        Ok(leased.boxed())
    }

    fn longest_wait(&self) -> Duration {
        LONGEST_NAK
    }

    async fn lanes(&self) -> Result<u16, QueueError> {
        Ok(self
            .nats
            .highest_lane()
            .await?
            .map_or(self.lanes, |highest| self.lanes.max(highest.saturating_add(1))))
    }

    async fn dead_letter(&self, key: &DeliveryKey, reason: &str, body: &Bytes) -> Result<(), QueueError> {
        let mut headers = HeaderMap::new();
        headers.insert(MESSAGE_ID, format!("dead:{}", key.id));
        headers.insert(EVENT, key.event.to_string());
        headers.insert(SUBSCRIPTION, key.subscription.to_string());
        headers.insert("Bus-Reason", single_line(reason));
        let body = match Body::bounded(body) {
            Body::Inline(body) => body,
            Body::Stored => Bytes::new(),
        };
        self.publish(self.nats.names.dead(key.organization, key.connection), headers, body, "dead-letter")
            .await
    }

    async fn receipts(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        let mut by_organization: Vec<&Receipt> = receipts.iter().collect();
        by_organization.sort_by_key(|receipt| receipt.organization);
        let messages = by_organization
            .chunk_by(|a, b| a.organization == b.organization)
            .flat_map(|chunk| chunk.chunks(RECEIPTS_PER_MESSAGE))
            .map(|chunk| async move {
                let body = serde_json::to_vec(chunk).expect("receipts are plain data");
                let subject = self.nats.names.receipt(chunk[0].organization);
                self.publish(subject, HeaderMap::new(), body.into(), "publish receipts").await
            });
        join_all(messages).await.into_iter().collect()
    }

    async fn prepare(&self) -> Result<(), QueueError> {
        Ok(self.nats.prepare().await?)
    }
}

impl JetStreamQueue {
    async fn publish(
        &self,
        subject: String,
        headers: HeaderMap,
        body: Bytes,
        operation: &'static str,
    ) -> Result<(), QueueError> {
        let ack = self.nats.jetstream.publish_with_headers(subject, headers, body).await.during(operation)?;
        ack.await.during(operation)?;
        Ok(())
    }

    /// Reads a message. One that cannot be read is moved to the dead-letter stream, so that it blocks
    /// nothing; `None` then.
    async fn lease(&self, message: Message) -> Option<Result<Leased, QueueError>> {
        match read(&message) {
            Ok((key, attempts)) => {
                let stored = message.headers.as_ref().is_some_and(|headers| headers.get(STORED).is_some());
                let body = if stored { Body::Stored } else { Body::Inline(message.payload.clone()) };
                Some(Ok(Leased { key, attempts, body, lease: Box::new(MessageLease(message)) }))
            }
            Err(problem) => {
                error!(subject = %message.subject, problem, "A message in the delivery stream cannot be read");
                let mut headers = HeaderMap::new();
                headers.insert("Bus-Reason", problem);
                headers.insert("Bus-Subject", message.subject.as_str());
                let subject = self.nats.names.malformed();
                let moved = self.publish(subject, headers, message.payload.clone(), "dead-letter").await;
                // Not moved: it stays and comes again after ack_wait.
                if let Err(failed) = moved {
                    warn!(error = %Chain(&failed), "The unreadable message stays in the stream for now");
                } else if let Err(failed) = message.ack_with(AckKind::Term).await.during("terminate") {
                    warn!(error = %Chain(&failed), "The unreadable message will be moved again");
                }
                None
            }
        }
    }
}

/// NATS header values are single lines.
fn single_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn read(message: &Message) -> Result<(DeliveryKey, u32), &'static str> {
    let headers = message.headers.as_ref().ok_or("no headers")?;
    let header = |name: &'static str, problem| headers.get(name).map(|value| value.as_str()).ok_or(problem);
    let id = header(MESSAGE_ID, "no Nats-Msg-Id")?;
    let (id, before) = match id.split_once(':') {
        Some((id, attempts)) => (id, attempts.parse().map_err(|_| "Nats-Msg-Id: not a number of attempts")?),
        None => (id, 0),
    };
    let id: DeliveryId = id.parse().map_err(|_| "Nats-Msg-Id: not a delivery id")?;
    let event: EventUid =
        header(EVENT, "no Bus-Event")?.parse().map_err(|_| "Bus-Event: not an event uid")?;
    let subscription = header(SUBSCRIPTION, "no Bus-Subscription")?
        .parse()
        .map_err(|_| "Bus-Subscription: not a subscription id")?;
    let connection_version = header(CONNECTION_VERSION, "no Bus-Connection-Version")?
        .parse()
        .map_err(|_| "Bus-Connection-Version: not a number")?;
    let mut tokens = message.subject.rsplit('.');
    let connection = tokens.next().and_then(|token| token.parse().ok()).ok_or("subject: no connection id")?;
    let organization =
        tokens.next().and_then(|token| token.parse().ok()).ok_or("subject: no organization id")?;
    let delivered = message.info().map_err(|_| "not a JetStream message")?.delivered;
    let again = u32::try_from(delivered.saturating_sub(1)).unwrap_or(u32::MAX);
    let key = DeliveryKey { id, event, organization, subscription, connection, connection_version };
    Ok((key, u32::saturating_add(before, again)))
}

#[derive(Debug)]
struct MessageLease(Message);

#[async_trait]
impl Lease for MessageLease {
    async fn ack(self: Box<Self>) -> Result<(), QueueError> {
        Ok(self.0.ack().await.during("acknowledge a delivery")?)
    }

    async fn retry(self: Box<Self>, wait: Duration) -> Result<(), QueueError> {
        Ok(self.0.ack_with(AckKind::Nak(Some(wait))).await.during("postpone a delivery")?)
    }

    async fn extend(&self) -> Result<(), QueueError> {
        Ok(self.0.ack_with(AckKind::Progress).await.during("hold a delivery longer")?)
    }
}
