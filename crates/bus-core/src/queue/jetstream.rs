//! The delivery queue on JetStream.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_nats::{
    HeaderMap,
    jetstream::{
        AckKind, Message, consumer::PullConsumer, message::PublishMessage, stream::RawMessageErrorKind,
    },
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _, TryStreamExt as _,
    future::join_all,
    stream::{self, BoxStream, FuturesUnordered},
};
use jiff::Timestamp;
use tokio::{sync::Mutex, time::Instant};
use tracing::{error, warn};

use super::{Body, DeliveryQueue, Enqueue, Lease, Leased, QueueError};
use crate::{
    delivery::{DeliveryKey, Progress},
    ids::{DeliveryId, EventUid},
    nats::{During as _, Nats},
    pg::DeadLetter,
    receipt::Receipt,
    telemetry::Chain,
};

/// Publishes of one call that wait for their acknowledgement. An acknowledgement that is out holds a permit
/// of the client; a call that took more permits while it waits for others would, beside others like it,
/// wait for ever.
const WINDOW: usize = 256;

/// Connections whose messages are looked through side by side.
const WALKS: usize = 32;

/// Receipts of one message; a receipt is about 300 bytes.
const RECEIPTS_PER_MESSAGE: usize = 500;

/// `<delivery>` or, from the second turn on, `<delivery>:<turn>`: whoever repeats a step is recognised.
const MESSAGE_ID: &str = "Nats-Msg-Id";
const EVENT: &str = "Bus-Event";
const SUBSCRIPTION: &str = "Bus-Subscription";
const CONNECTION_VERSION: &str = "Bus-Connection-Version";
const STORED: &str = "Bus-Body-Stored";
/// When the delivery's lifetime began, milliseconds since 1970.
const SINCE: &str = "Bus-Since";
/// Failed attempts so far; absent for none.
const ATTEMPTS: &str = "Bus-Attempts";
/// Not before this many milliseconds from when it is first handed out. JetStream has no delayed publish that
/// deduplicates, so the message goes in at once and whoever gets it first postpones it.
const WAIT: &str = "Bus-Wait";

/// Of the consumer's window at most this share is for deliveries that wait; the rest are parked.
const WAITING_SHARE: usize = 2;

/// How old the count of the window may be.
const COUNTED: Duration = Duration::from_millis(250);

/// The delivery queue on JetStream: a work-queue stream, one durable pull consumer per lane.
#[derive(Debug, Clone)]
pub struct JetStreamQueue {
    nats: Nats,
    lanes: u16,
    pulled: Arc<Mutex<HashMap<u16, Lane>>>,
    /// Lanes beyond those configured that certainly have a consumer: by it workers find them.
    found: Arc<Mutex<HashSet<u16>>>,
}

/// The consumer of a lane, and how much of its window is taken.
#[derive(Debug, Clone)]
struct Lane {
    consumer: PullConsumer,
    window: Arc<Mutex<Window>>,
}

#[derive(Debug, Default)]
struct Window {
    counted_at: Option<Instant>,
    taken: usize,
}

impl JetStreamQueue {
    /// A queue of `lanes` lanes.
    pub fn new(nats: Nats, lanes: u16) -> Self {
        Self { nats, lanes, pulled: Arc::default(), found: Arc::default() }
    }

    fn message(&self, delivery: &Enqueue) -> (String, PublishMessage) {
        let key = &delivery.key;
        let subject = self.nats.names.deliver(delivery.lane(self.lanes), key.organization, key.connection);
        let mut headers = HeaderMap::new();
        headers.insert(EVENT, key.event.to_string());
        headers.insert(SUBSCRIPTION, key.subscription.to_string());
        headers.insert(CONNECTION_VERSION, key.connection_version.to_string());
        write_progress(&mut headers, key.id, delivery.progress);
        let body = match &delivery.body {
            Body::Inline(body) => body.clone(),
            Body::Stored => {
                headers.insert(STORED, "1");
                Bytes::new()
            }
        };
        (subject, PublishMessage::build().headers(headers).payload(body))
    }

    async fn lane(&self, lane: u16) -> Result<Lane, QueueError> {
        if let Some(lane) = self.pulled.lock().await.get(&lane) {
            return Ok(lane.clone());
        }
        let pulled = Lane { consumer: self.nats.lane_consumer(lane).await?, window: Arc::default() };
        self.pulled.lock().await.insert(lane, pulled.clone());
        Ok(pulled)
    }

