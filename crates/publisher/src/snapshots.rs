//! Each organization's subscriptions, compiled and kept.

use std::{collections::HashMap, sync::Arc};

use bus_core::{
    ids::OrganizationId,
    matcher::{Snapshot, Subject},
    pg::{self, StoreError},
};
use moka::sync::Cache;
use sqlx::{PgConnection, PgPool};

/// The most memory that is kept, bytes, all organizations together. A subscription takes about 500 bytes, and
/// one whose filter has regular expressions up to 1 MiB.
const CAPACITY: u64 = 512 * 1024 * 1024;

/// A cache of [`Snapshot`]s. It never decides how fresh is fresh enough: whoever asks says so.
#[derive(Debug, Clone)]
pub struct Snapshots {
    pool: PgPool,
    cache: Cache<OrganizationId, Arc<Kept>>,
}

#[derive(Debug)]
struct Kept {
    snapshot: Arc<Snapshot>,
    candidates: Candidates,
}

impl Snapshots {
    /// An empty cache.
    pub fn new(pool: PgPool) -> Self {
        let cache = Cache::builder()
            .max_capacity(CAPACITY)
            .weigher(|_, kept: &Arc<Kept>| u32::try_from(kept.snapshot.memory_bytes()).unwrap_or(u32::MAX))
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
        if let Some(kept) = self.cache.get(&organization).filter(|kept| kept.snapshot.version >= version) {
            return Ok(Arc::clone(&kept.snapshot));
        }
        let loaded = Arc::new(pg::load_snapshot(connection, organization).await?);
        let new = Arc::new(Kept { candidates: Candidates::of(&loaded), snapshot: Arc::clone(&loaded) });
        // Two committers may load at once; the older result must not replace the newer.
        self.cache.entry(organization).and_upsert_with(|kept| match kept {
            Some(kept) if kept.value().snapshot.version > loaded.version => kept.into_value(),
            _ => new,
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
    pub(crate) fn candidates<'t>(
        &self,
        organization: OrganizationId,
        types: impl Iterator<Item = &'t str>,
    ) -> usize {
        match self.cache.get(&organization) {
            Some(kept) => types.map(|event_type| kept.candidates.for_type(event_type)).sum(),
            None => {
                types.count().saturating_mul(usize::try_from(pg::MAX_SUBSCRIPTIONS).unwrap_or(usize::MAX))
            }
        }
    }
}

/// How many subscriptions the index of a [`Snapshot`] leads to, for each way into it.
#[derive(Debug, Default)]
struct Candidates {
    exact: HashMap<String, usize>,
    by_first: HashMap<String, usize>,
    open: usize,
}

impl Candidates {
    fn of(snapshot: &Snapshot) -> Self {
        let mut candidates = Self::default();
        let nothing = Subject { event_type: "", publisher: None, payload: None };
        for (candidate, _) in snapshot.explain(nothing) {
            let pattern = &candidate.event_type;
            let (exact, first) = (pattern.is_exact(), pattern.first_token());
            *match first {
                _ if exact => candidates.exact.entry(pattern.as_str().to_owned()).or_default(),
                Some(first) => candidates.by_first.entry(first.to_owned()).or_default(),
                None => &mut candidates.open,
            } += 1;
        }
        candidates
    }

    fn for_type(&self, event_type: &str) -> usize {
        let first = event_type.split('.').next().unwrap_or_default();
        let count = |of: &HashMap<String, usize>, key| of.get(key).copied().unwrap_or_default();
        count(&self.exact, event_type) + count(&self.by_first, first) + self.open
    }
}

#[cfg(test)]
mod tests {
    use bus_core::{
        ids::{ConnectionId, SubscriptionId},
        matcher::Candidate,
        pattern::TypePattern,
    };
    use uuid::Uuid;

    use super::*;

    #[test]
    fn only_what_the_index_leads_to_is_counted() {
        let candidate = |(n, pattern): (usize, &str)| Candidate {
            subscription: SubscriptionId(Uuid::from_u128(n as u128)),
            connection: ConnectionId(Uuid::nil()),
            connection_version: 1,
            enabled: true,
            event_type: TypePattern::parse(pattern).expect("a pattern"),
            publisher: None,
            filter: None,
        };
        let patterns =
            ["order.created", "order.created", "order.paid", "order.*", "order.>", "*.created", ">"];
        let snapshot = Snapshot::new(1, patterns.into_iter().enumerate().map(candidate).collect());
        let candidates = Candidates::of(&snapshot);
        for (event_type, count) in [("order.created", 6), ("order.x.y", 4), ("order", 4), ("a.created", 2)] {
            assert_eq!(candidates.for_type(event_type), count, "{event_type}");
            let subject = Subject { event_type, publisher: None, payload: None };
            assert!(snapshot.matching(subject).len() <= count, "{event_type}");
        }
    }

    #[tokio::test]
    async fn an_unknown_organization_may_have_all_that_there_can_be() {
        let pool = PgPool::connect_lazy("postgres://localhost/none").expect("a URL");
        let organization = OrganizationId(Uuid::nil());
        assert_eq!(Snapshots::new(pool).candidates(organization, ["a", "b"].into_iter()), 20_000);
    }
}
