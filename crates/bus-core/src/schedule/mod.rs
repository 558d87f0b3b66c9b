//! Events that recur: when their ticks are, and what becomes of each.
//!
//! [`Recurrence`] says when a schedule's ticks are; a [`visit`](Rules::visit) decides which of them are fired and which are
//! skipped. Both are pure: the time is an argument.

mod occurrence;
mod recurrence;
mod rules;
mod visit;

pub(crate) use self::visit::same_day;
pub use self::{
    occurrence::{SCHEDULE_ID, SCHEDULED_TIME, occurrence},
    recurrence::{Field, ItemError, MAX_CRON_BYTES, Recurrence, RecurrenceError, tz_version},
    rules::{Missed, Overlap, Rules},
    visit::{Bounds, Circumstances, Decision, Position, SkipReason, Visit},
};
