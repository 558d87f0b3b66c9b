//! Everything that is done with cold storage: one loop for each stream and each table that is moved there, and one for
//! what is erased and expires in it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bus_core::{
    clock::Clock,
    ids::Ids,
    launcher::{BoxError, Ctx, Heartbeat},
    nats::Nats,
    pg::{self, ArchiveLease, ArchivePosition, DayTable, StoreError},
    streams::{AUDIT, Archive, Described},
    telemetry::Chain,
};
use cold_storage::{ColdStorage, Resumed};
use futures::{
    FutureExt as _,
    future::{BoxFuture, try_join_all},
};
use jiff::{Span, civil::Date, tz::TimeZone};
use metrics::counter;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::{ArchiverConfig, TableRetention},
    erasures::Erasures,
    error::ArchiveError,
    lease::{LeasedWork, Leases},
    streams::StreamArchiver,
    tables::TableArchiver,
};

/// Between two tries to open cold storage.
const AGAIN: Duration = Duration::from_secs(10);

/// How long a loop may be without a sign of life: it pauses after errors, and big objects take their time.
const ALIVE: Duration = Duration::from_secs(600);

/// Between two looks for what has expired in cold storage.
const EXPIRY: Duration = Duration::from_secs(3_600);

/// All loops that need cold storage. They begin when it can be opened: until then nothing expires, and all else goes on.
pub(crate) struct ColdLoops {
    config: ArchiverConfig,
    streams: Vec<(Described, Heartbeat)>,
    tables: Vec<(DayTable, TableRetention, Heartbeat)>,
    /// The audit stream, if it is archived.
    audit: Option<String>,
    nats: Option<Nats>,
    leases: Leases,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn Ids>,
    /// Of the loop that changes what is there.
    upkeep: Heartbeat,
    stop: CancellationToken,
}

impl ColdLoops {
    pub(crate) fn new(ctx: &Ctx<ArchiverConfig>, pool: PgPool, nats: Option<Nats>) -> Self {
        let beat = |name: &str| ctx.health.heartbeat(format!("archive {name}"), ALIVE);
        let archived = nats.iter().flat_map(|nats| nats.streams.iter());
        let streams: Vec<_> = archived
            .filter(|stream| stream.archive == Archive::Archive)
            .map(|stream| (stream.clone(), beat(&stream.name)))
            .collect();
        let audit = streams.iter().find(|(stream, _)| stream.name == AUDIT);
        let audit = audit.map(|(stream, _)| stream.config.name.clone());
        let tables = DayTable::ALL
            .into_iter()
            .map(|table| {
                let retention = ctx.config.retention.of(table);
                (table, retention, beat(table.name()))
            })
            .filter(|(_, retention, _)| retention.keep_days > 0)
            .collect();
        let holder = ctx.ids.next().simple().to_string();
        Self {
            streams,
            tables,
            audit,
            nats,
            leases: Leases { pool, holder: holder[20..].to_owned(), seconds: ctx.config.archive.lease_s },
            clock: Arc::clone(&ctx.clock),
            ids: Arc::clone(&ctx.ids),
            upkeep: beat("upkeep"),
            stop: ctx.stop.clone(),
            config: ctx.config.clone(),
        }
    }

    pub(crate) async fn run(self) -> Result<(), BoxError> {
        let Some(cold) = self.open().await else { return Ok(()) };
        let events_archived = self
            .tables
            .iter()
            .any(|(table, retention, _)| *table == DayTable::Events && retention.archive == Archive::Archive);
        let mut loops: Vec<BoxFuture<'_, Result<(), BoxError>>> = Vec::new();
        for (stream, beat) in self.streams {
            let Some(nats) = self.nats.clone() else { continue };
            let archiver = StreamArchiver {
                nats,
                cold: cold.clone(),
                leases: self.leases.clone(),
                stream,
                config: self.config.archive.clone(),
                clock: Arc::clone(&self.clock),
            };
            loops.push(archiver.run(beat, self.stop.clone()).boxed());
        }
        for (table, retention, beat) in self.tables {
            let from_stream = matches!(table, DayTable::DeliveryAttempts | DayTable::AuditRecords);
            let archiver = TableArchiver {
                table,
                retention,
                by_stream: self.audit.clone().filter(|_| from_stream),
                cold: cold.clone(),
                leases: self.leases.clone(),
                config: self.config.archive.clone(),
                clock: Arc::clone(&self.clock),
            };
            loops.push(archiver.run(beat, self.stop.clone()).boxed());
        }
        let days = self.config.retention.cold.keep_days;
        let expiry = (days > 0).then(|| Expiry {
            cold: cold.clone(),
            leases: self.leases.clone(),
            days,
            clock: Arc::clone(&self.clock),
        });
        let erasures = Erasures {
            cold,
            leases: self.leases,
            nats: self.nats,
            events_archived,
            clock: self.clock,
            ids: self.ids,
        };
        let upkeep = Upkeep { expiry, erasures, expired: Mutex::default() };
        loops.push(upkeep.run(self.upkeep, self.stop.clone()).boxed());
        try_join_all(loops).await?;
        Ok(())
    }

