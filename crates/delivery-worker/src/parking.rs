//! Parks long retries in the database, as many at once as have gathered.

use std::time::Duration;

use bus_core::{
    pg::{self, Park},
    queue::Lease,
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::delivery::put_back;

/// Rows of one statement.
const BATCH: usize = 500;

/// If the database is away, a delivery stays in the queue for this long instead.
const INSTEAD: Duration = Duration::from_secs(5);

/// The way to the parked deliveries. Cheap to clone; the batches end with the last clone.
#[derive(Debug, Clone)]
pub(crate) struct Parking(mpsc::Sender<(Park, Box<dyn Lease>)>);

impl Parking {
    pub(crate) fn start(pool: PgPool, tasks: &TaskTracker) -> Self {
        let (sender, mut parked) = mpsc::channel(BATCH);
        tasks.spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while parked.recv_many(&mut batch, BATCH).await > 0 {
                park(&pool, std::mem::take(&mut batch)).await;
            }
        });
        Self(sender)
    }

    /// Hands a delivery over. It is acknowledged once its row is committed.
    pub(crate) async fn park(&self, park: Park, lease: Box<dyn Lease>) {
        if let Err(mpsc::error::SendError((park, lease))) = self.0.send((park, lease)).await {
            put_back(lease, INSTEAD, &park.key).await;
        }
    }
}

async fn park(pool: &PgPool, batch: Vec<(Park, Box<dyn Lease>)>) {
    let (parked, leases): (Vec<Park>, Vec<Box<dyn Lease>>) = batch.into_iter().unzip();
    let stored = pg::park(pool, &parked).await;
    if let Err(failed) = &stored {
        warn!(error = %Chain(failed), deliveries = parked.len(), "Long retries stay in the queue for now");
    }
    for (park, lease) in parked.iter().zip(leases) {
        if stored.is_err() {
            put_back(lease, INSTEAD, &park.key).await;
        } else if let Err(failed) = lease.ack().await {
            warn!(delivery.id = %park.key.id, error = %Chain(&failed), "Parked, but not acknowledged");
        }
    }
}
