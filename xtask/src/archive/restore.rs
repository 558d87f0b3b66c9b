//! `cargo xtask archive restore`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bus_core::{
    audit::{Action, Change, TargetKind},
    pg::{self, DayTable},
};
use clap::{Args, ValueEnum};
use cold_storage::{ColdStorage, Record, Value};
use futures::TryStreamExt as _;
use jiff::Timestamp;
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    audit,
    ui::{self, FAINT, GOOD, paint},
};

/// Rows of one transaction.
const ROWS: usize = 500;

/// Bytes of one transaction; the row that passes the mark is the last.
const BYTES: usize = 8 * 1024 * 1024;

/// Between two lines about how far it is.
const TELL: Duration = Duration::from_secs(2);

/// What has a table to come back to.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Domain {
    /// Attempts at deliveries
    Receipts,
    /// Events
    Events,
    /// Who changed what
    Audit,
    /// What became of the ticks of schedules
    Occurrences,
}

impl Domain {
    fn dataset(self) -> &'static str {
        match self {
            Self::Receipts => "receipts",
            Self::Events => "events",
            Self::Audit => "audit",
            Self::Occurrences => "occurrences",
        }
    }

    fn table(self) -> DayTable {
        match self {
            Self::Receipts => DayTable::DeliveryAttempts,
            Self::Events => DayTable::Events,
            Self::Audit => DayTable::AuditRecords,
            Self::Occurrences => DayTable::Occurrences,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Restore {
    /// The dataset
    #[arg(long, value_enum)]
    domain: Domain,
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
    /// The database, with the schema's owner
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Only count what cold storage has of them
    #[arg(long)]
    dry_run: bool,
}

impl Restore {
    pub(super) async fn run(self, cold: &ColdStorage) -> Result<()> {
        let pool = PgPool::connect(&self.database_url).await.context("connect to the database")?;
        pg::check_schema(&pool).await?;
        let query = cold_storage::Query {
            domain: self.domain.dataset().to_owned(),
            organization: self.organization,
            since: self.since,
            until: self.until,
            event: self.event,
            limit: usize::MAX,
        };
        let mut records = std::pin::pin!(cold.query(&query)?);
        if !self.dry_run {
            let table = self.domain.table().name();
            let wanted = json!({ "event": self.event, "since": self.since, "until": self.until });
            let change = Change::new(Action::RowsRestored, TargetKind::Table, table).after(wanted);
            audit::record(&pool, self.organization.map(Into::into), change).await?;
        }
        let mut counts = Counts { found: 0, restored: 0, told: Instant::now() };
        let (mut part, mut bytes) = (Vec::new(), 0);
        while let Some(record) = records.try_next().await? {
            counts.found += 1;
            if self.dry_run {
                continue;
            }
            let (row, size) = row(&record);
            part.push(row);
            bytes += size;
            if part.len() == ROWS || bytes >= BYTES {
                counts.restored += pg::restore_rows(&pool, self.domain.table(), &part).await?;
                counts.tell();
                (part, bytes) = (Vec::new(), 0);
            }
        }
        if !part.is_empty() {
            counts.restored += pg::restore_rows(&pool, self.domain.table(), &part).await?;
        }
        pool.close().await;
        counts.sum_up(self.dry_run);
        Ok(())
    }
}

/// How far it is.
struct Counts {
    found: u64,
    restored: u64,
    told: Instant,
}

impl Counts {
    fn tell(&mut self) {
        if self.told.elapsed() >= TELL {
            ui::line(paint(FAINT, format!("  … {} restored of {} so far", self.restored, self.found)));
            self.told = Instant::now();
        }
    }

    fn sum_up(&self, dry_run: bool) {
        let Self { found, restored, .. } = self;
        if dry_run {
            ui::line(format!("  Cold storage has {found} of them; nothing was restored."));
            return;
        }
        let present = found.saturating_sub(*restored);
        ui::line(paint(GOOD, format!("  {restored} rows restored; {present} were there already.")));
        if *restored > 0 {
            let advice =
                "  The archiver expires them again with their day: see Restoring in docs/archive.md.";
            ui::line(paint(FAINT, advice));
        }
    }
}

/// A row as the database takes it, and about how large it is.
fn row(record: &Record) -> (serde_json::Value, usize) {
    let mut size = 0;
    let mut measured = |text: &str| {
        size += text.len();
        json!(text)
    };
    let values = record.values.iter().map(|value| match value {
        Value::Null => json!(null),
        Value::Uuid(uuid) => json!(uuid),
        Value::Timestamp(at) => json!(at),
        Value::Int(number) => json!(number),
        Value::Long(number) => json!(number),
        Value::Bool(truth) => json!(truth),
        Value::Text(text) | Value::Json(text) => measured(text),
        Value::Bytes(bytes) => measured(&BASE64_STANDARD.encode(bytes)),
    });
    let row = record.columns.iter().cloned().zip(values).collect();
    (row, size)
}
