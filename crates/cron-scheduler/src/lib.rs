//! The cron scheduler: everything that the clock drives. Now: parked retries return to the queue when
//! they are due.
//!
//! Any number of replicas share the work; due is the database's time.

mod returns;

use std::sync::Arc;

use bus_core::{
    config::{Common, RoleConfig},
    launcher::{BoxError, Ctx, Role},
    pg,
    supervise::{self, Broker},
};
use serde::Deserialize;

pub use self::returns::return_due;
use self::returns::{IDLE, LEASE_S};

/// What this binary is.
pub const ROLE: Role =
    Role { name: "cron-scheduler", about: "Returns parked deliveries to the queue when they are due" };

/// The scheduler has nothing of its own to configure yet.
#[derive(Debug, Clone, Deserialize)]
pub struct SchedulerConfig {}

impl RoleConfig for SchedulerConfig {
    fn defaults() -> Vec<&'static str> {
        Vec::new()
    }

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
    ctx.spawn("parked deliveries", returns::run(pool, Arc::clone(&transport.queue), beat, ctx.stop.clone()));
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
