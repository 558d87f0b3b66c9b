//! The archiver: everything that moves or expires data.
//!
//! `history` copies receipts to the database; `relay` passes audit records on to the audit stream; `cold` moves
//! `streams` and `tables` to cold storage; `erasures` empties payloads wherever they are; `maintenance` creates partitions ahead of their day and sweeps what
//! is over.

mod cold;
mod config;
mod erasures;
mod error;
mod history;
mod lease;
mod maintenance;
mod relay;
mod streams;
mod tables;

use std::sync::Arc;

use bus_core::{
    launcher::{BoxError, Ctx, Role},
    pg,
    supervise::{self, Broker},
};

pub use self::config::{
    ArchiveConfig, ArchiverConfig, MaintenanceConfig, Retention, RetentionConfig, TableRetention,
};
use self::{cold::ColdLoops, maintenance::Maintenance};
pub use self::{
    cold::Expiry,
    erasures::Erasures,
    error::ArchiveError,
    lease::{LeasedWork, Leases},
    tables::TableArchiver,
};

/// What this binary is.
pub const ROLE: Role =
    Role { name: "archiver", about: "Moves receipts to history, and what expires to cold storage" };

/// Runs until [`Ctx::stop`].
pub async fn run(ctx: Ctx<ArchiverConfig>) -> Result<(), BoxError> {
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let Some(transport) = supervise::connect(&ctx, &pool, Broker::Needed).await? else { return Ok(()) };
    if let Some(nats) = &transport.nats {
        let beat = ctx.health.heartbeat("history", history::PULL_WAIT * 60);
        ctx.spawn("history", history::run(pool.clone(), nats.clone(), beat, ctx.stop.clone()));
        let beat = ctx.health.heartbeat("relay", relay::LOOK * 60);
        ctx.spawn("relay", relay::run(pool.clone(), nats.clone(), beat, ctx.stop.clone()));
    }
    let beat = ctx.health.heartbeat("maintenance", maintenance::INTERVAL * 30);
    let upkeep =
        Maintenance { pool: pool.clone(), config: ctx.config.clone(), clock: Arc::clone(&ctx.clock) };
    ctx.spawn("maintenance", upkeep.run(beat, ctx.stop.clone()));
    ctx.spawn("cold storage", ColdLoops::new(&ctx, pool, transport.nats.clone()).run());
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
