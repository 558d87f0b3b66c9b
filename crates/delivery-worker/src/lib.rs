//! The delivery worker: takes deliveries from the queue and brings each to its end.
//!
//! The way of a delivery: [`lane`] pulls it, `delivery` finds its connection and decides what follows from
//! the attempt, [`webhook`] makes the attempt.

mod bodies;
pub mod config;
mod connections;
pub mod connector;
mod delivery;
pub mod lane;
mod parking;
mod patience;
mod receipts;
pub mod webhook;

use std::{sync::Arc, time::Duration};

use bus_core::{
    launcher::{BoxError, Ctx, Role},
    pg,
    supervise::{self, Broker},
};

use crate::{
    bodies::Bodies, config::WorkerConfig, connections::Connections, delivery::Deliverer, lane::Lane,
    parking::Parking, patience::Patience, receipts::Receipts, webhook::WebhookSink,
};

/// What this binary is.
pub const ROLE: Role = Role { name: "delivery-worker", about: "Delivers queued events to their subscribers" };

/// Runs until [`Ctx::stop`].
pub async fn run(ctx: Ctx<WorkerConfig>) -> Result<(), BoxError> {
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let Some(transport) = supervise::connect(&ctx, &pool, Broker::Needed).await? else { return Ok(()) };
    let settings = &ctx.config.worker;

    let ttl = Duration::from_secs(settings.connection_ttl_s);
    let connections = Connections::new(pool.clone(), settings.connection_cache, ttl);
    let following = connections.clone().follow(Arc::clone(&transport.hints));
    ctx.tasks.spawn(ctx.stop.clone().run_until_cancelled_owned(following));

    let patience = Patience::new(ctx.stop.clone());
    let deliverer = Arc::new(Deliverer {
        pool: pool.clone(),
        queue: Arc::clone(&transport.queue),
        connections,
        bodies: Bodies::new(pool.clone(), settings.body_cache_bytes),
        webhooks: Box::new(WebhookSink::new(&ctx.config.sink)?),
        parking: Parking::start(pool, Arc::clone(&transport.hints), patience.clone(), &ctx.tasks),
        patience,
        receipts: Receipts::start(
            Arc::clone(&transport.queue),
            settings.receipt_buffer,
            &ctx.tasks,
            ctx.stop.clone(),
        ),
        retry: settings.retry.clone(),
        clock: Arc::clone(&ctx.clock),
        random: rand::random::<f64>,
    });
    let lanes = transport.queue.lanes().await?;
    for number in 0..lanes {
        let lane = Lane {
            number,
            in_flight: (settings.in_flight / usize::from(lanes)).max(1),
            queue: Arc::clone(&transport.queue),
            deliverer: Arc::clone(&deliverer),
            tasks: ctx.tasks.clone(),
            beat: ctx.health.heartbeat(format!("lane {number}"), lane::PULL_WAIT * 15),
            stop: ctx.stop.clone(),
        };
        ctx.spawn("lane", lane.run());
    }
    drop(deliverer);
    ctx.stop.cancelled().await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    transport.flush().await;
    Ok(())
}
