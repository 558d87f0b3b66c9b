//! One delivery from the lease to its end: attempt, then acknowledge, postpone, park or dead-letter.

use std::sync::Arc;

use bus_core::{
    clock::Clock,
    connection::{Receiver, Target},
    delivery::{Delivery, DeliveryKey},
    launcher::BoxError,
    pg::{self, DeadLetter, Park},
    queue::{Body, DeliveryQueue, Lease, Leased},
    receipt::{Receipt, ReceiptOutcome},
    retry::{RetryPolicy, Verdict},
    sink::{AttemptReport, Outcome, Sink},
    telemetry::Chain,
};
use bytes::Bytes;
use jiff::Timestamp;
use metrics::{counter, histogram};
use sqlx::PgPool;
use tracing::{debug, warn};

use crate::{
    bodies::Bodies,
    connections::Connections,
    parking::Parking,
    patience::{Patience, put_back},
    receipts::Receipts,
};

/// Deliveries that were handed out this often beyond the attempts that the policy allows take their workers
/// down with them, or are always killed with them.
const POISON: u32 = 16;

/// Does the deliveries of one worker.
pub(crate) struct Deliverer {
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) connections: Connections,
    pub(crate) bodies: Bodies,
    pub(crate) webhooks: Box<dyn Sink>,
    pub(crate) parking: Parking,
    pub(crate) patience: Patience,
    pub(crate) receipts: Receipts,
    pub(crate) retry: RetryPolicy,
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
        let Leased { key, attempts, body, lease } = leased;
        let number = attempts.saturating_add(1);
        let prepared = if attempts >= self.retry.max_attempts.saturating_add(POISON) {
            Some(Err("redelivered_too_often"))
        } else {
            self.patience.insist(lease.as_ref(), &key, || self.prepare(&key, &body)).await
        };
        let (receiver, body) = match prepared {
            Some(Ok(prepared)) => prepared,
            Some(Err(reason)) => {
                return self.give_up(lease, DeadLetter::new(key, attempts, reason), Bytes::new()).await;
            }
            None => return put_back(lease, &key).await,
        };
        let at = self.clock.now();
        let delivery = Delivery { key, attempts, body };
        let report = self.webhooks.attempt(&receiver.connection, &delivery, at).await;
        histogram!("bus_attempt_duration_seconds").record(report.duration.as_secs_f64());
        let outcome = self.settle(lease, &delivery, number, &report).await;
        counter!("bus_attempts", "outcome" => outcome.as_str()).increment(1);
        self.receipts.send(receipt(&delivery.key, number, outcome, &report, at));
    }

    /// What an attempt needs, or the reason why there can be none.
    async fn prepare(
        &self,
        key: &DeliveryKey,
        body: &Body,
    ) -> Result<Result<(Arc<Receiver>, Bytes), &'static str>, BoxError> {
        let receiver = self.connections.get(key).await?;
        let Some(receiver) = receiver.filter(|found| found.connection.organization == key.organization)
        else {
            return Ok(Err("connection_deleted"));
        };
        let connection = &receiver.connection;
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
        Ok(body.map(|body| (receiver, body)).ok_or("event_expired"))
    }

    /// Draws the consequence of an attempt.
    async fn settle(
        &self,
        lease: Box<dyn Lease>,
        delivery: &Delivery,
        number: u32,
        report: &AttemptReport,
    ) -> ReceiptOutcome {
        let key = delivery.key;
        let failure = match &report.outcome {
            Outcome::Delivered => {
                if let Err(failed) = lease.ack().await {
                    // The subscriber has it, the queue does not know: it will be repeated, with the same id.
                    warn!(delivery.id = %key.id, error = %Chain(&failed), "Delivered, but not acknowledged");
                }
                return ReceiptOutcome::Delivered;
            }
            Outcome::Failed(failure) => failure,
        };
        debug!(delivery.id = %key.id, connection.id = %key.connection, attempt = number, %failure, "Attempt failed");
        match self.retry.after_failure(number, (self.random)()) {
            Verdict::Retry(wait) if wait <= self.queue.longest_wait() => {
                if let Err(failed) = lease.retry(wait).await {
                    warn!(delivery.id = %key.id, error = %Chain(&failed), "Not postponed; it comes again after ack_wait");
                }
                ReceiptOutcome::Failed
            }
            Verdict::Retry(wait) => {
                let park =
                    Park { key, attempts: number, wait_s: wait.as_secs_f64(), reason: failure.to_string() };
                self.parking.park(park, lease).await;
                ReceiptOutcome::Failed
            }
            Verdict::Dead => {
                let dead = DeadLetter {
                    last_status: report.status,
                    last_body: Some(report.answer.clone()),
                    last_error: Some(failure.to_string()),
                    ..DeadLetter::new(key, number, "attempts_exhausted")
                };
                self.give_up(lease, dead, delivery.body.clone()).await;
                ReceiptOutcome::Dead
            }
        }
    }

    /// The stream first, then the row, then the acknowledgement: whatever dies in between, the delivery
    /// comes again and the same is done once more.
    async fn give_up(&self, lease: Box<dyn Lease>, dead: DeadLetter, body: Bytes) {
        let key = dead.key;
        let recorded = self.patience.insist(lease.as_ref(), &key, || async {
            self.queue.dead_letter(&key, dead.reason, &body).await?;
            pg::insert_dead_letter(&self.pool, &dead).await?;
            Ok(())
        });
        if recorded.await.is_none() {
            return put_back(lease, &key).await;
        }
        counter!("bus_dead_letters", "reason" => dead.reason).increment(1);
        warn!(delivery.id = %key.id, event.uid = %key.event, connection.id = %key.connection,
              reason = dead.reason, attempts = dead.attempts, "Delivery given up");
        if let Err(failed) = lease.ack().await {
            warn!(delivery.id = %key.id, error = %Chain(&failed), "Dead letter not acknowledged");
        }
    }
}

fn receipt(
    key: &DeliveryKey,
    attempt: u32,
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
        attempt,
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
