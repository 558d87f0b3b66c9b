//! Expires the days of the tables that are partitioned by day: each is moved to cold storage, if the configuration says
//! so, and dropped whole.
//!
//! A day is moved in parts. It is dropped only if it has as many rows as its parts have together, counted while nobody can
//! write to it; if some came late, the day is archived afresh.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bus_core::{
    clock::Clock,
    fault,
    launcher::{BoxError, Heartbeat},
    pg::{self, ArchiveLease, ArchivePosition, ArchivedBatch, DayTable},
    streams::Archive,
};
use cold_storage::{
    AUDIT, Batch, ColdStorage, Dataset, EVENTS, Error as ColdError, Kind, Manifest, OCCURRENCES, RECEIPTS,
    Row, Slot, Source, Value,
};
use jiff::{Span, civil::Date, tz::TimeZone};
use metrics::counter;
use sqlx::{Row as _, postgres::PgRow};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    config::{ArchiveConfig, TableRetention},
    error::ArchiveError,
    lease::{LeasedWork, Leases},
};

/// Between two looks for days that have expired.
const LOOK: Duration = Duration::from_secs(60);

/// Rows of one query; of events fewer, since a body may be large.
const PAGE: u32 = 5_000;
const PAGE_OF_EVENTS: u32 = 100;

/// Rows swept in one statement.
const SWEEP: u32 = 5_000;

/// Expires the days of one table.
pub struct TableArchiver {
    /// Which one.
    pub table: DayTable,
    /// How long a day is kept, and what becomes of it.
    pub retention: TableRetention,
    /// Where it goes.
    pub cold: ColdStorage,
    /// Of several archivers one works on the table.
    pub leases: Leases,
    /// How large a part is.
    pub config: ArchiveConfig,
    /// Tells what day it is.
    pub clock: Arc<dyn Clock>,
}

impl TableArchiver {
    pub(crate) async fn run(self, beat: Heartbeat, stop: CancellationToken) -> Result<(), BoxError> {
        self.leases.keep_working(&self, &beat, &stop).await;
        Ok(())
    }
}

#[async_trait]
impl LeasedWork for TableArchiver {
    fn source(&self) -> &str {
        self.table.name()
    }

    async fn begin(&self) -> Result<(), ArchiveError> {
        let resumed = self.cold.resume(self.table.name()).await?;
        if resumed.discarded > 0 || resumed.open > 0 {
            let (discarded, open) = (resumed.discarded, resumed.open);
            info!(table = self.table.name(), discarded, open, "Found unfinished batches");
        }
        Ok(())
    }

    async fn round(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
    ) -> Result<Duration, ArchiveError> {
        self.expire(lease, position).await?;
        Ok(LOOK)
    }
}

impl TableArchiver {
    /// Every day that is past its retention.
    async fn expire(&self, lease: &ArchiveLease, position: &mut ArchivePosition) -> Result<(), ArchiveError> {
        let today = self.clock.now().to_zoned(TimeZone::UTC).date();
        let keep = Span::new().days(i64::from(self.retention.keep_days));
        let Ok(horizon) = today.checked_sub(keep) else { return Ok(()) };
        let pool = &self.leases.pool;
        for day in pg::partition_days(pool, self.table).await? {
            if day >= horizon {
                break;
            }
            let rows = match self.retention.archive {
                Archive::Drop => None,
                Archive::Archive => Some(self.archive_day(lease, position, day).await?),
            };
            fault::point("archiver.before-drop").await;
            self.leases.check(lease).await?;
            if pg::drop_day(pool, self.table, day, rows).await? {
                counter!("bus_partitions_dropped", "table" => self.table.name()).increment(1);
                info!(table = self.table.name(), %day, rows, "Dropped an expired day");
            } else {
                warn!(table = self.table.name(), %day, rows, "Rows came late to an expired day; it is archived afresh");
                self.forget_day(lease, position, day).await?;
            }
        }
        while pg::sweep_strays(pool, self.table, horizon, SWEEP).await? >= u64::from(SWEEP) {}
        Ok(())
    }

    /// Moves a day to cold storage, from where it was left; how many rows it has there.
    async fn archive_day(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        day: Date,
    ) -> Result<u64, ArchiveError> {
        if position.incarnation.as_deref() != Some(&day.to_string()) {
            let to = ArchivePosition { incarnation: Some(day.to_string()), next: 1, after: None };
            self.go_to(lease, position, to).await?;
        } else if let Some(last) = self.cold.last_manifest(self.table.name(), &day.to_string()).await?
            && last.source.next().is_none()
            && last.slot().first + 1 < position.next
        {
            // All of it is there and noted, only not dropped.
            return self.rows_of(day).await;
        }
        loop {
            let slot = Slot {
                source: self.table.name().to_owned(),
                incarnation: day.to_string(),
                first: position.next - 1,
            };
            let manifest = match self.cold.manifest_at(&slot).await? {
                Some(manifest) => manifest,
                None => match self.write(lease, &slot, position.after, day).await? {
                    Some(manifest) => manifest,
                    // A day without rows has no parts.
                    None => return self.rows_of(day).await,
                },
            };
            let after = self.key_after(day, position.after, manifest.rows).await?;
            let at = position.next;
            let batch = ArchivedBatch { first: at, last: at, newest: manifest.created_at };
            if !pg::note_archived(&self.leases.pool, lease, &batch, after).await? {
                return Err(ArchiveError::LeaseLost(lease.source.clone()));
            }
            fault::point("archiver.noted").await;
            (position.next, position.after) = (at + 1, after);
            if manifest.source.next().is_none() {
                return self.rows_of(day).await;
            }
        }
    }
}

