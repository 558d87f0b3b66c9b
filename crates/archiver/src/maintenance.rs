//! Keeps the database in shape: partitions ahead of their day, and rows swept that are over.

use std::{sync::Arc, time::Duration};

use bus_core::{
    clock::Clock,
    launcher::{BoxError, Heartbeat},
    pg::{self, StoreError},
    telemetry::Chain,
};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::ArchiverConfig;

/// Between two rounds.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);

/// Rows swept in one statement.
const SWEEP: u32 = 5_000;

/// What organizations published by the day is known for so many days: a year, and what a month is compared with.
const USAGE_KEEP_DAYS: u32 = 400;

/// Keeps the database in shape.
pub(crate) struct Maintenance {
    pub(crate) pool: PgPool,
    pub(crate) config: ArchiverConfig,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Maintenance {
    pub(crate) async fn run(self, beat: Heartbeat, stop: CancellationToken) -> Result<(), BoxError> {
        while !stop.is_cancelled() {
            beat.beat();
            match pg::answered("keep the database in shape", self.round()).await {
                // As much as one statement takes: there is more.
                Ok(swept) if swept >= u64::from(SWEEP) => continue,
                Ok(_) => {}
                Err(failed) => warn!(error = %Chain(&failed), "Maintenance put off"),
            }
            stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
        }
        Ok(())
    }

    async fn round(&self) -> Result<u64, StoreError> {
        let (pool, config) = (&self.pool, &self.config.maintenance);
        let created = pg::create_partitions(pool, self.clock.now(), config.partitions_ahead_days).await?;
        if created > 0 {
            info!(partitions = created, "Created partitions ahead");
        }
        let finished = pg::sweep_outbox(pool, Duration::from_secs(config.outbox_keep_s), SWEEP).await?;
        let over = pg::sweep_states(pool, Duration::from_secs(config.delivery_states_keep_s), SWEEP).await?;
        // What was cancelled is kept as long as what is over of deliveries: somebody may still ask what became of it.
        let gone = pg::sweep_scheduled(pool, config.delivery_states_keep_s, SWEEP).await?;
        let dead = match self.config.retention.dead_letters.keep_days {
            0 => 0,
            days => pg::sweep_dead_letters(pool, days, SWEEP).await?,
        };
        let counted = pg::sweep_usage(pool, USAGE_KEEP_DAYS, SWEEP).await?;
        Ok(finished + over + gone + dead + counted)
    }
}
