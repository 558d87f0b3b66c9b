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
    pg::{self, ArchiveLease, ArchivePosition, ArchivedBatch, DayTable, DropDay},
    streams::Archive,
};
use cold_storage::{
    AUDIT, Batch, ColdStorage, Dataset, EVENTS, Error as ColdError, Kind, MAX_BATCH_OBJECTS, Manifest,
    OCCURRENCES, RECEIPTS, Row, Slot, Source, Value,
};
use jiff::{Span, civil::Date};
use metrics::{counter, gauge};
use sqlx::{Row as _, postgres::PgRow};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    cold::{resume, today},
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

/// Rows outside of their day are counted up to this.
const STRAYS: u32 = 100_000;

/// What becomes a part of a day.
struct Part {
    batch: Batch,
    /// The key of its last row.
    last: Uuid,
    /// Whether nothing comes behind it.
    complete: bool,
}

/// Expires the days of one table.
pub struct TableArchiver {
    /// Which one.
    pub table: DayTable,
    /// How long a day is kept, and what becomes of it.
    pub retention: TableRetention,
    /// The stream that brings the same to cold storage, if there is one.
    pub by_stream: Option<String>,
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
        resume(&self.cold, self.table.name()).await
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
        let pool = &self.leases.pool;
        let keep = Span::new().days(i64::from(self.retention.keep_days));
        let today = today(self.clock.as_ref(), pool).await?;
        let Ok(horizon) = today.checked_sub(keep) else { return Ok(()) };
        let days = pg::partition_days(pool, self.table).await?;
        if let Some((day, attempt)) = position.incarnation.as_deref().and_then(attempt_of)
            && day >= horizon
            && days.contains(&day)
        {
            // Days are kept longer than when it was begun; whoever waits for it to be gone would wait for long.
            self.retract(lease, day, attempt).await?;
            self.go_to(lease, position, None).await?;
        }
        for day in days.into_iter().take_while(|day| *day < horizon) {
            self.expire_day(lease, position, day).await?;
        }
        self.look_after_strays(horizon).await
    }

    async fn expire_day(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        day: Date,
    ) -> Result<(), ArchiveError> {
        let pool = &self.leases.pool;
        let rows = if self.retention.archive == Archive::Archive && !self.came_by_stream(day).await? {
            Some(self.archive_day(lease, position, day).await?)
        } else {
            None
        };
        let relayed = self.table == DayTable::AuditRecords && self.by_stream.is_some();
        if rows.is_none() && relayed && pg::unrelayed_records(pool, day).await? > 0 {
            warn!(%day, "Audit records wait for their stream; their day stays");
            return Ok(());
        }
        fault::point("archiver.before-drop").await;
        self.leases.check(lease).await?;
        let table = self.table.name();
        match (pg::drop_day(pool, self.table, day, rows).await?, rows) {
            (DropDay::Dropped, _) => {
                counter!("bus_partitions_dropped", "table" => table).increment(1);
                info!(table, %day, rows, "Dropped an expired day");
            }
            (DropDay::Has(found), Some(archived)) if found > archived => {
                warn!(table, %day, found, archived, "Rows came late to an expired day; it is archived afresh");
                let attempt =
                    position.incarnation.as_deref().and_then(attempt_of).map_or(0, |(_, attempt)| attempt);
                self.forget_day(lease, position, day, attempt).await?;
            }
            (DropDay::Has(found), archived) => {
                // Somebody removed rows, or put the database back. What cold storage has is the better copy.
                counter!("bus_archive_failures", "source" => table).increment(1);
                warn!(table, %day, found, archived, "Cold storage has more of an expired day than the database; the day stays");
            }
        }
        Ok(())
    }

    /// Whether the rows of a day went to cold storage by the audit stream: there was one when the day began.
    async fn came_by_stream(&self, day: Date) -> Result<bool, ArchiveError> {
        let Some(stream) = &self.by_stream else { return Ok(false) };
        let position = pg::archive_position(&self.leases.pool, stream).await?;
        let created = position.and_then(|position| position.incarnation);
        let created = created.and_then(|created| Date::strptime("%Y%m%d", created.get(..8)?).ok());
        Ok(created.is_some_and(|created| created <= day))
    }

    /// Rows of days that are gone, which came late or were restored. They are deleted only if nobody wants them in cold
    /// storage; audit records never, whose table the archiver may not delete from.
    async fn look_after_strays(&self, horizon: Date) -> Result<(), ArchiveError> {
        let pool = &self.leases.pool;
        if self.retention.archive == Archive::Drop && self.table != DayTable::AuditRecords {
            while pg::sweep_strays(pool, self.table, horizon, SWEEP).await? >= u64::from(SWEEP) {}
        }
        let strays = pg::strays(pool, self.table, horizon, STRAYS).await?;
        gauge!("bus_stray_rows", "table" => self.table.name()).set(strays as f64);
        Ok(())
    }

    /// Moves a day to cold storage, from where it was left; how many rows it has there.
    async fn archive_day(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        day: Date,
    ) -> Result<u64, ArchiveError> {
        let table = self.table.name();
        let attempt = match position.incarnation.as_deref().and_then(attempt_of) {
            Some((at, attempt)) if at == day => attempt,
            _ => {
                let attempt = self.latest_attempt(day).await?;
                self.go_to(lease, position, Some((day, attempt))).await?;
                attempt
            }
        };
        let incarnation = Source::day_incarnation(day, attempt);
        if let Some(last) = self.cold.last_manifest(table, &incarnation).await?
            && last.source.next().is_none()
            && last.slot().first + 1 < position.next
        {
            // All of it is there and noted, only not dropped.
            return Ok(self.cold.rows_in(table, &incarnation).await?);
        }
        loop {
            let slot =
                Slot { source: table.to_owned(), incarnation: incarnation.clone(), first: position.next - 1 };
            let manifest = match self.cold.manifest_at(&slot).await? {
                Some(manifest) => manifest,
                None => match self.write(lease, &slot, position.after, day, attempt).await? {
                    Some(manifest) => manifest,
                    // A day without rows has no parts.
                    None => break,
                },
            };
            let after = match &manifest.source {
                Source::Table { last, .. } => Some(*last),
                Source::Stream { .. } => None,
            };
            let at = position.next;
            let batch = ArchivedBatch { first: at, last: at, newest: manifest.created_at };
            if !pg::note_archived(&self.leases.pool, lease, &batch, after).await? {
                return Err(ArchiveError::LeaseLost(lease.source.clone()));
            }
            fault::point("archiver.noted").await;
            (position.next, position.after) = (at + 1, after);
            if manifest.source.next().is_none() {
                break;
            }
        }
        Ok(self.cold.rows_in(table, &incarnation).await?)
    }

    /// Where a day was left, if the database has lost its account of it.
    async fn latest_attempt(&self, day: Date) -> Result<u32, ArchiveError> {
        let mut attempt = 0;
        while self
            .cold
            .last_manifest(self.table.name(), &Source::day_incarnation(day, attempt + 1))
            .await?
            .is_some()
        {
            attempt += 1;
        }
        Ok(attempt)
    }
}

