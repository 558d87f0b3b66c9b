//! The delivery worker: takes deliveries from the queue and brings each to its end.
//!
//! The way of a delivery: [`lane`] pulls it, `delivery` finds its connection, `admission` says whether that has room for
//! it, [`webhook`] makes the attempt, and `delivery` decides what follows from it.

mod admission;
pub mod batching;
mod bodies;
mod closed;
pub mod config;
mod connections;
pub mod connector;
pub mod delivery;
mod failing;
mod hold;
pub mod lane;
pub mod lanes;
mod parking;
mod patience;
mod recall;
mod receipts;
pub mod slots;
pub mod webhook;

use std::{sync::Arc, time::Duration};

use bus_core::{
    launcher::{BoxError, Ctx, Role},
    peers::{PeerRole, Peers},
    pg,
    supervise::{self, Broker},
};

use crate::{
    config::WorkerConfig,
    delivery::{Deliverer, Parts},
    lanes::{Homes, Lanes},
    webhook::WebhookSink,
};

/// What this binary is.
pub const ROLE: Role = Role { name: "delivery-worker", about: "Delivers queued events to their subscribers" };

/// Runs until [`Ctx::stop`].
pub async fn run(ctx: Ctx<WorkerConfig>) -> Result<(), BoxError> {
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let Some(transport) = supervise::connect(&ctx, &pool, Broker::Needed).await? else { return Ok(()) };
    let settings = &ctx.config.worker;
    let (hints, stop) = (Arc::clone(&transport.hints), ctx.stop.clone());
    let peers = Peers::start(hints, PeerRole::DeliveryWorker, ctx.ids.next(), &ctx.tasks, stop);
    let homes = Homes::new(pool.clone(), ctx.common.lanes);
    let deliverer = Arc::new(Deliverer::start(Parts {
        pool,
        queue: Arc::clone(&transport.queue),
        hints: Arc::clone(&transport.hints),
        peers,
        webhooks: Box::new(WebhookSink::new(&ctx.config.sink)?),
        settings: settings.clone(),
        lease: Duration::from_millis(ctx.common.nats.ack_wait_ms),
        longest_gathering: ctx.config.longest_gathering(&ctx.common),
        clock: Arc::clone(&ctx.clock),
        ids: Arc::clone(&ctx.ids),
        homes: homes.clone(),
        random: rand::random::<f64>,
        tasks: ctx.tasks.clone(),
        stop: ctx.stop.clone(),
    }));
    let lanes = Lanes {
        queue: Arc::clone(&transport.queue),
        hints: Arc::clone(&transport.hints),
        homes,
        in_flight: (settings.in_flight / usize::from(ctx.common.lanes)).max(1),
        ttl: Duration::from_secs(settings.connection_ttl_s),
        deliverer,
        tasks: ctx.tasks.clone(),
        health: ctx.health.clone(),
        stop: ctx.stop.clone(),
    };
    ctx.spawn("lanes", lanes.run());
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
