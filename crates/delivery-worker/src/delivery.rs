//! One delivery from the lease to its end: attempt, then acknowledge, postpone, park or dead-letter.

use std::{sync::Arc, time::Duration};

use bus_core::{
    clock::Clock,
    connection::{Connection, Target},
    delivery::{Delivery, DeliveryKey, Progress},
    launcher::BoxError,
    pg::{self, DeadLetter, LastAttempt, Park},
    queue::{Body, DeliveryQueue, Leased},
    receipt::{Receipt, ReceiptOutcome},
    retry::{RetryPolicy, Verdict},
    sink::{AttemptReport, Outcome, Sink},
};
use bytes::Bytes;
use jiff::Timestamp;
use metrics::{counter, histogram};
use sqlx::PgPool;
use tracing::{debug, warn};

use crate::{
    bodies::Bodies, closed::ClosedDeliveries, connections::Connections, hold::Hold, parking::Parking,
    patience::Patience, receipts::Receipts,
};

/// Does the deliveries of one worker.
pub(crate) struct Deliverer {
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) connections: Connections,
    pub(crate) bodies: Bodies,
    pub(crate) webhooks: Box<dyn Sink>,
    pub(crate) parking: Parking,
    pub(crate) patience: Patience,
    pub(crate) closed: ClosedDeliveries,
    pub(crate) receipts: Receipts,
    pub(crate) retry: RetryPolicy,
    /// A delivery that was handed out more often in one turn takes its workers down with it, or is always
    /// killed with them.
    pub(crate) max_handed_out: u32,
    /// How long a hold lasts.
    pub(crate) lease: Duration,
    pub(crate) clock: Arc<dyn Clock>,
    /// In `0.0..1.0`; chooses the jitter.
    pub(crate) random: fn() -> f64,
}

impl std::fmt::Debug for Deliverer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deliverer").finish_non_exhaustive()
    }
}

impl Deliverer {
    /// Brings a delivery to its end. At a stop it may be left to the queue, which hands it out again.
    pub(crate) async fn deliver(&self, leased: Leased) {
        let Leased { key, progress, handed_out, wait, body, lease } = leased;
        let hold = Hold::new(key, lease, self.lease);
        if let Some(wait) = wait {
            let park = Park {
                key,
                next: progress.next(progress.attempts),
                wait,
                reason: "the queue has no room for deliveries that wait".to_owned(),
                last: LastAttempt::default(),
            };
            return self.parking.park(park, hold).await;
        }
        if self.closed.overrule(&key, progress, handed_out).await {
            counter!("bus_deliveries_overruled").increment(1);
            debug!(delivery.id = %key.id, turn = progress.turn, "Closed, or overtaken by a later turn");
            return hold.ack().await;
        }
        let prepared = if handed_out > self.max_handed_out {
            Some(Err("redelivered_too_often"))
        } else {
            self.patience.insist(&hold, || self.prepare(&key, &body)).await
        };
        let (connection, body) = match prepared {
            Some(Ok(prepared)) => prepared,
            Some(Err(reason)) => {
                return self.give_up(hold, DeadLetter::new(key, progress, reason), Bytes::new()).await;
            }
            None => return hold.put_back().await,
        };
        let at = self.clock.now();
        let delivery = Delivery { key, body };
        let report = self.webhooks.attempt(&connection, &delivery, at).await;
        histogram!("bus_attempt_duration_seconds").record(report.duration.as_secs_f64());
        let outcome = self.settle(hold, &delivery, progress, &report, at).await;
        counter!("bus_attempts", "outcome" => outcome.as_str()).increment(1);
        self.receipts.send(receipt(&delivery.key, progress, outcome, &report, at));
    }

