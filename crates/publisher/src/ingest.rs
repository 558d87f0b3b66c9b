//! The way into the bus: bounds what is under way and waits for the commit.

use std::{sync::Arc, time::Duration};

use bus_core::{
    cloudevent::CloudEvent,
    ids::EventUid,
    pg::{Claim, Identity, StoreError, UniqueKey},
};
use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{api::auth::Principal, config::PublishConfig};

/// Memory is counted in units of this many bytes.
const UNIT: usize = 1024;

/// What an event costs besides its body, bytes.
const OVERHEAD: usize = 512;

/// Tell a client to come back after this time when there is no room, or its request was interrupted.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// One request to publish.
#[derive(Debug, Clone)]
pub struct Publish {
    /// Who publishes.
    pub principal: Principal,
    /// When the request arrived; the time of events that say none.
    pub at: Timestamp,
    /// The events, complete.
    pub events: Vec<CloudEvent>,
    /// For each event: the producer named it, so its (source, id) is published only once.
    pub explicit_id: Vec<bool>,
    /// For each event: when it is to be delivered, if not at once.
    pub deliver_at: Vec<Option<Timestamp>>,
    /// For each event: its uid.
    pub uids: Vec<EventUid>,
    /// The request as a whole is published only once.
    pub idempotency: Option<Idempotency>,
}

/// An `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07).
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The key, unique within the organization.
    pub key: String,
    /// SHA-256 of the request's body.
    pub fingerprint: [u8; 32],
}

/// What became of one event of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// What it was stored as, now or before.
    pub identity: Identity,
    /// It had been published before; nothing is delivered again.
    pub duplicate: bool,
}

/// Why a request was not published. Nothing of it was, unless it is `Interrupted`, or `Store` with an error
/// that [is "unavailable"](StoreError::is_unavailable): then it is not known.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    /// The API key was revoked or has expired.
    #[error("the API key is not valid any more")]
    KeyRevoked,
    /// The idempotency key was used for another request.
    #[error("the idempotency key was used for another request")]
    IdempotencyMismatch,
    /// Too much is waiting.
    #[error("too many events wait for their commit")]
    Busy {
        /// When to try again.
        retry_after: Duration,
    },
    /// The events would make too many deliveries for one transaction.
    #[error("the request would make more than {limit} deliveries")]
    TooManyDeliveries {
        /// The most deliveries of a request.
        limit: usize,
    },
    /// The committer died or the database did not answer in time; the events may be published or not.
    #[error("it is not known whether the events were published")]
    Interrupted {
        /// When to try again.
        retry_after: Duration,
    },
    /// The database.
    #[error("publish events")]
    Store(#[source] Arc<StoreError>),
}

/// A request on its way to a committer.
pub(crate) struct Job {
    pub(crate) publish: Publish,
    /// Each event's bytes, as they are delivered.
    pub(crate) bodies: Vec<Bytes>,
    pub(crate) answer: oneshot::Sender<Result<Vec<Accepted>, PublishError>>,
    /// Held until the answer.
    _memory: OwnedSemaphorePermit,
}

impl Job {
    pub(crate) fn bytes(&self) -> usize {
        self.bodies.iter().map(Bytes::len).sum()
    }

    /// The key of an event that must be published only once.
    pub(crate) fn event_key(&self, index: usize) -> Option<UniqueKey> {
        let event = &self.publish.events[index];
        self.publish.explicit_id[index]
            .then(|| UniqueKey::event(self.publish.principal.organization, &event.source, &event.id))
    }

    /// The request's own claim, if it has an idempotency key.
    pub(crate) fn idempotency_claim(&self) -> Option<Claim> {
        self.publish.idempotency.as_ref().map(|idempotency| Claim {
            key: UniqueKey::idempotency(self.publish.principal.organization, &idempotency.key),
            events: self.publish.uids.clone(),
            fingerprint: Some(idempotency.fingerprint),
        })
    }