    /// `None` if the process was told to stop before it could be opened.
    async fn open(&self) -> Option<ColdStorage> {
        loop {
            match probe(&self.config.cold, &self.leases.holder).await {
                Ok(cold) => return Some(cold),
                Err(failed) => {
                    counter!("bus_archive_failures", "source" => "cold").increment(1);
                    warn!(error = %Chain(&failed), "Cold storage cannot be used yet, and nothing is archived");
                }
            }
            let beats =
                self.streams.iter().map(|(_, beat)| beat).chain(self.tables.iter().map(|(_, _, beat)| beat));
            beats.chain([&self.upkeep]).for_each(Heartbeat::beat);
            self.stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await?;
        }
    }
}

async fn probe(config: &cold_storage::Config, holder: &str) -> Result<ColdStorage, cold_storage::Error> {
    let cold = ColdStorage::open(config)?;
    cold.probe(holder).await?;
    Ok(cold)
}

/// What has expired is counted from this day, by the earlier of two clocks: nothing goes because one of them is wrong.
pub(crate) async fn today(clock: &dyn Clock, pool: &PgPool) -> Result<Date, StoreError> {
    Ok(clock.now().min(pg::database_time(pool).await?).to_zoned(TimeZone::UTC).date())
}

/// Looks at what was begun for a source and not finished: what a new holder does first.
pub(crate) async fn resume(cold: &ColdStorage, source: &str) -> Result<(), ArchiveError> {
    let Resumed { discarded, open, .. } = cold.resume(source).await?;
    if discarded > 0 || open > 0 {
        info!(source, discarded, open, "Found unfinished batches");
    }
    Ok(())
}

/// Deletes what has expired in cold storage.
pub struct Expiry {
    /// Where.
    pub cold: ColdStorage,
    /// Of several archivers one does it.
    pub leases: Leases,
    /// What is older goes.
    pub days: u32,
    /// Tells what day it is.
    pub clock: Arc<dyn Clock>,
}

/// What is done to cold storage itself. One after the other and under one lease, since both change what is there.
struct Upkeep {
    /// If anything expires.
    expiry: Option<Expiry>,
    erasures: Erasures,
    /// When it was last looked for what has expired.
    expired: Mutex<Option<Instant>>,
}

/// What the lease of all that changes cold storage is about.
pub(crate) const COLD: &str = "cold";

impl Upkeep {
    async fn run(self, beat: Heartbeat, stop: CancellationToken) -> Result<(), BoxError> {
        self.erasures.leases.keep_working(&self, &beat, &stop).await;
        Ok(())
    }

    /// When it was last looked for what has expired.
    fn expired(&self) -> MutexGuard<'_, Option<Instant>> {
        self.expired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl LeasedWork for Upkeep {
    fn source(&self) -> &str {
        COLD
    }

    async fn begin(&self) -> Result<(), ArchiveError> {
        Ok(())
    }

    async fn round(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
    ) -> Result<Duration, ArchiveError> {
        if let Some(expiry) = &self.expiry
            && self.expired().is_none_or(|at| at.elapsed() >= EXPIRY)
        {
            expiry.round(lease, position).await?;
            *self.expired() = Some(Instant::now());
        }
        self.erasures.round(lease, position).await
    }
}

#[async_trait]
impl LeasedWork for Expiry {
    fn source(&self) -> &str {
        COLD
    }

    async fn begin(&self) -> Result<(), ArchiveError> {
        Ok(())
    }

    async fn round(&self, _: &ArchiveLease, _: &mut ArchivePosition) -> Result<Duration, ArchiveError> {
        let today = today(self.clock.as_ref(), &self.leases.pool).await?;
        if let Ok(before) = today.checked_sub(Span::new().days(i64::from(self.days))) {
            let expired = self.cold.expire(before).await?;
            if expired.batches > 0 {
                counter!("bus_archive_expired_batches").increment(expired.batches);
                info!(%before, batches = expired.batches, objects = expired.objects, "Expired in cold storage");
            }
        }
        Ok(EXPIRY)
    }
}
