//! What is due becomes events: matched, stored and fanned out.
//!
//! The steps are types, since what matters is what holds if the process dies between two of them. Before the commit
//! nothing has happened; after it the outbox row is there, and a publisher's relay finishes what this one does not.

use std::{collections::HashMap, fmt, sync::Arc};

use bus_core::{
    clock::Clock,
    delivery::Progress,
    fanout::{FanOut, FanOutEvent, FanOutStore, Target},
    ids::{Ids, OrganizationId, OutboxId},
    matcher::Snapshot,
    notify::{Hint, Notifier},
    pg::{self, NewEvent, StoreError},
    queue::{DeliveryQueue, QueueError},
    snapshots::Snapshots,
    telemetry::Chain,
};
use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use tracing::warn;

use crate::SchedulerConfig;

/// The most events of one transaction.
pub(crate) const MAX_EVENTS: usize = 500;

/// The most bytes of their bodies, read or stored; one event may have more.
pub(crate) const MAX_BYTES: u32 = 16 * 1024 * 1024;

/// The most deliveries of one transaction; one event may make more.
const MAX_DELIVERIES: usize = 50_000;

/// If this process is cut off from the database in the middle of a transaction, what it has claimed is free again
/// after this time.
pub(crate) const HOLD_S: u64 = 10;

/// What the database refuses is put off for this long.
pub(crate) const PUT_OFF_S: u32 = 60;

/// A fan-out that this process does not finish is taken over by a publisher's relay after this time.
pub(crate) const OUTBOX_LEASE_S: u64 = 10;

/// What firing needs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Firing {
    /// The database.
    pub pool: PgPool,
    /// What to match against.
    pub snapshots: Snapshots,
    /// Where deliveries wait.
    pub queue: Arc<dyn DeliveryQueue>,
    /// How fan-outs are stored.
    pub store: FanOutStore,
    /// Wakes the workers when deliveries are in the queue table.
    pub hints: Arc<dyn Notifier>,
    /// Names outbox rows.
    pub ids: Arc<dyn Ids>,
    /// When deliveries begin to live. What is due is told by the database's clock.
    pub clock: Arc<dyn Clock>,
    /// The role's configuration.
    pub config: SchedulerConfig,
}

impl Firing {
    /// The subscriptions of these organizations, as new as this transaction (invariant I2).
    pub(crate) async fn snapshots(
        &self,
        transaction: &mut PgConnection,
        organizations: impl Iterator<Item = OrganizationId>,
    ) -> Result<HashMap<OrganizationId, Arc<Snapshot>>, StoreError> {
        let mut organizations: Vec<OrganizationId> = organizations.collect();
        organizations.sort_unstable();
        organizations.dedup();
        let mut snapshots = HashMap::with_capacity(organizations.len());
        for (organization, version) in pg::read_versions_of(transaction, &organizations).await? {
            let snapshot = self.snapshots.at_least(transaction, organization, version).await?;
            snapshots.insert(organization, snapshot);
        }
        Ok(snapshots)
    }

    /// Stores events with their fan-out by these snapshots, in the transaction that claimed them.
    pub(crate) async fn store(
        &self,
        mut transaction: Transaction<'static, Postgres>,
        snapshots: &HashMap<OrganizationId, Arc<Snapshot>>,
        matched: Vec<(NewEvent, Vec<Target>)>,
    ) -> Result<Stored<'_>, StoreError> {
        let progress = Progress::new(self.clock.now());
        let (mut events, mut fan_outs) =
            (Vec::with_capacity(matched.len()), Vec::with_capacity(matched.len()));
        for (mut event, targets) in matched {
            let lane = snapshots.get(&event.organization).and_then(|snapshot| snapshot.lane);
            fan_outs.push(FanOutEvent::of(&mut event, lane, targets));
            events.push(event);
        }
        if !events.is_empty() {
            pg::insert_events(&mut transaction, &events).await?;
        }
        let queued = self.store.is_queue() && fan_outs.iter().any(|event| !event.targets.is_empty());
        let fan_out =
            self.store.store(&mut transaction, OutboxId(self.ids.next()), progress, fan_outs).await?;
        Ok(Stored { firing: self, transaction, fan_out, queued, progress })
    }
}

