//! Moves streams to cold storage: a batch is gathered, written, read back, committed and noted, and only then, when it
//! is old enough, trimmed from the stream (invariant I8).
//!
//! Whoever dies between two of these steps leaves the stream as it was. What the next one finds in cold storage it takes
//! for done, so that no range is archived twice and none is left out.

mod read;
mod rows;
mod trim;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bus_core::{
    clock::Clock,
    fault,
    launcher::{BoxError, Heartbeat},
    nats::Nats,
    pg::{self, ArchiveLease, ArchivePosition, ArchivedBatch},
    streams::Described,
};
use cold_storage::{ColdStorage, Error as ColdError, Manifest, Slot, Source};
use jiff::SignedDuration;
use metrics::{counter, gauge};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::read::StreamState;
pub(crate) use self::read::passing_reader;
use crate::{
    cold::resume,
    config::ArchiveConfig,
    error::{ArchiveError, During as _},
    lease::{LeasedWork, Leases},
};

/// Between two looks at a stream of which nothing is due.
const LOOK: Duration = Duration::from_secs(1);

/// How long the broker may take to be there before the lease is given back.
const REACHED: Duration = Duration::from_secs(10);

/// Moves one stream.
pub(crate) struct StreamArchiver {
    pub(crate) nats: Nats,
    pub(crate) cold: ColdStorage,
    pub(crate) leases: Leases,
    pub(crate) stream: Described,
    pub(crate) config: ArchiveConfig,
    pub(crate) clock: Arc<dyn Clock>,
}

impl StreamArchiver {
    pub(crate) async fn run(self, beat: Heartbeat, stop: CancellationToken) -> Result<(), BoxError> {
        self.leases.keep_working(&self, &beat, &stop).await;
        Ok(())
    }

    fn name(&self) -> &str {
        &self.stream.config.name
    }
}

#[async_trait]
impl LeasedWork for StreamArchiver {
    fn source(&self) -> &str {
        self.name()
    }

    async fn begin(&self) -> Result<(), ArchiveError> {
        const OPERATION: &str = "create the archived streams";
        // Not for as long as it takes: another archiver may reach the broker.
        tokio::time::timeout(REACHED, self.nats.prepare_archived())
            .await
            .during(OPERATION)?
            .during(OPERATION)?;
        resume(&self.cold, self.name()).await
    }

    async fn round(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
    ) -> Result<Duration, ArchiveError> {
        let state = self.state().await?;
        self.report(&state);
        self.follow(lease, position, &state).await?;
        let due = self.is_due(position, &state).await?;
        if due {
            self.archive(lease, position, &state).await?;
        }
        self.trim(lease, position, &state).await?;
        Ok(if due { Duration::ZERO } else { LOOK })
    }
}

impl StreamArchiver {
    /// Makes sure that the position is one in this stream: not in one of the same name that was deleted, nor in a future
    /// that the broker has forgotten.
    async fn follow(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        state: &StreamState,
    ) -> Result<(), ArchiveError> {
        let known = position.incarnation.as_deref();
        let same = known.is_some_and(|known| known.split("-r").next() == Some(&state.created));
        let rewound = same && self.is_rewound(position, state).await?;
        if same && !rewound {
            return Ok(());
        }
        let incarnation = match known {
            // Its numbers are given out a second time.
            Some(known) if rewound => {
                error!(
                    source = self.name(),
                    archived = position.next - 1,
                    last = state.last,
                    "The broker has lost messages that are archived"
                );
                counter!("bus_archive_rewinds", "source" => self.name().to_owned()).increment(1);
                later(known)
            }
            _ => state.created.clone(),
        };
        let next = match position.last_at.filter(|_| rewound) {
            // What came before is in cold storage, under numbers of the incarnation before.
            Some(archived) => self.first_after(archived).await?.unwrap_or(state.last + 1),
            // The database may have lost its account where cold storage has not.
            None => {
                let archived = self.cold.last_manifest(self.name(), &incarnation).await?;
                archived.and_then(|manifest| manifest.source.next()).unwrap_or(state.first)
            }
        };
        // By which the next rewind will be told.
        let last_at = if next > state.first { self.time_of(next - 1).await? } else { None };
        let to = ArchivePosition { incarnation: Some(incarnation), next, after: None, last_at };
        if !pg::restart_archive_source(&self.leases.pool, lease, &to).await? {
            return Err(ArchiveError::LeaseLost(lease.source.clone()));
        }
        info!(source = self.name(), incarnation = to.incarnation, next, "Begins to archive a stream");
        *position = to;
        Ok(())
    }

    /// Whether the broker has gone back to an earlier state: it has not yet come to the position again, or has put
    /// another message where the last archived one was.
    async fn is_rewound(
        &self,
        position: &ArchivePosition,
        state: &StreamState,
    ) -> Result<bool, ArchiveError> {
        if position.next > state.last + 1 {
            return Ok(true);
        }
        let Some(archived) = position.last_at.filter(|_| position.next > state.first) else {
            return Ok(false);
        };
        let there = self.time_of(position.next - 1).await?;
        // The database keeps microseconds.
        Ok(there.is_some_and(|there| there.duration_since(archived).abs() > SignedDuration::from_micros(1)))
    }

