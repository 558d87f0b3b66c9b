//! The figures: as a table, as JSON, and beside those of an earlier time.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::stand::Run;
use crate::{
    bench::{
        cost::{LOAD, NAMES, PARTS, RECEIVER},
        statistics::{median, quantile, spread},
        table::{row, show_columns},
    },
    ui,
};

/// All figures of one call.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    /// Deliveries of a run.
    pub(super) deliveries: usize,
    /// Whether what was measured was built for debugging.
    pub(super) debug: bool,
    pub(super) cases: Vec<CaseFigures>,
    pub(super) latencies: Vec<LatencyFigures>,
}

/// The runs of a case in their order.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CaseFigures {
    pub(super) case: String,
    pub(super) backend: String,
    deliveries_per_s: Vec<f64>,
    /// By process, µs for each delivery.
    processor_us: BTreeMap<String, Vec<f64>>,
    repeated: usize,
    refused: usize,
}

/// How long deliveries took from the moment that their request was due to the receiver.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LatencyFigures {
    /// `half of single-1`, or `idle`.
    load: String,
    backend: String,
    per_second: f64,
    deliveries: usize,
    p50_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl CaseFigures {
    pub(super) fn new(case: &str, backend: &str) -> Self {
        Self {
            case: case.to_owned(),
            backend: backend.to_owned(),
            deliveries_per_s: Vec::new(),
            processor_us: BTreeMap::new(),
            repeated: 0,
            refused: 0,
        }
    }

    pub(super) fn add(&mut self, run: &Run) {
        self.deliveries_per_s.push(run.deliveries_per_s);
        for (name, us) in &run.processor_us {
            self.processor_us.entry((*name).to_owned()).or_default().push(*us);
        }
        self.repeated += run.repeated;
        self.refused += run.refused;
    }

    /// What it reaches in the middle.
    pub(super) fn rate(&self) -> f64 {
        median(&self.deliveries_per_s)
    }

    /// Its runs beside those of another one in the same rounds, so that a machine that is busy meanwhile weighs on both.
    fn share_of(&self, other: &Self) -> f64 {
        let pairs = self.deliveries_per_s.iter().zip(&other.deliveries_per_s);
        median(&pairs.map(|(this, other)| this / other).collect::<Vec<_>>())
    }

    fn processor(&self, name: &str) -> Option<f64> {
        self.processor_us.get(name).map(|us| median(us))
    }

    /// All that is needed to deliver, without those who publish and receive.
    fn bus(&self) -> f64 {
        let outside = [LOAD, RECEIVER];
        NAMES.iter().filter(|name| !outside.contains(name)).filter_map(|name| self.processor(name)).sum()
    }

    fn is_like(&self, other: &Self) -> bool {
        (&self.case, &self.backend) == (&other.case, &other.backend)
    }
}

impl LatencyFigures {
    /// Of what took so long, in ascending order.
    pub(super) fn new(load: &str, backend: &str, period: Duration, took: &[Duration]) -> Self {
        let ms = |of_1_000| quantile(took, of_1_000).as_secs_f64() * 1e3;
        Self {
            load: load.to_owned(),
            backend: backend.to_owned(),
            per_second: 1.0 / period.as_secs_f64(),
            deliveries: took.len(),
            p50_ms: ms(500),
            p90_ms: ms(900),
            p99_ms: ms(990),
            max_ms: ms(1_000),
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        (&self.load, &self.backend) == (&other.load, &other.backend)
    }
}

impl Report {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("read the figures in {}", path.display()))
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Prints it. After each figure is how many times that of the `earlier` report it is.
    pub(super) fn show(&self, earlier: Option<&Self>) {
        let kind = |report: &Self| (report.deliveries, report.debug);
        if earlier.is_some_and(|earlier| kind(earlier) != kind(self)) {
            ui::line(
                "The earlier figures are of runs with another number of deliveries, or of another kind of build.",
            );
        }
        self.show_rates(earlier);
        self.show_costs(earlier);
        self.show_backends();
        self.show_latencies(earlier);
    }

    fn parts(&self) -> Option<&CaseFigures> {
        self.cases.iter().find(|figures| figures.case == PARTS)
    }

    fn show_rates(&self, earlier: Option<&Self>) {
        let mut rows = vec![row(["", "deliveries/s (min–max)", "÷ parts", "repeated", "refused"])];
        for case in &self.cases {
            let before = earlier.and_then(|earlier| earlier.cases.iter().find(|before| before.is_like(case)));
            let share = self.parts().map(|parts| case.share_of(parts));
            let share_before =
                earlier.zip(before).and_then(|(earlier, before)| Some(before.share_of(earlier.parts()?)));
            rows.push(vec![
                format!("{} ({})", case.case, case.backend),
                spread(&case.deliveries_per_s, 0) + &beside(case.rate(), before.map(CaseFigures::rate)),
                share.map_or("–".to_owned(), |share| format!("{share:.2}{}", beside(share, share_before))),
                case.repeated.to_string(),
                case.refused.to_string(),
            ]);
        }
        show_columns(&rows);
    }

