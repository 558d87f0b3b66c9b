//! One delivery from the lease to its end: attempt, then acknowledge, postpone, park or dead-letter.
//!
//! What a delivery that succeeds does not come to is boxed: its task would else have room for all of it, which is made and
//! copied for each delivery.

use std::{borrow::Cow, pin::pin, sync::Arc, time::Duration};

use bus_core::{
    clock::Clock,
    connection::{Receiver, Target},
    delivery::{Delivery, DeliveryKey, Progress},
    ids::Ids,
    launcher::BoxError,
    lifecycle::State,
    notify::{Hint, Notifier},
    peers::Peers,
    pg::{self, DeadLetter, LastAttempt, Park},
    queue::{Body, DeliveryQueue, Enqueue, Leased},
    receipt::{Receipt, ReceiptOutcome},
    retry::{DeadReason, Rules, Standing, Verdict, verdict},
    sink::{AttemptReport, Outcome, Parcel, Sink},
    telemetry::Chain,
};
use bytes::Bytes;
use futures::future::join_all;
use jiff::Timestamp;
use metrics::{counter, histogram};
use sqlx::PgPool;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use crate::{
    admission::{Admission, Place, Refusal, Request},
    batching::Batcher,
    bodies::Bodies,
    closed::{ClosedDeliveries, Turn},
    config::LoopConfig,
    connections::Connections,
    failing::{Failing, failed},
    hold::{HANDED_OVER, Hold},
    lanes::Homes,
    parking::Parking,
    patience::{Patience, held_during},
    recall::Recall,
    receipts::Receipts,
    slots::{Slot, Slots},
};

/// What a [`Deliverer`] is made of.
pub struct Parts {
    /// The database.
    pub pool: PgPool,
    /// Where the deliveries come from, and where retries and dead letters go.
    pub queue: Arc<dyn DeliveryQueue>,
    /// Says that connections changed and deliveries were closed.
    pub hints: Arc<dyn Notifier>,
    /// The other workers, who share the limits.
    pub peers: Peers,
    /// Makes the attempts.
    pub webhooks: Box<dyn Sink>,
    /// Limits and the retry policy.
    pub settings: LoopConfig,
    /// How long a hold on a delivery lasts.
    pub lease: Duration,
    /// The longest that a batch is gathered.
    pub longest_gathering: Duration,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// New ids.
    pub ids: Arc<dyn Ids>,
    /// Which organizations have a lane of their own.
    pub homes: Homes,
    /// In `0.0..1.0`; chooses the jitter.
    pub random: fn() -> f64,
    /// For what runs beside the deliveries.
    pub tasks: TaskTracker,
    /// From then on nothing is insisted on.
    pub stop: CancellationToken,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

/// Brings deliveries to their end. The worker's lanes feed it.
pub struct Deliverer {
    parts: Parts,
    connections: Connections,
    bodies: Bodies,
    batches: Batcher<InHand>,
    admission: Admission,
    failing: Failing,
    parking: Parking,
    recall: Recall,
    patience: Patience,
    closed: ClosedDeliveries,
    receipts: Receipts,
}

impl std::fmt::Debug for Deliverer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deliverer").finish_non_exhaustive()
    }
}

/// A delivery in a worker's hands, with the slot of its lane that it takes.
#[derive(Debug)]
struct InHand {
    hold: Hold,
    progress: Progress,
    handed_out: u32,
    receiver: Arc<Receiver>,
    slot: Slot,
}

/// Whether a delivery is in the lane in which it belongs.
enum Moved {
    Yes,
    No,
    /// It is not known. An attempt where it is would be one of two.
    Perhaps,
}

/// What may have been moved is tried again after this time.
const MOVED_AGAIN: Duration = Duration::from_secs(1);