impl TableArchiver {
    /// One part: as many rows as make a batch. `None` if there are none.
    async fn write(
        &self,
        lease: &ArchiveLease,
        slot: &Slot,
        after: Option<Uuid>,
        day: Date,
    ) -> Result<Option<Manifest>, ArchiveError> {
        let pool = &self.leases.pool;
        let mut batch = Batch::new();
        let mut after = after;
        let complete = 'gather: loop {
            let page = pg::day_rows(pool, self.table, day, after, self.page()).await?;
            let Some(last) = page.last() else { break true };
            after = Some(last.try_get("key").map_err(|source| self.unfit(source))?);
            for row in &page {
                match batch.push(dataset(self.table), self.values(row)?) {
                    Err(ColdError::BatchFull { .. }) if batch.rows() > 0 => break 'gather false,
                    other => other?,
                }
            }
            if batch.rows() >= self.config.batch_messages || batch.bytes() as u64 >= self.config.batch_bytes {
                break pg::day_rows(pool, self.table, day, after, 1).await?.is_empty();
            }
        };
        if batch.rows() == 0 {
            return Ok(None);
        }
        fault::point("archiver.gathered").await;
        let source = Source::Table { name: slot.source.clone(), day, part: slot.first, complete };
        let written =
            match batch.write(&self.cold, source, &self.leases.writer(lease), self.clock.now()).await {
                Err(ColdError::AlreadyArchived(manifest)) => return Ok(Some(*manifest)),
                other => other?,
            };
        fault::point("archiver.written").await;
        let confirmed = written.confirm(&self.cold).await?;
        fault::point("archiver.confirmed").await;
        let manifest = confirmed.commit(&self.cold).await?;
        fault::point("archiver.committed").await;
        let source = self.table.name();
        counter!("bus_archive_batches", "source" => source).increment(1);
        counter!("bus_archive_rows", "source" => source).increment(manifest.rows);
        counter!("bus_archive_bytes", "source" => source).increment(manifest.bytes());
        info!(source, batch = %manifest.slot(), rows = manifest.rows, complete, "Archived a part of a day");
        Ok(Some(manifest))
    }

    fn page(&self) -> u32 {
        if self.table == DayTable::Events { PAGE_OF_EVENTS } else { PAGE }
    }

    /// The key of the last of so many rows behind `after`: a manifest says how many it has, and not which.
    async fn key_after(
        &self,
        day: Date,
        after: Option<Uuid>,
        mut rows: u64,
    ) -> Result<Option<Uuid>, ArchiveError> {
        let mut after = after;
        while rows > 0 {
            let limit = u32::try_from(rows).unwrap_or(u32::MAX).min(self.page());
            let page = pg::day_rows(&self.leases.pool, self.table, day, after, limit).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.try_get("key").map_err(|source| self.unfit(source))?);
            rows = rows.saturating_sub(page.len() as u64);
        }
        Ok(after)
    }

    /// How many rows of a day are in cold storage.
    async fn rows_of(&self, day: Date) -> Result<u64, ArchiveError> {
        Ok(self.cold.rows_in(self.table.name(), &day.to_string()).await?)
    }

    async fn forget_day(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        day: Date,
    ) -> Result<(), ArchiveError> {
        self.leases.check(lease).await?;
        self.cold.retract(self.table.name(), &day.to_string()).await?;
        self.go_to(lease, position, ArchivePosition { incarnation: None, next: 1, after: None }).await
    }

    async fn go_to(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        to: ArchivePosition,
    ) -> Result<(), ArchiveError> {
        if !pg::restart_archive_source(&self.leases.pool, lease, &to).await? {
            return Err(ArchiveError::LeaseLost(lease.source.clone()));
        }
        *position = to;
        Ok(())
    }

    fn unfit(&self, source: sqlx::Error) -> ArchiveError {
        ArchiveError::Row { table: self.table.name(), source }
    }

    /// A row as cold storage has it: the query gives the columns in its order.
    fn values(&self, row: &PgRow) -> Result<Row, ArchiveError> {
        let columns = dataset(self.table).columns.iter().enumerate();
        columns
            .map(|(at, column)| value(row, at, column.kind))
            .collect::<Result<_, _>>()
            .map_err(|error| self.unfit(error))
    }
}

fn dataset(table: DayTable) -> &'static Dataset {
    match table {
        DayTable::Events => &EVENTS,
        DayTable::DeliveryAttempts => &RECEIPTS,
        DayTable::Occurrences => &OCCURRENCES,
        DayTable::AuditRecords => &AUDIT,
    }
}

fn value(row: &PgRow, at: usize, kind: Kind) -> Result<Value, sqlx::Error> {
    let value = match kind {
        Kind::Uuid => row.try_get::<Option<Uuid>, _>(at)?.map(Value::Uuid),
        Kind::Timestamp => {
            row.try_get::<Option<jiff_sqlx::Timestamp>, _>(at)?.map(|time| Value::Timestamp(time.to_jiff()))
        }
        Kind::Int => row.try_get::<Option<i32>, _>(at)?.map(Value::Int),
        Kind::Long => row.try_get::<Option<i64>, _>(at)?.map(Value::Long),
        Kind::Bool => row.try_get::<Option<bool>, _>(at)?.map(Value::Bool),
        Kind::Text => row.try_get::<Option<String>, _>(at)?.map(Value::Text),
        Kind::Json => row.try_get::<Option<String>, _>(at)?.map(Value::Json),
        Kind::Bytes => row.try_get::<Option<Vec<u8>>, _>(at)?.map(|bytes| Value::Bytes(bytes.into())),
    };
    Ok(value.unwrap_or(Value::Null))
}
