//! The cron scheduler: everything that the clock drives. Schedules fire, events with a `deliverAt` are published,
//! parked retries return to the queue, and replays are worked off at their rate.
//!
//! Any number of replicas share the work; due is the database's time.

mod due;
mod events;
mod firing;
mod replays;
mod returns;
mod ticks;

use std::sync::Arc;

use bus_core::{
    config::{Common, RoleConfig},
    fanout::FanOutStore,
    launcher::{BoxError, Ctx, Role},
    notify::{self, Hint},
    pg::{self, StoreError},
    schedule::tz_version,
    snapshots::Snapshots,
    supervise::{self, Broker},
    telemetry::Chain,
};
use serde::Deserialize;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    due::{Due, IDLE, Loop},
    firing::OUTBOX_LEASE_S,
    returns::LEASE_S,
};
pub use self::{
    events::{ClaimedEvents, publish_due},
    firing::{Committed, Enqueued, Firing, Stored},
    replays::{replay_chunk, replay_due},
    returns::return_due,
    ticks::{ClaimedSchedules, visit_due},
};

/// What this binary is.
pub const ROLE: Role = Role {
    name: "cron-scheduler",
    about: "Fires schedules and future-dated events, returns parked deliveries when they are due, and works off replays",
};

/// Schedules whose ticks are computed again at a time, if the time zone data is new.
const REFRESHED: u32 = 500;

/// The scheduler's own configuration. `defaults.toml` beside `src/` is the reference.
#[derive(Debug, Clone, Deserialize)]
pub struct SchedulerConfig {
    /// Schedules.
    pub scheduler: TicksConfig,
}

/// Schedules.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TicksConfig {
    /// A tick that is late by more counts as missed, and the schedule's policy decides; seconds, 1–3,600.
    pub missed_after_s: u64,
}

impl RoleConfig for SchedulerConfig {
    fn defaults() -> Vec<&'static str> {
        vec![include_str!("../defaults.toml")]
    }

    fn problem(&self, common: &Common) -> Option<String> {
        if !(1..=3_600).contains(&self.scheduler.missed_after_s) {
            return Some("scheduler.missed_after_s must be between 1 and 3600".into());
        }
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
    let due = Due::new();
    let wake = Arc::clone(&due);
    let following = notify::wake_on(Arc::clone(&transport.hints), Hint::Due, move || wake.ask());
    ctx.tasks.spawn(ctx.stop.clone().run_until_cancelled_owned(following));
    let firing = Firing {
        pool: pool.clone(),
        snapshots: Snapshots::new(pool.clone()),
        queue: Arc::clone(&transport.queue),
        store: FanOutStore::of(&ctx.common, OUTBOX_LEASE_S),
        hints: Arc::clone(&transport.hints),
        ids: Arc::clone(&ctx.ids),
        clock: Arc::clone(&ctx.clock),
        config: ctx.config.clone(),
    };
    let begin = |what, next| Loop {
        what,
        due: Arc::clone(&due),
        next,
        beat: ctx.health.heartbeat(what, IDLE * 12),
        stop: ctx.stop.clone(),
    };
    let ticks = begin("schedules", |agenda| agenda.ticks);
    let on = firing.clone();
    ctx.spawn(ticks.what, async move {
        refresh_time_zones(&on.pool, &ticks.stop).await;
        ticks.run(async move || visit_due(&on).await).await
    });
    let events = begin("due events", |agenda| agenda.events);
    ctx.spawn(events.what, events.run(async move || publish_due(&firing).await));
    let returning = begin("parked deliveries", |agenda| agenda.deliveries);
    let (on, queue) = (pool.clone(), Arc::clone(&transport.queue));
    ctx.spawn(returning.what, returning.run(async move || return_due(&on, queue.as_ref()).await));
    let replaying = begin("replays", |agenda| agenda.replays);
    let (on, wake) = (pool.clone(), Arc::clone(&due));
    let replay = async move || {
        let idle = replay_due(&on).await?;
        if idle.is_zero() {
            // What came back waits, and is due.
            wake.ask();
        }
        Ok::<_, StoreError>(idle)
    };
    ctx.spawn(replaying.what, replaying.run(replay));
    let beat = ctx.health.heartbeat("agenda", IDLE * 12);
    ctx.spawn("agenda", Arc::clone(&due).follow(pool, beat, ctx.stop.clone()));
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}

/// Computes ticks again that were computed with older time zone data. Should it fail, they are as they were planned.
async fn refresh_time_zones(pool: &PgPool, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        match pg::refresh_time_zones(pool, REFRESHED).await {
            Ok(0) => return,
            Ok(schedules) => {
                info!(schedules, version = tz_version(), "Ticks computed with new time zone data");
            }
            Err(failed) => {
                return warn!(error = %Chain(&failed), "Ticks stay as computed with older time zone data");
            }
        }
    }
}
