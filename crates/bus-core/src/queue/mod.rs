//! The delivery queue: where deliveries wait for a worker.

mod jetstream;
mod postgres;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

pub use self::{jetstream::JetStreamQueue, postgres::PostgresQueue};
use crate::{
    config::{Backend, Common},
    delivery::DeliveryKey,
    nats::{Nats, NatsError},
    notify::{self, Notifier},
    pg::StoreError,
    receipt::Receipt,
};

/// What went wrong with the queue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The broker.
    #[error(transparent)]
    Nats(#[from] NatsError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A process of its own cannot reach a queue that is in the memory of another one.
    #[error("the memory backend needs all roles in one process")]
    NotInOneProcess,
}

/// The event's bytes, or the advice to read them from the event store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// The CloudEvent in the JSON event format.
    Inline(Bytes),
    /// Too large for the queue; read it from the event store.
    Stored,
}

impl Body {
    /// What the queue may carry of an event that the event store holds.
    pub fn bounded(body: &Bytes) -> Self {
        if body.len() <= MAX_INLINE { Self::Inline(body.clone()) } else { Self::Stored }
    }
}

/// A larger event travels as a reference, bytes. NATS refuses messages above its `max_payload`, 1 MiB
/// unless configured, and copies of large bodies would fill the stream.
pub const MAX_INLINE: usize = 256 * 1024;

/// A delivery on its way into the queue.
#[derive(Debug, Clone)]
pub struct Enqueue {
    /// What it is about.
    pub key: DeliveryKey,
    /// Attempts made so far.
    pub attempts: u32,
    /// The event's bytes, shared by the whole fan-out.
    pub body: Body,
}

/// A delivery that a worker holds. It returns to the queue by itself if the worker dies.
#[derive(Debug)]
pub struct Leased {
    /// What it is about.
    pub key: DeliveryKey,
    /// Attempts made before this one.
    pub attempts: u32,
    /// The event's bytes.
    pub body: Body,
    /// The hold.
    pub lease: Box<dyn Lease>,
}

/// A worker's hold on a delivery.
#[async_trait]
pub trait Lease: Send + Sync + fmt::Debug {
    /// It is finished: delivered, parked, or dead-lettered.
    async fn ack(self: Box<Self>) -> Result<(), QueueError>;

    /// Give it out again after `wait`, with one more attempt counted. At most
    /// [`DeliveryQueue::longest_wait`].
    async fn retry(self: Box<Self>, wait: Duration) -> Result<(), QueueError>;

    /// It is still being worked on: the hold lasts as long again as from its beginning.
    async fn extend(&self) -> Result<(), QueueError>;
}

/// Where deliveries wait for a worker.
///
/// Order: deliveries of one connection come out in the order in which they were put in, as long as none
/// of them is retried and one worker takes the lane; nothing more is promised.
#[async_trait]
pub trait DeliveryQueue: Send + Sync + fmt::Debug {
    /// Puts deliveries in and returns when all are safely there. One that is there already (same id and
    /// attempts) is not put in twice, within the broker's duplicate window. After an error some may be
    /// there: call it again with all of them.
    async fn enqueue(&self, deliveries: &[Enqueue]) -> Result<(), QueueError>;

    /// Hands out at most `max` deliveries of a lane as they come, until `wait` is over. The stream ends
    /// early when `max` are out.
    async fn pull(
        &self,
        lane: u16,
        max: usize,
        wait: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError>;

    /// The longest wait that [`Lease::retry`] takes; what waits longer is parked.
    fn longest_wait(&self) -> Duration;

    /// How many lanes are to be pulled: those that are configured, and those of an earlier configuration
    /// that had more, which may still hold deliveries.
    async fn lanes(&self) -> Result<u16, QueueError>;

    /// Reports a dead letter to whoever listens for them. The row in the database is written by the
    /// caller.
    async fn dead_letter(&self, key: &DeliveryKey, reason: &str, body: &Bytes) -> Result<(), QueueError>;

    /// Reports finished attempts to history, without waiting for the archiver.
    async fn receipts(&self, receipts: &[Receipt]) -> Result<(), QueueError>;

    /// Creates what is missing, waiting for the broker as long as it takes.
    async fn prepare(&self) -> Result<(), QueueError>;
}

/// The queue and the hints of the configured backend.
#[derive(Debug, Clone)]
pub struct Transport {
    /// Where deliveries wait.
    pub queue: Arc<dyn DeliveryQueue>,
    /// What wakes and invalidates.
    pub hints: Arc<dyn Notifier>,
    /// The broker, if the deliveries are there. One that carries only hints is known to `hints` alone:
    /// nothing waits for it.
    pub nats: Option<Nats>,
}

impl Transport {
    /// Starts connecting to what the backend needs, and returns at once.
    pub async fn connect(
        common: &Common,
        pool: &PgPool,
        role: &'static str,
        stop: CancellationToken,
    ) -> Result<Self, QueueError> {
        match common.backend {
            Backend::Jetstream => {
                let nats = Nats::connect(&common.nats, &common.prefix, role).await?;
                let hints = notify::connect(common, pool, Some(nats.clone()), role, stop).await?;
                let queue = Arc::new(JetStreamQueue::new(nats.clone(), common.lanes));
                Ok(Self { queue, hints, nats: Some(nats) })
            }
            Backend::Postgres => {
                let hints = notify::connect(common, pool, None, role, stop.clone()).await?;
                let lease = Duration::from_millis(common.nats.ack_wait_ms);
                let poll = Duration::from_millis(common.notify.poll_ms);
                let queue =
                    PostgresQueue::new(pool.clone(), common.lanes, lease, Arc::clone(&hints), poll, stop);
                Ok(Self { queue: Arc::new(queue), hints, nats: None })
            }
            Backend::Memory => Err(QueueError::NotInOneProcess),
        }
    }

    /// Sends what is buffered. To be called after the last acknowledgement, before the process ends.
    pub async fn flush(&self) {
        self.hints.flush().await;
        if let Some(nats) = &self.nats {
            nats.flush().await;
        }
    }
}