    fn show_costs(&self, earlier: Option<&Self>) {
        let mut rows = vec![row(["processor time of a delivery, µs"])];
        rows[0].extend(NAMES.map(str::to_owned));
        rows[0].push("all but load and receiver".to_owned());
        for case in &self.cases {
            let before = earlier.and_then(|earlier| earlier.cases.iter().find(|before| before.is_like(case)));
            let mut row = vec![format!("{} ({})", case.case, case.backend)];
            row.extend(NAMES.map(|name| match case.processor(name) {
                Some(us) => {
                    let before = before.and_then(|before| before.processor(name));
                    format!("{us:.1}{}", beside(us, before))
                }
                None => "–".to_owned(),
            }));
            row.push(format!("{:.1}{}", case.bus(), beside(case.bus(), before.map(CaseFigures::bus))));
            rows.push(row);
        }
        show_columns(&rows);
    }

    /// What the backends reach beside each other, where both were measured.
    fn show_backends(&self) {
        for case in self.cases.iter().filter(|case| case.backend == "jetstream") {
            let other =
                self.cases.iter().find(|other| other.case == case.case && other.backend == "postgres");
            if let Some(other) = other
                && let Some((ours, theirs)) = case.processor("postgres").zip(other.processor("postgres"))
            {
                ui::line(format!(
                    "{}: jetstream ÷ postgres: deliveries/s {:.2}, processor time of the database {:.2}",
                    case.case,
                    case.share_of(other),
                    ours / theirs
                ));
            }
        }
    }

    fn show_latencies(&self, earlier: Option<&Self>) {
        if self.latencies.is_empty() {
            return;
        }
        let mut rows = vec![row(["latency, ms", "events/s", "deliveries", "p50", "p90", "p99", "max"])];
        for latency in &self.latencies {
            let before =
                earlier.and_then(|earlier| earlier.latencies.iter().find(|before| before.is_like(latency)));
            let ms = |of: fn(&LatencyFigures) -> f64| {
                format!("{:.2}{}", of(latency), beside(of(latency), before.map(of)))
            };
            rows.push(vec![
                format!("{} ({})", latency.load, latency.backend),
                format!("{:.0}", latency.per_second),
                latency.deliveries.to_string(),
                ms(|latency| latency.p50_ms),
                ms(|latency| latency.p90_ms),
                ms(|latency| latency.p99_ms),
                ms(|latency| latency.max_ms),
            ]);
        }
        show_columns(&rows);
    }
}

/// ` ×1.05`: how many times the earlier figure this one is; nothing if there was none.
fn beside(figure: f64, earlier: Option<f64>) -> String {
    let ratio = earlier.map(|earlier| figure / earlier).filter(|ratio| ratio.is_finite());
    ratio.map_or_else(String::new, |ratio| format!(" ×{ratio:.2}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)]

    use super::*;

    fn figures(case: &str, runs: &[f64]) -> CaseFigures {
        let mut figures = CaseFigures::new(case, "jetstream");
        for deliveries_per_s in runs {
            let processor_us = vec![("publisher", 10.0), (RECEIVER, 8.0), (LOAD, 4.0)];
            figures.add(&Run { deliveries_per_s: *deliveries_per_s, processor_us, repeated: 0, refused: 1 });
        }
        figures
    }

    #[test]
    fn a_share_is_of_the_same_round() {
        let (parts, batch) =
            (figures(PARTS, &[100.0, 50.0, 200.0]), figures("batch-1", &[90.0, 40.0, 100.0]));
        assert_eq!(batch.share_of(&parts), 0.8);
        assert_eq!((batch.rate(), batch.bus(), batch.refused), (90.0, 10.0, 3));
    }

    #[test]
    fn a_report_reads_back_as_written() {
        let took: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        let report = Report {
            deliveries: 10,
            debug: false,
            cases: vec![figures(PARTS, &[1.0])],
            latencies: vec![LatencyFigures::new("idle", "jetstream", Duration::from_millis(50), &took)],
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write(file.path()).unwrap();
        let read = Report::read(file.path()).unwrap();
        assert_eq!(read.cases[0].processor("publisher"), Some(10.0));
        let idle = &read.latencies[0];
        assert_eq!((idle.per_second, idle.p50_ms, idle.max_ms), (20.0, 50.0, 100.0));
    }

    #[test]
    fn what_has_no_earlier_figure_stands_alone() {
        assert_eq!(beside(3.0, Some(2.0)), " ×1.50");
        assert_eq!(beside(3.0, None), "");
        assert_eq!(beside(0.0, Some(0.0)), "");
    }
}