/// What is left of a transaction's bounds.
#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) events: usize,
    bytes: usize,
    deliveries: usize,
    used: bool,
}

impl Budget {
    pub(crate) fn new() -> Self {
        let bytes = usize::try_from(MAX_BYTES).unwrap_or(usize::MAX);
        Self { events: MAX_EVENTS, bytes, deliveries: MAX_DELIVERIES, used: false }
    }

    /// How many events fit, all of this size and with so many deliveries; the first one always does.
    pub(crate) fn fits(&self, bytes: usize, deliveries: usize) -> usize {
        let fits = self.events.min(self.bytes / bytes.max(1)).min(self.deliveries / deliveries.max(1));
        if self.used { fits } else { fits.max(1) }
    }

    pub(crate) fn take(&mut self, events: usize, bytes: usize, deliveries: usize) {
        self.used = true;
        self.events = self.events.saturating_sub(events);
        self.bytes = self.bytes.saturating_sub(bytes.saturating_mul(events));
        self.deliveries = self.deliveries.saturating_sub(deliveries.saturating_mul(events));
    }
}

/// Events that are stored, and not committed.
#[must_use = "nothing has happened before the commit"]
pub struct Stored<'f> {
    firing: &'f Firing,
    transaction: Transaction<'static, Postgres>,
    fan_out: Option<FanOut>,
    queued: bool,
    progress: Progress,
}

impl fmt::Debug for Stored<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored").field("fan_out", &self.fan_out).finish_non_exhaustive()
    }
}

impl<'f> Stored<'f> {
    /// All the steps that are left.
    pub(crate) async fn publish(self) -> Result<(), StoreError> {
        self.commit().await?.enqueue().await.finish().await
    }

    /// Commits. From here on the events are published, whoever dies.
    pub async fn commit(self) -> Result<Committed<'f>, StoreError> {
        let Self { firing, transaction, fan_out, queued, progress } = self;
        pg::commit(transaction).await?;
        if queued {
            firing.hints.notify(Hint::Enqueued).await;
        }
        Ok(Committed { firing, fan_out, progress })
    }
}

/// Events that are committed, and not fanned out by this process.
#[derive(Debug)]
#[must_use = "what is not fanned out waits for a relay"]
pub struct Committed<'f> {
    firing: &'f Firing,
    fan_out: Option<FanOut>,
    progress: Progress,
}

impl<'f> Committed<'f> {
    /// Puts the deliveries into the queue. Should that fail, a relay does it.
    pub async fn enqueue(self) -> Enqueued<'f> {
        let Some(fan_out) = self.fan_out else { return Enqueued { firing: self.firing, done: None } };
        match fan_out.enqueue(self.firing.queue.as_ref(), self.progress).await {
            Ok(()) => Enqueued { firing: self.firing, done: Some(fan_out.outbox) },
            Err(failed) => {
                left_to_relay(fan_out.outbox, &failed);
                Enqueued { firing: self.firing, done: None }
            }
        }
    }
}

fn left_to_relay(outbox: OutboxId, failed: &QueueError) {
    warn!(error = %Chain(failed), outbox.id = %outbox, "Fan-out left to the relay");
}

/// Deliveries that are in the queue, whose outbox row is not marked.
#[derive(Debug)]
#[must_use = "an unmarked row is fanned out once more"]
pub struct Enqueued<'f> {
    firing: &'f Firing,
    done: Option<OutboxId>,
}

impl Enqueued<'_> {
    /// Marks the outbox row. Unmarked, it is fanned out again by a relay, and the queue drops the repeats.
    pub async fn finish(self) -> Result<(), StoreError> {
        match self.done {
            Some(outbox) => pg::finish_outbox(&self.firing.pool, &[outbox]).await,
            None => Ok(()),
        }
    }
}
