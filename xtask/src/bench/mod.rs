//! `cargo xtask bench`: how fast and how exact the bus is, measured on a private stack.
//!
//! Absolute figures are one machine's. What counts is what must be zero, and ratios within one run.

mod clock;
mod cost;
mod due;
mod e2e;
mod history;
mod history_cost;
mod limits;
mod load;
mod neighbours;
mod receiver;
mod scene;
mod statistics;
mod table;
mod volume;
mod work;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::cargo::{build_binaries, run_in_release};

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
    /// How many deliveries a second, at which cost, and how fast, beside Postgres, JetStream and HTTP without the bus
    E2e(e2e::EndToEnd),
    /// History and cold storage, compared with what the receiver saw
    History(history::History),
    /// What history costs the database, written in bulk and row by row
    HistoryCost(history_cost::HistoryCost),
    /// What many subscriptions, organizations and queued deliveries cost, and what it costs to do nothing
    Limits(limits::Limits),
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
            // This program publishes and receives, which would be most of the cost if it was built for debugging.
            What::E2e(_) if cfg!(debug_assertions) && !self.debug => run_in_release(),
            What::E2e(e2e) => e2e.run(binaries()?, self.debug).await,
            What::History(history) => history.run(binaries()?).await,
            // Postgres alone.
            What::HistoryCost(cost) => cost.run().await,
            // Ratios, for which it is enough that this program is as slow each time; but it takes long.
            What::Limits(_) if cfg!(debug_assertions) && !self.debug && self.bin_dir.is_none() => {
                run_in_release()
            }
            What::Limits(limits) => limits.run(binaries()?).await,
            What::Neighbours(neighbours) => neighbours.run(binaries()?).await,
            What::Volume(volume) => volume.run(binaries()?).await,
        }
    }
}
