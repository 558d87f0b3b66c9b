//! `cargo xtask archive verify`.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cold_storage::{ColdStorage, Report};

use super::size;
use crate::ui::{self, BAD, FAINT, GOOD, paint};

/// Between two lines about how far it is.
const TELL: Duration = Duration::from_secs(2);

pub(super) async fn run(cold: &ColdStorage) -> Result<()> {
    let mut told = Instant::now();
    let tell = |report: &Report| {
        if told.elapsed() >= TELL {
            ui::line(paint(FAINT, format!("  … {}", summary(report))));
            told = Instant::now();
        }
    };
    let report = cold.verify(tell).await?;
    for problem in &report.problems {
        ui::line(format!("  {} {problem}", paint(BAD, "✗")));
        ui::line(paint(FAINT, format!("    {}", problem.advice())));
    }
    if !report.in_progress.is_empty() {
        let count = report.in_progress.len();
        ui::line(paint(FAINT, format!("  {count} objects belong to a batch that is not finished.")));
    }
    if !report.problems.is_empty() {
        bail!("{} problems in {}", report.problems.len(), summary(&report));
    }
    ui::line(paint(GOOD, format!("  Everything is as it was written: {}", summary(&report))));
    Ok(())
}

fn summary(report: &Report) -> String {
    let Report { batches, objects, rows, bytes, .. } = report;
    format!("{batches} batches, {objects} objects, {rows} rows, {}", size(*bytes))
}