    /// Sees to it that the lanes of these deliveries have consumers. Those that are configured are pulled anyway, and so are
    /// those that are an organization's now: a consumer that cannot be made must not keep the others' deliveries back.
    async fn make_known(&self, deliveries: &[Enqueue]) {
        let lanes = deliveries.iter().map(|delivery| delivery.lane(self.lanes));
        let lanes: BTreeSet<u16> = lanes.filter(|lane| *lane >= self.lanes).collect();
        for lane in lanes {
            if self.found.lock().await.contains(&lane) {
                continue;
            }
            match self.nats.lane_consumer(lane).await {
                Ok(_) => drop(self.found.lock().await.insert(lane)),
                Err(failed) => warn!(lane, error = %Chain(&failed), "A lane has no consumer yet"),
            }
        }
    }

    /// After an error the consumer may be gone; the next pull looks it up, and creates it if it is.
    async fn forget(&self, lane: u16) {
        self.pulled.lock().await.remove(&lane);
    }
}

#[async_trait]
impl DeliveryQueue for JetStreamQueue {
    async fn enqueue(&self, deliveries: &[Enqueue]) -> Result<(), QueueError> {
        self.make_known(deliveries).await;
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
        number: u16,
        max: usize,
        wait: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError> {
        let lane = self.lane(number).await?;
        // No idle heartbeats: async-nats 0.51 answers `Pending` to one without asking to be woken again, and
        // the batch then hangs. It ends by itself 5 s after `wait` if the broker says nothing.
        let batch = lane.consumer.batch().max_messages(max).expires(wait).messages().await;
        let batch = match batch.during("pull deliveries") {
            Ok(batch) => batch,
            Err(failed) => {
                self.forget(number).await;
                return Err(failed.into());
            }
        };
        let queue = self.clone();
        let leased = batch.filter_map(move |message| {
            let (queue, lane) = (queue.clone(), lane.clone());
            async move {
                match message.during("pull deliveries") {
                    Ok(message) => queue.lease(message, number, &lane).await,
                    Err(failed) => {
                        queue.forget(number).await;
                        Some(Err(failed.into()))
                    }
                }
            }
        });
        Ok(leased.boxed())
    }

    async fn withdraw(&self, _: &[DeliveryId]) -> Result<(), QueueError> {
        // A stream finds messages by sequence or subject only; a subject per delivery would cost the broker
        // memory for each that waits.
        Ok(())
    }

    async fn lanes(&self) -> Result<BTreeSet<u16>, QueueError> {
        Ok(self.nats.lanes().await?.into_iter().chain(0..self.lanes).collect())
    }

    async fn holds(&self, deliveries: &[DeliveryKey]) -> Result<HashSet<DeliveryId>, QueueError> {
        let mut wanted: HashMap<String, HashSet<DeliveryId>> = HashMap::new();
        for key in deliveries {
            let subject = self.nats.names.deliveries_of(key.organization, key.connection);
            wanted.entry(subject).or_default().insert(key.id);
        }
        let walks: Vec<_> = wanted.into_iter().map(|(subject, wanted)| self.walk(subject, wanted)).collect();
        stream::iter(walks).buffer_unordered(WALKS).try_concat().await
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        const OPERATION: &str = "count the deliveries in the queue";
        let name = &self.nats.names.deliver_stream;
        let stream = self.nats.jetstream.get_stream(name).await.during(OPERATION)?;
        Ok(stream.cached_info().state.messages)
    }

    async fn dead_letter(&self, letter: &DeadLetter, body: &Bytes) -> Result<(), QueueError> {
        let key = &letter.key;
        let mut headers = HeaderMap::new();
        headers.insert(MESSAGE_ID, format!("dead:{}:{}", key.id, letter.progress.turn));
        headers.insert(EVENT, key.event.to_string());
        headers.insert(SUBSCRIPTION, key.subscription.to_string());
        headers.insert(ATTEMPTS, letter.progress.attempts.to_string());
        headers.insert("Bus-Delivery", key.id.to_string());
        headers.insert("Bus-Reason", letter.reason.as_str());
        if let Some(status) = letter.last.status {
            headers.insert("Bus-Last-Status", status.to_string());
        }
        if let Some(error) = &letter.last.error {
            headers.insert("Bus-Last-Error", single_line(error));
        }
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
                let first = &chunk[0];
                let subject = self.nats.names.receipt(first.organization);
                let mut headers = HeaderMap::new();
                // A batch of which some messages were refused is sent again, cut into the same messages.
                let id = format!("{}:{}:{}:{}", first.delivery, first.turn, first.attempt, first.at);
                headers.insert(async_nats::header::NATS_MESSAGE_ID, id);
                self.publish(subject, headers, body.into(), "publish receipts").await
            });
        join_all(messages).await.into_iter().collect()
    }

    async fn prepare(&self) -> Result<(), QueueError> {
        // The broker may be another one, or have lost its consumers.
        self.found.lock().await.clear();
        Ok(self.nats.prepare().await?)
    }
}

