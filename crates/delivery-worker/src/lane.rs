//! The loop of one lane: asks for no more than can be started at once.

use std::{sync::Arc, time::Duration};

use bus_core::{
    launcher::{BoxError, Heartbeat},
    queue::DeliveryQueue,
    telemetry::Chain,
};
use futures::StreamExt as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    delivery::Deliverer,
    slots::{Slot, Slots},
};

/// How long one pull stays open. A pull is never broken off, since what the broker has sent by then
/// would wait for the end of its `ack_wait`; so this is also how long a stop takes when idle.
pub const PULL_WAIT: Duration = Duration::from_secs(2);

/// How long a lane whose slots are all taken lets batches wait for more.
const FULL: Duration = Duration::from_millis(100);

/// Between two pulls while the queue is away.
const AGAIN: Duration = Duration::from_millis(500);

/// One lane of one worker.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) number: u16,
    pub(crate) in_flight: usize,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) deliverer: Arc<Deliverer>,
    pub(crate) tasks: TaskTracker,
    pub(crate) beat: Heartbeat,
    pub(crate) stop: CancellationToken,
}

impl Lane {
    /// Runs until the stop; what was taken by then is finished by `tasks`.
    pub(crate) async fn run(self) -> Result<(), BoxError> {
        let slots = Arc::new(Slots::new(self.in_flight));
        let mut failing = false;
        while !self.stop.is_cancelled() {
            self.beat.beat();
            let Some(free) = self.free(&slots).await else { break };
            match self.pull(free, &slots).await {
                Ok(()) if failing => {
                    info!(lane = self.number, "Pulling again");
                    failing = false;
                }
                Ok(()) => {}
                Err(failed) => {
                    // Said once; the readiness probe tells how long it lasts.
                    if !failing {
                        warn!(lane = self.number, error = %Chain(failed.as_ref()), "Cannot pull deliveries");
                        failing = true;
                    }
                    self.stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await;
                }
            }
        }
        Ok(())
    }

    /// Waits for one free slot and takes all that are free. `None` at the stop.
    async fn free(&self, slots: &Slots) -> Option<Vec<Slot>> {
        let first = loop {
            let slot = tokio::time::timeout(FULL, slots.acquire());
            match self.stop.run_until_cancelled(slot).await? {
                Ok(slot) => break slot,
                // Every slot is taken, by slow endpoints or by batches that wait for what could not be taken
                // from the queue for want of slots. The loop is alive all the same.
                Err(_) => {
                    self.deliverer.flush_batches();
                    self.beat.beat();
                }
            }
        };
        Some(std::iter::once(first).chain(std::iter::from_fn(|| slots.try_acquire())).collect())
    }

    async fn pull(&self, mut free: Vec<Slot>, slots: &Arc<Slots>) -> Result<(), BoxError> {
        let mut leased = self.queue.pull(self.number, free.len(), PULL_WAIT).await?;
        while let Some(next) = leased.next().await {
            let (leased, deliverer) = (next?, Arc::clone(&self.deliverer));
            match free.pop() {
                Some(slot) => self.tasks.spawn(async move { deliverer.deliver(leased, slot).await }),
                // It came in one message with others. Nothing more is pulled before it has a slot, since whoever waits
                // for one is served in turn.
                None => {
                    let slots = Arc::clone(slots);
                    self.tasks.spawn(async move { deliverer.deliver_when_free(leased, &slots).await })
                }
            };
        }
        Ok(())
    }
}
