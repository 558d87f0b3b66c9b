//! Removes from a stream what is in cold storage, and old enough (invariant I8).

use std::time::Duration;

use bus_core::{
    fault,
    pg::{self, ArchiveLease, ArchivePosition, ArchivedBatch},
    streams::AUDIT,
};
use cold_storage::Slot;
use jiff::SignedDuration;
use metrics::{counter, gauge};
use tracing::info;

use super::{StreamArchiver, read::StreamState};
use crate::error::{ArchiveError, During as _};

/// Batches that are looked at in one round.
const BATCHES: u32 = 100;

/// A stream that is fuller than this loses what is archived before its time: sooner that than to refuse what is new.
const FULL: f64 = 0.8;

impl StreamArchiver {
    /// Gauges of how full the stream is; a full one refuses what comes.
    pub(super) fn report(&self, state: &StreamState) {
        let name = || self.stream.config.name.clone();
        gauge!("bus_stream_bytes", "stream" => name()).set(state.bytes as f64);
        gauge!("bus_stream_limit_bytes", "stream" => name()).set(state.limit.unwrap_or(0) as f64);
    }

    pub(super) async fn trim(
        &self,
        lease: &ArchiveLease,
        position: &ArchivePosition,
        state: &StreamState,
    ) -> Result<(), ArchiveError> {
        let name = &self.stream.config.name;
        let full = state.limit.is_some_and(|limit| state.bytes as f64 > limit as f64 * FULL);
        if self.stream.keep == Duration::ZERO && !full {
            return Ok(());
        }
        let keep = SignedDuration::try_from(self.stream.keep).unwrap_or(SignedDuration::MAX);
        let horizon = self.clock.now().saturating_sub(keep).unwrap_or(jiff::Timestamp::MIN);
        let batches = pg::archived_batches(&self.leases.pool, name, BATCHES).await?;
        let expired: Vec<_> = batches.iter().take_while(|batch| full || batch.newest <= horizon).collect();
        let Some(last) = expired.last() else { return Ok(()) };
        // History reads the same stream, at its own pace.
        let upto = match self.unread_by_history().await? {
            Some(unread) => unread.min(last.last + 1),
            None => last.last + 1,
        };
        if expired.first().is_none_or(|first| upto <= first.first) {
            return Ok(());
        }
        let trimmed = if upto > state.first { self.purge(lease, position, &expired, upto).await? } else { 0 };
        if !pg::note_trimmed(&self.leases.pool, lease, upto).await? {
            return Err(ArchiveError::LeaseLost(lease.source.clone()));
        }
        if trimmed > 0 {
            counter!("bus_archive_trimmed_messages", "source" => name.clone()).increment(trimmed);
            info!(source = name, upto = upto - 1, messages = trimmed, "Trimmed what is in cold storage");
        }
        Ok(())
    }

    /// Removes everything before `upto`, if cold storage still has it.
    async fn purge(
        &self,
        lease: &ArchiveLease,
        position: &ArchivePosition,
        expired: &[&ArchivedBatch],
        upto: u64,
    ) -> Result<u64, ArchiveError> {
        let name = &self.stream.config.name;
        for batch in expired {
            let incarnation = position.incarnation.clone().unwrap_or_default();
            let slot = Slot { source: name.clone(), incarnation, first: batch.first };
            if self.cold.manifest_at(&slot).await?.is_none() {
                return Err(ArchiveError::Vanished { source_name: slot.source, first: slot.first });
            }
        }
        fault::point("archiver.before-trim").await;
        self.leases.check(lease).await?;
        let stream = self.nats.jetstream.get_stream_no_info(name).await.during("look up a stream")?;
        let purged = stream.purge().sequence(upto).await.during("trim a stream")?;
        fault::point("archiver.trimmed").await;
        Ok(purged.purged)
    }

    /// The first message that history has not taken yet, if there is any.
    async fn unread_by_history(&self) -> Result<Option<u64>, ArchiveError> {
        if self.stream.name != AUDIT {
            return Ok(None);
        }
        let consumer = self.nats.receipt_consumer().await.during("look up history's consumer")?;
        let info = consumer.get_info().await.during("ask how far history is")?;
        let unread = info.num_pending > 0 || info.num_ack_pending > 0;
        Ok(unread.then_some(info.ack_floor.stream_sequence + 1))
    }
}
