//! Parks what is to wait in the database, as many at once as have gathered: long retries, and what finds no room.

use std::{pin::pin, sync::Arc, time::Duration};

use bus_core::{
    notify::{DUE_IDLE, Hint, Notifier},
    pg::{self, Park},
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::{
    hold::Hold,
    patience::{Patience, held_during},
};

/// Rows of one statement.
const BATCH: usize = 500;

/// How long a batch gathers. Each costs a commit, and commits that wait for the disk one after the other would slow down
/// those of the publishers.
const GATHER: Duration = Duration::from_millis(50);

/// Deliveries that wait for the next statement. Each may have a body of 256 KiB, usually a few.
const GATHERED: usize = 1_000;

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
        let (sender, mut parked) = mpsc::channel(GATHERED);
        tasks.spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while parked.recv_many(&mut batch, BATCH).await > 0 {
                sleep(GATHER).await;
                while batch.len() < BATCH
                    && let Ok(item) = parked.try_recv()
                {
                    batch.push(item);
                }
                park(&pool, hints.as_ref(), &patience, std::mem::take(&mut batch)).await;
            }
        });
        Self(sender)
    }

    /// Parks a delivery, and holds it until its row is committed, however long the database is away. At a stop
    /// it is put back for as long as it would have waited. `until_taken` is dropped once it is among those that are to be
    /// parked: what a delivery takes while it is on its way there bounds how many are. `why` is for metrics.
    pub(crate) async fn park<T>(&self, park: Park, hold: Hold, why: &'static str, until_taken: T) {
        let (wait, hold) = (park.wait, Arc::new(hold));
        let (done, parked) = oneshot::channel();
        let item = Item { park, hold: Arc::clone(&hold), done };
        let handed_over = pin!(async {
            let taken = self.0.send(item).await.is_ok();
            drop(until_taken);
            taken && parked.await.is_ok()
        });
        let parked = held_during(&[&*hold], handed_over).await;
        // The other reference went before the answer came.
        let Some(hold) = Arc::into_inner(hold) else { return };
        if parked {
            counter!("bus_parked", "reason" => why).increment(1);
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
            warn!(error = %Chain(&failed), deliveries = parked.len(), "What is to be parked is held until it can be");
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
