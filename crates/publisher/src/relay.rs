//! The relay: finishes fan-outs that another process, or an earlier failure of this one, left behind.

use std::{sync::Arc, time::Duration};

use bus_core::{
    clock::Clock,
    delivery::Progress,
    fanout::Chunks,
    launcher::{BoxError, Heartbeat},
    pg::{self, Unfinished},
    queue::{DeliveryQueue, QueueError},
    telemetry::Chain,
};
use futures::future::join_all;
use metrics::{counter, gauge};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::PublishConfig;

/// Between two looks for rows whose holder did not finish.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);

/// Rows taken over at a time, and worked on side by side.
const ROWS: u32 = 8;

/// Events read at a time; with the largest body that the queue carries, 5 MiB.
const EVENTS: usize = 20;

/// A relay.
#[derive(Debug, Clone)]
pub(crate) struct Relay {
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) config: PublishConfig,
    pub(crate) beat: Heartbeat,
    pub(crate) stop: CancellationToken,
}

impl Relay {
    /// Runs until the stop.
    pub(crate) async fn run(self) -> Result<(), BoxError> {
        while !self.stop.is_cancelled() {
            self.beat.beat();
            let taken = pg::take_over(&self.pool, ROWS, self.config.outbox_lease_s);
            match pg::answered("take over unfinished fan-outs", taken).await {
                Ok(rows) => {
                    let full = rows.len() == ROWS as usize;
                    let finished = join_all(rows.into_iter().map(|row| self.finish(row))).await;
                    // With less than a full hand, or nothing done, there is no hurry.
                    if full && finished.into_iter().any(|finished| finished) {
                        continue;
                    }
                }
                Err(failed) => warn!(error = %Chain(&failed), "Unfinished fan-outs wait"),
            }
            match pg::answered("read the outbox's age", pg::outbox_age(&self.pool)).await {
                Ok(age) => gauge!("bus_outbox_oldest_seconds").set(age),
                Err(failed) => warn!(error = %Chain(&failed), "The outbox's age is unknown"),
            }
            self.stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
        }
        Ok(())
    }

    /// Finishes one row; whether it is. What it cannot do stays in the row, for whoever takes it next.
    async fn finish(&self, row: Unfinished) -> bool {
        match self.fan_out(&row).await {
            Ok(()) => {
                counter!("bus_fan_outs", "by" => "relay").increment(1);
                info!(outbox.id = %row.id, "Finished a fan-out that was left behind");
                true
            }
            Err(failed) => {
                warn!(outbox.id = %row.id, error = %Chain(&failed), "A fan-out waits");
                false
            }
        }
    }

    async fn fan_out(&self, row: &Unfinished) -> Result<(), QueueError> {
        let mut left = &row.events[..];
        while !left.is_empty() {
            let (events, rest) = left.split_at(left.len().min(EVENTS));
            let mut chunks = Chunks::new(self.queue.as_ref(), Progress::new(self.clock.now()));
            let loaded = pg::load_fan_out(&self.pool, events);
            for event in pg::answered("load a fan-out", loaded).await? {
                for key in &event.deliveries {
                    chunks.push(*key, event.lane, &event.body).await?;
                    self.beat.beat();
                }
            }
            chunks.finish().await?;
            left = rest;
            if !left.is_empty() {
                let advanced = pg::advance_outbox(&self.pool, row.id, left, self.config.outbox_lease_s);
                pg::answered("note how far a fan-out is", advanced).await?;
            }
        }
        pg::answered("finish a fan-out", pg::finish_outbox(&self.pool, &[row.id])).await?;
        Ok(())
    }
}
