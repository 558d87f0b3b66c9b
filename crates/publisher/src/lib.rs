//! The publisher: the HTTP edge, matching, fan-out, and the relay of unfinished fan-outs.
//!
//! The way of an event: [`api`] reads the request, [`ingest`] bounds what is under way, [`commit`] puts
//! whatever has gathered into one transaction and matches it there, [`fanout`] puts the deliveries into
//! the queue. [`relay`] does that for a process that died before it could, and
//! `reconcile` does it again for a broker that lost what it had.

pub mod api;
pub mod commit;
pub mod config;
pub mod fanout;
pub mod ingest;
pub mod limits;
mod reconcile;
pub mod relay;
mod serve;
pub mod state;

use std::{sync::Arc, time::Duration};

use bus_core::{
    address::AddressPolicy,
    cloudevent,
    fanout::FanOutStore,
    launcher::{BoxError, Ctx, Role},
    peers::{PeerRole, Peers},
    pg,
    snapshots::Snapshots,
    supervise::{self, Broker},
};
use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};

use crate::{
    commit::Committer,
    config::PublisherConfig,
    fanout::FanOuts,
    ingest::Ingest,
    limits::Limits,
    reconcile::Reconciling,
    relay::{Backlog, Relay},
    state::{AppState, Inner},
};

/// What this binary is.
pub const ROLE: Role = Role {
    name: "publisher",
    about: "HTTP edge of the event bus: stores events, matches them and fans them out",
};

/// Runs until [`Ctx::stop`].
pub async fn run(mut ctx: Ctx<PublisherConfig>) -> Result<(), BoxError> {
    let listener = ctx.listener("http");
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let Some(transport) = supervise::connect(&ctx, &pool, Broker::Optional).await? else { return Ok(()) };
    let publish = &ctx.config.publish;
    let snapshots = Snapshots::new(pool.clone());

    let peers = {
        let (hints, stop) = (Arc::clone(&transport.hints), ctx.stop.clone());
        Peers::start(hints, PeerRole::Publisher, ctx.ids.next(), &ctx.tasks, stop)
    };
    let limits = {
        let (tasks, stop) = (ctx.tasks.clone(), ctx.stop.clone());
        Limits::new(pool.clone(), publish.limits.defaults(), peers, tasks, stop)
    };
    let beat = ctx.health.heartbeat("usage", limits::EVERY * 60);
    ctx.spawn("usage", limits.clone().run(beat));
    let backlog = Backlog::default();
    let fanouts = FanOuts::start(&ctx, pool.clone(), transport.queue.clone());
    let (ingest, jobs) = Ingest::new(publish);
    let committer = Committer {
        pool: pool.clone(),
        snapshots: snapshots.clone(),
        fanouts,
        ids: ctx.ids.clone(),
        clock: ctx.clock.clone(),
        config: publish.clone(),
        hints: transport.hints.clone(),
        limits: limits.clone(),
        store: FanOutStore::of(&ctx.common, publish.outbox_lease_s),
    };
    commit::start(&ctx, committer, jobs);
    let beat = ctx.health.heartbeat("relay", relay::INTERVAL * 60);
    let relay = Relay {
        pool: pool.clone(),
        queue: transport.queue.clone(),
        clock: ctx.clock.clone(),
        config: publish.clone(),
        backlog: backlog.clone(),
        beat,
        stop: ctx.stop.clone(),
    };
    ctx.spawn("relay", relay.run());
    let reconciling = Reconciling {
        pool: pool.clone(),
        transport: transport.clone(),
        window: Duration::from_secs(publish.reconcile_window_s),
        whole_stream: Duration::from_secs(publish.reconcile_stream_s),
        beat: ctx.health.heartbeat("reconcile", reconcile::LOOK * 20),
        stop: ctx.stop.clone(),
    };
    ctx.spawn("reconcile", reconciling.run());

    let state = AppState::new(Inner {
        pool,
        snapshots,
        ingest,
        publish_limits: limits.clone(),
        backlog,
        queue: transport.queue.clone(),
        history_lags: transport.nats.is_some(),
        hints: transport.hints.clone(),
        addresses: AddressPolicy::new(ctx.config.sink.allow_cidrs.clone()),
        admin_token: ctx
            .config
            .admin_token
            .as_ref()
            .map(|token| Sha256::digest(token.expose_secret().as_bytes()).into()),
        limits: cloudevent::Limits {
            max_batch: publish.max_batch,
            max_event_bytes: publish.max_event_bytes,
            ..cloudevent::Limits::default()
        },
        schedules: ctx.config.schedules.clone(),
        replays_per_second: ctx.config.replay.per_second,
        payload_access: ctx.config.audit.payload_access,
        max_body_bytes: publish.max_body_bytes,
        lanes: ctx.common.lanes,
        clock: Arc::clone(&ctx.clock),
        ids: Arc::clone(&ctx.ids),
    });
    let stop = ctx.stop.clone();
    // Closes the listener at the stop and waits for the requests that are under way. The router, and with
    // it the last way into the committers, is dropped then; they finish what they have and end.
    serve::serve(listener, api::router(state), stop).await;
    ctx.tasks.close();
    ctx.tasks.wait().await;
    // What the committers counted last.
    limits.flush(|| ()).await;
    transport.flush().await;
    Ok(())
}