impl JetStreamQueue {
    /// Which of the wanted deliveries are among the messages of a subject. By the leader's own account, message by
    /// message: a work queue has no second consumer, and a follower may lag.
    async fn walk(
        &self,
        subject: String,
        mut wanted: HashSet<DeliveryId>,
    ) -> Result<HashSet<DeliveryId>, QueueError> {
        const OPERATION: &str = "look through the delivery stream";
        let name = &self.nats.names.deliver_stream;
        let stream = self.nats.jetstream.get_stream_no_info(name).await.during(OPERATION)?;
        let (mut sequence, mut held) = (1, HashSet::new());
        while !wanted.is_empty() {
            let message = match stream.get_first_raw_message_by_subject(&subject, sequence).await {
                Ok(message) => message,
                Err(failed) if failed.kind() == RawMessageErrorKind::NoMessageFound => break,
                Err(failed) => return Err(failed).during(OPERATION)?,
            };
            sequence = message.sequence + 1;
            let id = message.headers.get(MESSAGE_ID).and_then(|id| delivery_of(id.as_str()));
            held.extend(id.filter(|id| wanted.remove(id)));
        }
        Ok(held)
    }

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

    /// Reads a message. `None` for one that is not to be worked on now: it has to wait and does so in the
    /// lane's window, or it cannot be read and was moved to the dead-letter stream, so that it blocks nothing.
    async fn lease(&self, message: Message, number: u16, lane: &Lane) -> Option<Result<Leased, QueueError>> {
        let read = match read(&message) {
            Ok(read) => read,
            Err(problem) => {
                self.set_aside(&message, problem).await;
                return None;
            }
        };
        let wait = read.wait.filter(|_| read.delivered == 1);
        // The first time that a waiting message is handed out is nobody's.
        let handed_out = read.delivered - u32::from(read.wait.is_some() && wait.is_none());
        if let Some(wait) = wait
            && lane.may_wait(self.nats.config.max_ack_pending).await
        {
            if let Err(failed) =
                message.ack_with(AckKind::Nak(Some(wait))).await.during("postpone a delivery")
            {
                // It comes again after ack_wait, which is longer.
                warn!(error = %Chain(&failed), "A delivery waits longer than it should");
            }
            return None;
        }
        let stored = message.headers.as_ref().is_some_and(|headers| headers.get(STORED).is_some());
        let body = if stored { Body::Stored } else { Body::Inline(message.payload.clone()) };
        let Read { key, progress, .. } = read;
        let lease = Box::new(MessageLease { message, delivery: key.id, queue: self.clone() });
        Some(Ok(Leased { key, progress, lane: number, handed_out, wait, body, lease }))
    }

    /// Moves a message that cannot be read to the dead-letter stream. If that fails it stays and comes again
    /// after `ack_wait`.
    async fn set_aside(&self, message: &Message, problem: &'static str) {
        error!(subject = %message.subject, problem, "A message in the delivery stream cannot be read");
        let mut headers = HeaderMap::new();
        headers.insert("Bus-Reason", problem);
        headers.insert("Bus-Subject", message.subject.as_str());
        if let Ok(info) = message.info() {
            // Whoever is too slow to answer for it does the same once more.
            let id = format!("malformed:{}:{}", info.stream_sequence, info.published.unix_timestamp_nanos());
            headers.insert(MESSAGE_ID, id);
        }
        let subject = self.nats.names.malformed();
        let moved = self.publish(subject, headers, message.payload.clone(), "dead-letter").await;
        if let Err(failed) = moved {
            warn!(error = %Chain(&failed), "The unreadable message stays in the stream for now");
        } else if let Err(failed) = message.ack_with(AckKind::Term).await.during("terminate") {
            warn!(error = %Chain(&failed), "The unreadable message will be moved again");
        }
    }
}

