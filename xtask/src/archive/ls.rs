//! `cargo xtask archive ls`.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use cold_storage::ColdStorage;
use futures::TryStreamExt as _;
use jiff::civil::Date;
use serde_json::json;

use super::size;
use crate::ui::{self, FAINT, STRONG, paint};

#[derive(Debug, Args)]
pub(super) struct Ls {
    /// Only this stream or table
    #[arg(long)]
    source: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// What there is of one source, dataset and day.
#[derive(Default)]
struct Sum {
    batches: u64,
    rows: u64,
    bytes: u64,
}

impl Ls {
    pub(super) async fn run(self, cold: &ColdStorage) -> Result<()> {
        let mut sums = BTreeMap::<(String, String, Date), Sum>::new();
        let mut manifests = std::pin::pin!(cold.manifests(self.source.as_deref()));
        while let Some(manifest) = manifests.try_next().await? {
            let source = manifest.slot().source;
            let mut counted = BTreeMap::<_, Sum>::new();
            for object in &manifest.objects {
                let sum = counted.entry((source.clone(), object.domain.clone(), object.date)).or_default();
                sum.rows += object.rows;
                sum.bytes += object.bytes;
            }
            for (place, Sum { rows, bytes, .. }) in counted {
                let sum = sums.entry(place).or_default();
                sum.batches += 1;
                sum.rows += rows;
                sum.bytes += bytes;
            }
        }
        if self.json {
            for ((source, domain, date), Sum { batches, rows, bytes }) in &sums {
                let line = json!({
                    "source": source, "domain": domain, "date": date, "batches": batches, "rows": rows, "bytes": bytes,
                });
                ui::line(line);
            }
            return Ok(());
        }
        let header = format!(
            "{:24} {:12} {:10} {:>8} {:>12} {:>12}",
            "source", "domain", "date", "batches", "rows", "size"
        );
        ui::line(paint(STRONG, header));
        for ((source, domain, date), Sum { batches, rows, bytes }) in &sums {
            ui::line(format!(
                "{source:24} {domain:12} {date:10} {batches:>8} {rows:>12} {:>12}",
                size(*bytes)
            ));
        }
        let rows: u64 = sums.values().map(|sum| sum.rows).sum();
        let bytes: u64 = sums.values().map(|sum| sum.bytes).sum();
        ui::line(paint(FAINT, format!("{rows} rows, {}", size(bytes))));
        Ok(())
    }
}
