//! Puts deliveries back that the queue has lost: a broker that was restored from a copy, whose disk lost what was not yet
//! synced, or whose stream was deleted.
//!
//! Every delivery that matched leaves a trace when it is done: a receipt in history, or a row. What has neither must be in
//! the queue; what is not there either is lost, and returns like a parked retry. The order of the questions is what makes
//! that certain: a fan-out that was finished before the queue is asked has put its deliveries there; what has left the
//! queue by then has its trace as soon as history has come past that moment.
//!
//! A receipt that was lost itself, with the broker's audit stream or in a worker that was killed, makes a delivery look
//! lost that was made: the subscriber gets it twice, with the same `webhook-id`.

use std::{collections::HashSet, time::Duration};

use jiff::{SignedDuration, Timestamp};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    ids::{DeliveryId, EventUid, uuid_floor},
    notify::{Hint, Notifier},
    pg::{self, Known, StoreError},
    queue::{DeliveryQueue, QueueError},
};

/// Deliveries that are looked up in the queue at a time; with what is kept of each, 20 MiB.
const AT_ONCE: usize = 100_000;

/// Deliveries of one statement.
const ROWS: usize = 5_000;

/// A worker has sent the receipt of what it acknowledged at most this much later.
const RECEIPT_MARGIN: SignedDuration = SignedDuration::from_secs(5);

/// How long history may take to come past the moment at which the queue was asked.
const HISTORY_WAIT: Duration = Duration::from_secs(120);

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
    /// No archiver brings receipts into history, so nobody knows what was delivered.
    #[error("history did not come past {until} within {HISTORY_WAIT:?}: is an archiver running?")]
    HistoryBehind {
        /// The moment that history has to come past.
        until: Timestamp,
    },
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
    /// Whether history follows the deliveries, as it does over a broker, instead of being written with them.
    pub history_lags: bool,
    /// Only look.
    pub dry_run: bool,
}

impl Reconciler<'_> {
    /// Goes through the events that were received at `since` or later, and the deliveries of earlier ones that came back
    /// since then; tells how far it is. Runs beside everything else, on any number of processes. Dropping it is harmless.
    pub async fn run(
        &self,
        since: Timestamp,
        mut tell: impl FnMut(&Reconciled),
    ) -> Result<Reconciled, ReconcileError> {
        let now = pg::database_time(self.pool).await?;
        let (from, until) =
            (uuid_floor(since), uuid_floor(now.saturating_add(SignedDuration::from_secs(60)).unwrap_or(now)));
        let mut found = Reconciled::default();
        let mut open = Vec::new();

        let mut after = previous(from);
        while let page @ pg::Page { last: Some(last), .. } =
            pg::matched_deliveries(self.pool, after, until).await?
        {
            after = last.0;
            found.events += page.events;
            self.gather(&page.deliveries, &mut open, &mut found).await?;
            tell(&found);
        }
        let mut place = (since, DeliveryId(Uuid::nil()));
        loop {
            let (returned, last) = pg::returned_deliveries(self.pool, from, place).await?;
            self.gather(&returned, &mut open, &mut found).await?;
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
        deliveries: &[Known],
        open: &mut Vec<Known>,
        found: &mut Reconciled,
    ) -> Result<(), ReconcileError> {
        found.deliveries += deliveries.len() as u64;
        for some in deliveries.chunks(ROWS) {
            open.extend(pg::unsettled(self.pool, some).await?);
        }
        if open.len() >= AT_ONCE {
            self.settle(std::mem::take(open), found).await?;
        }
        Ok(())
    }

    /// Decides about deliveries that were unsettled a moment ago.
    async fn settle(&self, open: Vec<Known>, found: &mut Reconciled) -> Result<(), ReconcileError> {
        let events: HashSet<EventUid> = open.iter().map(|known| known.key.event).collect();
        let unfinished = pg::being_fanned_out(self.pool, &events).await?;
        let (finished, under_way): (Vec<Known>, Vec<Known>) =
            open.into_iter().partition(|known| !unfinished.contains(&known.key.event));
        found.queued += under_way.len() as u64;
        let keys: Vec<_> = finished.iter().map(|known| known.key).collect();
        let held = self.queue.holds(&keys).await?;
        found.queued += held.len() as u64;
        let missing: Vec<Known> =
            finished.into_iter().filter(|known| !held.contains(&known.key.id)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.wait_for_history().await?;
        for some in missing.chunks(ROWS) {
            let lost = pg::unsettled(self.pool, some).await?;
            found.lost += lost.len() as u64;
            if !self.dry_run && !lost.is_empty() {
                found.put_back += pg::put_back(self.pool, &lost).await?;
                self.hints.notify(Hint::Due).await;
            }
        }
        Ok(())
    }

    /// Until everything that was delivered by now is in history.
    async fn wait_for_history(&self) -> Result<(), ReconcileError> {
        if !self.history_lags {
            return Ok(());
        }
        let now = pg::database_time(self.pool).await?;
        let until = now.saturating_add(RECEIPT_MARGIN).unwrap_or(now);
        let come_past = async {
            while pg::history_through(self.pool).await?.is_none_or(|(through, _)| through < until) {
                tokio::time::sleep(LOOK).await;
            }
            Ok(())
        };
        tokio::time::timeout(HISTORY_WAIT, come_past)
            .await
            .unwrap_or(Err(ReconcileError::HistoryBehind { until }))
    }
}

/// The id before this one: a page begins after an id.
fn previous(id: Uuid) -> Uuid {
    Uuid::from_u128(id.as_u128().saturating_sub(1))
}