    /// What an attempt needs, or the reason why there can be none.
    async fn prepare(
        &self,
        key: &DeliveryKey,
        body: &Body,
    ) -> Result<Result<(Arc<Connection>, Bytes), &'static str>, BoxError> {
        let connection = self.connections.get(key).await?;
        let Some(connection) = connection.filter(|found| found.organization == key.organization) else {
            return Ok(Err("connection_deleted"));
        };
        if !connection.enabled {
            return Ok(Err("connection_disabled"));
        }
        if !matches!(connection.target, Target::Webhook(_)) {
            return Ok(Err("connection_receives_nothing"));
        }
        let body = match body {
            Body::Inline(body) => Some(body.clone()),
            Body::Stored => self.bodies.get(key.event).await?,
        };
        Ok(body.map(|body| (connection, body)).ok_or("event_expired"))
    }

    /// Draws the consequence of an attempt.
    async fn settle(
        &self,
        hold: Hold,
        delivery: &Delivery,
        progress: Progress,
        report: &AttemptReport,
        at: Timestamp,
    ) -> ReceiptOutcome {
        let key = delivery.key;
        let failure = match &report.outcome {
            Outcome::Delivered => {
                hold.ack().await;
                return ReceiptOutcome::Delivered;
            }
            Outcome::Failed(failure) => failure,
        };
        let next = progress.next(progress.attempts.saturating_add(1));
        debug!(delivery.id = %key.id, connection.id = %key.connection, attempt = next.attempts, %failure, "Attempt failed");
        if hold.is_lost() {
            warn!(delivery.id = %key.id, "The hold ended before the attempt; whoever has the delivery now decides");
            return ReceiptOutcome::Failed;
        }
        let last = LastAttempt {
            status: report.status,
            body: Some(report.answer.clone()),
            error: Some(failure.to_string()),
            at: Some(at),
            duration: Some(report.duration),
        };
        match self.retry.after_failure(next.attempts, (self.random)()) {
            Verdict::Retry(wait) if wait <= self.queue.longest_wait() => {
                hold.postpone(next, wait).await;
                ReceiptOutcome::Failed
            }
            Verdict::Retry(wait) => {
                let park = Park { key, next, wait, reason: failure.to_string(), last };
                self.parking.park(park, hold).await;
                ReceiptOutcome::Failed
            }
            Verdict::Dead => {
                let progress = Progress { attempts: next.attempts, ..progress };
                let dead = DeadLetter { last, ..DeadLetter::new(key, progress, "attempts_exhausted") };
                self.give_up(hold, dead, delivery.body.clone()).await;
                ReceiptOutcome::Dead
            }
        }
    }

    /// The stream first, then the row, then the acknowledgement: whatever dies in between, the delivery
    /// comes again and the same is done once more.
    async fn give_up(&self, hold: Hold, dead: DeadLetter, body: Bytes) {
        let key = dead.key;
        let recorded = self.patience.insist(&hold, || async {
            self.queue.dead_letter(&dead, &body).await?;
            pg::bury(&self.pool, &dead).await?;
            Ok(())
        });
        if recorded.await.is_none() {
            return hold.put_back().await;
        }
        counter!("bus_dead_letters", "reason" => dead.reason).increment(1);
        warn!(delivery.id = %key.id, event.uid = %key.event, connection.id = %key.connection,
              reason = dead.reason, attempts = dead.progress.attempts, "Delivery given up");
        hold.ack().await;
    }
}

fn receipt(
    key: &DeliveryKey,
    progress: Progress,
    outcome: ReceiptOutcome,
    report: &AttemptReport,
    at: Timestamp,
) -> Receipt {
    let error = match &report.outcome {
        Outcome::Delivered => None,
        Outcome::Failed(failure) => Some(failure.to_string()),
    };
    Receipt {
        delivery: key.id,
        attempt: progress.attempts.saturating_add(1),
        turn: progress.turn,
        event: key.event,
        organization: key.organization,
        subscription: key.subscription,
        connection: key.connection,
        outcome,
        status: report.status,
        error,
        at,
        duration_ms: u32::try_from(report.duration.as_millis()).unwrap_or(u32::MAX),
    }
}