    /// Whether enough has gathered, or has waited long enough.
    async fn is_due(&self, position: &ArchivePosition, state: &StreamState) -> Result<bool, ArchiveError> {
        let waiting = (state.last + 1).saturating_sub(position.next);
        gauge!("bus_archive_waiting", "source" => self.name().to_owned()).set(waiting as f64);
        let behind = gauge!("bus_archive_behind_seconds", "source" => self.name().to_owned());
        if waiting == 0 {
            behind.set(0);
            return Ok(false);
        }
        // What was deleted under us is of no age; the batch that says so is due.
        let since = self.time_of(position.next).await?;
        let age =
            since.map(|since| Duration::try_from(self.clock.now().duration_since(since)).unwrap_or_default());
        behind.set(age.unwrap_or_default().as_secs_f64());
        let bytes = state.bytes / state.messages.max(1) * waiting;
        Ok(age.is_none_or(|age| age >= Duration::from_secs(self.config.batch_age_s))
            || waiting >= self.config.batch_messages
            || bytes >= self.config.batch_bytes)
    }

    /// One batch, from the position on.
    async fn archive(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
        state: &StreamState,
    ) -> Result<(), ArchiveError> {
        let incarnation = position.incarnation.clone().unwrap_or_default();
        let slot = Slot { source: self.name().to_owned(), incarnation, first: position.next };
        let manifest = match self.cold.manifest_at(&slot).await? {
            Some(manifest) => self.repeated(manifest),
            None => self.write(lease, &slot, state).await?,
        };
        let Some(next) = manifest.source.next() else {
            return Err(ArchiveError::Vanished { source_name: slot.source, first: slot.first });
        };
        let newest = self.time_of(next - 1).await?.unwrap_or(manifest.created_at);
        let batch = ArchivedBatch { first: slot.first, last: next - 1, newest };
        if !pg::note_archived(&self.leases.pool, lease, &batch, None).await? {
            return Err(ArchiveError::LeaseLost(lease.source.clone()));
        }
        fault::point("archiver.noted").await;
        (position.next, position.last_at) = (next, Some(newest));
        Ok(())
    }

    /// Somebody committed this batch and died before it was noted.
    fn repeated(&self, manifest: Manifest) -> Manifest {
        info!(source = self.name(), batch = %manifest.slot(), writer = manifest.writer, "This batch is archived already");
        counter!("bus_archive_repeats", "source" => self.name().to_owned()).increment(1);
        manifest
    }

    async fn write(
        &self,
        lease: &ArchiveLease,
        slot: &Slot,
        state: &StreamState,
    ) -> Result<Manifest, ArchiveError> {
        let range = self.read(slot.first, state.last).await?;
        let (batch, last) = rows::batch(&range, &self.nats.names)?;
        let messages = range.messages.iter().filter(|message| message.sequence <= last).count() as u64;
        let missing = last + 1 - slot.first - messages;
        if missing > 0 {
            error!(
                source = self.name(),
                missing,
                first = slot.first,
                last,
                "Messages were gone before they were archived"
            );
            counter!("bus_archive_missing_messages", "source" => self.name().to_owned()).increment(missing);
        }
        fault::point("archiver.gathered").await;
        let source = Source::Stream {
            name: slot.source.clone(),
            incarnation: slot.incarnation.clone(),
            first: slot.first,
            last,
            messages,
        };
        let written =
            match batch.write(&self.cold, source, &self.leases.writer(lease), self.clock.now()).await {
                Err(ColdError::AlreadyArchived(manifest)) => return Ok(self.repeated(*manifest)),
                other => other?,
            };
        fault::point("archiver.written").await;
        let confirmed = written.confirm(&self.cold).await?;
        fault::point("archiver.confirmed").await;
        let manifest = confirmed.commit(&self.cold).await?;
        fault::point("archiver.committed").await;
        let bytes = manifest.bytes();
        let source = self.name().to_owned();
        counter!("bus_archive_batches", "source" => source.clone()).increment(1);
        counter!("bus_archive_rows", "source" => source.clone()).increment(manifest.rows);
        counter!("bus_archive_bytes", "source" => source).increment(bytes);
        info!(source = self.name(), batch = %manifest.slot(), last, rows = manifest.rows, bytes, "Archived a batch");
        Ok(manifest)
    }
}

/// The name of a stream that counts its messages anew, though it was not created anew: `created`, `created-r1`, …
fn later(incarnation: &str) -> String {
    let (created, rewinds) = incarnation.split_once("-r").unwrap_or((incarnation, "0"));
    format!("{created}-r{}", rewinds.parse::<u64>().unwrap_or(0) + 1)
}
