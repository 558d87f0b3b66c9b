//! `cargo xtask bench`: how fast and how exact the bus is, measured on a private stack.
//!
//! Absolute figures are one machine's. What counts is what must be zero, and ratios within one run.

mod clock;
mod due;
mod history;
mod history_cost;
mod neighbours;
mod volume;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use devkit::{
    client::ApiClient,
    processes::Role,
    receiver::Receiver,
    servers::Durability,
    stack::{ServerChoice, Stack, StackOptions},
};
use serde_json::json;

use crate::{cargo::build_binaries, ui::Step};

/// Measure.
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
    /// Measure the debug build, which is quicker to make
    #[arg(long, global = true)]
    debug: bool,
    /// Build nothing, and measure the binaries in this folder: another version's, for example
    #[arg(long, global = true, conflicts_with = "debug")]
    bin_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Schedules that tick every second, on schedulers that are killed in turn
    Clock(clock::Clock),
    /// Events that are all due in the same second
    Due(due::Due),
    /// History and cold storage, compared with what the receiver saw
    History(history::History),
    /// What history costs the database, written in bulk and row by row
    HistoryCost(history_cost::HistoryCost),
    /// What endpoints that hang, and an organization that floods its lane, cost the others
    Neighbours(neighbours::Neighbours),
    /// A million events in one run: complete, and without growth
    Volume(volume::Volume),
}

impl Bench {
    pub(crate) async fn run(self) -> Result<()> {
        let binaries = || match &self.bin_dir {
            Some(dir) => Ok(dir.clone()),
            None => build_binaries(!self.debug),
        };
        match self.what {
            What::Clock(clock) => clock.run(binaries()?).await,
            What::Due(due) => due.run(binaries()?).await,
            What::History(history) => history.run(binaries()?).await,
            // Postgres alone.
            What::HistoryCost(cost) => cost.run().await,
            What::Neighbours(neighbours) => neighbours.run(binaries()?).await,
            What::Volume(volume) => volume.run(binaries()?).await,
        }
    }
}

/// A private stack with one organization.
struct Scene {
    stack: Stack,
    receiver: Receiver,
    api: ApiClient,
}

impl Scene {
    /// Starts it; every event whose type begins with `bench` goes to the receiver's `/bench`.
    async fn set(bin_dir: PathBuf, schedulers: usize) -> Result<Self> {
        let step = Step::begin(&format!(
            "Starting nats-server, Postgres, {schedulers} schedulers and one of the others"
        ));
        let mut options = StackOptions::default()
            .servers(ServerChoice::Own(Durability::Full))
            .replicas(Role::CronScheduler, schedulers)
            .role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MIN_INTERVAL_S", 1)
            .role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MAX_PER_ORGANIZATION", 1_000_000);
        options.bin_dir = Some(bin_dir);
        let mut stack = Stack::start(options).await?;
        let receiver = Receiver::start().await?;
        let admin = stack.admin(0)?;
        let organization = admin.create_organization("bench").await?.require(201)?.id().to_owned();
        let key = json!({ "name": "all", "scopes": ["publish", "subscribe", "read", "admin"] });
        let key = admin.create_key(&organization, &key).await?.require(201)?;
        let api = stack.client(0)?.with_token(key.text("/key"));
        let hook = api.create_webhook("hook", &receiver.url("/bench")).await?.require(201)?;
        let wanted = json!({ "connectionId": hook.id(), "eventType": "bench.>" });
        api.subscribe(&wanted).await?.require(201)?;
        step.done();
        Ok(Self { stack, receiver, api })
    }
}
