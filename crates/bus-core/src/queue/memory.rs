//! The delivery queue in memory: for tests, and for a process that runs all roles by itself. What it holds
//! dies with the process.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use jiff::{SignedDuration, Timestamp};
use metrics::gauge;
use sqlx::PgPool;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use super::{Body, DeliveryQueue, Enqueue, Lease, Leased, QueueError};
use crate::{
    clock::Clock,
    delivery::{DeliveryKey, Progress},
    ids::DeliveryId,
    pg::{self, DeadLetter},
    receipt::Receipt,
};

/// The most deliveries that are held (invariant I10); with the largest body that a queue carries and one
/// subscriber per event, 25 GiB, so bodies of one fan-out are shared.
pub(super) const CAPACITY: usize = 100_000;

/// Between two looks of a pull that waits: what is due by the clock wakes nobody.
const POLL: Duration = Duration::from_millis(50);

/// The delivery queue in memory. Clones share the deliveries.
#[derive(Debug, Clone)]
pub struct MemoryQueue {
    pool: PgPool,
    clock: Arc<dyn Clock>,
    lanes: u16,
    lease: Duration,
    state: Arc<Mutex<State>>,
    wake: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<DeliveryId, Entry>,
    /// What may be handed out, in this order, by lane.
    visible: BTreeMap<(u16, Timestamp, u64), DeliveryId>,
    /// The next position or token.
    counter: u64,
}

#[derive(Debug)]
struct Entry {
    key: DeliveryKey,
    progress: Progress,
    body: Body,
    lane: u16,
    handed_out: u32,
    /// Its key in [`State::visible`].
    visible_at: Timestamp,
    position: u64,
    /// The latest hold; a late answer of an earlier holder finds another one and changes nothing.
    token: u64,
}

impl State {
    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn put(&mut self, entry: Entry) {
        self.visible.insert((entry.lane, entry.visible_at, entry.position), entry.key.id);
        self.entries.insert(entry.key.id, entry);
    }

    /// Nobody else can count what is in this process's memory.
    fn report(&self) {
        gauge!("bus_memory_queue_deliveries").set(self.entries.len() as f64);
    }

    fn take(&mut self, id: DeliveryId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.visible.remove(&(entry.lane, entry.visible_at, entry.position));
        Some(entry)
    }

    /// Changes the entry that is held with this token, if it still is.
    fn held(&mut self, id: DeliveryId, token: u64, change: impl FnOnce(&mut Entry)) {
        if self.entries.get(&id).is_some_and(|entry| entry.token == token)
            && let Some(mut entry) = self.take(id)
        {
            change(&mut entry);
            self.put(entry);
        }
    }
}