impl Deliverer {
    /// Starts what runs beside the deliveries: it follows hints, parks, and sends receipts, until the stop.
    pub fn start(parts: Parts) -> Self {
        let (pool, settings, stop, tasks) = (&parts.pool, &parts.settings, &parts.stop, &parts.tasks);
        let ttl = Duration::from_secs(settings.connection_ttl_s);
        let connections = Connections::new(pool.clone(), settings.connection_cache, ttl);
        let (hints, ids) = (Arc::clone(&parts.hints), Arc::clone(&parts.ids));
        let closed = ClosedDeliveries::new(pool.clone(), hints, ids, settings.lifetime());
        let following = connections.clone().follow(Arc::clone(&parts.hints));
        tasks.spawn(stop.clone().run_until_cancelled_owned(following));
        let following = closed.clone().follow();
        tasks.spawn(stop.clone().run_until_cancelled_owned(following));
        let patience = Patience::new(stop.clone());
        let (queue, buffer) = (Arc::clone(&parts.queue), settings.receipt_buffer);
        let admission = Admission::new(
            settings.connection,
            settings.breaker,
            settings.connection_cache,
            parts.peers.clone(),
            parts.random,
        );
        let (hints, after) = (Arc::clone(&parts.hints), settings.breaker.disable_after_s);
        Self {
            connections,
            bodies: Bodies::new(pool.clone(), settings.body_cache_bytes),
            batches: Batcher::new(parts.longest_gathering, stop.clone()),
            admission,
            failing: Failing::new(pool.clone(), hints, after, tasks.clone()),
            parking: Parking::start(pool.clone(), Arc::clone(&parts.hints), patience.clone(), tasks),
            recall: Recall::new(pool.clone(), Arc::clone(&parts.hints), tasks.clone()),
            patience,
            closed,
            receipts: Receipts::start(queue, buffer, tasks, stop.clone()),
            parts,
        }
    }

    /// Sends off what is gathered for batches: their lane has no slot left for what they wait for.
    pub(crate) fn flush_batches(&self) {
        self.batches.flush_all();
    }

    /// As [`deliver`](Self::deliver), for a delivery that came in one message with others, for which there were slots: waits
    /// for one, and holds it meanwhile. At a stop it is left to the queue.
    pub(crate) async fn deliver_when_free(&self, mut leased: Leased, slots: &Slots) {
        let hold = Hold::new(leased.key, leased.lease, self.parts.lease);
        let slot = pin!(self.parts.stop.run_until_cancelled(slots.acquire()));
        let slot = held_during(&[&hold], slot).await;
        let Some(slot) = slot else { return hold.put_back(HANDED_OVER).await };
        leased.lease = hold.into_lease();
        self.deliver(leased, slot).await;
    }

    /// Brings a delivery to its end, or to others of its batch whose task does. At a stop it may be left to the
    /// queue, which hands it out again.
    pub async fn deliver(&self, leased: Leased, slot: Slot) {
        let Leased { key, progress, lane, handed_out, wait, body, lease } = leased;
        let hold = Hold::new(key, lease, self.parts.lease);
        if let Some(wait) = wait {
            let park = Park {
                key,
                next: progress.next(progress.attempts),
                wait,
                paced: false,
                reason: "the queue has no room for deliveries that wait".to_owned(),
                last: LastAttempt::default(),
            };
            return Box::pin(self.parking.park(park, hold, "queue_full", slot)).await;
        }
        if let Some(home) = self.parts.homes.elsewhere(key.organization, lane).await {
            match Box::pin(self.moved(home, &hold, progress, handed_out, &body)).await {
                Moved::Yes => return hold.ack().await,
                Moved::Perhaps => return hold.put_back(MOVED_AGAIN).await,
                Moved::No => {}
            }
        }
        let prepared = if handed_out > self.parts.settings.max_handed_out {
            Some(Err(DeadReason::RedeliveredTooOften))
        } else if progress.turn > 0 && self.age(progress) > self.parts.settings.lifetime() {
            Some(Err(DeadReason::Expired))
        } else {
            self.patience.insist(&[&hold], || self.prepare(&key, &body)).await
        };
        let (receiver, body) = match prepared {
            Some(Ok(prepared)) => prepared,
            Some(Err(reason)) => {
                let body = match body {
                    Body::Inline(body) => body,
                    Body::Stored => Bytes::new(),
                };
                Box::pin(self.give_up(hold, DeadLetter::new(key, progress, reason), body)).await;
                return;
            }
            None => return hold.put_back(HANDED_OVER).await,
        };
        let delivery = Delivery { key, body };
        let batch = receiver.rules.get(&key.subscription).and_then(|rules| rules.batch);
        let in_hand = InHand { hold, progress, handed_out, receiver: Arc::clone(&receiver), slot };
        match batch {
            None => self.attempt_wanted(&receiver, false, vec![delivery], vec![in_hand]).await,
            Some(policy) => {
                let Some(batch) = self.batches.add(policy, delivery, in_hand).await else { return };
                // Of several holds on one delivery the latest is the one that the queue knows.
                let in_hand: Vec<InHand> =
                    batch.held.into_iter().filter_map(|mut holds| holds.pop()).collect();
                // Whoever was added last may know a later version of the connection.
                let latest =
                    in_hand.iter().map(|one| &one.receiver).max_by_key(|known| known.connection.version);
                let receiver = latest.map_or(receiver, Arc::clone);
                self.attempt_wanted(&receiver, true, batch.deliveries, in_hand).await;
            }
        }
    }