    /// Every key that this request must be alone with in its transaction.
    pub(crate) fn keys(&self) -> impl Iterator<Item = UniqueKey> + '_ {
        let events = (0..self.publish.events.len()).filter_map(|index| self.event_key(index));
        events.chain(self.idempotency_claim().map(|claim| claim.key))
    }
}

/// The way into the bus. Cheap to clone; the committers end when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Ingest {
    jobs: mpsc::Sender<Job>,
    memory: Arc<Semaphore>,
    max_wait: Duration,
}

impl Ingest {
    /// The way in, and what comes out of it for the committers.
    pub(crate) fn new(config: &PublishConfig) -> (Self, mpsc::Receiver<Job>) {
        // The semaphore is the bound that counts; the channel only has to be as long.
        let units = (config.max_waiting_bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS);
        let (jobs, receiver) = mpsc::channel(units);
        let ingest = Self {
            jobs,
            memory: Arc::new(Semaphore::new(units)),
            max_wait: Duration::from_millis(config.max_wait_ms),
        };
        (ingest, receiver)
    }

    /// Publishes and returns once the events are committed: what each of them was accepted as, in order.
    pub async fn publish(&self, publish: Publish) -> Result<Vec<Accepted>, PublishError> {
        if publish.events.is_empty() {
            return Ok(Vec::new());
        }
        let bodies: Vec<Bytes> = publish.events.iter().map(CloudEvent::to_structured).collect();
        let size: usize = bodies.iter().map(|body| body.len() + OVERHEAD).sum();
        let units = u32::try_from(size.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let busy = || PublishError::Busy { retry_after: RETRY_AFTER };
        let memory = tokio::time::timeout(self.max_wait, Arc::clone(&self.memory).acquire_many_owned(units))
            .await
            .map_err(|_| busy())?
            .map_err(|_| busy())?;
        let (answer, result) = oneshot::channel();
        let job = Job { publish, bodies, answer, _memory: memory };
        self.jobs.send(job).await.map_err(|_| busy())?;
        // A committer that died with the request leaves no answer, and may have died after the commit.
        result.await.map_err(|_| PublishError::Interrupted { retry_after: RETRY_AFTER })?
    }
}

#[cfg(test)]
mod tests {
    use bus_core::{
        ids::{KeyId, OrganizationId},
        pg::Scopes,
    };
    use uuid::Uuid;

    use super::*;
    use crate::config::PublisherConfig;

    #[tokio::test]
    async fn a_request_whose_committer_died_is_not_said_to_be_unpublished() {
        let environment = [("DATABASE_URL", "postgres://localhost/bus"), ("NATS_URL", "nats://localhost")];
        let environment = environment.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        let loaded = bus_core::config::load::<PublisherConfig>(None, environment).expect("the defaults");
        let (ingest, mut jobs) = Ingest::new(&loaded.config.publish);
        let event = CloudEvent {
            id: "1".into(),
            source: "/shop".into(),
            r#type: "t".into(),
            subject: None,
            time: None,
            datacontenttype: None,
            dataschema: None,
            extensions: std::collections::BTreeMap::new(),
            data: None,
        };
        let publish = Publish {
            principal: Principal {
                key: KeyId(Uuid::nil()),
                organization: OrganizationId(Uuid::nil()),
                connection: None,
                scopes: Scopes::default(),
            },
            at: Timestamp::UNIX_EPOCH,
            events: vec![event],
            explicit_id: vec![true],
            deliver_at: vec![None],
            uids: vec![EventUid(Uuid::nil())],
            idempotency: None,
        };
        let committer = async { drop(jobs.recv().await.expect("the request")) };
        let (answer, ()) = tokio::join!(ingest.publish(publish.clone()), committer);
        assert!(matches!(answer, Err(PublishError::Interrupted { .. })), "{answer:?}");
        // Without any committer nothing can have been published.
        drop(jobs);
        let answer = ingest.publish(publish).await;
        assert!(matches!(answer, Err(PublishError::Busy { .. })), "{answer:?}");
    }
}
