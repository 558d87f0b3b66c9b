//! When scheduled events are due.

mod recurrence;

pub use recurrence::{Field, ItemError, MAX_CRON_BYTES, Recurrence, RecurrenceError, tz_version};
