//! Events that are too large for the queue, read from the event store and kept for their fan-out.

use std::{sync::Arc, time::Duration};

use bus_core::{
    ids::EventUid,
    pg::{self, StoreError},
    retry::DeadReason,
};
use bytes::Bytes;
use moka::future::Cache;
use sqlx::PgPool;

/// A fan-out is usually over by then.
const KEEP: Duration = Duration::from_secs(60);

/// The kept bodies, bounded in bytes. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Bodies {
    pool: PgPool,
    cache: Cache<EventUid, Result<Bytes, DeadReason>>,
}

impl Bodies {
    pub(crate) fn new(pool: PgPool, max_bytes: u64) -> Self {
        let cache = Cache::builder()
            .max_capacity(max_bytes)
            .weigher(|_, body: &Result<Bytes, DeadReason>| {
                body.as_ref().map_or(1, |body| u32::try_from(body.len()).unwrap_or(u32::MAX))
            })
            .time_to_live(KEEP)
            .build();
        Self { pool, cache }
    }

    /// The event's bytes, or why there are none any more.
    pub(crate) async fn get(&self, event: EventUid) -> Result<Result<Bytes, DeadReason>, Arc<StoreError>> {
        self.cache.try_get_with(event, pg::load_body(&self.pool, event)).await
    }
}