    /// Enters a delivery in the lane in which it belongs, as its next turn: with the same turn the queue would take it
    /// for a repetition. What the queue refuses is delivered where it is: so one that is full, and takes nothing more, is
    /// emptied all the same.
    async fn moved(&self, lane: u16, hold: &Hold, progress: Progress, handed_out: u32, body: &Body) -> Moved {
        let key = hold.key;
        if handed_out > 1 {
            // Whoever had it before may have delivered it in this turn; of the next one that is not known.
            let turn = Turn { key, progress, handed_out, age: self.age(progress) };
            match self.closed.overruled(&[turn]).await {
                Ok(overruled) if !overruled.contains(&true) => {}
                _ => return Moved::No,
            }
        }
        let next = progress.next(progress.attempts);
        let delivery = Enqueue { key, progress: next, lane: Some(lane), body: body.clone() };
        let entering = pin!(self.parts.queue.enqueue(std::slice::from_ref(&delivery)));
        let entered = held_during(&[hold], entering).await;
        match entered {
            Ok(()) => {
                counter!("bus_deliveries_moved").increment(1);
                Moved::Yes
            }
            Err(failed) => {
                debug!(delivery.id = %key.id, error = %Chain(&failed), "Not moved to its lane");
                if failed.is_refusal() { Moved::No } else { Moved::Perhaps }
            }
        }
    }

    /// Attempts those that are still wanted, in one request, if their connection has room for one; else they are parked,
    /// which costs no attempt. Those that are closed, or overtaken by a later turn, are finished. At a stop all may be left
    /// to the queue.
    async fn attempt_wanted(
        &self,
        receiver: &Receiver,
        batched: bool,
        deliveries: Vec<Delivery>,
        in_hand: Vec<InHand>,
    ) {
        let Some(first) = in_hand.first() else { return };
        let request = Request {
            connection: &receiver.connection,
            lane: first.slot.usage(),
            slots: in_hand.len(),
            returns: in_hand.iter().any(|one| one.progress.turn > 0),
        };
        let place = {
            let holds: Vec<&Hold> = in_hand.iter().map(|one| &one.hold).collect();
            held_during(&holds, pin!(self.admission.admit(request))).await
        };
        let place = match place {
            Ok(place) => place,
            Err(refusal) => return Box::pin(self.park_all(in_hand, refusal)).await,
        };
        let turn = |one: &InHand| Turn {
            key: one.hold.key,
            progress: one.progress,
            handed_out: one.handed_out,
            age: self.age(one.progress),
        };
        let turns: Vec<Turn> = in_hand.iter().map(turn).collect();
        let holds: Vec<&Hold> = in_hand.iter().map(|one| &one.hold).collect();
        // Last, since a later answer may be another: whatever takes time is done by now.
        let known = self.patience.insist(&holds, || async { Ok(self.closed.overruled(&turns).await?) }).await;
        let Some(overruled) = known else {
            join_all(in_hand.into_iter().map(|one| one.hold.put_back(HANDED_OVER))).await;
            return;
        };
        let (over, wanted): (Vec<_>, Vec<_>) =
            deliveries.into_iter().zip(in_hand).zip(overruled).partition(|(_, overruled)| *overruled);
        let finished = over.into_iter().map(|((delivery, one), _)| async move {
            counter!("bus_deliveries_overruled").increment(1);
            debug!(delivery.id = %delivery.key.id, turn = one.progress.turn, "Closed, or overtaken by a later turn");
            one.hold.ack().await;
            drop(one.slot);
        });
        let (wanted, in_hand): (Vec<_>, Vec<_>) = wanted.into_iter().map(|(one, _)| one).unzip();
        let attempted = async {
            match &wanted[..] {
                [] => {}
                [one] if !batched => self.attempt(receiver, Parcel::Single(one), in_hand, place).await,
                all => self.attempt(receiver, Parcel::Batch(all), in_hand, place).await,
            }
        };
        tokio::join!(join_all(finished), attempted);
    }

