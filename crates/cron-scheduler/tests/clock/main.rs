//! Invariant I5, the scheduler's part: nothing early, each tick once or skipped with a reason, whoever dies when.

#![allow(clippy::unwrap_used, missing_docs)]

mod crashes;
mod due_events;
mod policies;
mod world;
