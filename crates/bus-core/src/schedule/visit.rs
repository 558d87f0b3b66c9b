//! A visit to a schedule whose next tick is due: what becomes of every tick since the last one.

use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};

use super::{
    Recurrence,
    rules::{Missed, Overlap, Rules},
};
use crate::{ids::ScheduleId, words::words};

words! {
    /// Why a tick was not fired.
    SkipReason {
        /// It was late, and the schedule's policy for missed ticks leaves it out.
        Missed = "missed",
        /// The schedule was paused.
        Paused = "paused",
        /// The schedule was cancelled before anyone came to it.
        Cancelled = "cancelled",
        /// It was due, and before anyone came to it the schedule got another start or end.
        Changed = "changed",
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
    /// When it was resumed last: what was due until then and nobody came to is skipped as paused.
    pub paused_until: Option<Timestamp>,
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
            && self.due(schedule, tick) <= found.now
            && looked < bounds.max_looked
        {
            let reason = if found.closed.is_some() {
                found.closed
            } else if found.paused_until.is_some_and(|until| tick <= until) {
                Some(SkipReason::Paused)
            } else if !self.has(tick) {
                Some(SkipReason::Changed)
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
            next = self.first_tick(recurrence, tick);
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

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const BOUNDS: Bounds =
        Bounds { missed_after: Duration::from_secs(60), max_fired: 100, max_looked: 10_000 };

    fn at(time: &str) -> Timestamp {
        format!("2026-05-01T{time}Z").parse().expect("a time")
    }

    /// A visit to a schedule that ticks every ten minutes and has come to 00:10.
    fn visit(rules: &Rules, now: &str, catch_up_until: Option<&str>, bounds: Bounds) -> Visit {
        let recurrence = Recurrence::parse("*/10 * * * *", "UTC").expect("a schedule");
        let position = Position { next_tick: at("00:10:00"), catch_up_until: catch_up_until.map(at) };
        let found = Circumstances { now: at(now), closed: None, paused_until: None, overlapping: false };
        rules.visit(&recurrence, ScheduleId(Uuid::nil()), position, found, bounds)
    }

    fn skipped(first: &str, last: &str, ticks: u64, reason: SkipReason) -> Decision {
        Decision::Skip { first: at(first), last: at(last), ticks, reason }
    }

    fn next(next_tick: &str, catch_up_until: Option<&str>) -> Option<Position> {
        Some(Position { next_tick: at(next_tick), catch_up_until: catch_up_until.map(at) })
    }

    #[test]
    fn nothing_is_decided_before_it_is_due() {
        let early = visit(&Rules::DEFAULT, "00:09:59.999999", None, BOUNDS);
        assert_eq!(early, Visit { decisions: vec![], position: next("00:10:00", None) });
        let due = visit(&Rules::DEFAULT, "00:10:00", None, BOUNDS);
        assert_eq!(due.decisions, [Decision::Fire(at("00:10:00"))]);
        assert_eq!(due.position, next("00:20:00", None));
    }

    #[test]
    fn a_tick_is_missed_when_it_is_later_than_is_let_pass() {
        let skip = Rules { missed: Missed::Skip, ..Rules::DEFAULT };
        assert_eq!(visit(&skip, "00:11:00", None, BOUNDS).decisions, [Decision::Fire(at("00:10:00"))]);
        let missed = skipped("00:10:00", "00:10:00", 1, SkipReason::Missed);
        assert_eq!(visit(&skip, "00:11:00.000001", None, BOUNDS).decisions, [missed]);
        // Jitter is no lateness.
        let jittery = Rules { jitter_ms: 30_000, ..skip };
        assert_eq!(visit(&jittery, "00:11:30", None, BOUNDS).decisions, [Decision::Fire(at("00:10:00"))]);
    }

    #[test]
    fn what_a_policy_fires_stays_due_when_a_visit_cannot_fire_all_of_it() {
        let rules = Rules { missed: Missed::CatchUp, catch_up_limit: 3, ..Rules::DEFAULT };
        let two = Bounds { max_fired: 2, ..BOUNDS };
        let first = visit(&rules, "01:05:00", None, two);
        assert_eq!(
            first.decisions,
            [
                skipped("00:10:00", "00:30:00", 3, SkipReason::Missed),
                Decision::Fire(at("00:40:00")),
                Decision::Fire(at("00:50:00")),
            ]
        );
        assert_eq!(first.position, next("01:00:00", Some("01:04:00")));
        // Hours later, what was promised then is fired, and the rest is a new decision.
        let later = visit(&rules, "05:05:00", Some("00:25:00"), BOUNDS).decisions;
        assert_eq!(later[..2], [Decision::Fire(at("00:10:00")), Decision::Fire(at("00:20:00"))]);
        assert_eq!(later[2], skipped("00:30:00", "04:30:00", 25, SkipReason::Missed));
        assert_eq!(later.len(), 2 + 1 + 3);
    }

    #[test]
    fn a_visit_that_only_skipped_has_promised_nothing() {
        let bounds = Bounds { max_looked: 2, ..BOUNDS };
        let visit = visit(&Rules::DEFAULT, "05:05:00", None, bounds);
        assert_eq!(visit.decisions, [skipped("00:10:00", "00:20:00", 2, SkipReason::Missed)]);
        assert_eq!(visit.position, next("00:30:00", None));
    }

    #[test]
    fn a_run_of_skipped_ticks_ends_with_its_day() {
        let recurrence = Recurrence::parse("0 */8 * * *", "UTC").expect("a schedule");
        let position = Position { next_tick: at("08:00:00"), catch_up_until: None };
        let now = "2026-05-02T09:00:00Z".parse().expect("a time");
        let found =
            Circumstances { now, closed: Some(SkipReason::Paused), paused_until: None, overlapping: true };
        let visit = Rules::DEFAULT.visit(&recurrence, ScheduleId(Uuid::nil()), position, found, BOUNDS);
        let runs: Vec<u64> = visit
            .decisions
            .iter()
            .map(|decision| match decision {
                Decision::Skip { ticks, reason: SkipReason::Paused, .. } => *ticks,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(runs, [2, 2]);
    }
}
