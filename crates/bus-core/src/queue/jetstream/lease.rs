//! Holds on the deliveries of a message.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::jetstream::{AckKind, Message};
use async_trait::async_trait;
use tokio::time::Instant;

use super::{
    super::{Lease, QueueError},
    JetStreamQueue,
    message::{self, Content},
};
use crate::{delivery::Progress, nats::During as _};

/// A message in a worker's hands. It is acknowledged when each of its deliveries has its outcome.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) message: Message,
    pub(super) queue: JetStreamQueue,
    /// For each of its deliveries, whether it still needs the message.
    open: Mutex<Vec<bool>>,
    /// When the hold was extended last; nobody does it again within `fresh`.
    extended: Mutex<Option<Instant>>,
    fresh: Duration,
}

impl Held {
    pub(super) fn new(
        message: Message,
        queue: JetStreamQueue,
        deliveries: usize,
        fresh: Duration,
    ) -> Arc<Self> {
        let (open, extended) = (Mutex::new(vec![true; deliveries]), Mutex::default());
        Arc::new(Self { message, queue, open, extended, fresh })
    }

    async fn answer(&self, kind: AckKind, operation: &'static str) -> Result<(), QueueError> {
        Ok(self.message.ack_with(kind).await.during(operation)?)
    }

    /// The delivery at this place needs the message no longer. Whoever is last acknowledges it, and may do so again after an
    /// error.
    async fn finish(&self, place: usize) -> Result<(), QueueError> {
        let last = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open[place] = false;
            !open.contains(&true)
        };
        if last { self.answer(AckKind::Ack, "acknowledge a delivery").await } else { Ok(()) }
    }
}

/// The hold on one delivery of a message.
#[derive(Debug)]
pub(super) struct MessageLease {
    pub(super) held: Arc<Held>,
    /// Which delivery of the message it is.
    pub(super) place: usize,
    /// Whether the message has others.
    pub(super) packed: bool,
    pub(super) content: Content,
}

impl MessageLease {
    /// Puts the delivery in once more, alone, and gives up its hold on the message. Whoever dies in between leaves both: the
    /// earlier one is attempted again, and what follows from that bears the same message id.
    async fn enter(
        &self,
        progress: Progress,
        wait: Duration,
        operation: &'static str,
    ) -> Result<(), QueueError> {
        let Content { key, body, .. } = &self.content;
        let subject = self.held.message.subject.to_string();
        let message = message::alone(key, progress, body, wait);
        let ack = self.held.queue.nats.jetstream.send_publish(subject, message).await.during(operation)?;
        ack.await.during(operation)?;
        self.held.finish(self.place).await
    }
}

#[async_trait]
impl Lease for MessageLease {
    async fn ack(&self) -> Result<(), QueueError> {
        self.held.finish(self.place).await
    }

    async fn postpone(&self, next: Progress, wait: Duration) -> Result<(), QueueError> {
        self.enter(next, wait, "postpone a delivery").await
    }

    async fn put_back(&self, wait: Duration) -> Result<(), QueueError> {
        const OPERATION: &str = "put a delivery back";
        if self.packed {
            // The others of the pack must not come again with it.
            return self.enter(self.content.progress, wait, OPERATION).await;
        }
        self.held.answer(AckKind::Nak(Some(wait)), OPERATION).await
    }

    async fn extend(&self) -> Result<(), QueueError> {
        let last = *self.held.extended.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|at| at.elapsed() < self.held.fresh) {
            return Ok(());
        }
        let now = Instant::now();
        self.held.answer(AckKind::Progress, "hold a delivery longer").await?;
        *self.held.extended.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        Ok(())
    }
}
