//! Parks long retries in the database, as many at once as have gathered.

use std::sync::Arc;

use bus_core::{
    notify::{DUE_IDLE, Hint, Notifier},
    pg::{self, Park},
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::{hold::Hold, patience::Patience};

/// Rows of one statement.
const BATCH: usize = 500;

/// The way to the parked deliveries. Cheap to clone; the batches end with the last clone.
#[derive(Debug, Clone)]
pub(crate) struct Parking(mpsc::Sender<(Park, Hold)>);

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
    pub(crate) async fn park(&self, park: Park, hold: Hold) {
        if let Err(mpsc::error::SendError((_, hold))) = self.0.send((park, hold)).await {
            hold.put_back().await;
        }
    }
}

async fn park(pool: &PgPool, hints: &dyn Notifier, patience: &Patience, batch: Vec<(Park, Hold)>) {
    // Somebody else has what was held for too long, and has perhaps delivered it.
    let (parked, holds): (Vec<Park>, Vec<Hold>) =
        batch.into_iter().filter(|(_, hold)| !hold.is_lost()).unzip();
    let mut said = false;
    while let Err(failed) = pg::park(pool, &parked).await {
        if !said {
            warn!(error = %Chain(&failed), deliveries = parked.len(), "Long retries are held until they can be parked");
            said = true;
        }
        if patience.wait().await.is_none() {
            for hold in holds {
                hold.put_back().await;
            }
            return;
        }
        for hold in &holds {
            hold.extend().await;
        }
    }
    if said {
        info!(deliveries = parked.len(), "Parked");
    }
    if parked.iter().any(|park| park.wait < DUE_IDLE) {
        hints.notify(Hint::Due).await;
    }
    for hold in holds {
        hold.ack().await;
    }
}
