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
const FULL_PERCENT: u128 = 80;

impl StreamArchiver {
    /// Gauges of how full the stream is; a full one refuses what comes.
    pub(super) fn report(&self, state: &StreamState) {
        let name = || self.stream.config.name.clone();
        gauge!("bus_stream_bytes", "stream" => name()).set(state.bytes as f64);
        if let Some(limit) = state.limit {
            gauge!("bus_stream_limit_bytes", "stream" => name()).set(limit as f64);
        }
        if let Some(most) = state.most_messages {
            gauge!("bus_stream_messages", "stream" => name()).set(state.messages as f64);
            gauge!("bus_stream_limit_messages", "stream" => name()).set(most as f64);
        }
    }

    pub(super) async fn trim(
        &self,
        lease: &ArchiveLease,
        position: &ArchivePosition,
        state: &StreamState,
    ) -> Result<(), ArchiveError> {
        let name = &self.stream.config.name;
        let surplus = surplus(state);
        if self.stream.keep == Duration::ZERO && surplus == 0 {
            return Ok(());
        }
        let keep = SignedDuration::try_from(self.stream.keep).unwrap_or(SignedDuration::MAX);
        let horizon = self.clock.now().saturating_sub(keep).unwrap_or(jiff::Timestamp::MIN);
        let batches = pg::archived_batches(&self.leases.pool, name, BATCHES).await?;
        // Of a full stream only as much as makes it less so.
        let enough = state.first.saturating_add(surplus);
        let expired: Vec<_> =
            batches.iter().take_while(|batch| batch.newest <= horizon || batch.first < enough).collect();
        let Some(last) = expired.last() else { return Ok(()) };
        // History reads the same stream, at its own pace.
        let upto = match self.unread_by_history().await? {
            Some(unread) => unread.min(last.last + 1),
            None => last.last + 1,
        };
        if expired.first().is_none_or(|first| upto <= first.first) {
            return Ok(());
        }
        let trimmed =
            if upto > state.first { self.purge(lease, position, state, &expired, upto).await? } else { 0 };
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
        state: &StreamState,
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
        // Much may have happened since the round began.
        if self.state().await?.created != state.created {
            return Err(ArchiveError::Replaced(name.clone()));
        }
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

/// How many messages a stream has above the mark, by the limit that is nearer.
fn surplus(state: &StreamState) -> u64 {
    let above = |has: u64, limit: Option<u64>| {
        let Some(limit) = limit else { return 0 };
        let mark = u128::from(limit) * FULL_PERCENT / 100;
        if u128::from(has) <= mark {
            return 0;
        }
        let below = u128::from(state.messages) * mark / u128::from(has);
        state.messages - u64::try_from(below).unwrap_or(state.messages)
    };
    above(state.bytes, state.limit).max(above(state.messages, state.most_messages))
}
