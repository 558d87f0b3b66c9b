//! Puts deliveries back that the queue has lost: a broker that was restored from a copy, whose disk lost what was not yet
//! synced, or whose stream was deleted.
//!
//! Every delivery that matched leaves a trace when it is done: a receipt in history, or a row. What has neither must be in
//! the queue; what is not there either is lost, and returns like a parked retry. The order of the questions is what makes
//! that certain: a fan-out that was finished before the queue is asked has put its deliveries there; what has left the
//! queue by then has its trace as soon as history has come past that moment.
//!
//! That is as good as the receipts are. One that was lost itself (with the broker's audit stream, or in a worker that was
//! killed) makes a delivery look lost that was made: the subscriber gets it twice, with the same `webhook-id`. So does an
//! attempt that takes longer than [`Reconciler::settled_after`] and whose message the broker has lost. While receipts find no
//! room, nothing can be known, and nothing is done.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    ids::{DeliveryId, EventUid, uuid_floor},
    nats::{Nats, NatsError},
    notify::{Hint, Notifier},
    pg::{self, Known, StoreError},
    queue::{DeliveryQueue, QueueError},
};

/// Deliveries that are looked up in the queue at a time; with what is kept of each, 20 MiB.
const AT_ONCE: usize = 100_000;

/// Deliveries of one statement.
const ROWS: usize = 5_000;

/// How long history may take to come past the moment at which the queue was asked, and [`Reconciler::settled_after`].
const HISTORY_WAIT: Duration = Duration::from_secs(120);

/// An audit stream of which so many percent are taken may refuse receipts.
const FULL: u64 = 95;

/// The clock of a publisher, which makes the uids, may be ahead of the database's.
const UID_AHEAD: SignedDuration = SignedDuration::from_secs(60);

/// Between two looks at history.
const LOOK: Duration = Duration::from_millis(500);

/// Why a reconciliation was broken off. What was put back by then stays put back; it may be repeated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconcileError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The queue.
    #[error("ask the queue what it holds")]
    Queue(#[from] QueueError),
    /// The broker.
    #[error(transparent)]
    Nats(#[from] NatsError),
    /// No archiver brings receipts into history, so nobody knows what was delivered.
    #[error("history did not come past {until} in time: is an archiver running?")]
    HistoryBehind {
        /// The moment that history has to come past.
        until: Timestamp,
    },
    /// Receipts wait in the workers, or are dropped, so nobody knows what was delivered.
    #[error("the audit stream is full: receipts of what was delivered may be missing")]
    ReceiptsRefused,
}

/// What was found so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Events that were looked at.
    pub events: u64,
    /// Their deliveries, and those that came back for earlier events.
    pub deliveries: u64,
    /// Deliveries that are still to be made, and in the queue.
    pub queued: u64,
    /// Deliveries that nobody had any more.
    pub lost: u64,
    /// Those that were put back: all of them, unless it is a rehearsal or something was written about them meanwhile.
    pub put_back: u64,
}

/// Finds lost deliveries, and puts them back.
#[derive(Debug, Clone, Copy)]
pub struct Reconciler<'a> {
    /// The database; of `delivery_states` it needs to write.
    pub pool: &'a PgPool,
    /// What may have lost deliveries.
    pub queue: &'a dyn DeliveryQueue,
    /// Wakes the schedulers.
    pub hints: &'a dyn Notifier,
    /// The broker, over which history follows the deliveries; without one it is written with them.
    pub nats: Option<&'a Nats>,
    /// What left the queue has its receipt in the broker after this time, and what was under way has ended: a hold's length.
    pub settled_after: Duration,
    /// Only look.
    pub dry_run: bool,
}

