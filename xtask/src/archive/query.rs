//! `cargo xtask archive query`.

use anyhow::Result;
use clap::Args;
use cold_storage::{ColdStorage, Record};
use futures::TryStreamExt as _;
use jiff::Timestamp;
use uuid::Uuid;

use crate::ui::{self, FAINT, STRONG, paint};

/// The longest text that a table shows.
const WIDEST: usize = 40;

#[derive(Debug, Args)]
pub(super) struct Query {
    /// The dataset: receipts, audit, events, occurrences or messages
    #[arg(long)]
    domain: String,
    /// Only what belongs to this event (its uid)
    #[arg(long)]
    event: Option<Uuid>,
    /// Only rows of this organization
    #[arg(long)]
    organization: Option<Uuid>,
    /// Only rows of this time or later: 2026-11-21T00:00:00Z
    #[arg(long)]
    since: Option<Timestamp>,
    /// Only rows before this time
    #[arg(long)]
    until: Option<Timestamp>,
    /// At most so many rows
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// A table for people, instead of one JSON object a line
    #[arg(long)]
    table: bool,
}

impl Query {
    pub(super) async fn run(self, cold: &ColdStorage) -> Result<()> {
        let Self { domain, event, organization, since, until, limit, table } = self;
        let query = cold_storage::Query { domain, organization, since, until, event, limit };
        let mut records = std::pin::pin!(cold.query(&query)?);
        if table {
            show(&records.try_collect::<Vec<_>>().await?);
            return Ok(());
        }
        while let Some(record) = records.try_next().await? {
            ui::line(record.to_json());
        }
        Ok(())
    }
}

/// A table as wide as its values.
fn show(records: &[Record]) {
    let Some(first) = records.first() else {
        ui::line(paint(FAINT, "  no rows"));
        return;
    };
    let names = first.columns.to_vec();
    let cells: Vec<Vec<String>> = records.iter().map(|record| cells(record, &names)).collect();
    let width = |index: usize, name: &str| {
        let longest = cells.iter().map(|row| row[index].chars().count()).max().unwrap_or_default();
        longest.max(name.len())
    };
    let widths: Vec<usize> = names.iter().enumerate().map(|(index, name)| width(index, name)).collect();
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    ui::line(paint(STRONG, line(&names)));
    for row in &cells {
        ui::line(line(row));
    }
}

fn cells(record: &Record, names: &[String]) -> Vec<String> {
    let json = record.to_json();
    let cell = |name: &String| match &json[name] {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => shorten(text),
        other => shorten(&other.to_string()),
    };
    names.iter().map(cell).collect()
}

fn shorten(text: &str) -> String {
    let line = text.replace(char::is_control, " ");
    if line.chars().count() <= WIDEST {
        return line;
    }
    line.chars().take(WIDEST - 1).chain(['…']).collect()
}
