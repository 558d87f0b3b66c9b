//! From the publish request to the receiver: how many deliveries a second, at which cost, and how fast, beside the bare parts
//! without the bus.

mod parts;
mod report;
mod stand;

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::Args;

use self::{
    report::{CaseFigures, LatencyFigures, Report},
    stand::{Case, Stand},
};
use crate::{
    Backend,
    bench::receiver::Receiver,
    ui::{self, FAINT, Step, paint},
};

/// Before anything is measured each case is run with so much less.
const WARM_UP: usize = 10;
/// Events that are published while nothing else happens, and the time between two of them.
const IDLE_EVENTS: usize = 200;
const IDLE_PERIOD: Duration = Duration::from_millis(50);

/// What is run, and how often.
#[derive(Debug, Args)]
pub(super) struct EndToEnd {
    /// Events of a run; of those for ten subscriptions a tenth, so that there are as many deliveries
    #[arg(long = "events", default_value_t = 60_000)]
    deliveries: usize,
    /// Runs of each case, in turn with those of the others
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    runs: u8,
    /// Which cases
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["parts", "batch-1", "single-1", "batch-10"])]
    cases: Vec<Case>,
    /// Where the deliveries wait; of each one that is named there is a stack, and their runs take turns
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["jetstream"])]
    backend: Vec<Backend>,
    /// Requests under way at a time with one event each
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    in_flight: u16,
    /// How long latency is measured at half of the rate that requests with one event reach, seconds; 0: not at all
    #[arg(long, default_value_t = 20)]
    latency_s: u32,
    /// Write all figures into this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Show how many times those in this file, of an earlier call with --json, the figures are
    #[arg(long)]
    compare: Option<PathBuf>,
}

impl EndToEnd {
    pub(super) async fn run(self, bin_dir: PathBuf, debug: bool) -> Result<()> {
        ensure!(self.deliveries > 0, "without deliveries there is nothing to measure");
        ensure!(
            !self.backend.contains(&Backend::Memory),
            "the processes are measured one by one: there is no memory backend"
        );
        let earlier = self.compare.as_deref().map(Report::read).transpose()?;
        let receiver = Receiver::start().await?;
        let mut stands = Vec::new();
        for backend in &self.backend {
            let stand =
                Stand::set(bin_dir.clone(), (*backend).into(), self.in_flight.into(), &receiver).await?;
            stands.push(stand);
        }

        let cases = self.rounds(&mut stands, &receiver).await?;
        let latencies = self.latencies(&mut stands, &cases, &receiver).await?;
        for stand in stands {
            stand.end().await?;
        }
        let report = Report { deliveries: self.deliveries, debug, cases, latencies };
        report.show(earlier.as_ref());
        self.json.as_deref().map_or(Ok(()), |path| report.write(path))
    }

    /// One run of each case after the other, again and again.
    async fn rounds(&self, stands: &mut [Stand], receiver: &Receiver) -> Result<Vec<CaseFigures>> {
        let on = self.on(stands);
        ensure!(!on.is_empty(), "the bare parts need the jetstream backend");
        let empty =
            |(place, case): &(usize, Case)| CaseFigures::new(case.name(), stands[*place].backend.name());
        let mut figures: Vec<CaseFigures> = on.iter().map(empty).collect();
        let step = Step::begin("Warming up");
        for (place, case) in &on {
            stands[*place].run(*case, (self.deliveries / WARM_UP).max(1), receiver).await?;
        }
        step.done();
        for round in 1..=self.runs {
            for ((place, case), figures) in on.iter().zip(&mut figures) {
                let what = format!("{} ({})", case.name(), stands[*place].backend.name());
                let step = Step::begin(&format!("Round {round} of {}: {what}", self.runs));
                let run = stands[*place].run(*case, self.deliveries, receiver).await?;
                step.done();
                let total: f64 = run.processor_us.iter().map(|(_, us)| us).sum();
                ui::line(paint(
                    FAINT,
                    format!(
                        "    {:.0} deliveries/s, {total:.1} µs of processor time each",
                        run.deliveries_per_s
                    ),
                ));
                figures.add(&run);
            }
        }
        Ok(figures)
    }

    /// Each case with the place of each stack that it can be run on.
    fn on(&self, stands: &[Stand]) -> Vec<(usize, Case)> {
        let cases = self.cases.iter().flat_map(|case| {
            let able = stands.iter().enumerate().filter(|(_, stand)| stand.can(*case));
            able.map(|(place, _)| (place, *case))
        });
        cases.collect()
    }

    async fn latencies(
        &self,
        stands: &mut [Stand],
        cases: &[CaseFigures],
        receiver: &Receiver,
    ) -> Result<Vec<LatencyFigures>> {
        let mut latencies = Vec::new();
        if self.latency_s == 0 {
            return Ok(latencies);
        }
        for stand in stands {
            let backend = stand.backend.name();
            let single = cases.iter().find(|of| of.case == Case::Single1.name() && of.backend == backend);
            let half = single.map(|single| Duration::from_secs_f64(2.0 / single.rate()));
            let at_half = half.map(|period| {
                let events = f64::from(self.latency_s) / period.as_secs_f64();
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a number of events, at least one"
                )]
                ("half of single-1", period, events.max(1.0) as usize)
            });
            for (load, period, events) in at_half.into_iter().chain([("idle", IDLE_PERIOD, IDLE_EVENTS)]) {
                let step = Step::begin(&format!(
                    "Latency ({backend}, {load}): {:.0} events a second",
                    1.0 / period.as_secs_f64()
                ));
                let took = stand.latencies(period, events, receiver).await?;
                step.done();
                latencies.push(LatencyFigures::new(load, backend, period, &took));
            }
        }
        Ok(latencies)
    }
}
