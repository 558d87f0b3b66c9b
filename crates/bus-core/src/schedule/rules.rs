//! What a schedule says besides when.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::Recurrence;
use crate::{ids::ScheduleId, words::words};

words! {
    /// What becomes of ticks whose time went by while nobody could fire them.
    Missed {
        /// None is fired.
        Skip = "skip",
        /// The latest one is fired.
        FireOnce = "fire_once",
        /// The latest ones are fired, up to [`Rules::catch_up_limit`].
        CatchUp = "catch_up",
    }
}

words! {
    /// What becomes of a tick while the occurrence before it still has open deliveries.
    Overlap {
        /// It is fired all the same.
        Allow = "allow",
        /// It is skipped.
        Skip = "skip",
    }
}

/// What a schedule says besides when its ticks are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// No tick before this time.
    pub starts_at: Option<Timestamp>,
    /// No tick after this time.
    pub ends_at: Option<Timestamp>,
    /// Each tick is due up to so much later, milliseconds; how much is derived from schedule and tick.
    pub jitter_ms: u32,
    /// What becomes of ticks that were missed.
    pub missed: Missed,
    /// How many missed ticks are fired with [`Missed::CatchUp`], at least 1.
    pub catch_up_limit: u32,
    /// What becomes of ticks while the occurrence before is not delivered.
    pub overlap: Overlap,
}

impl Rules {
    /// The most that a tick may be put off by jitter: a day, milliseconds.
    pub const MAX_JITTER_MS: u32 = 86_400_000;

    /// The most missed ticks that a schedule may fire at once.
    pub const MAX_CATCH_UP: u32 = 1_000;

    /// Without limits, and with what is the default of each policy: after an outage the latest tick is fired, and
    /// occurrences may overlap.
    pub const DEFAULT: Self = Self {
        starts_at: None,
        ends_at: None,
        jitter_ms: 0,
        missed: Missed::FireOnce,
        catch_up_limit: 100,
        overlap: Overlap::Allow,
    };

    /// The first tick after `now`, if there is one.
    pub fn first_tick(&self, recurrence: &Recurrence, now: Timestamp) -> Option<Timestamp> {
        // A tick at the very start counts.
        let start = self.starts_at.and_then(|start| start.checked_sub(SignedDuration::from_nanos(1)).ok());
        recurrence.next_after(start.map_or(now, |start| start.max(now))).filter(|tick| self.has(*tick))
    }

    /// Whether a tick is neither before the start nor after the end.
    pub(super) fn has(&self, tick: Timestamp) -> bool {
        self.starts_at.is_none_or(|start| start <= tick) && self.ends_at.is_none_or(|end| tick <= end)
    }

    /// When a tick is due: at its own time, or later by its jitter. Everyone who asks gets the same answer.
    pub fn due(&self, schedule: ScheduleId, tick: Timestamp) -> Timestamp {
        let spread = u128::from(self.jitter_ms) + 1;
        let drawn = Uuid::new_v5(&schedule.0, &tick.as_millisecond().to_be_bytes()).as_u128() % spread;
        let jitter = Duration::from_millis(u64::try_from(drawn).unwrap_or(0));
        tick.saturating_add(jitter).unwrap_or(tick)
    }
}
