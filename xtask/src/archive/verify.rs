//! `cargo xtask archive verify`.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cold_storage::{ColdStorage, Report};

use super::size;
use crate::ui::{self, BAD, FAINT, GOOD, paint};

/// Between two lines about how far it is.
const TELL: Duration = Duration::from_secs(2);

/// So many of what is not finished are named.
const SHOWN: usize = 20;

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
        ui::line(paint(
            FAINT,
            format!("  {count} belong to a batch, or to a table's day, that is not finished:"),
        ));
        for path in report.in_progress.iter().take(SHOWN) {
            ui::line(paint(FAINT, format!("    {path}")));
        }
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
