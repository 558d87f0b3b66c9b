//! Sinks: how deliveries reach one connection.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::{connection::Connection, delivery::Delivery};

/// The most of an answer that is kept for those who look into a failure, bytes.
pub const MAX_KEPT_ANSWER: usize = 16 * 1024;

/// What one attempt carries.
#[derive(Debug, Clone, Copy)]
pub enum Parcel<'a> {
    /// One delivery, laid out as the connection asks for.
    Single(&'a Delivery),
    /// Deliveries of one subscription that asked for batches. No two of them are of events with the same
    /// CloudEvents `id`, by which the answer names them.
    Batch(&'a [Delivery]),
}

impl<'a> Parcel<'a> {
    /// What is in it.
    pub fn deliveries(self) -> &'a [Delivery] {
        match self {
            Self::Single(delivery) => std::slice::from_ref(delivery),
            Self::Batch(deliveries) => deliveries,
        }
    }
}

/// What came of one attempt, for one delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptReport {
    /// Whether the subscriber took the event.
    pub outcome: Outcome,
    /// The HTTP status, if an answer came.
    pub status: Option<u16>,
    /// The start of the answer's body, at most [`MAX_KEPT_ANSWER`] bytes.
    pub answer: Bytes,
    /// From the start of the attempt to its end.
    pub duration: Duration,
}

/// Whether the subscriber took the event. What follows from it is for [`crate::retry::verdict`] to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Delivered,
    /// It asked to be called again later; this is no failure and costs no attempt.
    Deferred {
        /// How long it asked to be left alone, as it said it: no limit has been applied.
        wait: Duration,
        /// Who asked, and why if they said so.
        why: String,
    },
    /// It did not.
    Failed {
        /// Why.
        failure: Failure,
        /// The endpoint asked not to be called again before this time is over, as it said it.
        not_before: Option<Duration>,
    },
}

impl Outcome {
    /// Why it was not taken, for those who look; `None` if it was.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Delivered => None,
            Self::Deferred { why, .. } => Some(why.clone()),
            Self::Failed { failure, .. } => Some(failure.to_string()),
        }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failed { failure, not_before: None }
    }
}

/// Why an attempt failed. The message is what history and dead letters show.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The endpoint answered with a status other than 2xx.
    #[error("the endpoint answered {0}")]
    Status(u16),
    /// The endpoint answered 2xx, and said in the body that it failed.
    #[error("the subscriber reported a failure: {0}")]
    Reported(String),
    /// The exchange was not complete within the connection's timeout.
    #[error("no complete answer within {0:?}")]
    Timeout(Duration),
    /// The host name has no address.
    #[error("the host name does not resolve: {0}")]
    Resolve(String),
    /// The address is not public and not allowed by configuration.
    #[error("the address {0} is not allowed")]
    AddressRefused(std::net::IpAddr),
    /// No connection could be made, TLS included.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The connection broke, or the answer was not HTTP.
    #[error("the exchange broke off: {0}")]
    Exchange(String),
    /// The event or the connection cannot be turned into a request.
    #[error("no request can be made: {0}")]
    Request(String),
}

/// Delivers to one kind of connection.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Makes one attempt at `at` and reports on each delivery of the parcel, in their order. Never takes
    /// longer than the connection's timeout.
    async fn attempt(&self, connection: &Connection, parcel: Parcel<'_>, at: Timestamp)
    -> Vec<AttemptReport>;

    /// [`Sink::attempt`] with one delivery.
    async fn attempt_one(
        &self,
        connection: &Connection,
        delivery: &Delivery,
        at: Timestamp,
    ) -> AttemptReport {
        let mut reports = self.attempt(connection, Parcel::Single(delivery), at).await;
        reports.pop().expect("a sink reports on each delivery")
    }
}
