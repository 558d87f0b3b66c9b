//! The syntax of cron expressions.
//!
//! `croner` reads them too, but more than we would explain: it takes `MON` for a minute, and ignores an empty
//! item. What is accepted here is stored for years, so it is only what has one meaning.

use std::fmt;

/// The longest cron expression, in bytes.
pub const MAX_CRON_BYTES: usize = 256;

const NICKNAMES: [(&str, &str); 7] = [
    ("hourly", "0 * * * *"),
    ("daily", "0 0 * * *"),
    ("midnight", "0 0 * * *"),
    ("weekly", "0 0 * * 0"),
    ("monthly", "0 0 1 * *"),
    ("yearly", "0 0 1 1 *"),
    ("annually", "0 0 1 1 *"),
];

const MONTHS: [&str; 12] =
    ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];

const DAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];

/// Why a cron expression in a time zone is no [`Recurrence`](super::Recurrence).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecurrenceError {
    /// The expression is longer than [`MAX_CRON_BYTES`].
    #[error("a cron expression has at most {MAX_CRON_BYTES} bytes, this one has {0}")]
    TooLong(usize),
    /// It has too few or too many fields.
    #[error(
        "a cron expression has 5 fields, or 6 with the seconds first, and none for the year; this one has {0}"
    )]
    FieldCount(usize),
    /// `@reboot`, which is no time.
    #[error("`@reboot` is refused: a schedule does not depend on when a process starts")]
    Reboot,
    /// `@every`, which has no beginning to count from.
    #[error("`@every` is refused: a schedule has no start to count from; use a step such as `*/15 * * * *`")]
    Every,
    /// Another word behind `@`.
    #[error("`@{0}` is none of @hourly, @daily, @midnight, @weekly, @monthly, @yearly and @annually")]
    Nickname(String),
    /// Something in a field is wrong.
    #[error("the {field} `{item}` is refused: {reason}")]
    Item {
        /// Where it is.
        field: Field,
        /// What it is: one item of the field's list.
        item: String,
        /// What is wrong with it.
        reason: ItemError,
    },
    /// `croner` has a reason of its own. None is known.
    #[error("the cron expression is refused: {0}")]
    Refused(String),
    /// No day has all that the expression asks for, as in `0 0 31 2 *`.
    #[error("the cron expression names no day that exists")]
    NeverOccurs,
    /// The time zone is unknown.
    #[error(
        "{0:?} is no time zone of the IANA database {version}; give a name such as `UTC` or `Europe/London`, no offset and no POSIX rule",
        version = super::tz_version()
    )]
    UnknownTimezone(String),
}

/// Why an item of a field is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ItemError {
    /// Nothing is between two commas.
    #[error("an item of the list is missing")]
    Empty,
    /// Not a value of a field without names.
    #[error("a value is a number from {0} to {1}")]
    Number(u8, u8),
    /// Not a value of a field with names.
    #[error("a value is a number from {0} to {1}, or the first three letters of an English name")]
    NumberOrName(u8, u8),
    /// A range goes from a higher value to a lower one.
    #[error("a range goes from a lower value to a higher one")]
    Reversed,
    /// A step follows a single value.
    #[error("a step follows `*` or a range, as in `*/5` or `10-30/5`")]
    StepOfValue,
    /// A step is 0, too long, or no number.
    #[error("a step is a number from 1 to {0}")]
    Step(u8),
    /// `*` is in a list with others.
    #[error("`*` stands alone in its field")]
    Wildcard,
    /// No such day of the week in any month.
    #[error("the number behind `#` is from 1 to 5")]
    Nth,
    /// `L` and `LW` are in one list.
    #[error("`L` and `LW` cannot be in one list")]
    LastTwice,
}

/// A field of a cron expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// The first of six fields.
    Second,
    /// The first of five fields.
    Minute,
    /// From 0 to 23.
    Hour,
    /// A number, or what depends on the month: `L`, `LW`, `15W`.
    DayOfMonth,
    /// A number or a name.
    Month,
    /// From Sunday to Sunday, 0 to 7, or a name; or one of the month's: `5L`, `FRI#2`.
    DayOfWeek,
}