    /// They come again, in their next turn, with the attempts that they have behind them.
    async fn park_all(&self, in_hand: Vec<InHand>, Refusal { why, wait }: Refusal) {
        join_all(in_hand.into_iter().map(|InHand { hold, progress, slot, .. }| {
            let (key, next) = (hold.key, progress.next(progress.attempts));
            let (reason, last) = (why.to_string(), LastAttempt::default());
            let park = Park { key, next, wait, paced: true, reason, last };
            self.parking.park(park, hold, why.as_str(), slot)
        }))
        .await;
    }

    /// What an attempt needs, or the reason why there can be none.
    async fn prepare(
        &self,
        key: &DeliveryKey,
        body: &Body,
    ) -> Result<Result<(Arc<Receiver>, Bytes), DeadReason>, BoxError> {
        let receiver = self.connections.get(key).await?;
        let Some(receiver) = receiver.filter(|found| found.connection.organization == key.organization)
        else {
            return Ok(Err(DeadReason::ConnectionDeleted));
        };
        if !receiver.connection.enabled {
            return Ok(Err(DeadReason::ConnectionDisabled));
        }
        if !matches!(receiver.connection.target, Target::Webhook(_)) {
            return Ok(Err(DeadReason::ConnectionReceivesNothing));
        }
        let body = match body {
            Body::Inline(body) => Ok(body.clone()),
            Body::Stored => Box::pin(self.bodies.get(key.event)).await?,
        };
        Ok(body.map(|body| (receiver, body)))
    }

    /// Makes one attempt and draws its consequences, for each delivery of the parcel.
    async fn attempt(&self, receiver: &Receiver, parcel: Parcel<'_>, in_hand: Vec<InHand>, mut place: Place) {
        let at = self.parts.clock.now();
        let holds: Vec<&Hold> = in_hand.iter().map(|one| &one.hold).collect();
        let attempt = pin!(self.parts.webhooks.attempt(&receiver.connection, parcel, at));
        let reports = held_during(&holds, attempt).await;
        if let Some(report) = reports.first() {
            histogram!("bus_attempt_duration_seconds").record(report.duration.as_secs_f64());
        }
        let has_failed = failed(&reports);
        let changed = place.report(has_failed);
        self.failing.note(&receiver.connection, has_failed, changed);
        let settled = parcel.deliveries().iter().zip(reports).zip(in_hand).map(
            |((delivery, report), InHand { hold, progress, slot, .. })| async move {
                let outcome = self.settle(receiver, hold, delivery, progress, &report, at).await;
                counter!("bus_attempts", "outcome" => outcome.as_str()).increment(1);
                self.receipts.send(receipt(&delivery.key, progress, outcome, report, at));
                // Not earlier: what is not settled yet counts among what is in hand.
                drop(slot);
            },
        );
        join_all(settled).await;
        drop(place);
        if has_failed == Some(false) {
            self.recall.if_there_is_room(&self.admission, &receiver.connection);
        }
    }

    /// Draws the consequence of an attempt.
    async fn settle(
        &self,
        receiver: &Receiver,
        hold: Hold,
        delivery: &Delivery,
        progress: Progress,
        report: &AttemptReport,
        at: Timestamp,
    ) -> ReceiptOutcome {
        let key = delivery.key;
        let followed_by = match &report.outcome {
            Outcome::Delivered => ReceiptOutcome::Delivered,
            Outcome::Deferred { .. } => ReceiptOutcome::Deferred,
            Outcome::Failed { .. } => ReceiptOutcome::Failed,
        };
        if followed_by != ReceiptOutcome::Delivered && hold.is_lost() {
            warn!(delivery.id = %key.id, "The hold ended before the attempt; whoever has the delivery now decides");
            return followed_by;
        }
        let last = || LastAttempt {
            status: report.status,
            body: Some(report.answer.clone()),
            error: report.outcome.reason(),
            at: Some(at),
            duration: Some(report.duration),
        };
        let (attempts, reason) = match self.verdict(receiver, &key, progress, &report.outcome) {
            Verdict::Delivered => {
                hold.ack().await;
                return followed_by;
            }
            Verdict::Retry { wait, attempts, reason } => {
                debug!(delivery.id = %key.id, connection.id = %key.connection, ?wait, reason, "Another attempt");
                let next = progress.next(attempts);
                let waits = wait <= self.parts.queue.longest_wait() && hold.postpone(next, wait).await;
                if !waits {
                    let park = Park { key, next, wait, paced: false, reason, last: last() };
                    Box::pin(self.parking.park(park, hold, "retry", ())).await;
                }
                return followed_by;
            }
            Verdict::Dead { reason, attempts } => (attempts, reason),
            Verdict::Gone { attempts } => {
                Box::pin(self.disable(receiver, &hold)).await;
                (attempts, DeadReason::EndpointGone)
            }
        };
        let dead =
            DeadLetter { last: last(), ..DeadLetter::new(key, Progress { attempts, ..progress }, reason) };
        let given_up = Box::pin(self.give_up(hold, dead, delivery.body.clone())).await;
        if given_up { ReceiptOutcome::Dead } else { followed_by }
    }

