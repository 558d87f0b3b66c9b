//! The delivery queue on JetStream.

mod lease;
mod message;
mod pack;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_nats::{
    HeaderMap,
    jetstream::{AckKind, Message, consumer::PullConsumer, stream::RawMessageErrorKind},
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _, TryStreamExt as _,
    future::{join_all, try_join_all},
    stream::{self, BoxStream, FuturesUnordered},
};
use tokio::{sync::Mutex, time::Instant};
use tracing::{error, warn};

use self::{
    lease::{Held, MessageLease},
    message::{ATTEMPTS, Content, EVENT, MESSAGE_ID, Read, SUBSCRIPTION},
    pack::Limits,
};
use super::{Body, DeliveryQueue, Enqueue, Leased, QueueError};
use crate::{
    delivery::DeliveryKey,
    ids::DeliveryId,
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

/// Of the consumer's window at most this share is for deliveries that wait; the rest are parked.
const WAITING_SHARE: usize = 2;

/// A hold that was extended this part of `ack_wait` ago is not extended again: those of a message all ask for it.
const EXTENDED: u32 = 20;

/// A pack that is handed out this often is taken apart. One that is handed out again has been repeated already.
const TAKEN_APART: u32 = 3;

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
    /// About how many deliveries the largest message had lately.
    largest: Arc<AtomicUsize>,
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

    async fn lane(&self, lane: u16) -> Result<Lane, QueueError> {
        if let Some(lane) = self.pulled.lock().await.get(&lane) {
            return Ok(lane.clone());
        }
        let consumer = self.nats.lane_consumer(lane).await?;
        // Rather too few are asked for at first than more than there are slots.
        let largest = Arc::new(AtomicUsize::new(self.nats.config.pack_deliveries));
        let pulled = Lane { consumer, window: Arc::default(), largest };
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
        let limits =
            Limits { deliveries: self.nats.config.pack_deliveries, bytes: self.nats.config.pack_bytes };
        let mut acks = FuturesUnordered::new();
        for group in pack::group(deliveries, self.lanes, limits) {
            let Some(first) = group.first() else { continue };
            if acks.len() == WINDOW {
                acks.next().await.transpose().during("enqueue a delivery")?;
            }
            let key = &first.key;
            let subject = self.nats.names.deliver(first.lane(self.lanes), key.organization, key.connection);
            let message = message::write(&group);
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
        let messages = (max / lane.largest.load(Ordering::Relaxed).max(1)).max(1);
        let batch = lane.consumer.batch().max_messages(messages).expires(wait).messages().await;
        let batch = match batch.during("pull deliveries") {
            Ok(batch) => batch,
            Err(failed) => {
                self.forget(number).await;
                return Err(failed.into());
            }
        };
        let queue = self.clone();
        let leased = batch.then(move |message| {
            let (queue, lane) = (queue.clone(), lane.clone());
            async move {
                match message.during("pull deliveries") {
                    Ok(message) => queue.lease(message, number, &lane).await.into_iter().map(Ok).collect(),
                    Err(failed) => {
                        queue.forget(number).await;
                        vec![Err(failed.into())]
                    }
                }
            }
        });
        let leased = leased.map(stream::iter).flatten();
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
            let there = message::deliveries_in(&message.headers, &message.payload);
            held.extend(there.into_iter().filter(|id| wanted.remove(id)));
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

    /// The deliveries of a message. None if it is not to be worked on now: it has to wait and does so in the lane's window, or
    /// it cannot be read and was moved to the dead-letter stream, so that it blocks nothing.
    async fn lease(&self, message: Message, number: u16, lane: &Lane) -> Vec<Leased> {
        let Read { contents, wait: waits, delivered } = match message::read(&message) {
            Ok(read) => read,
            Err(problem) => {
                self.set_aside(&message, problem).await;
                return Vec::new();
            }
        };
        let wait = waits.filter(|_| delivered == 1);
        // The first time that a waiting message is handed out is nobody's.
        let handed_out = delivered - u32::from(waits.is_some() && wait.is_none());
        if let Some(wait) = wait
            && lane.may_wait(self.nats.config.max_ack_pending).await
        {
            if let Err(failed) =
                message.ack_with(AckKind::Nak(Some(wait))).await.during("postpone a delivery")
            {
                // It comes again after ack_wait, which is longer.
                warn!(error = %Chain(&failed), "A delivery waits longer than it should");
            }
            return Vec::new();
        }
        let packed = contents.len() > 1;
        if packed && handed_out >= TAKEN_APART {
            self.take_apart(&message, &contents).await;
            return Vec::new();
        }
        lane.note(contents.len());
        let ack_wait = Duration::from_millis(self.nats.config.ack_wait_ms);
        let held = Held::new(message, self.clone(), contents.len(), ack_wait / EXTENDED);
        let leased = contents.into_iter().enumerate().map(|(place, content)| Leased {
            key: content.key,
            progress: content.progress,
            lane: number,
            handed_out,
            wait,
            body: content.body.clone(),
            lease: Box::new(MessageLease { held: Arc::clone(&held), place, packed, content }),
        });
        leased.collect()
    }

    /// Puts the deliveries of a pack in alone: one of them may take down whoever holds it, and the others with it. If that
    /// fails, the pack comes again after `ack_wait`, and those that went in are recognised.
    async fn take_apart(&self, message: &Message, contents: &[Content]) {
        const OPERATION: &str = "take a pack apart";
        let entered = contents.iter().map(|Content { key, progress, body }| async move {
            let alone = message::alone(key, *progress, body, Duration::ZERO);
            let ack = self.nats.jetstream.send_publish(message.subject.to_string(), alone).await;
            ack.during(OPERATION)?.await.during(OPERATION)
        });
        let taken = match try_join_all(entered).await {
            Ok(_) => message.ack_with(AckKind::Ack).await.during(OPERATION),
            Err(failed) => Err(failed),
        };
        match taken {
            Ok(()) => {
                let (deliveries, subject) = (contents.len(), &message.subject);
                warn!(deliveries, %subject, "A pack that was handed out again and again is taken apart");
            }
            Err(failed) => warn!(error = %Chain(&failed), "A pack is not taken apart yet"),
        }
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
    /// Notes how many deliveries a message had. Where packs have become smaller that is known a few messages later.
    fn note(&self, deliveries: usize) {
        let before = self.largest.load(Ordering::Relaxed);
        let now = deliveries.max(before - before.saturating_sub(deliveries).div_ceil(8));
        if now != before {
            self.largest.store(now, Ordering::Relaxed);
        }
    }

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