/// The day and the attempt of an incarnation.
pub(crate) fn attempt_of(incarnation: &str) -> Option<(Date, u32)> {
    let (day, attempt) = incarnation.split_once("-r").unwrap_or((incarnation, "0"));
    Some((day.parse().ok()?, attempt.parse().ok()?))
}

impl TableArchiver {
    /// One part: as many rows as make a batch. `None` if there are none.
    async fn write(
        &self,
        lease: &ArchiveLease,
        slot: &Slot,
        after: Option<Uuid>,
        day: Date,
        attempt: u32,
    ) -> Result<Option<Manifest>, ArchiveError> {
        let Some(part) = self.gather(day, after).await? else { return Ok(None) };
        fault::point("archiver.gathered").await;
        let Part { batch, last, complete } = part;
        let source =
            Source::Table { name: slot.source.clone(), day, attempt, part: slot.first, last, complete };
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

    /// The rows behind `after`, as many as make a batch. It ends between two keys, so that the next part can begin there.
    async fn gather(&self, day: Date, after: Option<Uuid>) -> Result<Option<Part>, ArchiveError> {
        let pool = &self.leases.pool;
        let mut batch = Batch::new();
        let mut last = None;
        loop {
            let page = pg::day_rows(pool, self.table, day, last.or(after), self.page()).await?;
            if page.is_empty() {
                return Ok(last.map(|last| Part { batch, last, complete: true }));
            }
            for row in &page {
                let key: Uuid = row.try_get("key").map_err(|source| self.unfit(source))?;
                if let Some(last) = last.filter(|last| *last != key)
                    && self.is_full(&batch)
                {
                    return Ok(Some(Part { batch, last, complete: false }));
                }
                batch.push(dataset(self.table), self.values(row)?)?;
                last = Some(key);
            }
        }
    }

    fn is_full(&self, batch: &Batch) -> bool {
        batch.rows() >= self.config.batch_messages
            || batch.bytes() as u64 >= self.config.batch_bytes
            // One event's rows may be of two days.
            || batch.objects() + 2 > MAX_BATCH_OBJECTS
    }

    fn page(&self) -> u32 {
        if self.table == DayTable::Events { PAGE_OF_EVENTS } else { PAGE }
    }

    /// Takes a day out of the archive again. It begins anew under another incarnation: an archiver that still believes in
    /// this one commits into what nobody counts.
    async fn forget_day(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        day: Date,
        attempt: u32,
    ) -> Result<(), ArchiveError> {
        self.retract(lease, day, attempt).await?;
        self.go_to(lease, position, Some((day, attempt + 1))).await
    }

    async fn retract(&self, lease: &ArchiveLease, day: Date, attempt: u32) -> Result<(), ArchiveError> {
        self.leases.check(lease).await?;
        Ok(self.cold.retract(self.table.name(), &Source::day_incarnation(day, attempt)).await?)
    }

    async fn go_to(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        attempt: Option<(Date, u32)>,
    ) -> Result<(), ArchiveError> {
        let incarnation = attempt.map(|(day, attempt)| Source::day_incarnation(day, attempt));
        let to = ArchivePosition { incarnation, next: 1, ..ArchivePosition::default() };
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
