//! The relay: finishes fan-outs that another process, or an earlier failure of this one, left behind.

use std::{sync::Arc, time::Duration};

use bus_core::{
    ids::OutboxId,
    launcher::{BoxError, Heartbeat},
    pg,
    queue::{DeliveryQueue, QueueError},
    telemetry::Chain,
};
use metrics::{counter, gauge};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{config::PublishConfig, fanout::Chunks};

/// Between two looks for rows whose holder did not finish.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);

/// Rows taken over at a time; each holds at most a group of events.
const ROWS: u32 = 4;

/// Events read at a time.
const EVENTS: usize = 100;

/// Runs until `stop`.
pub(crate) async fn run(
    pool: PgPool,
    queue: Arc<dyn DeliveryQueue>,
    config: PublishConfig,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    while !stop.is_cancelled() {
        beat.beat();
        match relay_once(&pool, queue.as_ref(), &config).await {
            Ok(rows) if rows == ROWS => continue,
            Ok(_) => {}
            Err(failed) => warn!(error = %Chain(&failed), "Unfinished fan-outs wait"),
        }
        match pg::outbox_age(&pool).await {
            Ok(age) => gauge!("bus_outbox_oldest_seconds").set(age),
            Err(failed) => warn!(error = %Chain(&failed), "The outbox's age is unknown"),
        }
        stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
    }
    Ok(())
}

/// Takes over unfinished rows and finishes them; returns how many were taken.
async fn relay_once(
    pool: &PgPool,
    queue: &dyn DeliveryQueue,
    config: &PublishConfig,
) -> Result<u32, QueueError> {
    let rows = pg::take_over(pool, ROWS, config.outbox_lease_s).await?;
    let mut finished: Vec<OutboxId> = Vec::with_capacity(rows.len());
    for row in &rows {
        for events in row.events.chunks(EVENTS) {
            let mut chunks = Chunks::new(queue);
            for event in pg::load_fan_out(pool, events).await? {
                for key in &event.deliveries {
                    chunks.push(*key, &event.body).await?;
                }
            }
            chunks.finish().await?;
        }
        finished.push(row.id);
    }
    if !finished.is_empty() {
        pg::finish_outbox(pool, &finished).await?;
        counter!("bus_fan_outs", "by" => "relay").increment(finished.len() as u64);
        info!(rows = finished.len(), "Finished fan-outs that were left behind");
    }
    Ok(u32::try_from(rows.len()).unwrap_or(u32::MAX))
}
