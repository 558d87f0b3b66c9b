//! Connections, kept in memory so that a delivery needs no read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bus_core::{
    connection::Connection,
    delivery::DeliveryKey,
    ids::{ConnectionId, OrganizationId},
    pg::{self, StoreError},
    queue::{Hint, Hints},
};
use futures::StreamExt as _;
use moka::future::Cache;
use sqlx::PgPool;

/// The kept connections; a deleted one is kept as `None`. Cheap to clone.
///
/// Fresh enough is: at least the version that the delivery was matched with, and not older than the last
/// hint about it.
#[derive(Debug, Clone)]
pub(crate) struct Connections {
    pool: PgPool,
    cache: Cache<ConnectionId, Option<Arc<Connection>>>,
    /// Counts the hints, so that a read that was under way when one came is not kept.
    hints: Arc<AtomicU64>,
}

impl Connections {
    pub(crate) fn new(pool: PgPool, capacity: u64, ttl: Duration) -> Self {
        let cache = Cache::builder().max_capacity(capacity).time_to_live(ttl).build();
        Self { pool, cache, hints: Arc::default() }
    }

    /// The delivery's connection, as it was when the event was matched or later; `None` if it was deleted.
    pub(crate) async fn get(&self, key: &DeliveryKey) -> Result<Option<Arc<Connection>>, Arc<StoreError>> {
        let (organization, id) = (key.organization, key.connection);
        let kept = self.cache.try_get_with(id, self.load(organization, id)).await?;
        match kept {
            Some(connection) if connection.version < key.connection_version => {
                self.cache.invalidate(&id).await;
                self.cache.try_get_with(id, self.load(organization, id)).await
            }
            kept => Ok(kept),
        }
    }

    async fn load(
        &self,
        organization: OrganizationId,
        id: ConnectionId,
    ) -> Result<Option<Arc<Connection>>, StoreError> {
        loop {
            let before = self.hints.load(Ordering::Acquire);
            let loaded = pg::connection(&self.pool, organization, id).await?.map(Arc::new);
            if self.hints.load(Ordering::Acquire) == before {
                return Ok(loaded);
            }
        }
    }

    /// Drops what hints speak of. Never ends.
    pub(crate) async fn follow(self, hints: Arc<dyn Hints>) {
        let mut hints = hints.listen().await;
        while let Some(hint) = hints.next().await {
            self.hints.fetch_add(1, Ordering::AcqRel);
            match hint {
                Hint::ConnectionChanged(id) => self.cache.invalidate(&id).await,
                Hint::Missed => self.cache.invalidate_all(),
            }
        }
    }
}
