//! The cron scheduler: everything that the clock drives. Now: parked retries return to the queue when
//! they are due, and replays are worked off at their rate.
//!
//! Any number of replicas share the work; due is the database's time.

mod due;
mod replays;
mod returns;

use std::sync::Arc;

use bus_core::{
    config::{Common, RoleConfig},
    launcher::{BoxError, Ctx, Role},
    notify::{self, Hint},
    pg::{self, StoreError},
    supervise::{self, Broker},
};
use serde::Deserialize;
use tokio::sync::Notify;

use self::{
    due::{IDLE, Loop},
    returns::LEASE_S,
};
pub use self::{
    replays::{replay_chunk, replay_due},
    returns::return_due,
};

/// What this binary is.
pub const ROLE: Role = Role {
    name: "cron-scheduler",
    about: "Returns parked deliveries to the queue when they are due, and works off replays",
};

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
    let (due, wanted) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let wake = [Arc::clone(&due), Arc::clone(&wanted)];
    let following = notify::wake_on(Arc::clone(&transport.hints), Hint::Due, move || {
        wake.iter().for_each(|one| one.notify_one());
    });
    ctx.tasks.spawn(ctx.stop.clone().run_until_cancelled_owned(following));
    let begin =
        |what, wake| Loop { what, wake, beat: ctx.health.heartbeat(what, IDLE * 12), stop: ctx.stop.clone() };
    let returning = begin("parked deliveries", Arc::clone(&due));
    let (on, queue) = (pool.clone(), Arc::clone(&transport.queue));
    ctx.spawn(returning.what, returning.run(async move || return_due(&on, queue.as_ref()).await));
    let replaying = begin("replays", wanted);
    let replay = async move || {
        let idle = replay_due(&pool).await?;
        if idle.is_zero() {
            // What came back waits, and is due.
            due.notify_one();
        }
        Ok::<_, StoreError>(idle)
    };
    ctx.spawn(replaying.what, replaying.run(replay));
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
