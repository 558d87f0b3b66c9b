//! The streams of a deployment: what the configuration says about them, what the broker has, and the way from the
//! one to the other.
//!
//! A process creates the streams that the bus itself cannot do without, and changes none that exists: two processes
//! with different configurations would change it to and fro. It only says where they differ. Changing is for
//! `cargo xtask streams apply`, by a person who has seen the [`Plan`].

mod check;
mod plan;
mod server;
mod spec;

pub(crate) use self::{
    check::problem,
    server::{Said, ensure},
};
pub use self::{
    plan::{Change, ChangeKind, Effect, Existing, Field, Held, Plan, plan},
    server::{Loss, StreamsError, apply, existing},
    spec::{Archive, Described, Placement, StreamSpec, described, stream_name},
};

/// The streams that the bus itself publishes to and reads from, as they are called in the configuration.
pub const OWN: [&str; 3] = [DELIVER, DEAD, AUDIT];

/// The work queue.
pub const DELIVER: &str = "deliver";
/// Dead letters.
pub const DEAD: &str = "dead";
/// Receipts and audit records.
pub const AUDIT: &str = "audit";
