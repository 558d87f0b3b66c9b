//! A visit to a schedule whose next tick is due: what becomes of every tick since the last one.

use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};

use super::{
    Recurrence,
    rules::{Missed, Overlap, Rules, words},
};
use crate::ids::ScheduleId;

words! {
    /// Why a tick was not fired.
    SkipReason {
        /// It was late, and the schedule's policy for missed ticks leaves it out.
        Missed = "missed",
        /// The schedule was paused.
        Paused = "paused",
        /// The schedule was cancelled before anyone came to it.
        Cancelled = "cancelled",
        /// The occurrence before it still had open deliveries.
        Overlap = "overlap",
    }
}

/// How far a schedule has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The first tick that is not accounted for.
    pub next_tick: Timestamp,
    /// Late ticks before this time are to be fired all the same: a visit began to catch up and could not fire all.
    pub catch_up_until: Option<Timestamp>,
}

/// What a visit finds.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances {
    /// The time; the database's, for all schedulers alike.
    pub now: Timestamp,
    /// No tick is to be fired: the schedule is paused, or was cancelled.
    pub closed: Option<SkipReason>,
    /// The latest occurrence still has open deliveries.
    pub overlapping: bool,
}

/// How much one visit may do.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// A tick that is late by more counts as missed. What is less late is fired, whatever the policy says.
    pub missed_after: Duration,
    /// The most ticks that are fired.
    pub max_fired: usize,
    /// The most ticks that are looked at.
    pub max_looked: usize,
}

/// What becomes of ticks, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// This one is fired.
    Fire(Timestamp),
    /// These are not: a run of ticks of one UTC day.
    Skip {
        /// The first.
        first: Timestamp,
        /// The last.
        last: Timestamp,
        /// How many.
        ticks: u64,
        /// Why.
        reason: SkipReason,
    },
}

/// What a visit decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    /// What becomes of the ticks that were looked at, in order, without a gap.
    pub decisions: Vec<Decision>,
    /// Where the next visit begins; `None` if there are no more ticks.
    pub position: Option<Position>,
}

impl Rules {
    /// Decides on the ticks from `position` on that are due, as far as the bounds allow.
    ///
    /// A late tick is decided once: if a visit cannot fire all that its policy calls for, those that are left stay
    /// due, however late they become.
    pub fn visit(
        &self,
        recurrence: &Recurrence,
        schedule: ScheduleId,
        position: Position,
        found: Circumstances,
        bounds: Bounds,
    ) -> Visit {
        let late_before = self.late_before(found.now, bounds.missed_after);
        let mut late = Late { rules: self, recurrence, position, before: late_before, from: None };
        let (mut decisions, mut fired, mut looked) = (Vec::new(), 0, 0);
        let mut next = Some(position.next_tick);
        while let Some(tick) = next
            && self.has(tick)
            && self.due(schedule, tick) <= found.now
            && looked < bounds.max_looked
        {
            let reason = if found.closed.is_some() {
                found.closed
            } else if tick < late_before && !late.is_fired(tick) {
                Some(SkipReason::Missed)
            } else if self.overlap == Overlap::Skip && found.overlapping {
                Some(SkipReason::Overlap)
            } else {
                None
            };
            match reason {
                Some(reason) => skip(&mut decisions, tick, reason),
                None if fired == bounds.max_fired => break,
                None => {
                    decisions.push(Decision::Fire(tick));
                    fired += 1;
                }
            }
            looked += 1;
            next = recurrence.next_after(tick);
            if reason.is_none() && self.overlap == Overlap::Skip {
                // Whether the next one overlaps with this one is for the next visit to find.
                break;
            }
        }
        let position = next
            .filter(|tick| self.has(*tick))
            .map(|next_tick| Position { next_tick, catch_up_until: late.until(next_tick) });
        Visit { decisions, position }
    }

    /// Ticks before this are late by more than is let pass. Jitter is no lateness.
    fn late_before(&self, now: Timestamp, missed_after: Duration) -> Timestamp {
        let allowed = missed_after.saturating_add(Duration::from_millis(self.jitter_ms.into()));
        now.saturating_sub(allowed).unwrap_or(now)
    }
}

/// Which of the ticks that are late are fired all the same.
struct Late<'a> {
    rules: &'a Rules,
    recurrence: &'a Recurrence,
    position: Position,
    before: Timestamp,
    /// The first one that the policy fires, once it was asked for.
    from: Option<Timestamp>,
}

impl Late<'_> {
    fn is_fired(&mut self, tick: Timestamp) -> bool {
        self.position.catch_up_until.is_some_and(|until| tick < until) || self.fires_from() <= tick
    }

    /// So many ticks before the first that is not late, as the policy fires.
    fn fires_from(&mut self) -> Timestamp {
        if let Some(from) = self.from {
            return from;
        }
        let count = match self.rules.missed {
            Missed::Skip => 0,
            Missed::FireOnce => 1,
            Missed::CatchUp => self.rules.catch_up_limit,
        };
        let mut from = self.before;
        for _ in 0..count {
            match self.recurrence.last_before(from) {
                Some(tick) if tick >= self.position.next_tick => from = tick,
                _ => break,
            }
        }
        self.from = Some(from);
        from
    }

    /// Up to where the next visit is to fire late ticks: this one came to those that the policy fires, and not to
    /// their end.
    fn until(&self, next_tick: Timestamp) -> Option<Timestamp> {
        let begun = self.from.filter(|from| *from <= next_tick).map(|_| self.before);
        begun.max(self.position.catch_up_until).filter(|until| next_tick < *until)
    }
}

/// Adds a tick to the run of skipped ones before it, or begins one: another reason or another day is another run.
fn skip(decisions: &mut Vec<Decision>, tick: Timestamp, why: SkipReason) {
    if let Some(Decision::Skip { last, ticks, reason, .. }) = decisions.last_mut()
        && *reason == why
        && same_day(*last, tick)
    {
        *last = tick;
        *ticks += 1;
    } else {
        decisions.push(Decision::Skip { first: tick, last: tick, ticks: 1, reason: why });
    }
}

/// Whether two times are of one UTC day.
pub(crate) fn same_day(one: Timestamp, other: Timestamp) -> bool {
    let day = |at: Timestamp| at.to_zoned(TimeZone::UTC).date();
    day(one) == day(other)
}
