//! The archiver: everything that moves or expires data. Receipts go from the audit stream to history,
//! partitions are created ahead of their day, finished outbox rows and expired keys are swept.

mod history;
mod maintenance;

use bus_core::{
    config::{Common, RoleConfig},
    launcher::{BoxError, Ctx, Role},
    pg,
    supervise::{self, Broker},
};
use serde::Deserialize;

/// What this binary is.
pub const ROLE: Role =
    Role { name: "archiver", about: "Moves receipts to history and keeps the database in shape" };

/// The archiver's own configuration. `defaults.toml` beside `src/` is the reference.
#[derive(Debug, Clone, Deserialize)]
pub struct ArchiverConfig {
    /// What is created ahead and what is kept.
    pub maintenance: MaintenanceConfig,
}

/// What is created ahead and what is kept.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaintenanceConfig {
    /// Days for which partitions exist ahead.
    pub partitions_ahead_days: i32,
    /// Finished outbox rows are kept this long, seconds: longer than the broker's sync interval (two
    /// minutes by default), so that they still tell what a broker that lost its last messages had.
    pub outbox_keep_s: u64,
    /// Rows of deliveries that are over, and have left the straight path, are kept this long, seconds.
    pub delivery_states_keep_s: u64,
}

impl RoleConfig for ArchiverConfig {
    fn defaults() -> Vec<&'static str> {
        vec![include_str!("../defaults.toml")]
    }

    fn problem(&self, _: &Common) -> Option<String> {
        let days = self.maintenance.partitions_ahead_days;
        (!(1..=31).contains(&days))
            .then(|| format!("maintenance.partitions_ahead_days ({days}) must be between 1 and 31"))
    }
}

/// Runs until [`Ctx::stop`].
pub async fn run(ctx: Ctx<ArchiverConfig>) -> Result<(), BoxError> {
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let Some(transport) = supervise::connect(&ctx, &pool, Broker::Needed).await? else { return Ok(()) };
    if let Some(nats) = &transport.nats {
        let beat = ctx.health.heartbeat("history", history::PULL_WAIT * 60);
        ctx.spawn("history", history::run(pool.clone(), nats.clone(), beat, ctx.stop.clone()));
    }
    let beat = ctx.health.heartbeat("maintenance", maintenance::INTERVAL * 30);
    let upkeep = maintenance::run(
        pool,
        ctx.config.maintenance.clone(),
        std::sync::Arc::clone(&ctx.clock),
        beat,
        ctx.stop.clone(),
    );
    ctx.spawn("maintenance", upkeep);
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