impl Reconciler<'_> {
    /// Goes through the events that were received, or fanned out, at `since` or later, and the deliveries of others that came
    /// back since then; tells how far it is. Runs beside everything else, on any number of processes. Dropping it is harmless.
    pub async fn run(
        &self,
        since: Timestamp,
        mut tell: impl FnMut(&Reconciled),
    ) -> Result<Reconciled, ReconcileError> {
        let now = ask("ask for the time", pg::database_time(self.pool)).await?;
        let ahead = now.saturating_add(UID_AHEAD).unwrap_or(now);
        let fanned_out = ask("read the finished fan-outs", pg::fanned_out_from(self.pool, since)).await?;
        let from = fanned_out.into_iter().chain([uuid_floor(since)]).min().unwrap_or_default();
        let mut found = Reconciled::default();
        let mut open = HashMap::new();

        let mut after = previous(from);
        loop {
            let page = pg::matched_deliveries(self.pool, after, uuid_floor(ahead));
            let page = ask("read the deliveries of events", page).await?;
            found.events += page.events;
            self.gather(page.deliveries, &mut open, &mut found).await?;
            tell(&found);
            match page.last {
                Some(last) => after = last.0,
                None => break,
            }
        }
        let mut place = (since, DeliveryId(Uuid::nil()));
        loop {
            let page = pg::returned_deliveries(self.pool, from, place, now);
            let (returned, last) = ask("read the deliveries that came back", page).await?;
            self.gather(returned, &mut open, &mut found).await?;
            tell(&found);
            match last {
                Some(last) => place = last,
                None => break,
            }
        }
        self.settle(open, &mut found).await?;
        tell(&found);
        Ok(found)
    }

    /// Adds what is unsettled of these to `open`, which is settled whenever it is full.
    async fn gather(
        &self,
        deliveries: Vec<Known>,
        open: &mut HashMap<DeliveryId, Known>,
        found: &mut Reconciled,
    ) -> Result<(), ReconcileError> {
        found.deliveries += deliveries.len() as u64;
        for some in deliveries.chunks(ROWS) {
            let unsettled = ask("ask which are settled", pg::unsettled(self.pool, some, None)).await?;
            // As they were matched: the last question is asked from the beginning.
            open.extend(unsettled.into_iter().map(|one| (one.known.key.id, one.known)));
        }
        if open.len() >= AT_ONCE {
            self.settle(std::mem::take(open), found).await?;
        }
        Ok(())
    }

    /// Decides about deliveries that were unsettled a moment ago.
    async fn settle(
        &self,
        open: HashMap<DeliveryId, Known>,
        found: &mut Reconciled,
    ) -> Result<(), ReconcileError> {
        let events: HashSet<EventUid> = open.values().map(|known| known.key.event).collect();
        let unfinished = pg::being_fanned_out(self.pool, &events);
        let unfinished = ask("read the unfinished fan-outs", unfinished).await?;
        let asked = ask("ask for the time", pg::database_time(self.pool)).await?;
        let keys: Vec<_> = open
            .values()
            .filter(|known| !unfinished.contains(&known.key.event))
            .map(|known| known.key)
            .collect();
        let held = self.queue.holds(&keys).await?;
        found.queued += (open.len() - keys.len() + held.len()) as u64;
        let missing: Vec<Known> = keys
            .iter()
            .filter(|key| !held.contains(&key.id))
            .filter_map(|key| open.get(&key.id).copied())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.wait_for_history().await?;
        for some in missing.chunks(ROWS) {
            let lost = ask("ask which are settled", pg::unsettled(self.pool, some, Some(asked))).await?;
            found.lost += lost.len() as u64;
            if !self.dry_run && !lost.is_empty() {
                found.put_back += ask("put lost deliveries back", pg::put_back(self.pool, &lost)).await?;
                self.hints.notify(Hint::Due).await;
            }
        }
        Ok(())
    }

    /// Until everything that has left the queue by now is in history.
    async fn wait_for_history(&self) -> Result<(), ReconcileError> {
        let Some(nats) = self.nats else { return Ok(()) };
        let now = ask("ask for the time", pg::database_time(self.pool)).await?;
        let settled_after = SignedDuration::try_from(self.settled_after).unwrap_or(SignedDuration::ZERO);
        let until = now.saturating_add(settled_after).unwrap_or(now);
        let come_past = async {
            loop {
                let through = ask("ask how far history is", pg::history_through(self.pool)).await?;
                if through.is_some_and(|(through, _)| through >= until) {
                    return Ok(());
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let wait = self.settled_after + HISTORY_WAIT;
        tokio::time::timeout(wait, come_past)
            .await
            .unwrap_or(Err(ReconcileError::HistoryBehind { until }))?;
        // What found no room is not in history, however far it is.
        if nats.audit_is_full(FULL).await? { Err(ReconcileError::ReceiptsRefused) } else { Ok(()) }
    }
}

/// A question to the database, which may not wait for ever for its answer.
async fn ask<T>(
    operation: &'static str,
    question: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    pg::answered(operation, question).await
}

/// The id before this one: a page begins after an id.
fn previous(id: Uuid) -> Uuid {
    Uuid::from_u128(id.as_u128().saturating_sub(1))
}
