//! Fan-out: from stored events to deliveries in the queue, for whoever stores events.
//!
//! The transaction that stores events also [stores their fan-out](FanOutStore::store); after the commit it is
//! [put into the queue](FanOut::enqueue). Whoever dies in between leaves an outbox row, which a publisher's relay
//! finishes.

use bytes::Bytes;
use metrics::counter;
use sqlx::PgConnection;

use crate::{
    cloudevent::CloudEvent,
    config::{Backend, Common},
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, OutboxId, SubscriptionId},
    matcher::{Candidate, Snapshot, Subject},
    pg::{self, NewEvent, StoreError},
    queue::{Body, DeliveryQueue, Enqueue, QueueError, lane_of},
};

/// Deliveries that are handed to the queue at a time; bounds memory where an event has many targets.
const CHUNK: usize = 1_000;

/// Rows of one statement that fills the queue of the Postgres backend.
const MAX_QUEUED: usize = 5_000;

/// One place an event goes to.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The subscription that matched.
    pub subscription: SubscriptionId,
    /// Where it sends.
    pub connection: ConnectionId,
    /// That connection's version when it matched.
    pub connection_version: i64,
}

impl From<&Candidate> for Target {
    fn from(candidate: &Candidate) -> Self {
        Self {
            subscription: candidate.subscription,
            connection: candidate.connection,
            connection_version: candidate.connection_version,
        }
    }
}

impl Target {
    /// Where an event goes by these subscriptions.
    pub fn of(snapshot: &Snapshot, event: &CloudEvent, publisher: Option<ConnectionId>) -> Vec<Self> {
        let subject = Subject { event_type: &event.r#type, publisher, payload: event.json_payload() };
        snapshot.matching(subject).into_iter().map(Self::from).collect()
    }

    /// An event's delivery to this target.
    pub fn delivery(&self, event: EventUid, organization: OrganizationId) -> DeliveryKey {
        DeliveryKey {
            id: DeliveryId::derive(event, self.subscription),
            event,
            organization,
            subscription: self.subscription,
            connection: self.connection,
            connection_version: self.connection_version,
        }
    }
}

/// An event and where it goes.
#[derive(Debug)]
pub struct FanOutEvent {
    /// The event.
    pub uid: EventUid,
    /// Whose it is.
    pub organization: OrganizationId,
    /// The lane that the organization has of its own.
    pub lane: Option<u16>,
    /// Its bytes.
    pub body: Bytes,
    /// Where it goes.
    pub targets: Vec<Target>,
}

impl FanOutEvent {
    /// The fan-out of an event by its organization's lane; its matches are noted in it.
    pub fn of(event: &mut NewEvent, lane: Option<u16>, targets: Vec<Target>) -> Self {
        event.subscriptions = targets.iter().map(|target| target.subscription).collect();
        Self { uid: event.uid, organization: event.organization, lane, body: event.body.clone(), targets }
    }

    fn deliveries(&self) -> impl Iterator<Item = DeliveryKey> + '_ {
        self.targets.iter().map(|target| target.delivery(self.uid, self.organization))
    }
}

/// How a transaction stores its fan-out.
#[derive(Debug, Clone, Copy)]
pub struct FanOutStore {
    /// The lanes, if the queue is a table of the same database: the deliveries then go in with the events,
    /// and there is nothing left to fan out.
    pub queue_in_database: Option<u16>,
    /// A fan-out that is not finished after this time is taken over by any publisher's relay, seconds.
    pub lease_s: u64,
}

impl FanOutStore {
    /// As the configured backend needs it.
    pub fn of(common: &Common, lease_s: u64) -> Self {
        let queue_in_database = (common.backend == Backend::Postgres).then_some(common.lanes);
        Self { queue_in_database, lease_s }
    }

    /// Whether a commit puts the deliveries into the queue by itself.
    pub fn is_queue(&self) -> bool {
        self.queue_in_database.is_some()
    }

    /// Stores what is to be fanned out in the events' own transaction (invariant I1). Gives what is left to do
    /// after the commit. Events without a target need nothing.
    pub async fn store(
        &self,
        transaction: &mut PgConnection,
        outbox: OutboxId,
        progress: Progress,
        events: Vec<FanOutEvent>,
    ) -> Result<Option<FanOut>, StoreError> {
        let events: Vec<FanOutEvent> = events.into_iter().filter(|event| !event.targets.is_empty()).collect();
        if events.is_empty() {
            return Ok(None);
        }
        if let Some(lanes) = self.queue_in_database {
            let mut keys = Vec::with_capacity(MAX_QUEUED);
            for event in &events {
                let lane = lane_of(event.organization, event.lane, lanes);
                for key in event.deliveries() {
                    keys.push((key, progress, lane));
                    if keys.len() == MAX_QUEUED {
                        pg::insert_queued(transaction, &keys).await?;
                        keys.clear();
                    }
                }
            }
            pg::insert_queued(transaction, &keys).await?;
            return Ok(None);
        }
        let uids: Vec<EventUid> = events.iter().map(|event| event.uid).collect();
        pg::insert_outbox(transaction, outbox, &uids, self.lease_s).await?;
        Ok(Some(FanOut { outbox, events }))
    }
}

/// One transaction's fan-out.
#[derive(Debug)]
pub struct FanOut {
    /// Its outbox row, to be [finished](pg::finish_outbox) when all is in the queue.
    pub outbox: OutboxId,
    events: Vec<FanOutEvent>,
}

impl FanOut {
    /// Puts every delivery into the queue, in the order of the events.
    pub async fn enqueue(&self, queue: &dyn DeliveryQueue, progress: Progress) -> Result<(), QueueError> {
        let mut chunks = Chunks::new(queue, progress);
        for event in &self.events {
            let body = Body::bounded(&event.body);
            for key in event.deliveries() {
                chunks.push(key, event.lane, &body).await?;
            }
        }
        chunks.finish().await
    }
}

/// Puts deliveries into the queue, a thousand at a time.
#[derive(Debug)]
pub struct Chunks<'q> {
    queue: &'q dyn DeliveryQueue,
    progress: Progress,
    chunk: Vec<Enqueue>,
}

impl<'q> Chunks<'q> {
    /// Nothing yet.
    pub fn new(queue: &'q dyn DeliveryQueue, progress: Progress) -> Self {
        Self { queue, progress, chunk: Vec::new() }
    }

    /// One delivery more, and the lane that its organization has of its own.
    pub async fn push(&mut self, key: DeliveryKey, lane: Option<u16>, body: &Body) -> Result<(), QueueError> {
        self.chunk.push(Enqueue { key, progress: self.progress, lane, body: body.clone() });
        if self.chunk.len() == CHUNK { self.send().await } else { Ok(()) }
    }

    /// To be called after the last delivery; what is dropped without it was not put in.
    pub async fn finish(mut self) -> Result<(), QueueError> {
        if self.chunk.is_empty() { Ok(()) } else { self.send().await }
    }

    async fn send(&mut self) -> Result<(), QueueError> {
        self.queue.enqueue(&self.chunk).await?;
        counter!("bus_deliveries_enqueued").increment(self.chunk.len() as u64);
        self.chunk.clear();
        Ok(())
    }
}
