//! Parks long retries in the database, as many at once as have gathered.

use std::sync::Arc;

use bus_core::{
    notify::{DUE_IDLE, Hint, Notifier},
    pg::{self, Park},
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::{
    hold::Hold,
    patience::{Patience, held_during},
};

/// Rows of one statement.
const BATCH: usize = 500;

/// A delivery on its way into the database.
#[derive(Debug)]
struct Item {
    park: Park,
    /// The one who waits keeps it from ending, and acknowledges it.
    hold: Arc<Hold>,
    /// Sent once the row is committed; dropped if it is not to be.
    done: oneshot::Sender<()>,
}

/// The way to the parked deliveries. Cheap to clone; the batches end with the last clone.
#[derive(Debug, Clone)]
pub(crate) struct Parking(mpsc::Sender<Item>);

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

    /// Parks a delivery, and holds it until its row is committed, however long the database is away. At a stop
    /// it is put back for as long as it would have waited.
    pub(crate) async fn park(&self, park: Park, hold: Hold) {
        let (wait, hold) = (park.wait, Arc::new(hold));
        let (done, parked) = oneshot::channel();
        let item = Item { park, hold: Arc::clone(&hold), done };
        let handed_over = async { self.0.send(item).await.is_ok() && parked.await.is_ok() };
        let parked = held_during(&[&*hold], handed_over).await;
        // The other reference went before the answer came.
        let Some(hold) = Arc::into_inner(hold) else { return };
        if parked {
            hold.ack().await;
        } else if !hold.is_lost() {
            hold.put_back(wait).await;
        }
    }
}

async fn park(pool: &PgPool, hints: &dyn Notifier, patience: &Patience, mut batch: Vec<Item>) {
    let mut said = false;
    loop {
        // Somebody else has what was held for too long, and has perhaps delivered it.
        batch.retain(|item| !item.hold.is_lost());
        let parked: Vec<Park> = batch.iter().map(|item| item.park.clone()).collect();
        let Err(failed) = pg::answered("park deliveries", pg::park(pool, &parked)).await else { break };
        if !failed.is_unavailable() {
            // One of them cannot be stored, and must not keep the others from it.
            if let [one] = &batch[..] {
                error!(delivery.id = %one.park.key.id, error = %Chain(&failed), "A delivery cannot be parked");
                return;
            }
            for one in batch {
                Box::pin(park(pool, hints, patience, vec![one])).await;
            }
            return;
        }
        if !said {
            warn!(error = %Chain(&failed), deliveries = parked.len(), "Long retries are held until they can be parked");
            said = true;
        }
        if patience.wait().await.is_none() {
            return;
        }
    }
    if said {
        info!(deliveries = batch.len(), "Parked");
    }
    if batch.iter().any(|item| item.park.wait < DUE_IDLE) {
        hints.notify(Hint::Due).await;
    }
    for Item { hold, done, .. } in batch {
        drop(hold);
        // Whoever waited may be gone with the worker's last moments.
        let _ = done.send(());
    }
}
