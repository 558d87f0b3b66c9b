//! The cron scheduler: everything that the clock drives. Now: parked retries return to the queue when
//! they are due.
//!
//! Any number of replicas share the work; due is the database's time.

use std::{sync::Arc, time::Duration};

use bus_core::{
    config::{Common, RoleConfig},
    ids::DeliveryId,
    launcher::{BoxError, Ctx, Heartbeat, Role},
    notify::{self, DUE_IDLE, Hint},
    pg::{self, DeadLetter},
    queue::{DeliveryQueue, Enqueue, QueueError},
    supervise::{self, Broker},
    telemetry::Chain,
};
use metrics::counter;
use serde::Deserialize;
use sqlx::PgPool;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// What this binary is.
pub const ROLE: Role =
    Role { name: "cron-scheduler", about: "Returns parked deliveries to the queue when they are due" };

/// The safety interval: an idle scheduler asks once in this time. Most parked waits are longer, so that they
/// cannot become due unseen between two looks; the others are announced by [`Hint::Due`].
const IDLE: Duration = DUE_IDLE;

/// The shortest sleep between two looks that found nothing to do, however many hints come.
const SHORTEST: Duration = Duration::from_millis(20);

/// After an error.
const AGAIN: Duration = Duration::from_secs(1);

/// Deliveries returned at a time; with the largest body that the queue carries, 50 MiB.
const BATCH: u32 = 200;

/// If this process dies with deliveries in hand, another one takes them after this time. Well within the
/// broker's duplicate window, so that what was already put back is recognised.
const LEASE_S: u64 = 30;

/// The scheduler has nothing of its own to configure yet.
#[derive(Debug, Clone, Deserialize)]
pub struct SchedulerConfig {}

impl RoleConfig for SchedulerConfig {
    const DEFAULTS: &'static str = "";

    fn problem(&self, common: &Common) -> Option<String> {
        (common.nats.duplicate_window_s < LEASE_S * 2).then(|| {
            format!(
                "nats.duplicate_window_s ({}) must be at least {}, twice the lease of a due delivery",
                common.nats.duplicate_window_s,
                LEASE_S * 2
            )
        })
    }
}

/// Runs until [`Ctx::stop`].
pub async fn run(ctx: Ctx<SchedulerConfig>) -> Result<(), BoxError> {
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let Some(transport) = supervise::connect(&ctx, &pool, Broker::Needed).await? else { return Ok(()) };
    let beat = ctx.health.heartbeat("parked deliveries", IDLE * 12);
    let due = Arc::new(Notify::new());
    let wake = Arc::clone(&due);
    let following = notify::wake_on(Arc::clone(&transport.hints), Hint::Due, move || wake.notify_one());
    ctx.tasks.spawn(ctx.stop.clone().run_until_cancelled_owned(following));
    let queue = Arc::clone(&transport.queue);
    ctx.spawn("parked deliveries", return_due(pool, queue, due, beat, ctx.stop.clone()));
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}

async fn return_due(
    pool: PgPool,
    queue: Arc<dyn DeliveryQueue>,
    due: Arc<Notify>,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    while !stop.is_cancelled() {
        beat.beat();
        let idle = match return_once(&pool, queue.as_ref()).await {
            Ok(idle) => idle,
            Err(failed) => {
                warn!(error = %Chain(&failed), "Due deliveries wait");
                AGAIN
            }
        };
        stop.run_until_cancelled(rest(idle, &due)).await;
    }
    Ok(())
}

/// Waits until there may be something to do: `idle`, or shorter if something became due. All that was
/// announced since the last look is one reason to look again.
async fn rest(idle: Duration, due: &Notify) {
    let shortest = idle.min(SHORTEST);
    sleep(shortest).await;
    // Either way the answer is the same: look again.
    let _ = timeout(idle - shortest, due.notified()).await;
}

/// Returns one batch; answers how long there is nothing more to do.
async fn return_once(pool: &PgPool, queue: &dyn DeliveryQueue) -> Result<Duration, QueueError> {
    let due = pg::take_due(pool, BATCH, LEASE_S).await?;
    if due.is_empty() {
        let next = pg::next_due_in(pool).await?;
        let next = next.map_or(IDLE, |seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(IDLE));
        return Ok(next.clamp(SHORTEST, IDLE));
    }
    let mut deliveries = Vec::with_capacity(due.len());
    for due in &due {
        match &due.body {
            Some(body) => {
                deliveries.push(Enqueue { key: due.key, attempts: due.attempts, body: body.clone() });
            }
            None => {
                let expired = DeadLetter::new(due.key, due.attempts, "event_expired");
                pg::insert_dead_letter(pool, &expired).await?;
            }
        }
    }
    queue.enqueue(&deliveries).await?;
    let back: Vec<(DeliveryId, u32)> = due.iter().map(|due| (due.key.id, due.attempts)).collect();
    pg::unpark(pool, &back).await?;
    counter!("bus_parked_returned").increment(back.len() as u64);
    debug!(deliveries = back.len(), "Due deliveries are back in the queue");
    Ok(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_announced_ends_the_rest_but_hints_do_not_make_it_spin() {
        let due = Arc::new(Notify::new());
        let begun = Instant::now();
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), IDLE, "nothing was announced");

        let (announcing, begun) = (Arc::clone(&due), Instant::now());
        tokio::spawn(async move {
            sleep(Duration::from_secs(1)).await;
            announcing.notify_one();
        });
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(1));

        let begun = Instant::now();
        for _ in 0..1_000 {
            due.notify_one();
        }
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), SHORTEST, "a thousand hints are one reason");
        rest(IDLE, &due).await;
        assert_eq!(begun.elapsed(), SHORTEST + IDLE);

        let begun = Instant::now();
        rest(Duration::ZERO, &due).await;
        assert_eq!(begun.elapsed(), Duration::ZERO, "there is more to do already");
    }
}
