//! Works off erasures: empties payloads in the database, in the dead-letter stream and in cold storage.
//!
//! The order is what makes it certain. The tables come first, so that whatever is archived or given up from then on is
//! without the payload. What was read before that may still be on its way to cold storage: it has to arrive before cold
//! storage is emptied. Every step may be repeated, and whoever is killed in between leaves an open job that begins anew.

use std::{sync::Arc, time::Duration};

use async_nats::{
    HeaderMap,
    jetstream::{
        ErrorCode,
        consumer::{PullConsumer, pull},
        context::GetStreamErrorKind,
        stream::Stream,
    },
};
use async_trait::async_trait;
use bus_core::{
    audit::By,
    clock::Clock,
    fault,
    ids::{EventUid, Ids},
    nats::Nats,
    pg::{self, ArchiveLease, ArchivePosition, DayTable, Erasure},
    telemetry::Chain,
};
use cold_storage::ColdStorage;
use futures::StreamExt as _;
use metrics::counter;
use tracing::{info, warn};

use crate::{
    cold::COLD,
    error::{ArchiveError, During as _},
    lease::{LeasedWork, Leases},
    streams::passing_reader,
    tables::attempt_of,
};

/// Jobs of one round.
const JOBS: u32 = 100;

/// Rows emptied in one statement.
const ROWS: u32 = 1_000;

/// Between two looks for open jobs.
const LOOK: Duration = Duration::from_secs(2);

/// Between two looks whether what was under way is in cold storage.
const ARRIVED: Duration = Duration::from_millis(500);

/// How long one pull may take.
const PULL_WAIT: Duration = Duration::from_secs(5);

/// Messages of one pull; of each only the headers are sent.
const PULL: usize = 1_000;

/// Works off erasures. Under the lease of cold storage, which is not emptied and expired at the same time.
pub struct Erasures {
    /// Where what is archived is.
    pub cold: ColdStorage,
    /// Of several archivers one does it.
    pub leases: Leases,
    /// Where the dead letters are.
    pub nats: Option<Nats>,
    /// Whether the events go to cold storage from their table.
    pub events_archived: bool,
    /// Tells when it was.
    pub clock: Arc<dyn Clock>,
    /// For the record of what was done.
    pub ids: Arc<dyn Ids>,
}

/// The dead-letter stream as it was after the tables were emptied.
struct DeadLetters {
    stream: Stream,
    /// The last message that had come by then.
    last: u64,
}

#[async_trait]
impl LeasedWork for Erasures {
    fn source(&self) -> &str {
        COLD
    }

    async fn begin(&self) -> Result<(), ArchiveError> {
        Ok(())
    }

    async fn round(&self, lease: &ArchiveLease, _: &mut ArchivePosition) -> Result<Duration, ArchiveError> {
        self.work(lease).await.map(|()| LOOK)
    }
}

impl Erasures {
    /// Works off the open jobs. One that fails keeps none of the others from being done.
    async fn work(&self, lease: &ArchiveLease) -> Result<(), ArchiveError> {
        let pool = &self.leases.pool;
        let open = pg::open_erasures(pool, JOBS).await?;
        if open.is_empty() {
            return Ok(());
        }
        let (mut emptied, mut result) = (Vec::with_capacity(open.len()), Ok(()));
        for erasure in &open {
            match pg::empty_tables(pool, erasure, ROWS).await {
                Ok(()) => emptied.push(erasure),
                Err(failed) => {
                    warn!(erasure.id = %erasure.id, error = %Chain(&failed), "An erasure waits");
                    result = Err(failed.into());
                }
            }
        }
        fault::point("archiver.erasure-emptied").await;
        let dead = self.dead_letters().await?;
        self.wait_for_what_is_under_way().await?;
        for erasure in emptied {
            if let Err(failed) = self.finish(lease, erasure, dead.as_ref()).await {
                warn!(erasure.id = %erasure.id, error = %Chain(&failed), "An erasure waits");
                result = Err(failed);
            }
        }
        result
    }

