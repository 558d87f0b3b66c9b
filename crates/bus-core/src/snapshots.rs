//! Each organization's subscriptions, compiled and kept.

use std::sync::Arc;

use moka::sync::Cache;
use sqlx::{PgConnection, PgPool};

use crate::{
    ids::OrganizationId,
    matcher::Snapshot,
    pg::{self, StoreError},
};

/// The most memory that is kept, bytes, all organizations together. A subscription takes about 500 bytes, and
/// one whose filter has regular expressions up to 1 MiB.
const CAPACITY: u64 = 512 * 1024 * 1024;

/// A cache of [`Snapshot`]s. It never decides how fresh is fresh enough: whoever asks says so.
#[derive(Debug, Clone)]
pub struct Snapshots {
    pool: PgPool,
    cache: Cache<OrganizationId, Arc<Snapshot>>,
}

impl Snapshots {
    /// An empty cache.
    pub fn new(pool: PgPool) -> Self {
        let cache = Cache::builder()
            .max_capacity(CAPACITY)
            .weigher(|_, kept: &Arc<Snapshot>| u32::try_from(kept.memory_bytes()).unwrap_or(u32::MAX))
            .build();
        Self { pool, cache }
    }

    /// The organization's subscriptions at `version` or later.
    pub async fn at_least(
        &self,
        connection: &mut PgConnection,
        organization: OrganizationId,
        version: i64,
    ) -> Result<Arc<Snapshot>, StoreError> {
        if let Some(kept) = self.cache.get(&organization).filter(|kept| kept.version >= version) {
            return Ok(kept);
        }
        let loaded = Arc::new(pg::load_snapshot(connection, organization).await?);
        // Two committers may load at once; the older result must not replace the newer.
        self.cache.entry(organization).and_upsert_with(|kept| match kept {
            Some(kept) if kept.value().version > loaded.version => kept.into_value(),
            _ => Arc::clone(&loaded),
        });
        Ok(loaded)
    }

    /// The organization's subscriptions, with every change that was made before this call.
    pub async fn fresh(&self, organization: OrganizationId) -> Result<Arc<Snapshot>, StoreError> {
        let mut connection = pg::acquire(&self.pool).await?;
        let version = pg::read_version(&mut connection, organization).await?;
        self.at_least(&mut connection, organization, version).await
    }

    /// How many subscriptions are to be looked at for events of these types: an estimate from what is kept,
    /// for planning. An organization of which nothing is kept may have as many as there can be.
    pub fn candidates<'t>(
        &self,
        organization: OrganizationId,
        types: impl Iterator<Item = &'t str>,
    ) -> usize {
        match self.cache.get(&organization) {
            Some(kept) => types.map(|event_type| kept.candidates(event_type)).sum(),
            None => {
                types.count().saturating_mul(usize::try_from(pg::MAX_SUBSCRIPTIONS).unwrap_or(usize::MAX))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn an_unknown_organization_may_have_all_that_there_can_be() {
        let pool = PgPool::connect_lazy("postgres://localhost/none").expect("a URL");
        let organization = OrganizationId(Uuid::nil());
        assert_eq!(Snapshots::new(pool).candidates(organization, ["a", "b"].into_iter()), 20_000);
    }
}