impl Lane {
    /// Whether one more delivery may wait in the consumer's window, which the deliveries under way need too:
    /// a full window stops the lane.
    async fn may_wait(&self, max_ack_pending: i64) -> bool {
        let limit = usize::try_from(max_ack_pending).unwrap_or(usize::MAX) / WAITING_SHARE;
        let mut window = self.window.lock().await;
        if window.counted_at.is_none_or(|at| at.elapsed() >= COUNTED) {
            // Without an answer the last count serves, and what was added to it since.
            if let Ok(info) = self.consumer.get_info().await {
                window.taken = info.num_ack_pending;
                window.counted_at = Some(Instant::now());
            }
        }
        let room = window.taken < limit;
        window.taken = window.taken.saturating_add(usize::from(room));
        room
    }
}

/// NATS header values are single lines.
fn single_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn write_progress(headers: &mut HeaderMap, delivery: DeliveryId, progress: Progress) {
    let id = match progress.turn {
        0 => delivery.to_string(),
        turn => format!("{delivery}:{turn}"),
    };
    headers.insert(MESSAGE_ID, id);
    headers.insert(SINCE, progress.since.as_millisecond().to_string());
    if progress.attempts > 0 {
        headers.insert(ATTEMPTS, progress.attempts.to_string());
    }
}

/// The delivery that a message id names.
fn delivery_of(message_id: &str) -> Option<DeliveryId> {
    message_id.split(':').next().and_then(|id| id.parse().ok())
}

/// What a message says.
struct Read {
    key: DeliveryKey,
    progress: Progress,
    wait: Option<Duration>,
    /// How often it was handed out.
    delivered: u32,
}

fn read(message: &Message) -> Result<Read, &'static str> {
    let headers = message.headers.as_ref().ok_or("no headers")?;
    let optional = |name: &'static str| headers.get(name).map(|value| value.as_str());
    let header = |name: &'static str, problem| optional(name).ok_or(problem);
    let id = header(MESSAGE_ID, "no Nats-Msg-Id")?;
    let turn = match id.split_once(':') {
        Some((_, turn)) => turn.parse::<i64>().map_err(|_| "Nats-Msg-Id: not a turn")?,
        None => 0,
    };
    let id = delivery_of(id).ok_or("Nats-Msg-Id: not a delivery id")?;
    if turn < 0 {
        return Err("Nats-Msg-Id: not a turn");
    }
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
    let attempts = optional(ATTEMPTS).map_or(Ok(0), str::parse).map_err(|_| "Bus-Attempts: not a number")?;
    let wait = optional(WAIT).map(str::parse).transpose().map_err(|_| "Bus-Wait: not a number")?;
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
    Ok(Read {
        key: DeliveryKey { id, event, organization, subscription, connection, connection_version },
        progress: Progress { attempts, turn, since },
        wait: wait.map(Duration::from_millis),
        delivered: u32::try_from(info.delivered).unwrap_or(u32::MAX),
    })
}

#[derive(Debug)]
struct MessageLease {
    message: Message,
    delivery: DeliveryId,
    queue: JetStreamQueue,
}

#[async_trait]
impl Lease for MessageLease {
    async fn ack(&self) -> Result<(), QueueError> {
        Ok(self.message.ack().await.during("acknowledge a delivery")?)
    }

    /// The next turn goes in first: whoever dies in between leaves both, the earlier one is attempted again,
    /// and what follows from that bears the same message id.
    async fn postpone(&self, next: Progress, wait: Duration) -> Result<(), QueueError> {
        let mut headers = self.message.headers.clone().unwrap_or_default();
        write_progress(&mut headers, self.delivery, next);
        // Rounded up: not a moment early.
        headers.insert(WAIT, wait.as_nanos().div_ceil(1_000_000).to_string());
        let (subject, body) = (self.message.subject.to_string(), self.message.payload.clone());
        self.queue.publish(subject, headers, body, "postpone a delivery").await?;
        self.ack().await
    }

    async fn put_back(&self, wait: Duration) -> Result<(), QueueError> {
        Ok(self.message.ack_with(AckKind::Nak(Some(wait))).await.during("put a delivery back")?)
    }

    async fn extend(&self) -> Result<(), QueueError> {
        Ok(self.message.ack_with(AckKind::Progress).await.during("hold a delivery longer")?)
    }
}
