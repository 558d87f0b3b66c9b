//! Deliveries in the states that workers leave them in.

use std::time::Duration;

use bus_core::{
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId},
    pg::{self, DeadLetter, LastAttempt, Park},
    retry::DeadReason,
};
use sqlx::PgPool;

use super::Tenant;

/// A published event that one subscription of one connection has matched.
pub(crate) struct Published {
    pub(crate) key: DeliveryKey,
}

impl Published {
    pub(crate) fn new(tenant: &Tenant, event: &str, subscription: &str, connection: &str) -> Self {
        let (event, subscription): (EventUid, SubscriptionId) =
            (event.parse().unwrap(), subscription.parse().unwrap());
        let organization: OrganizationId = tenant.id.parse().unwrap();
        let connection: ConnectionId = connection.parse().unwrap();
        let id = DeliveryId::derive(event, subscription);
        let key = DeliveryKey { id, event, organization, subscription, connection, connection_version: 1 };
        Self { key }
    }

    pub(crate) fn id(&self) -> String {
        self.key.id.to_string()
    }

    pub(crate) fn progress(&self, turn: i64) -> Progress {
        let since = "2026-01-01T00:00:00Z".parse().unwrap();
        Progress { attempts: u32::try_from(turn).unwrap_or(3), turn, since }
    }

    /// As the worker does when a retry waits long.
    pub(crate) async fn park(&self, pool: &PgPool, turn: i64) {
        let park = Park {
            key: self.key,
            next: self.progress(turn),
            wait: Duration::from_secs(3_600),
            paced: false,
            reason: "http_500".into(),
            last: LastAttempt::default(),
        };
        pg::park(pool, &[park]).await.unwrap();
    }

    /// As the worker does when it gives up.
    pub(crate) async fn bury(&self, pool: &PgPool, turn: i64, reason: &'static str) {
        let last = LastAttempt {
            status: Some(500),
            body: Some(b"no \xff thanks".as_slice().into()),
            error: Some("answered 500".into()),
            at: Some("2026-01-01T00:00:01.5Z".parse().unwrap()),
            duration: Some(Duration::from_millis(250)),
        };
        let reason: DeadReason = serde_json::from_value(reason.into()).unwrap();
        let letter = DeadLetter { key: self.key, progress: self.progress(turn), reason, last };
        pg::bury(pool, &letter).await.unwrap();
    }

    /// State and turn in the database.
    pub(crate) async fn standing(&self, pool: &PgPool) -> Option<(String, i64)> {
        let standing = pg::standing(pool, self.key.id).await.unwrap();
        standing.map(|(state, turn)| (state.as_str().to_owned(), turn))
    }
}
