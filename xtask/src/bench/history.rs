//! History and cold storage beside what the receiver saw, attempt by attempt.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use clap::Args;
use cold_storage::{ColdStorage, Config};
use devkit::{
    attempts::Load,
    servers::Durability,
    stack::{ServerChoice, Stack},
};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::ui::{self, STRONG, Step, paint};

/// How long all deliveries may take to be over, and to be archived.
const DEADLINE: Duration = Duration::from_secs(1_800);
/// Between two questions how far history is behind.
const SAMPLE: Duration = Duration::from_millis(500);

/// How many.
#[derive(Debug, Args)]
pub(super) struct History {
    /// Events that are published and delivered
    #[arg(long, default_value_t = 200_000)]
    events: usize,
    /// Organizations that publish them
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    organizations: u16,
}

impl History {
    pub(super) async fn run(self, bin_dir: PathBuf) -> Result<()> {
        let step = Step::begin("Starting nats-server, Postgres and one of each binary");
        let mut options = Load::options().servers(ServerChoice::Own(Durability::Full));
        options.bin_dir = Some(bin_dir);
        let mut stack = Stack::start(options).await?;
        let load = Load::set(&mut stack, self.organizations.into()).await?;
        step.done();

        let step = Step::begin(&format!(
            "Publishing {} events of {} organizations, until all is delivered, in history and archived",
            self.events, self.organizations
        ));
        let begun = Instant::now();
        let stop = CancellationToken::new();
        let work = async {
            let _stop = stop.clone().drop_guard();
            load.publish(self.events).await?;
            load.settle(&stack, self.events, DEADLINE).await
        };
        let (worked, lag) = tokio::join!(work, sample(&load, &stop));
        worked?;
        let elapsed = begun.elapsed();
        step.done();

        let step = Step::begin("Comparing with what DuckDB reads, and verifying cold storage");
        let account = load.account(&stack).await?;
        let url =
            Url::from_directory_path(stack.cold_dir()).map_err(|()| anyhow!("no URL of cold storage"))?;
        let report = ColdStorage::open(&Config::at(url))?.verify(|_| ()).await?;
        step.done();

        let outcomes: Vec<String> =
            account.outcomes.iter().map(|(outcome, times)| format!("{outcome} {times}")).collect();
        ui::line(format!("attempts by outcome: {}", outcomes.join(", ")));
        ui::line(format!(
            "cold storage: {} batches, {} objects, {} rows, {} bytes, {} problems; {} days of organizations compared",
            report.batches,
            report.objects,
            report.rows,
            report.bytes,
            report.problems.len(),
            account.days
        ));
        ui::line(format!(
            "history was behind: p50 {} ms, max {} ms ({} samples, {} unanswered); {:.0} deliveries/s",
            lag.behind.get(lag.behind.len() / 2).copied().unwrap_or_default(),
            lag.behind.last().copied().unwrap_or_default(),
            lag.behind.len(),
            lag.unanswered,
            self.events as f64 / elapsed.as_secs_f64()
        ));
        ui::line(paint(STRONG, format!("history: events {}, {account}", self.events)));
        for difference in &account.differences {
            ui::line(difference);
        }
        for problem in &report.problems {
            ui::line(problem);
        }
        stack.shutdown().await?;
        ensure!(account.differences.is_empty(), "history or cold storage is not what the receiver saw");
        ensure!(account.deliveries == self.events, "not every event was delivered");
        ensure!(report.problems.is_empty(), "cold storage is not whole");
        Ok(())
    }
}

/// How far history was behind while it ran.
#[derive(Debug, Default)]
struct Lag {
    /// Milliseconds, in ascending order.
    behind: Vec<u64>,
    /// Questions that the API could not answer: there was no event yet, or the bus was too busy.
    unanswered: usize,
}

/// Asks until `stop`.
async fn sample(load: &Load, stop: &CancellationToken) -> Lag {
    let mut lag = Lag::default();
    while stop.run_until_cancelled(tokio::time::sleep(SAMPLE)).await.is_some() {
        match load.behind_ms().await {
            Ok(Some(behind)) => lag.behind.push(behind),
            Ok(None) | Err(_) => lag.unanswered += 1,
        }
    }
    lag.behind.sort_unstable();
    lag
}