impl MemoryQueue {
    /// A queue of `lanes` lanes that reports receipts to the database; a holder that gives no answer loses
    /// its hold after `lease` on `clock`.
    pub fn new(pool: PgPool, clock: Arc<dyn Clock>, lanes: u16, lease: Duration) -> Self {
        Self { pool, clock, lanes, lease, state: Arc::default(), wake: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn after(&self, wait: Duration) -> Timestamp {
        let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
        self.clock.now().checked_add(wait).unwrap_or(Timestamp::MAX)
    }

    fn claim(&self, lane: u16, max: usize) -> Vec<Leased> {
        let (now, until) = (self.clock.now(), self.after(self.lease));
        let mut state = self.state();
        let due: Vec<DeliveryId> = state
            .visible
            .range((lane, Timestamp::MIN, 0)..=(lane, now, u64::MAX))
            .take(max)
            .map(|(_, id)| *id)
            .collect();
        let mut leased = Vec::with_capacity(due.len());
        for id in due {
            let token = state.next();
            let Some(mut entry) = state.take(id) else { continue };
            entry.token = token;
            entry.visible_at = until;
            entry.handed_out = entry.handed_out.saturating_add(1);
            leased.push(Leased {
                key: entry.key,
                progress: entry.progress,
                lane,
                handed_out: entry.handed_out,
                wait: None,
                body: entry.body.clone(),
                lease: Box::new(EntryLease { queue: self.clone(), delivery: id, token }),
            });
            state.put(entry);
        }
        leased
    }
}

#[async_trait]
impl DeliveryQueue for MemoryQueue {
    async fn enqueue(&self, deliveries: &[Enqueue]) -> Result<(), QueueError> {
        let now = self.clock.now();
        let mut state = self.state();
        for delivery in deliveries {
            let id = delivery.key.id;
            if state.entries.get(&id).is_some_and(|there| there.progress.turn >= delivery.progress.turn) {
                continue;
            }
            if state.entries.len() >= CAPACITY {
                return Err(QueueError::Full(CAPACITY));
            }
            state.take(id);
            let position = state.next();
            state.put(Entry {
                key: delivery.key,
                progress: delivery.progress,
                body: delivery.body.clone(),
                lane: delivery.lane(self.lanes),
                handed_out: 0,
                visible_at: now,
                position,
                token: 0,
            });
        }
        state.report();
        drop(state);
        self.wake.notify_waiters();
        Ok(())
    }

    async fn pull(
        &self,
        lane: u16,
        max: usize,
        wait: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError> {
        let deadline = Instant::now() + wait;
        loop {
            let mut woken = std::pin::pin!(self.wake.notified());
            // Registered before the look, so that what is enqueued in between wakes us.
            woken.as_mut().enable();
            let claimed = self.claim(lane, max);
            let left = deadline.saturating_duration_since(Instant::now());
            if !claimed.is_empty() || left.is_zero() {
                return Ok(stream::iter(claimed.into_iter().map(Ok)).boxed());
            }
            // Either way the answer is the same: look again.
            let _ = timeout(left.min(POLL), woken).await;
        }
    }

    async fn withdraw(&self, deliveries: &[DeliveryId]) -> Result<(), QueueError> {
        let mut state = self.state();
        for id in deliveries {
            state.take(*id);
        }
        state.report();
        Ok(())
    }

    async fn lanes(&self) -> Result<BTreeSet<u16>, QueueError> {
        let taken: BTreeSet<u16> = self.state().entries.values().map(|entry| entry.lane).collect();
        Ok((0..self.lanes).chain(taken).collect())
    }

    async fn holds(&self, deliveries: &[DeliveryKey]) -> Result<HashSet<DeliveryId>, QueueError> {
        let state = self.state();
        let held = deliveries.iter().map(|key| key.id).filter(|id| state.entries.contains_key(id));
        Ok(held.collect())
    }

    async fn depth(&self) -> Result<u64, QueueError> {
        Ok(self.state().entries.len() as u64)
    }

    async fn dead_letter(&self, _: &DeadLetter, _: &Bytes) -> Result<(), QueueError> {
        // The row that the caller writes is the only record without a broker.
        Ok(())
    }

    async fn receipts(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        Ok(pg::insert_attempts(&self.pool, receipts).await?)
    }

    async fn prepare(&self) -> Result<(), QueueError> {
        Ok(())
    }
}

#[derive(Debug)]
struct EntryLease {
    queue: MemoryQueue,
    delivery: DeliveryId,
    token: u64,
}

#[async_trait]
impl Lease for EntryLease {
    async fn ack(&self) -> Result<(), QueueError> {
        let mut state = self.queue.state();
        if state.entries.get(&self.delivery).is_some_and(|entry| entry.token == self.token) {
            state.take(self.delivery);
            state.report();
        }
        Ok(())
    }

    async fn postpone(&self, next: Progress, wait: Duration) -> Result<(), QueueError> {
        let visible_at = self.queue.after(wait);
        let mut state = self.queue.state();
        let position = state.next();
        state.held(self.delivery, self.token, |entry| {
            entry.progress = next;
            entry.handed_out = 0;
            entry.token = 0;
            entry.visible_at = visible_at;
            entry.position = position;
        });
        Ok(())
    }

    async fn put_back(&self, wait: Duration) -> Result<(), QueueError> {
        let visible_at = self.queue.after(wait);
        self.queue.state().held(self.delivery, self.token, |entry| {
            entry.token = 0;
            entry.visible_at = visible_at;
        });
        Ok(())
    }

    async fn extend(&self) -> Result<(), QueueError> {
        let visible_at = self.queue.after(self.queue.lease);
        self.queue.state().held(self.delivery, self.token, |entry| entry.visible_at = visible_at);
        Ok(())
    }
}
