//! One delivery from the lease to its end: attempt, then acknowledge, postpone, park or dead-letter.

use std::{sync::Arc, time::Duration};

use bus_core::{
    clock::Clock,
    connection::{Connection, Target},
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
use tracing::{debug, error, warn};

use crate::{bodies::Bodies, connections::Connections, parking::Parking, receipts::Receipts};

/// While the database cannot be reached and is needed, a delivery is put back for this long.
const DATABASE_AWAY: Duration = Duration::from_secs(2);

/// Does the deliveries of one worker.
pub(crate) struct Deliverer {
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) connections: Connections,
    pub(crate) bodies: Bodies,
    pub(crate) webhooks: Box<dyn Sink>,
    pub(crate) parking: Parking,
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

/// Why a delivery is given up before it was attempted.
enum Undeliverable {
    Dead(&'static str),
    /// The database is needed and away.
    Later(BoxError),
}

impl Deliverer {
    /// Brings a delivery to its end, or leaves it to the queue, which hands it out again.
    pub(crate) async fn deliver(&self, leased: Leased) {
        let Leased { key, attempts, body, lease } = leased;
        let number = attempts.saturating_add(1);
        let prepared = if attempts >= self.retry.max_attempts {
            // Handed out again and again without an answer: it takes its workers down, or they are killed.
            Err(Undeliverable::Dead("attempts_exhausted"))
        } else {
            self.prepare(&key, body).await
        };
        let (connection, body) = match prepared {
            Ok(prepared) => prepared,
            Err(Undeliverable::Dead(reason)) => {
                return self.give_up(lease, DeadLetter::new(key, attempts, reason), Bytes::new()).await;
            }
            Err(Undeliverable::Later(failed)) => {
                warn!(delivery.id = %key.id, error = %Chain(failed.as_ref()), "Delivery put back");
                return put_back(lease, DATABASE_AWAY.min(self.queue.longest_wait()), &key).await;
            }
        };
        let at = self.clock.now();
        let delivery = Delivery { key, attempts, body };
        let report = self.webhooks.attempt(&connection, &delivery, at).await;
        histogram!("bus_attempt_duration_seconds").record(report.duration.as_secs_f64());
        let outcome = self.settle(lease, &delivery, number, &report).await;
        counter!("bus_attempts", "outcome" => outcome.as_str()).increment(1);
        self.receipts.send(receipt(&delivery.key, number, outcome, &report, at));
    }

    async fn prepare(
        &self,
        key: &DeliveryKey,
        body: Body,
    ) -> Result<(Arc<Connection>, Bytes), Undeliverable> {
        let later = |failed: Arc<pg::StoreError>| Undeliverable::Later(Box::new(failed));
        let connection = self
            .connections
            .get(key)
            .await
            .map_err(later)?
            .filter(|connection| connection.organization == key.organization)
            .ok_or(Undeliverable::Dead("connection_deleted"))?;
        if !connection.enabled {
            return Err(Undeliverable::Dead("connection_disabled"));
        }
        if !matches!(connection.target, Target::Webhook(_)) {
            return Err(Undeliverable::Dead("connection_receives_nothing"));
        }
        let body = match body {
            Body::Inline(body) => body,
            Body::Stored => self
                .bodies
                .get(key.event)
                .await
                .map_err(later)?
                .ok_or(Undeliverable::Dead("event_expired"))?,
        };
        Ok((connection, body))
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
                put_back(lease, wait, &key).await;
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
        let recorded = async {
            self.queue.dead_letter(&key, dead.reason, &body).await?;
            pg::insert_dead_letter(&self.pool, &dead).await?;
            Ok::<_, BoxError>(())
        };
        match recorded.await {
            Ok(()) => {
                counter!("bus_dead_letters", "reason" => dead.reason).increment(1);
                warn!(delivery.id = %key.id, event.uid = %key.event, connection.id = %key.connection,
                      reason = dead.reason, attempts = dead.attempts, "Delivery given up");
                if let Err(failed) = lease.ack().await {
                    warn!(delivery.id = %key.id, error = %Chain(&failed), "Dead letter not acknowledged");
                }
            }
            Err(failed) => {
                error!(delivery.id = %key.id, error = %Chain(failed.as_ref()), "Dead letter not recorded yet");
                put_back(lease, DATABASE_AWAY.min(self.queue.longest_wait()), &key).await;
            }
        }
    }
}

pub(crate) async fn put_back(lease: Box<dyn Lease>, wait: Duration, key: &DeliveryKey) {
    if let Err(failed) = lease.retry(wait).await {
        warn!(delivery.id = %key.id, error = %Chain(&failed), "Not put back; it comes again after ack_wait");
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
