//! Parks long retries in the database, as many at once as have gathered.

use std::sync::Arc;

use bus_core::{
    notify::{DUE_IDLE, Hint, Notifier},
    pg::{self, Park},
    queue::Lease,
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::patience::{Patience, extend, put_back};

/// Rows of one statement.
const BATCH: usize = 500;

/// The way to the parked deliveries. Cheap to clone; the batches end with the last clone.
#[derive(Debug, Clone)]
pub(crate) struct Parking(mpsc::Sender<(Park, Box<dyn Lease>)>);

impl Parking {
    /// `hints` wake the scheduler for what is due before it would look by itself.
    pub(crate) fn start(
        pool: PgPool,
        hints: Arc<dyn Notifier>,
        patience: Patience,
        tasks: &TaskTracker,
    ) -> Self {
        let (sender, mut parked) = mpsc::channel(BATCH);
        tasks.spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while parked.recv_many(&mut batch, BATCH).await > 0 {
                park(&pool, hints.as_ref(), &patience, std::mem::take(&mut batch)).await;
            }
        });
        Self(sender)
    }

    /// Hands a delivery over, waiting while too many wait already. It is acknowledged once its row is
    /// committed.
    pub(crate) async fn park(&self, park: Park, lease: Box<dyn Lease>) {
        if let Err(mpsc::error::SendError((park, lease))) = self.0.send((park, lease)).await {
            put_back(lease, &park.key).await;
        }
    }
}

async fn park(pool: &PgPool, hints: &dyn Notifier, patience: &Patience, batch: Vec<(Park, Box<dyn Lease>)>) {
    let (parked, leases): (Vec<Park>, Vec<Box<dyn Lease>>) = batch.into_iter().unzip();
    let mut said = false;
    while let Err(failed) = pg::park(pool, &parked).await {
        if !said {
            warn!(error = %Chain(&failed), deliveries = parked.len(), "Long retries are held until they can be parked");
            said = true;
        }
        if patience.wait().await.is_none() {
            for (park, lease) in parked.iter().zip(leases) {
                put_back(lease, &park.key).await;
            }
            return;
        }
        for (park, lease) in parked.iter().zip(&leases) {
            extend(lease.as_ref(), &park.key).await;
        }
    }
    if said {
        info!(deliveries = parked.len(), "Parked");
    }
    if parked.iter().any(|park| park.wait_s < DUE_IDLE.as_secs_f64()) {
        hints.notify(Hint::Due).await;
    }
    for (park, lease) in parked.iter().zip(leases) {
        if let Err(failed) = lease.ack().await {
            warn!(delivery.id = %park.key.id, error = %Chain(&failed), "Parked, but not acknowledged");
        }
    }
}
