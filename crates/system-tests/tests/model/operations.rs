//! The operations, each on the world and on the reference model.

use std::{collections::BTreeMap, fmt, time::Duration};

use bus_core::{
    audit::By,
    delivery::DeliveryKey,
    ids::{DeliveryId, Ids as _, ReplayId, SystemIds},
    lifecycle::{State, Step},
    notify::{Hint, Notifier as _},
    pg::{self, Closed, NewReplay, Selection, Whose},
    sink::{Failure, Outcome},
};
use cron_scheduler::{replay_due, return_due};
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::{
    sync::oneshot,
    task::AbortHandle,
    time::{Instant, timeout},
};

use super::{
    reference::Reference,
    world::{Kind, LEASE, Note, World},
};

/// Nothing in this test takes longer unless it hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// A hold that is younger is certainly held; see the worker's `Hold`.
const SURE: Duration = Duration::from_millis(1_000);

/// An attempt that is under way.
struct Attempt {
    delivery: DeliveryId,
    number: u64,
    answer: oneshot::Sender<Outcome>,
    task: AbortHandle,
    begun: Instant,
    /// Its worker does not react until its hold is over.
    frozen: bool,
}

/// How often each operation was done.
#[derive(Debug, Default)]
pub(crate) struct Counts(BTreeMap<&'static str, usize>);

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(operation, n)| write!(f, "{operation} {n}, "))
    }
}

pub(crate) struct Run {
    world: World,
    truth: Reference,
    rng: StdRng,
    under_way: Vec<Attempt>,
    /// The deliveries of each event.
    published: Vec<Vec<DeliveryKey>>,
    counts: Counts,
}

