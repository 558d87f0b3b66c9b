//! Connections, kept in memory so that a delivery needs no read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bus_core::{
    connection::Receiver,
    delivery::DeliveryKey,
    ids::ConnectionId,
    notify::{Hint, Notifier},
    pg::{self, StoreError},
};
use futures::StreamExt as _;
use moka::future::Cache;
use sqlx::PgPool;
use tokio::time::Instant;
use tracing::debug;

/// The kept connections with their subscriptions' rules; a deleted one is kept too, as `None`. Cheap to clone.
///
/// Fresh enough is: at least the version that the delivery was matched with, read since the last hint that
/// concerns it, and not longer ago than the time to live. What is not fresh is read again. While the
/// database is away, nobody can change a connection, so one that is merely old, or may have missed a hint,
/// serves all the same; one that is known to have changed does not.
#[derive(Debug, Clone)]
pub(crate) struct Connections {
    pool: PgPool,
    ttl: Duration,
    kept: Cache<ConnectionId, Kept>,
    /// Counts the moments from which every hint may have been missed.
    epoch: Arc<AtomicU64>,
}

#[derive(Debug, Clone)]
struct Kept {
    /// `None` if it was deleted, or has not been read yet but is already outdated.
    receiver: Option<Arc<Receiver>>,
    read_at: Instant,
    epoch: u64,
    /// A hint says that it has changed since.
    outdated: bool,
}

impl Kept {
    /// It has not changed since, as far as the delivery and the hints know.
    fn is_current(&self, key: &DeliveryKey) -> bool {
        let version = self.receiver.as_ref().map_or(i64::MAX, |receiver| receiver.connection.version);
        !self.outdated && version >= key.connection_version
    }

    /// A connection counts as one, and every ten of the rules that are kept with it as another: with retry
    /// policies as long as they may be, ten take about 10 KiB.
    fn weight(&self) -> u32 {
        let rules = self.receiver.as_ref().map_or(0, |receiver| receiver.rules.len());
        u32::try_from(1 + rules / 10).unwrap_or(u32::MAX)
    }
}

impl Connections {
    pub(crate) fn new(pool: PgPool, capacity: u64, ttl: Duration) -> Self {
        let kept = Cache::builder().max_capacity(capacity).weigher(|_, kept: &Kept| kept.weight()).build();
        Self { pool, ttl, kept, epoch: Arc::default() }
    }

    /// The delivery's connection; `None` if it was deleted.
    pub(crate) async fn get(&self, key: &DeliveryKey) -> Result<Option<Arc<Receiver>>, StoreError> {
        let kept = self.kept.get(&key.connection).await;
        if let Some(kept) = kept.as_ref().filter(|kept| self.is_fresh(kept, key)) {
            return Ok(kept.receiver.clone());
        }
        // Boxed, since it is rare: see `delivery`.
        match Box::pin(self.read(key)).await {
            Ok(receiver) => Ok(receiver),
            Err(failed) => match kept {
                Some(kept) if failed.is_unavailable() && kept.is_current(key) => {
                    debug!(connection.id = %key.connection, "The database is away; the kept connection serves");
                    Ok(kept.receiver)
                }
                _ => Err(failed),
            },
        }
    }

    fn is_fresh(&self, kept: &Kept, key: &DeliveryKey) -> bool {
        kept.is_current(key)
            && kept.epoch == self.epoch.load(Ordering::Acquire)
            && kept.read_at.elapsed() < self.ttl
    }

    /// Several deliveries may read the same connection at once; what was read first stays if it is newer.
    async fn read(&self, key: &DeliveryKey) -> Result<Option<Arc<Receiver>>, StoreError> {
        // Both from before the read: a hint that comes meanwhile makes it outdated again.
        let (epoch, read_at) = (self.epoch.load(Ordering::Acquire), Instant::now());
        let receiver = pg::receiver(&self.pool, key.organization, key.connection).await?.map(Arc::new);
        let fresh = Kept { receiver: receiver.clone(), read_at, epoch, outdated: false };
        self.kept
            .entry(key.connection)
            .and_upsert_with(|kept| {
                let kept = kept.map(moka::Entry::into_value);
                let newer = kept.filter(|kept| kept.read_at > read_at).unwrap_or(fresh);
                std::future::ready(newer)
            })
            .await;
        Ok(receiver)
    }

    /// What was read before this moment is outdated, also if the read ends only afterwards.
    async fn outdate(&self, id: ConnectionId) {
        let outdated = |kept: Option<moka::Entry<ConnectionId, Kept>>| {
            let receiver = kept.and_then(|kept| kept.into_value().receiver);
            std::future::ready(Kept { receiver, read_at: Instant::now(), epoch: 0, outdated: true })
        };
        self.kept.entry(id).and_upsert_with(outdated).await;
    }

    /// Follows what hints say. Never ends.
    pub(crate) async fn follow(self, hints: Arc<dyn Notifier>) {
        let mut hints = hints.listen();
        while let Some(hint) = hints.next().await {
            match hint {
                Hint::ConnectionChanged(id) => {
                    self.outdate(id).await;
                }
                Hint::Missed => {
                    self.epoch.fetch_add(1, Ordering::AcqRel);
                }
                Hint::Closed(_)
                | Hint::Cancelled(_)
                | Hint::Due
                | Hint::Enqueued
                | Hint::LanesChanged
                | Hint::Probe(_)
                | Hint::Alive { .. } => {}
            }
        }
    }
}
