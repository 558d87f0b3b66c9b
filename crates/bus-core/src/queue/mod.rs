//! The delivery queue: where deliveries wait for a worker.

mod drain;
mod jetstream;
mod memory;
mod postgres;

use std::{
    collections::{BTreeSet, HashSet},
    error::Error,
    fmt,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use self::{
    drain::{Drained, drain},
    jetstream::JetStreamQueue,
    memory::MemoryQueue,
    postgres::PostgresQueue,
};
use crate::{
    clock::SystemClock,
    config::{Backend, Common},
    delivery::{DeliveryKey, Progress},
    ids::{DeliveryId, OrganizationId},
    nats::{Nats, NatsError},
    notify::{self, Notifier},
    pg::{DeadLetter, StoreError},
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
    /// The queue in memory has no room (invariant I10).
    #[error("the queue in memory is full ({0} deliveries)")]
    Full(usize),
}

impl QueueError {
    /// Whether the queue has certainly not taken what it was given: it said so. Otherwise it may have, and the same is to
    /// be given again, under the same id.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Full(_) => true,
            Self::Store(failed) => !failed.is_unavailable(),
            Self::Nats(failed) => {
                std::iter::successors(Some(failed as &(dyn Error + 'static)), |&error| error.source())
                    .any(|error| error.is::<async_nats::jetstream::Error>())
            }
        }
    }
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
    /// How far it has come.
    pub progress: Progress,
    /// The lane that its organization has of its own.
    pub lane: Option<u16>,
    /// The event's bytes, shared by the whole fan-out.
    pub body: Body,
}

impl Enqueue {
    /// Where it goes in a queue of `lanes` lanes.
    fn lane(&self, lanes: u16) -> u16 {
        lane_of(self.key.organization, self.lane, lanes)
    }
}

/// The lane of an organization's deliveries: its `own` if it has one, or the one of `lanes` that its id falls on.
pub fn lane_of(organization: OrganizationId, own: Option<u16>, lanes: u16) -> u16 {
    own.unwrap_or_else(|| organization.lane(lanes))
}

/// A delivery that a worker holds. It returns to the queue by itself if the worker dies.
#[derive(Debug)]
pub struct Leased {
    /// What it is about.
    pub key: DeliveryKey,
    /// How far it has come.
    pub progress: Progress,
    /// The lane in which it was.
    pub lane: u16,
    /// How often it was handed out in this turn, this time included. More than once means that an earlier
    /// holder died, was cut off, or put it back.
    pub handed_out: u32,
    /// It must not be attempted yet, and the queue has no room to keep it waiting: to be parked for this long.
    pub wait: Option<Duration>,
    /// The event's bytes.
    pub body: Body,
    /// The hold.
    pub lease: Box<dyn Lease>,
}

/// A worker's hold on a delivery.
#[async_trait]
pub trait Lease: Send + Sync + fmt::Debug {
    /// It is finished: delivered, parked, or dead-lettered. May be repeated after an error.
    async fn ack(&self) -> Result<(), QueueError>;

    /// Gives it out again as `next`, not before `wait` is over. At most
    /// [`DeliveryQueue::longest_wait`]. If the hold was lost meanwhile, and the queue can tell, nothing
    /// changes. After an error it is not known whether it took place; parking the same turn does no harm then.
    async fn postpone(&self, next: Progress, wait: Duration) -> Result<(), QueueError>;

    /// Leaves it to another worker, as it was, after `wait`.
    async fn put_back(&self, wait: Duration) -> Result<(), QueueError>;

    /// It is still being worked on: the hold lasts as long again as from its beginning.
    async fn extend(&self) -> Result<(), QueueError>;
}

/// Where deliveries wait for a worker.
///
/// Promised: what was put in comes out until it is acknowledged; nobody gets what a live worker holds; no
/// delivery comes before its wait is over; one that waits keeps nobody else from coming.
///
/// Order: deliveries of one connection come out in the order in which they were put in, as long as one
/// worker takes the lane and none of them was handed out before. Nothing is promised about the order after a
/// retry, a crash, a move to another lane or a return from the database, between several workers, or between
/// connections.
#[async_trait]
pub trait DeliveryQueue: Send + Sync + fmt::Debug {
    /// Puts deliveries in and returns when all are safely there, each in its lane, and those who look which
    /// [`lanes`](Self::lanes) there are find it. One that is there already (same id and turn) is not put in twice,
    /// within the broker's duplicate window. After an error some may be there: call it again with all of them.
    async fn enqueue(&self, deliveries: &[Enqueue]) -> Result<(), QueueError>;

    /// Hands out at most `max` deliveries of a lane as they come, until `wait` is over. The stream ends early when `max` are
    /// out. A queue that keeps several deliveries in one message hands out whole messages, and so may exceed it.
    async fn pull(
        &self,
        lane: u16,
        max: usize,
        wait: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError>;

    /// Takes out deliveries that are closed (acknowledged by the subscriber, or cancelled), as far as the
    /// queue can find them. Those that it cannot find, and those that are held, are dropped by the worker.
    async fn withdraw(&self, deliveries: &[DeliveryId]) -> Result<(), QueueError>;

    /// The longest wait that [`Lease::postpone`] takes; what waits longer is parked.
    fn longest_wait(&self) -> Duration {
        LONGEST_WAIT
    }

    /// The lanes that are to be pulled: those that are configured, and others that may hold deliveries: those of an
    /// earlier configuration that had more, and those of single organizations. Asks no database that carries no
    /// deliveries.
    async fn lanes(&self) -> Result<BTreeSet<u16>, QueueError>;

    /// Which of these deliveries are in the queue, in whatever turn, held and waiting ones included. What went in before
    /// the call and has not left it by the end is among them.
    async fn holds(&self, deliveries: &[DeliveryKey]) -> Result<HashSet<DeliveryId>, QueueError>;

    /// How many deliveries are in the queue, held and waiting ones included; several in one message count as one.
    async fn depth(&self) -> Result<u64, QueueError>;

    /// Reports a dead letter to whoever listens for them. The row in the database is written by the
    /// caller.
    async fn dead_letter(&self, letter: &DeadLetter, body: &Bytes) -> Result<(), QueueError>;

    /// Reports finished attempts to history, without waiting for the archiver.
    async fn receipts(&self, receipts: &[Receipt]) -> Result<(), QueueError>;

    /// Creates what is missing, waiting for the broker as long as it takes.
    async fn prepare(&self) -> Result<(), QueueError>;
}

/// A delivery that waits longer leaves the queue and is parked in the database: a wait in the broker takes a
/// place in the window of unacknowledged deliveries, and one in the database can be queried.
pub const LONGEST_WAIT: Duration = Duration::from_secs(5);

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
                let nats = Nats::connect(common, role).await?;
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
            Backend::Memory => {
                let hints = notify::connect(common, pool, None, role, stop).await?;
                warn!("The queue is in memory: what is in it when this process ends is not delivered");
                let lease = Duration::from_millis(common.nats.ack_wait_ms);
                let queue = MemoryQueue::new(pool.clone(), Arc::new(SystemClock), common.lanes, lease);
                Ok(Self { queue: Arc::new(queue), hints, nats: None })
            }
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
