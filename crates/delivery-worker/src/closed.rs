//! Deliveries that were closed from outside (acknowledged by the subscriber, or cancelled), kept in memory so
//! that dropping one needs no read.

use std::{sync::Arc, time::Duration};

use bus_core::{
    delivery::{DeliveryKey, Progress},
    ids::DeliveryId,
    notify::{Hint, Notifier},
    pg::{self, StoreError},
    telemetry::Chain,
};
use futures::StreamExt as _;
use moka::sync::Cache;
use sqlx::PgPool;
use tokio::time::Instant;
use tracing::{debug, warn};

/// The most that are kept, about 100 bytes each. Beyond it, or when a hint was lost, a first attempt may still
/// be made; a retry asks the database.
const CAPACITY: u64 = 200_000;

/// How many are read after hints may have been missed.
const READ: u32 = 100_000;

/// A transaction that closes deliveries may commit this much later than the time that it writes.
const OVERLAP: Duration = Duration::from_secs(60);

/// How long a retry's question to the database may take before the attempt is made all the same: a database
/// that is away must not stop deliveries.
const ASK: Duration = Duration::from_secs(1);

/// The closed deliveries. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ClosedDeliveries {
    pool: PgPool,
    lifetime: Duration,
    kept: Cache<DeliveryId, ()>,
}

impl ClosedDeliveries {
    /// None is kept for longer than a delivery may live.
    pub(crate) fn new(pool: PgPool, lifetime: Duration) -> Self {
        let kept = Cache::builder().max_capacity(CAPACITY).time_to_live(lifetime).build();
        Self { pool, lifetime, kept }
    }

    /// Whether this turn of the delivery is not to be attempted any more. A first turn that is handed out for
    /// the first time is judged from memory alone (invariant I6).
    pub(crate) async fn overrule(&self, key: &DeliveryKey, progress: Progress, handed_out: u32) -> bool {
        let closed = self.kept.contains_key(&key.id);
        if progress.turn == 0 && handed_out <= 1 {
            return closed;
        }
        // What was closed before may have been replayed since; only the database knows.
        let closed = closed && !progress.is_replayed();
        match tokio::time::timeout(ASK, pg::standing(&self.pool, key.id)).await {
            Ok(Ok(standing)) => standing.is_some_and(|(state, at)| state.overrules(at, progress.turn)),
            Ok(Err(failed)) => {
                debug!(delivery.id = %key.id, error = %Chain(&failed), "The database is away; memory serves");
                closed
            }
            Err(_) => closed,
        }
    }

    /// Follows what hints say. Never ends.
    pub(crate) async fn follow(self, hints: Arc<dyn Notifier>) {
        let mut hints = hints.listen();
        let mut read_at: Option<Instant> = None;
        while let Some(hint) = hints.next().await {
            match hint {
                Hint::Closed(id) => self.kept.insert(id, ()),
                Hint::Missed => {
                    let begun = Instant::now();
                    // The first time all that may matter, then what came since.
                    let since =
                        read_at.map_or(self.lifetime, |at| (at.elapsed() + OVERLAP).min(self.lifetime));
                    match self.read(since).await {
                        Ok(()) => read_at = Some(begun),
                        Err(failed) => {
                            warn!(error = %Chain(&failed), "Deliveries that were closed lately may be attempted once more");
                        }
                    }
                }
                Hint::ConnectionChanged(_) | Hint::Due | Hint::Enqueued => {}
            }
        }
    }

    async fn read(&self, within: Duration) -> Result<(), StoreError> {
        for id in pg::closed_lately(&self.pool, within.as_secs(), READ).await? {
            self.kept.insert(id, ());
        }
        Ok(())
    }
}
