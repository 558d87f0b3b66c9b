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