impl Run {
    pub(crate) async fn new(kind: Kind, rng: StdRng) -> Self {
        Self {
            world: World::new(kind).await,
            truth: Reference::default(),
            rng,
            under_way: Vec::new(),
            published: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// One random operation.
    pub(crate) async fn step(&mut self) {
        self.settle_the_old().await;
        let operation = match self.rng.random_range(0..1_000) {
            0..140 => {
                self.publish().await;
                "publish"
            }
            140..460 => {
                let max = self.rng.random_range(1..8);
                self.claim(max).await;
                "claim"
            }
            460..580 => {
                self.answer(|_| Outcome::Delivered).await;
                "succeed"
            }
            580..800 => {
                self.answer(|_| Outcome::from(Failure::Status(500))).await;
                "fail"
            }
            800..870 => {
                // A few milliseconds stay in the queue, six seconds are parked.
                self.answer(|rng| Outcome::Deferred {
                    wait: Duration::from_millis(if rng.random_bool(0.3) {
                        6_000
                    } else {
                        rng.random_range(0..20)
                    }),
                    why: "later".into(),
                })
                .await;
                "retryAfter"
            }
            870..905 => {
                self.close(Closed::Acked, Step::Ack).await;
                "ack"
            }
            905..920 => {
                self.close(Closed::Cancelled, Step::Cancel).await;
                "cancel"
            }
            920..940 => {
                self.crash();
                "crash"
            }
            940..950 => {
                self.freeze();
                "freeze"
            }
            950..970 => {
                self.replay().await;
                "replay"
            }
            970..997 => {
                self.return_due().await;
                "return"
            }
            _ => {
                self.advance().await;
                "advance"
            }
        };
        *self.counts.0.entry(operation).or_default() += 1;
    }

    async fn publish(&mut self) {
        let matched: Vec<_> =
            self.world.subscriptions.iter().filter(|_| self.rng.random_bool(0.5)).copied().collect();
        if matched.is_empty() {
            return;
        }
        let keys = self.world.publish(&matched).await;
        for key in &keys {
            self.truth.published(*key);
        }
        self.published.push(keys);
    }

    /// A worker takes what there is. Each delivery is asked about, or found to be over, before the next
    /// operation.
    async fn claim(&mut self, max: usize) -> usize {
        let worker = self.rng.random_range(0..2);
        let mut started = self.world.pull(worker, max).await;
        let taken = started.len();
        while !started.is_empty() {
            match self.note().await {
                // Overruled, or parked for want of room.
                Note::Done(number) => drop(started.remove(&number).expect("nothing else is being done")),
                Note::Asked(key, answer) => {
                    self.truth.of(key.id).asks(self.world.kind == Kind::JetStream);
                    let number = started.iter().find(|(_, (id, _))| *id == key.id).map(|(number, _)| *number);
                    let number = number.expect("one that was started");
                    let (delivery, task) = started.remove(&number).unwrap();
                    let begun = Instant::now();
                    self.under_way.push(Attempt { delivery, number, answer, task, begun, frozen: false });
                }
            }
        }
        taken
    }

    async fn note(&mut self) -> Note {
        timeout(DEADLINE, self.world.notes.recv()).await.expect("the workers go on").unwrap()
    }

    /// The subscriber answers one of the attempts that are under way.
    async fn answer(&mut self, outcome: impl FnOnce(&mut StdRng) -> Outcome) {
        let live: Vec<usize> = (0..self.under_way.len()).filter(|n| !self.under_way[*n].frozen).collect();
        if let Some(chosen) = live.choose(&mut self.rng) {
            let outcome = outcome(&mut self.rng);
            self.settle(*chosen, outcome).await;
        }
    }

    /// The subscriber's answer, and what the worker makes of it.
    async fn settle(&mut self, place: usize, outcome: Outcome) {
        let attempt = self.under_way.swap_remove(place);
        let truth = self.truth.of(attempt.delivery);
        let age = attempt.begun.elapsed();
        attempt.answer.send(outcome.clone()).expect("the worker waits");
        match &outcome {
            Outcome::Delivered => {
                truth.succeeds();
                // Somebody else may have it by now.
                truth.repeatable |= age > SURE;
            }
            _ if attempt.frozen => truth.note("too late"),
            Outcome::Deferred { wait, .. } => truth.is_deferred(*wait),
            Outcome::Failed { .. } => truth.fails(),
        }
        if !attempt.frozen {
            truth.held = false;
            if attempt.begun.elapsed() > LEASE - LEASE / 5 {
                truth.note("this machine is slow");
                truth.vague = true;
            }
        }
        match self.note().await {
            Note::Done(number) => assert_eq!(number, attempt.number),
            Note::Asked(key, _) => self.truth.of(key.id).wrong("asked by nobody"),
        }
    }

    /// Attempts that would outlive their hold succeed in time; frozen ones fail, or succeed, too late.
    async fn settle_the_old(&mut self) {
        let old = |attempt: &Attempt| {
            let limit = if attempt.frozen { LEASE } else { SURE };
            attempt.begun.elapsed() > limit
        };
        while let Some(place) = self.under_way.iter().position(old) {
            let late = self.under_way[place].frozen && self.rng.random_bool(0.7);
            let outcome = if late { Failure::Status(500).into() } else { Outcome::Delivered };
            self.settle(place, outcome).await;
        }
    }

    /// As the API does it.
    async fn close(&mut self, closed: Closed, step: Step) {
        // A late one more often than an early one: those are still open.
        let Some(event) = self.published[self.published.len().saturating_sub(50)..].choose(&mut self.rng)
        else {
            return;
        };
        let Some(chosen) = event.choose(&mut self.rng).copied() else { return };
        let of_connection: Vec<DeliveryId> =
            event.iter().filter(|key| key.connection == chosen.connection).map(|key| key.id).collect();
        let (pool, organization) = (&self.world.pool, self.world.organization);
        let ids = pg::close_deliveries(
            pool,
            organization,
            chosen.event,
            Some(chosen.connection),
            closed,
            &By::system(SystemIds.next()),
        )
        .await
        .unwrap()
        .expect("the event is stored");
        self.world.queue.withdraw(&ids).await.unwrap();
        let hint = match closed {
            Closed::Acked => Hint::Closed,
            Closed::Cancelled => Hint::Cancelled,
        };
        for id in &ids {
            self.world.hints.notify(hint(*id)).await;
        }
        for id in of_connection {
            let truth = self.truth.of(id);
            let was = truth.state;
            truth.closed_by(step);
            if was.is_open() && !ids.contains(&id) {
                truth.wrong("open, and not closed");
            }
            if was == State::Dead && ids.contains(&id) {
                truth.wrong("closed though it is dead");
            }
        }
    }

    /// A worker dies in the middle of an attempt: nothing is answered, nothing is put back.
    fn crash(&mut self) {
        let Some(place) = (0..self.under_way.len()).collect::<Vec<_>>().choose(&mut self.rng).copied() else {
            return;
        };
        let attempt = self.under_way.swap_remove(place);
        attempt.task.abort();
        let truth = self.truth.of(attempt.delivery);
        truth.note("its worker died");
        truth.held = false;
    }

    /// A worker stands still in the middle of an attempt, for longer than its hold lasts.
    fn freeze(&mut self) {
        let live: Vec<usize> = (0..self.under_way.len()).filter(|n| !self.under_way[*n].frozen).collect();
        if let Some(place) = live.choose(&mut self.rng) {
            let attempt = &mut self.under_way[*place];
            attempt.frozen = true;
            let truth = self.truth.of(attempt.delivery);
            truth.note("its worker stands still");
            truth.held = false;
        }
    }

    /// Somebody asks once more for a delivery that is over: as a job for one event and subscription.
    async fn replay(&mut self) {
        let over: Vec<DeliveryKey> = self
            .published
            .iter()
            .rev()
            .take(30)
            .flatten()
            .filter(|key| {
                let truth = self.truth.of(key.id);
                // One that is under way would be tried twice at a time, and rightly so.
                !truth.state.is_open()
                    && !truth.cancelled
                    && !truth.held
                    && self.under_way.iter().all(|attempt| attempt.delivery != key.id)
            })
            .copied()
            .collect();
        let Some(key) = over.choose(&mut self.rng) else { return };
        let selection = Selection::Event { event: key.event, subscription: Some(key.subscription) };
        let whose = Whose { organization: key.organization, only: None };
        let id = ReplayId(SystemIds.next());
        let new = NewReplay { id, whose, selection, per_second: 1_000, request: None };
        pg::create_replay(&self.world.pool, &new, &By::system(SystemIds.next())).await.unwrap();
        while replay_due(&self.world.pool).await.unwrap().is_zero() {}
        self.truth.of(key.id).is_replayed();
    }

    async fn return_due(&mut self) {
        while return_due(&self.world.pool, self.world.queue.as_ref()).await.unwrap().is_zero() {}
    }

    /// Holds end, and what is parked becomes due.
    async fn advance(&mut self) {
        while let Some(place) = self.under_way.iter().position(|attempt| !attempt.frozen) {
            self.settle(place, Outcome::Delivered).await;
        }
        tokio::time::sleep(LEASE).await;
        sqlx::query("UPDATE delivery_states SET due_at = now() WHERE state = 'waiting'")
            .execute(&self.world.pool)
            .await
            .unwrap();
        self.truth.all_due();
    }

    /// Lets everything come to its end, and compares.
    pub(crate) async fn finish(mut self) -> Counts {
        let until = Instant::now() + DEADLINE;
        loop {
            self.advance().await;
            self.settle_the_old().await;
            self.return_due().await;
            while self.claim(50).await > 0 {
                while !self.under_way.is_empty() {
                    self.settle(0, Outcome::Delivered).await;
                }
            }
            let waiting: i64 =
                sqlx::query_scalar("SELECT count(*) FROM delivery_states WHERE state = 'waiting'")
                    .fetch_one(&self.world.pool)
                    .await
                    .unwrap();
            if waiting == 0 && self.world.queue.depth().await.unwrap() == 0 {
                break;
            }
            assert!(Instant::now() < until, "{waiting} deliveries still wait");
        }
        for truth in self.truth.all() {
            if truth.vague {
                *self.counts.0.entry("vague").or_default() += 1;
                continue;
            }
            if truth.state.is_open() {
                truth.wrong("lost");
            }
            let standing = pg::standing(&self.world.pool, truth.key.id).await.unwrap();
            match (truth.state, standing.map(|(state, _)| state)) {
                // What never left the straight path has no row; one that was delivered first may be closed
                // after it, since only history knows. One that was delivered by a holder that had lost it may
                // have failed, and died, with the next holder.
                (State::Delivered, Some(State::Waiting | State::Dead)) if !truth.repeatable => {
                    truth.wrong("delivered")
                }
                (State::Delivered, _) => {}
                (state, Some(stored)) if state == stored => {}
                (_, stored) => truth.wrong(&format!("stored as {stored:?}")),
            }
            if truth.state == State::Dead {
                let attempts: i32 =
                    sqlx::query_scalar("SELECT attempts FROM delivery_states WHERE delivery_id = $1")
                        .bind(truth.key.id.0)
                        .fetch_one(&self.world.pool)
                        .await
                        .unwrap();
                if u32::try_from(attempts).unwrap() != truth.attempts {
                    truth.wrong(&format!("charged with {attempts} attempts instead of {}", truth.attempts));
                }
            }
            *self.counts.0.entry(truth.state.as_str()).or_default() += 1;
        }
        self.world.end().await;
        self.counts
    }
}
