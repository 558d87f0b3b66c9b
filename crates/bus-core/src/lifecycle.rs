//! The states of a delivery, and which leads to which.
//!
//! ```text
//!            taken            success
//! pending ──────────▶ in flight ──────▶ delivered
//!    ▲                  │   │
//!    │ due              │   └─ attempts exhausted, final, expired ─▶ dead
//!    │                  │ failure, retryAfter                         │
//!    └──── waiting ◀────┘                                             │ replay
//!             ▲ └───────────────────────────────────────────────────◀─┘
//!
//! pending, in flight, waiting ── ack ──▶ acked        (replay ▶ waiting)
//! pending, in flight, waiting ── cancel ──▶ cancelled (for good) ◀── discard ── dead
//! ```
//!
//! A result belongs to a turn. It changes something only if the delivery is open and no later turn has begun.
//! The same rules are the guards of the statements in `pg/deliveries.rs`, `pg/dead_letters.rs` and `pg/replays`,
//! and, through the message id, of the streams; the tests of this module and the model-based test hold them to
//! this table.

use std::str::FromStr;

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// In the queue, or in a worker's hands, for the first time or again.
    Queued,
    /// Waits for its next try.
    Waiting,
    /// The subscriber took it.
    Delivered,
    /// Given up.
    Dead,
    /// The subscriber says that it has it.
    Acked,
    /// Not to be delivered.
    Cancelled,
}

/// What happens to a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// An attempt of this turn succeeded.
    Succeeded,
    /// An attempt of this turn failed or was deferred; the next turn waits.
    Postponed,
    /// This turn is given up.
    GivenUp,
    /// The waiting turn is due and goes back into the queue.
    Returned,
    /// The subscriber says that it has it.
    Ack,
    /// It is not to be delivered.
    Cancel,
    /// Somebody asks for it once more, in a new turn.
    Replay,
    /// A dead letter is not wanted any more.
    Discard,
}

impl Step {
    /// All steps.
    pub const ALL: [Self; 8] = [
        Self::Succeeded,
        Self::Postponed,
        Self::GivenUp,
        Self::Returned,
        Self::Ack,
        Self::Cancel,
        Self::Replay,
        Self::Discard,
    ];
}

impl State {
    /// All states.
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Waiting, Self::Delivered, Self::Dead, Self::Acked, Self::Cancelled];

    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Waiting => "waiting",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
            Self::Acked => "acked",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether there may be another attempt.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Queued | Self::Waiting)
    }

    /// Whether a worker that holds this delivery in `turn` is to drop it without an attempt: it is closed, or
    /// a later turn has begun. `at` is the turn of the state.
    pub fn overrules(self, at: i64, turn: i64) -> bool {
        match self {
            Self::Acked | Self::Cancelled => true,
            Self::Delivered | Self::Dead => at >= turn,
            Self::Queued | Self::Waiting => at > turn,
        }
    }

    /// The state after a step. `late`: the step's turn is not the latest one.
    #[must_use]
    pub fn after(self, step: Step, late: bool) -> Self {
        match step {
            Step::Succeeded if self.is_open() && !late => Self::Delivered,
            Step::Postponed if self.is_open() && !late => Self::Waiting,
            Step::GivenUp if self.is_open() && !late => Self::Dead,
            Step::Returned if self == Self::Waiting && !late => Self::Queued,
            Step::Ack if self.is_open() => Self::Acked,
            Step::Cancel if self.is_open() => Self::Cancelled,
            Step::Replay if self != Self::Cancelled => Self::Waiting,
            Step::Discard if self == Self::Dead => Self::Cancelled,
            _ => self,
        }
    }
}

impl FromStr for State {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;

    fn steps() -> impl Strategy<Value = Vec<(Step, bool)>> {
        prop::collection::vec((select(&Step::ALL[..]), any::<bool>()), 0..40)
    }

    proptest! {
        #[test]
        fn a_cancelled_delivery_stays_cancelled(steps in steps()) {
            let end = steps.iter().fold(State::Cancelled, |state, (step, late)| state.after(*step, *late));
            prop_assert_eq!(end, State::Cancelled);
        }

        #[test]
        fn nothing_but_a_replay_or_a_discard_reopens_or_changes_what_is_over(steps in steps()) {
            for start in State::ALL.into_iter().filter(|state| !state.is_open()) {
                let mut state = start;
                for (step, late) in steps.iter().take_while(|(step, _)| !matches!(step, Step::Replay | Step::Discard)) {
                    state = state.after(*step, *late);
                }
                prop_assert_eq!(state, start);
            }
        }

        #[test]
        fn a_late_result_changes_nothing(state in select(&State::ALL[..])) {
            for step in [Step::Succeeded, Step::Postponed, Step::GivenUp, Step::Returned] {
                prop_assert_eq!(state.after(step, true), state);
            }
        }

        #[test]
        fn a_worker_is_overruled_by_what_is_over_and_by_a_later_turn(
            state in select(&State::ALL[..]), at in 0i64..100, turn in 0i64..100,
        ) {
            let overruled = state.overrules(at, turn);
            match state {
                State::Acked | State::Cancelled => prop_assert!(overruled),
                _ if at > turn => prop_assert!(overruled),
                State::Queued | State::Waiting => prop_assert!(!overruled),
                // An earlier end does not overrule a replay.
                State::Delivered | State::Dead => prop_assert_eq!(overruled, at == turn),
            }
        }
    }

    #[test]
    fn states_are_read_as_they_are_written() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert_eq!("gone".parse::<State>(), Err(()));
    }
}
