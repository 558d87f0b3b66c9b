//! The reference model: what is true of each delivery, whatever queue carries it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bus_core::{
    delivery::DeliveryKey,
    ids::DeliveryId,
    lifecycle::{State, Step},
};

/// Attempts that the retry policy of this test allows.
pub(crate) const MAX_ATTEMPTS: u32 = 4;

/// One delivery, as it must be.
#[derive(Debug)]
pub(crate) struct Truth {
    pub(crate) key: DeliveryKey,
    pub(crate) state: State,
    /// Failures since it was published or replayed.
    pub(crate) attempts: u32,
    /// How often the subscriber was asked since then.
    pub(crate) asked: u32,
    /// A worker may hold it, or may have died holding it.
    pub(crate) held: bool,
    /// A holder outlived its hold and then reported success: at-least-once allows a repeat.
    pub(crate) repeatable: bool,
    /// An answer came when it was no longer sure that its holder still had it: this machine was slow.
    pub(crate) vague: bool,
    /// It may not be attempted before (invariant I5).
    pub(crate) not_before: Option<Instant>,
    /// Somebody cancelled it, perhaps after it was delivered: the bus, which learns of deliveries late, then
    /// refuses to replay it.
    pub(crate) cancelled: bool,
    /// What happened, for whoever reads a failure.
    pub(crate) story: Vec<String>,
}

/// All deliveries.
#[derive(Debug, Default)]
pub(crate) struct Reference(BTreeMap<uuid::Uuid, Truth>);

impl Reference {
    pub(crate) fn published(&mut self, key: DeliveryKey) {
        let truth = Truth {
            key,
            state: State::Queued,
            attempts: 0,
            asked: 0,
            held: false,
            repeatable: false,
            vague: false,
            not_before: None,
            cancelled: false,
            story: vec!["published".into()],
        };
        self.0.insert(key.id.0, truth);
    }

    pub(crate) fn of(&mut self, id: DeliveryId) -> &mut Truth {
        self.0.get_mut(&id.0).expect("a delivery that was published")
    }

    /// Whatever waits for its time is due now.
    pub(crate) fn all_due(&mut self) {
        self.0.values_mut().for_each(|truth| truth.not_before = None);
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Truth> {
        self.0.values()
    }
}

impl Truth {
    pub(crate) fn note(&mut self, what: impl Into<String>) {
        self.story.push(what.into());
    }

    pub(crate) fn wrong(&self, what: &str) -> ! {
        panic!("{what}: {:?} {}\n{}", self.key.id, self.state.as_str(), self.story.join("\n"));
    }

    /// A worker asks the subscriber. `first`: a queue that cannot find messages by delivery may still hand
    /// out a first turn that was closed.
    pub(crate) fn asks(&mut self, first_turns_may_slip: bool) {
        self.note("asked");
        if self.vague {
            self.held = true;
            return;
        }
        if self.held {
            self.wrong("asked while another worker holds it");
        }
        if self.not_before.is_some_and(|due| Instant::now() < due) {
            self.wrong("asked before its wait was over");
        }
        let slipped = first_turns_may_slip && self.asked == 0;
        match self.state {
            State::Queued | State::Waiting => {}
            State::Acked | State::Cancelled if slipped => {}
            State::Delivered if self.repeatable => {}
            _ => self.wrong("asked though it is over"),
        }
        self.asked += 1;
        self.held = true;
    }

    pub(crate) fn succeeds(&mut self) {
        self.note("succeeded");
        self.state = self.state.after(Step::Succeeded, false);
    }

    pub(crate) fn fails(&mut self) {
        self.note("failed");
        if self.state.is_open() {
            self.attempts += 1;
            let step = if self.attempts >= MAX_ATTEMPTS { Step::GivenUp } else { Step::Postponed };
            self.state = self.state.after(step, false);
        }
    }

    pub(crate) fn is_deferred(&mut self, wait: Duration) {
        self.note("deferred");
        self.not_before = Some(Instant::now() + wait);
        self.state = self.state.after(Step::Postponed, false);
    }

    /// Somebody asks for it once more.
    pub(crate) fn is_replayed(&mut self) {
        self.note("replayed");
        let state = self.state.after(Step::Replay, false);
        if state != self.state {
            self.state = state;
            self.attempts = 0;
            self.not_before = None;
        }
    }

    pub(crate) fn closed_by(&mut self, step: Step) {
        self.note(format!("{step:?}"));
        self.cancelled |= step == Step::Cancel;
        self.state = self.state.after(step, false);
    }
}