    async fn finish(
        &self,
        lease: &ArchiveLease,
        erasure: &Erasure,
        dead: Option<&DeadLetters>,
    ) -> Result<(), ArchiveError> {
        let pool = &self.leases.pool;
        if let Some(dead) = dead {
            let removed = self.remove_dead_letters(erasure, dead).await?;
            pg::count_emptied(pool, erasure.id, removed, 0).await?;
        }
        fault::point("archiver.erasure-removed").await;
        self.leases.check(lease).await?;
        let event = erasure.event.map(|event| event.0);
        let expunged = self.cold.expunge(erasure.organization.0, event, self.clock.now()).await?;
        pg::count_emptied(pool, erasure.id, 0, expunged.rows).await?;
        fault::point("archiver.erasure-expunged").await;
        if let Some(done) = pg::finish_erasure(pool, erasure.id, &By::system(self.ids.next())).await? {
            counter!("bus_erasures_done").increment(1);
            info!(erasure.id = %done.id, emptied = ?done.emptied, "Erased payloads");
        }
        Ok(())
    }

    /// Returns when nothing that was read before the tables were emptied can come to cold storage any more. A day of
    /// events is archived part by part and then dropped: while its partition is there, a part may be under way.
    async fn wait_for_what_is_under_way(&self) -> Result<(), ArchiveError> {
        let pool = &self.leases.pool;
        if self.events_archived
            && let Some(position) = pg::archive_position(pool, DayTable::Events.name()).await?
            && let Some((day, _)) = position.incarnation.as_deref().and_then(attempt_of)
        {
            while pg::partition_days(pool, DayTable::Events).await?.contains(&day) {
                tokio::time::sleep(ARRIVED).await;
            }
        }
        Ok(())
    }

    /// `None` if there is no such stream: the queue is elsewhere, or nobody has created it yet.
    async fn dead_letters(&self) -> Result<Option<DeadLetters>, ArchiveError> {
        let Some(nats) = &self.nats else { return Ok(None) };
        match nats.jetstream.get_stream(&nats.names.dead_stream).await {
            Ok(stream) => {
                let last = stream.cached_info().state.last_sequence;
                Ok(Some(DeadLetters { stream, last }))
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(refused)
                    if refused.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(error).during("look up the dead-letter stream"),
            },
        }
    }

    /// How many there were.
    async fn remove_dead_letters(&self, erasure: &Erasure, dead: &DeadLetters) -> Result<u64, ArchiveError> {
        let Some(nats) = &self.nats else { return Ok(0) };
        let subject = nats.names.all_dead(erasure.organization);
        let Some(event) = erasure.event else {
            let purge = dead.stream.purge().filter(subject).sequence(dead.last + 1);
            return Ok(purge.await.during("remove an organization's dead letters")?.purged);
        };
        let found = dead.of_event(subject, event).await?;
        for sequence in &found {
            dead.stream.delete_message(*sequence).await.during("remove a dead letter")?;
        }
        Ok(found.len() as u64)
    }
}

impl DeadLetters {
    /// The messages about this event.
    async fn of_event(&self, subject: String, event: EventUid) -> Result<Vec<u64>, ArchiveError> {
        const OPERATION: &str = "look for an event's dead letters";
        let config = pull::Config { filter_subject: subject, headers_only: true, ..passing_reader() };
        let consumer: PullConsumer = self.stream.create_consumer(config).await.during(OPERATION)?;
        let mut left = consumer.cached_info().num_pending;
        let (mut found, mut delivered) = (Vec::new(), 0);
        while left > 0 {
            let mut pulled =
                consumer.batch().max_messages(PULL).expires(PULL_WAIT).messages().await.during(OPERATION)?;
            let before = delivered;
            while let Some(message) = pulled.next().await {
                let message = message.during(OPERATION)?;
                let info = message.info().during(OPERATION)?;
                delivered += 1;
                if info.consumer_sequence != delivered {
                    // What was sent over a connection that broke is not sent again.
                    return Err("messages were lost on the way").during(OPERATION);
                }
                if is_about(message.headers.as_ref(), event) && info.stream_sequence <= self.last {
                    found.push(info.stream_sequence);
                }
                left = if info.stream_sequence < self.last { info.pending } else { 0 };
                if left == 0 {
                    break;
                }
            }
            if delivered == before {
                return Err("the broker sends nothing").during(OPERATION);
            }
        }
        // It would be gone soon anyway.
        let _ = self.stream.delete_consumer(&consumer.cached_info().name).await;
        Ok(found)
    }
}

fn is_about(headers: Option<&HeaderMap>, event: EventUid) -> bool {
    let named = headers.and_then(|headers| headers.get("Bus-Event"));
    named.is_some_and(|named| named.as_str().parse() == Ok(event))
}
