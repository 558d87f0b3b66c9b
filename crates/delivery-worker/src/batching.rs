//! Gathers the deliveries of subscriptions that asked for batches.
//!
//! There is no task and no timer of its own. Whoever adds the first delivery of a batch waits for the others
//! and gets the whole batch; those who add to it get nothing and are done. So a batch is attempted by a task
//! that is there anyway, and what is gathered cannot be forgotten: it belongs to the one who waits.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bus_core::{cloudevent::CloudEvent, delivery::Delivery, ids::SubscriptionId, subscription::BatchPolicy};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// The most bytes of events in a batch: as much as the largest event has.
pub const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// Deliveries of one subscription that go out in one request.
#[derive(Debug)]
pub struct Batch<H> {
    /// The deliveries in the order in which they were added, at least one. No two of them have the same id,
    /// nor are they of events with the same CloudEvents `id`, by which the answer names them.
    pub deliveries: Vec<Delivery>,
    /// For each delivery what was given with it. There are several if the queue handed the delivery out
    /// again while it waited here; all of them are to be settled alike.
    pub held: Vec<Vec<H>>,
}

/// The batches that are being gathered. `H` is what holds a delivery: its lease and its slot.
pub struct Batcher<H> {
    open: Mutex<HashMap<SubscriptionId, Open<H>>>,
    longest_wait: Duration,
    stop: CancellationToken,
}

/// A batch that someone waits for.
struct Open<H> {
    batch: Batch<H>,
    /// The CloudEvents ids in it.
    ids: HashSet<String>,
    bytes: usize,
    full: oneshot::Sender<Batch<H>>,
}

impl<H> fmt::Debug for Batcher<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batcher").field("longest_wait", &self.longest_wait).finish_non_exhaustive()
    }
}

impl<H> Batcher<H> {
    /// No batch waits longer than `longest_wait`, whatever its subscription asks for, so that the gathering
    /// and the attempt together stay below the queue's `ack_wait`. From `stop` on none waits at all.
    pub fn new(longest_wait: Duration, stop: CancellationToken) -> Self {
        Self { open: Mutex::default(), longest_wait, stop }
    }

    /// Adds a delivery to its subscription's batch. `None` if another caller gets the batch, and with it
    /// this delivery and its `hold`. Otherwise this delivery is the first one of a batch, and the call waits
    /// until
    /// - it has as many events as the policy allows,
    /// - a delivery came that must not be in it, by [`MAX_BATCH_BYTES`] or by its event's `id`,
    /// - the policy's time is over, or
    /// - it is flushed.
    ///
    /// The deliveries of a batch may carry different versions of their connection; whoever attempts it needs
    /// the latest of them. If the future is dropped, the holds of what it has gathered are dropped with it,
    /// at the latest when the next delivery comes.
    pub async fn add(&self, policy: BatchPolicy, delivery: Delivery, hold: H) -> Option<Batch<H>> {
        let subscription = delivery.key.subscription;
        let mut full = self.join(policy, delivery, hold)?;
        let wait = policy.max_wait().min(self.longest_wait);
        if let Some(Ok(Ok(batch))) =
            self.stop.run_until_cancelled(tokio::time::timeout(wait, &mut full)).await
        {
            return Some(batch);
        }
        // A batch is sent off under the lock: if it was not sent by now, it is the one in the map.
        let mut open = self.lock();
        full.try_recv().ok().or_else(|| open.remove(&subscription).map(|open| open.batch))
    }

    /// Sends every batch off as it is. To be called while a lane has no free slot: the deliveries that the
    /// batches wait for could not be taken from the queue.
    pub fn flush_all(&self) {
        self.lock().drain().for_each(|(_, open)| open.send_off());
    }

    /// Puts a delivery where it belongs. If that is a new batch: the way on which it will come.
    fn join(&self, policy: BatchPolicy, delivery: Delivery, hold: H) -> Option<oneshot::Receiver<Batch<H>>> {
        let subscription = delivery.key.subscription;
        let id = CloudEvent::id_of(&delivery.body).unwrap_or_default();
        let mut map = self.lock();
        if let Some(mut open) = map.remove(&subscription).filter(|open| !open.full.is_closed()) {
            let again = open.batch.deliveries.iter().position(|there| there.key.id == delivery.key.id);
            if let Some(position) = again {
                open.batch.held[position].push(hold);
                map.insert(subscription, open);
                return None;
            }
            if open.has_room_for(&delivery, &id) {
                open.push(delivery, id, hold);
                if open.batch.deliveries.len() < usize::from(policy.max_events) {
                    map.insert(subscription, open);
                } else {
                    open.send_off();
                }
                return None;
            }
            open.send_off();
        }
        let (full, receiver) = oneshot::channel();
        let batch = Batch { deliveries: Vec::new(), held: Vec::new() };
        let mut open = Open { batch, ids: HashSet::new(), bytes: 0, full };
        open.push(delivery, id, hold);
        if policy.max_events > 1 {
            map.insert(subscription, open);
        } else {
            open.send_off();
        }
        Some(receiver)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SubscriptionId, Open<H>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H> Open<H> {
    fn has_room_for(&self, delivery: &Delivery, id: &str) -> bool {
        self.bytes + delivery.body.len() <= MAX_BATCH_BYTES && !self.ids.contains(id)
    }

    fn push(&mut self, delivery: Delivery, id: String, hold: H) {
        self.bytes += delivery.body.len();
        self.ids.insert(id);
        self.batch.deliveries.push(delivery);
        self.batch.held.push(vec![hold]);
    }

    /// If nobody waits for it any more, it is dropped, and the queue hands its deliveries out again.
    fn send_off(self) {
        drop(self.full.send(self.batch));
    }
}

#[cfg(test)]
#[path = "batching_tests.rs"]
mod tests;
