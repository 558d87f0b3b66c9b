//! Fan-out: puts the deliveries of committed events into the queue.
//!
//! Nothing here has to succeed. The outbox row is in the events' own transaction; a fan-out that fails,
//! does not fit, or dies with the process is taken over by a [`relay`](crate::relay).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bus_core::{
    clock::Clock,
    delivery::Progress,
    fanout::FanOut,
    ids::OutboxId,
    launcher::{BoxError, Ctx},
    pg,
    queue::DeliveryQueue,
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use crate::config::PublisherConfig;

/// Rows that are marked at a time.
const CHUNK: usize = 1_000;

/// How long a committer waits for room, at most.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(1);

/// Between two tries to mark finished rows.
const AGAIN: Duration = Duration::from_secs(1);

/// Finished rows are marked together, at most this long after the first.
const FINISH_EVERY: Duration = Duration::from_millis(100);

/// Runs fan-outs beside the committers. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct FanOuts {
    queue: Arc<dyn DeliveryQueue>,
    room: Arc<Semaphore>,
    tasks: TaskTracker,
    finished: mpsc::Sender<OutboxId>,
    clock: Arc<dyn Clock>,
    /// The last fan-out succeeded.
    healthy: Arc<AtomicBool>,
}

impl FanOuts {
    pub(crate) fn start(ctx: &Ctx<PublisherConfig>, pool: PgPool, queue: Arc<dyn DeliveryQueue>) -> Self {
        let (finished, rows) = mpsc::channel(CHUNK);
        ctx.spawn("finished fan-outs", mark_finished(pool, rows, ctx.stop.clone()));
        let room = Arc::new(Semaphore::new(ctx.config.publish.fan_outs));
        let (tasks, clock) = (ctx.tasks.clone(), Arc::clone(&ctx.clock));
        Self { queue, room, tasks, finished, clock, healthy: Arc::new(AtomicBool::new(true)) }
    }

    /// Starts a fan-out. While there is no room the committer waits, and with it those who publish; but not
    /// for a broker that is away: then the outbox row is left to the relay.
    pub(crate) async fn submit(&self, fan_out: FanOut) {
        let room = Arc::clone(&self.room);
        let permit = if self.healthy.load(Ordering::Relaxed) {
            timeout(WAIT_FOR_ROOM, room.acquire_owned()).await.ok().and_then(Result::ok)
        } else {
            room.try_acquire_owned().ok()
        };
        let Some(permit) = permit else {
            counter!("bus_fan_outs", "by" => "left_to_relay").increment(1);
            return;
        };
        let this = self.clone();
        self.tasks.spawn(async move {
            let result = fan_out.enqueue(this.queue.as_ref(), Progress::new(this.clock.now())).await;
            this.healthy.store(result.is_ok(), Ordering::Relaxed);
            match result {
                Ok(()) => {
                    counter!("bus_fan_outs", "by" => "publisher").increment(1);
                    // Unmarked, the row is fanned out again by the relay, and the queue drops the repeats.
                    let _ = this.finished.send(fan_out.outbox).await;
                }
                Err(failed) => {
                    warn!(error = %Chain(&failed), outbox.id = %fan_out.outbox, "Fan-out left to the relay");
                    counter!("bus_fan_outs", "by" => "left_to_relay").increment(1);
                }
            }
            drop(permit);
        });
    }
}

/// Marks rows, and insists: a row that stays unmarked is fanned out again, and after the broker's duplicate
/// window the subscribers would get it twice.
async fn mark_finished(
    pool: PgPool,
    mut rows: mpsc::Receiver<OutboxId>,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    let mut batch = Vec::new();
    while rows.recv_many(&mut batch, CHUNK).await > 0 {
        if batch.len() < CHUNK {
            stop.run_until_cancelled(sleep(FINISH_EVERY)).await;
            while batch.len() < CHUNK
                && let Ok(row) = rows.try_recv()
            {
                batch.push(row);
            }
        }
        let mut said = false;
        while let Err(failed) = pg::answered("finish outbox rows", pg::finish_outbox(&pool, &batch)).await {
            if !said {
                warn!(error = %Chain(&failed), rows = batch.len(), "Finished fan-outs are not marked yet");
                said = true;
            }
            if stop.run_until_cancelled(sleep(AGAIN)).await.is_none() {
                warn!(rows = batch.len(), "Finished fan-outs stay unmarked; a relay repeats them");
                break;
            }
        }
        batch.clear();
    }
    Ok(())
}
