//! Events with a `deliverAt` are published when they are due.

use std::time::Duration;

use bus_core::{
    cloudevent::CloudEvent,
    fanout::Target,
    ids::EventUid,
    pg::{self, ScheduledEvent, StoreError},
    telemetry::Chain,
};
use metrics::{counter, histogram};
use sqlx::{Postgres, Transaction};
use tracing::{debug, error, warn};

use crate::{
    due::IDLE,
    firing::{Budget, Firing, HOLD_S, MAX_BYTES, MAX_EVENTS, PUT_OFF_S, Stored},
};

/// Publishes some of the events that are due; answers how long there is nothing more to do.
pub async fn publish_due(firing: &Firing) -> Result<Duration, StoreError> {
    let Some(claimed) = ClaimedEvents::claim(firing, None).await? else { return Ok(IDLE) };
    let uids: Vec<EventUid> = claimed.events.iter().map(|scheduled| scheduled.event.uid).collect();
    match claimed.publish().await {
        // What the database refuses for one event must not stop the others.
        Err(failed) if !failed.is_unavailable() => {
            warn!(error = %Chain(&failed), events = uids.len(), "Due events not published; each is tried alone");
            for uid in uids {
                publish_alone(firing, uid).await?;
            }
        }
        published => published?,
    }
    Ok(Duration::ZERO)
}

async fn publish_alone(firing: &Firing, uid: EventUid) -> Result<(), StoreError> {
    let Some(claimed) = ClaimedEvents::claim(firing, Some(uid)).await? else { return Ok(()) };
    match claimed.publish().await {
        Err(failed) if !failed.is_unavailable() => {
            error!(event.uid = %uid, error = %Chain(&failed), "A due event cannot be published; it is put off");
            pg::put_off_event(&firing.pool, uid, PUT_OFF_S).await
        }
        published => published,
    }
}

/// Events that are due, held by this process.
#[derive(Debug)]
#[must_use = "what is claimed is free again when this is dropped"]
pub struct ClaimedEvents<'f> {
    firing: &'f Firing,
    transaction: Transaction<'static, Postgres>,
    events: Vec<ScheduledEvent>,
}

impl<'f> ClaimedEvents<'f> {
    /// Claims the events that are due the longest, or only this one; none if none is due.
    pub async fn claim(firing: &'f Firing, only: Option<EventUid>) -> Result<Option<Self>, StoreError> {
        let mut transaction = pg::begin(&firing.pool).await?;
        let limit = u32::try_from(MAX_EVENTS).unwrap_or(u32::MAX);
        let events = pg::claim_due_events(&mut transaction, only, limit, MAX_BYTES.into(), HOLD_S).await?;
        Ok((!events.is_empty()).then_some(Self { firing, transaction, events }))
    }

    /// Moves them into the event store, with the subscriptions that match now, in the order in which they were due. What
    /// would make too many deliveries is left for the next transaction.
    pub async fn store(self) -> Result<Stored<'f>, StoreError> {
        let Self { firing, mut transaction, events } = self;
        let now = pg::transaction_time(&mut transaction).await?;
        let organizations = events.iter().map(|scheduled| scheduled.event.organization);
        let snapshots = firing.snapshots(&mut transaction, organizations).await?;
        let mut budget = Budget::new();
        let mut matched = Vec::with_capacity(events.len());
        let matching = || {
            for ScheduledEvent { event, due_at, .. } in events {
                let targets = match (
                    CloudEvent::from_structured(&event.body),
                    snapshots.get(&event.organization),
                ) {
                    (Ok(parsed), Some(snapshot)) => Target::of(snapshot, &parsed, event.publisher),
                    (Err(failed), _) => {
                        // It is history all the same, and must not come up for ever.
                        error!(event.uid = %event.uid, error = %Chain(&failed), "Stored event cannot be read");
                        Vec::new()
                    }
                    (Ok(_), None) => Vec::new(),
                };
                if budget.fits(event.body.len(), targets.len()) == 0 {
                    break;
                }
                budget.take(1, event.body.len(), targets.len());
                histogram!("bus_scheduled_event_lateness_seconds")
                    .record(now.duration_since(due_at).as_secs_f64());
                matched.push((event, targets));
            }
        };
        // Filters of tenants may take a while; the other tasks of this thread need not wait for them.
        tokio::task::block_in_place(matching);
        let uids: Vec<EventUid> = matched.iter().map(|(event, _)| event.uid).collect();
        pg::remove_scheduled(&mut transaction, &uids).await?;
        counter!("bus_scheduled_events_published").increment(uids.len() as u64);
        debug!(events = uids.len(), "Events are due");
        firing.store(transaction, &snapshots, matched).await
    }

    async fn publish(self) -> Result<(), StoreError> {
        self.store().await?.publish().await
    }
}
