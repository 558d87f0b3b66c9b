//! Every role in one process: for development, tests and embedding, and the only process that can keep its
//! queue in memory.
//!
//! Each role runs as it does alone, with its own configuration and its own connections to the database. What
//! the process has once: the ports, the probes, the signals, the drain, and the queue with its hints.

use std::net::SocketAddr;

use archiver::ArchiverConfig;
use bus_core::{
    config::{Common, RoleConfig},
    launcher::{BoxError, Ctx, Role},
    pg,
    queue::Transport,
};
use cron_scheduler::SchedulerConfig;
use delivery_worker::config::WorkerConfig;
use figment::{Figment, providers::Serialized, value::Dict};
use publisher::config::PublisherConfig;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};

/// What this binary is.
pub const ROLE: Role = Role {
    name: "event-bus",
    about: "Every role of the event bus in one process, for development, tests and embedding",
};

/// The configuration of every role, each with the sections that it has alone. `[sink]` is read by two of them.
#[derive(Debug, Clone)]
pub struct EventBusConfig {
    publisher: PublisherConfig,
    worker: WorkerConfig,
    scheduler: SchedulerConfig,
    archiver: ArchiverConfig,
}

impl<'de> Deserialize<'de> for EventBusConfig {
    /// By hand: `serde(flatten)` gives a section to the first role that asks for it.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        fn read<T: DeserializeOwned, E: Error>(values: &Figment) -> Result<T, E> {
            values.extract().map_err(E::custom)
        }
        let values = Figment::from(Serialized::defaults(Dict::deserialize(deserializer)?));
        Ok(Self {
            publisher: read(&values)?,
            worker: read(&values)?,
            scheduler: read(&values)?,
            archiver: read(&values)?,
        })
    }
}

impl RoleConfig for EventBusConfig {
    const EVERY_ROLE: bool = true;

    fn defaults() -> Vec<&'static str> {
        [
            PublisherConfig::defaults(),
            WorkerConfig::defaults(),
            SchedulerConfig::defaults(),
            ArchiverConfig::defaults(),
        ]
        .concat()
    }

    fn problem(&self, common: &Common) -> Option<String> {
        self.publisher
            .problem(common)
            .or_else(|| self.worker.problem(common))
            .or_else(|| self.scheduler.problem(common))
            .or_else(|| self.archiver.problem(common))
    }

    fn listen(&self) -> Vec<(&'static str, SocketAddr)> {
        self.publisher.listen()
    }
}

/// Runs until [`Ctx::stop`]; if one role fails, all end.
pub async fn run(mut ctx: Ctx<EventBusConfig>) -> Result<(), BoxError> {
    let pool = pg::pool(&ctx.common.postgres, ctx.role.name)?;
    let transport = Transport::connect(&ctx.common, &pool, ctx.role.name, ctx.stop.clone()).await?;
    let EventBusConfig { publisher, worker, scheduler, archiver } = ctx.config.clone();
    let publisher = ctx.part(publisher::ROLE, publisher, &transport);
    ctx.spawn(publisher::ROLE.name, publisher::run(publisher));
    let worker = ctx.part(delivery_worker::ROLE, worker, &transport);
    ctx.spawn(delivery_worker::ROLE.name, delivery_worker::run(worker));
    let scheduler = ctx.part(cron_scheduler::ROLE, scheduler, &transport);
    ctx.spawn(cron_scheduler::ROLE.name, cron_scheduler::run(scheduler));
    let archiver = ctx.part(archiver::ROLE, archiver, &transport);
    ctx.spawn(archiver::ROLE.name, archiver::run(archiver));
    ctx.stop.cancelled().await;
    Ok(())
}
