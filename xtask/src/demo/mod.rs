//! `cargo xtask demo`: the bus at work, with a crash on the way.

mod events;
mod ledger;
mod progress;
mod report;
mod scenario;
mod stage;

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::Args;
use devkit::stack::Stack;

pub use self::report::Outcome;
use self::{
    ledger::{Faults, Inbox, settle},
    progress::Progress,
    scenario::{SHOPS, Verdict},
    stage::{Plan, Stage},
};
use crate::{
    Backend,
    cargo::build_binaries,
    ui::{self, BAD, FAINT, STRONG, Step, paint},
};

const SEED: u64 = 42;
const EVENTS: u32 = 400;

/// How long the last delivery may take after the last event. A crashed worker's deliveries come back
/// only after the broker's `ack_wait`.
const PATIENCE: Duration = Duration::from_secs(120);

/// Show the bus at work: two organizations, ten subscriptions, a few hundred events, and a crash.
#[derive(Debug, Args)]
pub struct Demo {
    /// Where the deliveries wait
    #[arg(long, value_enum, env = "EVENT_BUS_BACKEND", default_value = "jetstream")]
    backend: Backend,
    /// Another number, another story
    #[arg(long, default_value_t = SEED)]
    seed: u64,
    /// How many events, both organizations together
    #[arg(long, default_value_t = EVENTS, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    events: u32,
    /// Build with optimizations
    #[arg(long)]
    release: bool,
}

/// What the demo is to show.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Where the deliveries wait.
    pub backend: devkit::stack::Backend,
    /// The same events for the same seed.
    pub seed: u64,
    /// How many events, both organizations together.
    pub events: usize,
    /// The folder with the binaries; see [`devkit::processes::bin_dir`].
    pub bin_dir: Option<PathBuf>,
}

impl Default for DemoOptions {
    /// What `cargo xtask demo` shows when it is told nothing.
    fn default() -> Self {
        Self {
            backend: devkit::stack::Backend::Jetstream,
            seed: SEED,
            events: EVENTS as usize,
            bin_dir: None,
        }
    }
}

impl Demo {
    pub(crate) async fn run(self) -> Result<()> {
        ui::line("  Building the binaries");
        let bin_dir = build_binaries(self.release)?;
        let outcome = demo(&DemoOptions {
            backend: self.backend.into(),
            seed: self.seed,
            events: usize::try_from(self.events)?,
            bin_dir: Some(bin_dir),
        })
        .await?;
        ui::line(outcome);
        if !outcome.is_success() {
            // The line above says why, and is to be the last one.
            std::process::exit(1);
        }
        Ok(())
    }
}

/// Shows it, and says how it ended.
///
/// # Errors
/// If the bus does not start, refuses a request, or does not stop in order.
pub async fn demo(options: &DemoOptions) -> Result<Outcome> {
    ui::line(format!(
        "\n  {}\n",
        paint(STRONG, format!("An event bus, two shops and a crash  (seed {})", options.seed))
    ));
    let mut stage = Stage::set(options).await?;
    let result = perform(&mut stage, options).await;
    match result {
        Ok(outcome) if outcome.is_success() => {
            let step = Step::begin("Draining every process that is left");
            stage.stack.shutdown().await?;
            step.done();
            ui::line("");
            Ok(outcome)
        }
        failed => {
            show_logs(&stage.stack);
            failed
        }
    }
}

async fn perform(stage: &mut Stage, options: &DemoOptions) -> Result<Outcome> {
    let plan = Plan::draw([options.events.div_ceil(2), options.events / 2], options.seed);
    let wanted = |shop: usize, event| {
        let subscriptions = &SHOPS[shop].subscriptions;
        subscriptions.iter().filter(|subscription| subscription.judge(event) == Verdict::Deliver).count()
    };
    let expected = plan.events().map(|(shop, event)| wanted(shop, event)).sum();
    report::subscriptions(&SHOPS);
    ui::line(format!(
        "  {} events, ids and names the same in both shops; {expected} deliveries must come of them.\n",
        options.events
    ));
    let mut progress = Progress::new(options.events, expected);
    let published = stage.publish(plan, &mut progress).await?;
    stage.drain(PATIENCE, &mut progress).await?;
    progress.finish();

    let mut faults = Faults::default();
    let mut blocks = Vec::new();
    let mut deliveries = 0;
    for (index, (shop, published)) in SHOPS.iter().zip(&published).enumerate() {
        let mut rows = Vec::new();
        for subscription in &shop.subscriptions {
            let (secret, received) = stage.inbox(index, subscription);
            deliveries += received.len();
            rows.push(settle(published, &Inbox { shop, subscription, secret, received }, &mut faults));
        }
        blocks.push((*shop, rows));
    }
    report::table(&blocks);
    report::checks(&faults, deliveries);
    let rows = || blocks.iter().flat_map(|(_, rows)| rows);
    let outcome = Outcome {
        published: published.iter().map(Vec::len).sum(),
        expected: rows().map(|row| row.matched).sum(),
        delivered: rows().map(|row| row.delivered).sum(),
        duplicates: rows().map(|row| row.duplicates).sum(),
        faults: faults.leaks + faults.unwanted + faults.forged + faults.renamed,
    };
    ensure!(outcome.expected == expected, "not every event of the plan was published");
    Ok(outcome)
}

/// The end of every process's log, which is gone with the demo.
fn show_logs(stack: &Stack) {
    ui::line(paint(BAD, "\n  What the processes wrote last:"));
    for line in stack.all_logs().lines().rev().take(60).collect::<Vec<_>>().into_iter().rev() {
        ui::line(paint(FAINT, format!("    {line}")));
    }
}
