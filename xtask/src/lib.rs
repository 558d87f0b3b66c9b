//! What `cargo xtask` does; a library, so that a test can run the demo too.

mod archive;
mod audit;
mod bench;
mod cargo;
pub mod demo;
mod deployment;
mod dev;
mod down;
mod drain;
mod migrate;
mod reconcile;
mod streams;
mod test;
pub mod ui;
mod up;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Subcommand, ValueEnum};

/// Where the deliveries wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// NATS JetStream: a delivery that succeeds writes nothing to the database
    Jetstream,
    /// The database alone; no NATS is started
    Postgres,
    /// One process with every role, and the queue in its memory: what is queued does not survive it
    Memory,
}

impl From<Backend> for devkit::stack::Backend {
    fn from(backend: Backend) -> Self {
        match backend {
            Backend::Jetstream => Self::Jetstream,
            Backend::Postgres => Self::Postgres,
            Backend::Memory => Self::Memory,
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the bus on this machine, with servers of its own; it runs on until `down`
    Up(up::Up),
    /// Stop what `up` started; the data stays
    Down(down::Down),
    /// Apply or list the database migrations
    Migrate(migrate::Migrate),
    /// Show or apply what the configuration describes and the broker does not have
    Streams(streams::Streams),
    /// Change the backend: move everything that is pending from one queue into the other
    Drain(drain::Drain),
    /// Put back what the queue has lost: what neither history nor the database nor the queue knows of
    Reconcile(reconcile::Reconcile),
    /// Look into the cold storage, and restore from it: list, verify, query, restore, expunge
    Archive(archive::Archive),
    /// Show the bus at work: two organizations, ten subscriptions, a few hundred events, and a crash
    Demo(demo::Demo),
    /// Measure how fast and how exact the bus is
    Bench(bench::Bench),
    /// Run the whole gate: format, lints, licences, tests, documentation, demo
    Test(test::Test),
}

impl Command {
    /// Does it, and gives what the process is to end with.
    ///
    /// # Errors
    /// When it could not be done; a person reads the error.
    pub async fn run(self) -> Result<ExitCode> {
        match self {
            Self::Up(up) => up.run().await?,
            Self::Down(down) => down.run().await?,
            Self::Migrate(migrate) => migrate.run().await?,
            Self::Streams(streams) => return streams.run().await,
            Self::Drain(drain) => drain.run().await?,
            Self::Reconcile(reconcile) => reconcile.run().await?,
            Self::Archive(archive) => archive.run().await?,
            Self::Demo(demo) => demo.run().await?,
            Self::Bench(bench) => bench.run().await?,
            Self::Test(test) => test.run().await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
