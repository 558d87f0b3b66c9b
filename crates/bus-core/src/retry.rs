//! What follows from an attempt: whether, and when, a delivery is tried again.

mod policy;
mod verdict;

pub use self::{
    policy::{MAX_ATTEMPTS, MAX_WAIT_MS, RetryOverride, RetryPolicy},
    verdict::{DeadReason, Rules, Standing, Verdict, verdict},
};