/// The expression with one space between its fields, in upper case, and with nicknames as fields.
pub(super) fn normalise(cron: &str) -> Result<String, RecurrenceError> {
    if cron.trim_ascii().len() > MAX_CRON_BYTES {
        return Err(RecurrenceError::TooLong(cron.trim_ascii().len()));
    }
    let cron = cron.to_ascii_uppercase();
    let fields: Vec<&str> = cron.split_ascii_whitespace().collect();
    if let Some(nickname) = fields.first().and_then(|first| first.strip_prefix('@')) {
        return expand(nickname, fields.len());
    }
    let all = [Field::Second, Field::Minute, Field::Hour, Field::DayOfMonth, Field::Month, Field::DayOfWeek];
    let present = match fields.len() {
        5 => &all[1..],
        6 => &all[..],
        count => return Err(RecurrenceError::FieldCount(count)),
    };
    for (field, text) in present.iter().zip(&fields) {
        field.check(text)?;
    }
    Ok(fields.join(" "))
}

fn expand(nickname: &str, words: usize) -> Result<String, RecurrenceError> {
    let nickname = nickname.to_ascii_lowercase();
    match (nickname.as_str(), NICKNAMES.iter().find(|(name, _)| *name == nickname)) {
        ("reboot", _) => Err(RecurrenceError::Reboot),
        ("every", _) => Err(RecurrenceError::Every),
        (_, Some((_, fields))) if words == 1 => Ok((*fields).to_owned()),
        (_, Some(_)) => Err(RecurrenceError::FieldCount(words)),
        (_, None) => Err(RecurrenceError::Nickname(nickname)),
    }
}

impl Field {
    fn check(self, text: &str) -> Result<(), RecurrenceError> {
        if text == "*" {
            return Ok(());
        }
        let items = || text.split(',');
        for item in items() {
            let checked = match (self, item) {
                (Self::DayOfMonth, "L") if items().any(|other| other == "LW") => Err(ItemError::LastTwice),
                _ => self.check_item(item),
            };
            checked.map_err(|reason| RecurrenceError::Item { field: self, item: item.to_owned(), reason })?;
        }
        Ok(())
    }

    fn check_item(self, item: &str) -> Result<(), ItemError> {
        match (self, item) {
            (_, "") => return Err(ItemError::Empty),
            (_, "*") => return Err(ItemError::Wildcard),
            (Self::DayOfMonth, "L" | "LW") => return Ok(()),
            _ => {}
        }
        let (base, step) = item.split_once('/').map_or((item, None), |(base, step)| (base, Some(step)));
        if let Some(step) = step {
            let (_, highest) = self.bounds();
            number(step).filter(|step| (1..=highest).contains(step)).ok_or(ItemError::Step(highest))?;
        }
        match (base.split_once('-'), step) {
            (Some((first, last)), _) => {
                let first = self.value(first)?;
                // As the end of a range, Sunday ends the week.
                let last = if last == DAYS[0] { self.value("7")? } else { self.value(last)? };
                if first <= last { Ok(()) } else { Err(ItemError::Reversed) }
            }
            (None, Some(_)) if base == "*" => Ok(()),
            (None, Some(_)) => Err(ItemError::StepOfValue),
            (None, None) => self.check_single(item),
        }
    }

    /// One value, or a day that depends on the month.
    fn check_single(self, item: &str) -> Result<(), ItemError> {
        let value = match (self, item.split_once('#')) {
            (Self::DayOfMonth, _) => item.strip_suffix('W').unwrap_or(item),
            (Self::DayOfWeek, None) => item.strip_suffix('L').unwrap_or(item),
            (Self::DayOfWeek, Some((day, nth))) => {
                number(nth).filter(|nth| (1..=5).contains(nth)).ok_or(ItemError::Nth)?;
                day
            }
            _ => item,
        };
        self.value(value).map(drop)
    }

    fn value(self, text: &str) -> Result<u8, ItemError> {
        let (lowest, highest) = self.bounds();
        let names: &[&str] = match self {
            Self::Month => &MONTHS,
            Self::DayOfWeek => &DAYS,
            _ => &[],
        };
        let named = (lowest..).zip(names).find(|(_, name)| **name == text).map(|(value, _)| value);
        let value = named.or_else(|| number(text).filter(|value| (lowest..=highest).contains(value)));
        let expected = if names.is_empty() { ItemError::Number } else { ItemError::NumberOrName };
        value.ok_or(expected(lowest, highest))
    }

    const fn bounds(self) -> (u8, u8) {
        match self {
            Self::Second | Self::Minute => (0, 59),
            Self::Hour => (0, 23),
            Self::DayOfMonth => (1, 31),
            Self::Month => (1, 12),
            Self::DayOfWeek => (0, 7),
        }
    }
}

/// One or two digits.
fn number(text: &str) -> Option<u8> {
    let digits = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Field {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::DayOfMonth => "day of month",
            Self::Month => "month",
            Self::DayOfWeek => "day of week",
        })
    }
}
