//! What must not grow with the work: what publishing costs with many subscriptions and organizations, what a delivery costs
//! with many queued; and what the bus takes while it has nothing to do.

mod ground;
mod idle;
mod organizations;
mod queued;
mod report;
mod subscriptions;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use self::report::{Figure, Report};
use crate::ui;

/// Before anything is measured it is run with so much less.
const WARM_UP: usize = 10;

/// What is measured, and with how many.
#[derive(Debug, Args)]
pub(super) struct Limits {
    /// Which of the limits
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["subscriptions", "organizations", "queued", "idle"])]
    only: Vec<Section>,
    /// Subscriptions of the organization that has many; the other one has 100
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(200..))]
    subscriptions: u32,
    /// Organizations, where they are many; beside 10
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(20..))]
    organizations: u32,
    /// Deliveries that are queued, where they are many; beside a tenth of them
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1_000..))]
    queued: u32,
    /// How long nothing happens, seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    idle_s: u16,
    /// Events of a run that publishes to few or many subscriptions
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..))]
    events: u32,
    /// Runs of each case, in turn with those of the other
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Write all figures into this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One of the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Publishing into an organization with many subscriptions
    Subscriptions,
    /// The same load spread over many organizations
    Organizations,
    /// Delivering while many deliveries are queued
    Queued,
    /// Nothing to do
    Idle,
}

impl Section {
    fn name(self) -> &'static str {
        match self {
            Self::Subscriptions => "subscriptions",
            Self::Organizations => "organizations",
            Self::Queued => "queued",
            Self::Idle => "idle",
        }
    }
}

impl Limits {
    pub(super) async fn run(self, bin_dir: PathBuf) -> Result<()> {
        let mut report = Report::default();
        for section in &self.only {
            ui::line(format!("{}:", section.name()));
            let figures = self.measure(*section, bin_dir.clone()).await;
            let figures = figures.with_context(|| format!("there is no figure for {}", section.name()))?;
            report.add(section.name(), figures);
        }
        report.show();
        if let Some(path) = &self.json {
            report.write(path)?;
        }
        let exceeded = report.exceeded();
        ensure!(exceeded.is_empty(), "beyond the limit: {}", exceeded.join("; "));
        Ok(())
    }

    async fn measure(&self, section: Section, bin_dir: PathBuf) -> Result<Vec<Figure>> {
        match section {
            Section::Subscriptions => subscriptions::measure(self, bin_dir).await,
            Section::Organizations => organizations::measure(self, bin_dir).await,
            Section::Queued => queued::measure(self, bin_dir).await,
            Section::Idle => idle::measure(self, bin_dir).await,
        }
    }
}
