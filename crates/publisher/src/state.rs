//! What the API's handlers share.

use std::{ops::Deref, sync::Arc};

use bus_core::{
    address::AddressPolicy, clock::Clock, cloudevent, ids::Ids, notify::Notifier, queue::DeliveryQueue,
};
use sqlx::PgPool;

use bus_core::snapshots::Snapshots;

use crate::{config::SchedulesConfig, ingest::Ingest, limits::Limits, relay::Backlog};

/// What the API's handlers share. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

/// The parts of [`AppState`].
pub struct Inner {
    /// The database.
    pub pool: PgPool,
    /// Each organization's subscriptions, compiled.
    pub snapshots: Snapshots,
    /// The way into the bus.
    pub ingest: Ingest,
    /// How much organizations may publish.
    pub publish_limits: Limits,
    /// Whether too much waits to be fanned out.
    pub backlog: Backlog,
    /// Where deliveries wait for a worker.
    pub queue: Arc<dyn DeliveryQueue>,
    /// Whether attempts come to history through the broker, and so a little later.
    pub history_lags: bool,
    /// Tells the workers what changed.
    pub hints: Arc<dyn Notifier>,
    /// Which addresses a webhook may have.
    pub addresses: AddressPolicy,
    /// SHA-256 of the admin token; without one the admin API is closed to all but `admin` keys.
    pub admin_token: Option<[u8; 32]>,
    /// What a publish request may contain, whenever it comes.
    pub limits: cloudevent::Limits,
    /// What schedules, and events that are due later, may ask for.
    pub schedules: SchedulesConfig,
    /// How many deliveries of a replay come back in a second, unless the request says so.
    pub replays_per_second: u32,
    /// Whether reading what an event says leaves an audit record.
    pub payload_access: bool,
    /// The most bytes of a request's body.
    pub max_body_bytes: usize,
    /// The lanes that are configured.
    pub lanes: u16,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// New ids.
    pub ids: Arc<dyn Ids>,
}

impl AppState {
    /// Shares `inner`.
    pub fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }
}

impl Deref for AppState {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}