    /// Since the delivery's lifetime began. The clock of whoever began it may be ahead of ours.
    fn age(&self, progress: Progress) -> Duration {
        Duration::try_from(self.parts.clock.now().duration_since(progress.since)).unwrap_or_default()
    }

    fn verdict(
        &self,
        receiver: &Receiver,
        key: &DeliveryKey,
        progress: Progress,
        outcome: &Outcome,
    ) -> Verdict {
        let own = receiver.rules.get(&key.subscription).and_then(|rules| rules.retry.as_ref());
        let default = &self.parts.settings.retry;
        let policy = own.map_or(Cow::Borrowed(default), |own| Cow::Owned(own.apply(default)));
        let final_statuses = match &receiver.connection.target {
            Target::Webhook(webhook) => &webhook.final_statuses[..],
            Target::Publisher => &[],
        };
        let rules: Rules<'_> = self.parts.settings.rules(&policy, final_statuses);
        let standing = Standing { attempts: progress.attempts, age: self.age(progress) };
        verdict(outcome, &rules, &standing, (self.parts.random)())
    }

    /// The endpoint says that it is gone for good (HTTP 410): nothing is matched for its connection any more.
    /// At a stop it may stay enabled; the delivery's next attempt then finds out again.
    async fn disable(&self, receiver: &Receiver, hold: &Hold) {
        let connection = &receiver.connection;
        let held = [hold];
        let disabled = self.patience.insist(&held, || async {
            let (organization, id, version) = (connection.organization, connection.id, connection.version);
            let reason = "the endpoint answered 410 (Gone)";
            Ok(pg::disable_connection(&self.parts.pool, organization, id, version, reason).await?)
        });
        if disabled.await == Some(true) {
            info!(connection.id = %connection.id, "Connection disabled: its endpoint answered 410");
            self.parts.hints.notify(Hint::ConnectionChanged(connection.id)).await;
        }
    }

    /// The stream first, then the row, then the acknowledgement: whatever dies in between, the delivery
    /// comes again and the same is done once more. False if it was not given up: it was closed or replayed
    /// meanwhile, or it is left to another worker.
    async fn give_up(&self, hold: Hold, dead: DeadLetter, body: Bytes) -> bool {
        let (key, turn) = (dead.key, dead.progress.turn);
        let held = [&hold];
        let recorded = self.patience.insist(&held, || async {
            let standing = pg::standing(&self.parts.pool, key.id).await?;
            // Dead in this very turn: whoever recorded it did not come to the acknowledgement.
            let repeated = standing == Some((State::Dead, turn));
            if !repeated && standing.is_some_and(|(state, at)| state.overrules(at, turn)) {
                return Ok(false);
            }
            self.parts.queue.dead_letter(&dead, &body).await?;
            Ok(pg::bury(&self.parts.pool, &dead).await? || repeated)
        });
        let Some(given_up) = recorded.await else {
            hold.put_back(HANDED_OVER).await;
            return false;
        };
        if given_up {
            counter!("bus_dead_letters", "reason" => dead.reason.as_str()).increment(1);
            warn!(delivery.id = %key.id, event.uid = %key.event, connection.id = %key.connection,
                  reason = %dead.reason, attempts = dead.progress.attempts, "Delivery given up");
        }
        hold.ack().await;
        given_up
    }
}

fn receipt(
    key: &DeliveryKey,
    progress: Progress,
    outcome: ReceiptOutcome,
    report: AttemptReport,
    at: Timestamp,
) -> Receipt {
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
        error: report.outcome.reason(),
        at,
        duration_ms: u32::try_from(report.duration.as_millis()).unwrap_or(u32::MAX),
    }
}
