//! Sinks: how one delivery reaches one connection.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::{connection::Connection, delivery::Delivery};

/// The most of an answer that is kept, bytes. What follows is not read.
pub const MAX_KEPT_ANSWER: usize = 16 * 1024;

/// What came of one attempt.
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

/// Whether the subscriber took the event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Delivered,
    /// It did not.
    Failed(Failure),
}

/// Why an attempt failed. The message is what history and dead letters show.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The endpoint answered with a status other than 2xx.
    #[error("the endpoint answered {0}")]
    Status(u16),
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
    /// Makes one attempt at `at`. Never takes longer than the connection's timeout.
    async fn attempt(&self, connection: &Connection, delivery: &Delivery, at: Timestamp) -> AttemptReport;
}
