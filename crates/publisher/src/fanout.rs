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
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, OutboxId, SubscriptionId},
    launcher::{BoxError, Ctx},
    matcher::Candidate,
    pg,
    queue::{Body, DeliveryQueue, Enqueue, QueueError},
    telemetry::Chain,
};
use bytes::Bytes;
use metrics::counter;
use sqlx::PgPool;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use crate::config::PublisherConfig;

/// Deliveries that are handed to the queue at a time; bounds memory where an event has many targets.
const CHUNK: usize = 1_000;

/// How long a committer waits for room, at most.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(1);

/// Between two tries to mark finished rows.
const AGAIN: Duration = Duration::from_secs(1);

/// Finished rows are marked together, at most this long after the first.
const FINISH_EVERY: Duration = Duration::from_millis(100);

/// One place an event goes to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) subscription: SubscriptionId,
    pub(crate) connection: ConnectionId,
    pub(crate) connection_version: i64,
}

impl From<&Candidate> for Target {
    fn from(candidate: &Candidate) -> Self {
        Self {
            subscription: candidate.subscription,
            connection: candidate.connection,
            connection_version: candidate.connection_version,
        }
    }
}

/// A committed event and where it goes.
#[derive(Debug)]
pub(crate) struct FanOutEvent {
    pub(crate) uid: EventUid,
    pub(crate) organization: OrganizationId,
    pub(crate) body: Bytes,
    pub(crate) targets: Vec<Target>,
}

impl FanOutEvent {
    /// The event's delivery to one of its targets.
    pub(crate) fn delivery(&self, target: &Target) -> DeliveryKey {
        DeliveryKey {
            id: DeliveryId::derive(self.uid, target.subscription),
            event: self.uid,
            organization: self.organization,
            subscription: target.subscription,
            connection: target.connection,
            connection_version: target.connection_version,
        }
    }
}

/// One transaction's fan-out.
#[derive(Debug)]
pub(crate) struct FanOut {
    pub(crate) outbox: OutboxId,
    pub(crate) events: Vec<FanOutEvent>,
}

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
            let result = this.run(&fan_out.events).await;
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

    async fn run(&self, events: &[FanOutEvent]) -> Result<(), QueueError> {
        let mut chunks = Chunks::new(self.queue.as_ref(), Progress::new(self.clock.now()));
        for event in events {
            let body = Body::bounded(&event.body);
            for target in &event.targets {
                chunks.push(event.delivery(target), &body).await?;
            }
        }
        chunks.finish().await
    }
}

/// Puts deliveries into the queue, [`CHUNK`] at a time.
pub(crate) struct Chunks<'q> {
    queue: &'q dyn DeliveryQueue,
    progress: Progress,
    chunk: Vec<Enqueue>,
}

impl<'q> Chunks<'q> {
    pub(crate) fn new(queue: &'q dyn DeliveryQueue, progress: Progress) -> Self {
        Self { queue, progress, chunk: Vec::new() }
    }

    pub(crate) async fn push(&mut self, key: DeliveryKey, body: &Body) -> Result<(), QueueError> {
        self.chunk.push(Enqueue { key, progress: self.progress, body: body.clone() });
        if self.chunk.len() == CHUNK { self.send().await } else { Ok(()) }
    }

    /// To be called after the last delivery; what is dropped without it was not put in.
    pub(crate) async fn finish(mut self) -> Result<(), QueueError> {
        if self.chunk.is_empty() { Ok(()) } else { self.send().await }
    }

    async fn send(&mut self) -> Result<(), QueueError> {
        self.queue.enqueue(&self.chunk).await?;
        counter!("bus_deliveries_enqueued").increment(self.chunk.len() as u64);
        self.chunk.clear();
        Ok(())
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
        while let Err(failed) = pg::finish_outbox(&pool, &batch).await {
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
