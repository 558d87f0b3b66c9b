//! The archiver: everything that moves or expires data.
//!
//! [`history`] copies receipts to the database; [`relay`] passes audit records on to the audit stream; [`streams`] and
//! [`tables`] move what expires to cold storage; [`maintenance`] creates partitions ahead of their day and sweeps what
//! is over.

mod config;
mod error;
mod history;
mod lease;
mod maintenance;
mod relay;
mod streams;
mod tables;

use std::{sync::Arc, time::Duration};

use bus_core::{
    config::RoleConfig,
    launcher::{BoxError, Ctx, Role},
    nats::Nats,
    pg::{self, DayTable},
    streams::{AUDIT, Archive},
    supervise::{self, Broker},
    telemetry::Chain,
};
use cold_storage::ColdStorage;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use self::config::{
    ArchiveConfig, ArchiverConfig, MaintenanceConfig, Retention, RetentionConfig, TableRetention,
};
use self::{lease::Leases, streams::StreamArchiver, tables::TableArchiver};

/// What this binary is.
pub const ROLE: Role =
    Role { name: "archiver", about: "Moves receipts to history, and what expires to cold storage" };

/// Between two tries to open cold storage.
const AGAIN: Duration = Duration::from_secs(10);

/// How long a loop of archiving may be without a sign of life: it pauses after errors.
const ALIVE: Duration = Duration::from_secs(300);

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
    if let Some(cold) = open(&ctx).await {
        archive(&ctx, &pool, transport.nats.as_ref(), &cold);
        let beat = ctx.health.heartbeat("maintenance", maintenance::INTERVAL * 30);
        let upkeep = maintenance::Maintenance {
            pool,
            config: ctx.config.maintenance.clone(),
            retention: ctx.config.retention.clone(),
            cold,
            clock: Arc::clone(&ctx.clock),
        };
        ctx.spawn("maintenance", upkeep.run(beat, ctx.stop.clone()));
    }
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
