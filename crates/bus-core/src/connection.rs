//! Connections: the identities that publish events and receive them.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::{
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    signature::SigningSecret,
    subscription::SubscriptionRules,
};

/// How an event is laid out in a webhook request (CloudEvents HTTP binding §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContentMode {
    /// The whole event is the body, as `application/cloudevents+json`.
    #[default]
    Structured,
    /// The payload is the body, the attributes are `ce-` headers.
    Binary,
}

/// How much a connection takes, of all workers together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Requests under way at a time; `None` for as many as the workers' configuration says.
    pub max_in_flight: Option<u32>,
    /// Requests per second; `None` for no limit.
    pub rate: Option<RateLimit>,
}

/// How many requests a connection takes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateLimit {
    /// In the long run.
    pub per_second: f64,
    /// How many may follow at once after a pause; `None` for those of one second.
    pub burst: Option<u32>,
}

impl RateLimit {
    /// How many may follow at once after a pause.
    pub fn burst(&self) -> u32 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate is above zero, and as large a burst as fits is meant"
        )]
        self.burst.unwrap_or(self.per_second.ceil() as u32).max(1)
    }
}

/// What a connection can do besides publishing.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// Receives nothing; an identity to publish under.
    Publisher,
    /// Receives signed HTTP requests.
    Webhook(Box<Webhook>),
}

/// A signed HTTP endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Webhook {
    /// `http` or `https`, with a host, without user information or fragment.
    pub url: Url,
    /// Sent with each request in addition to the bus's own.
    pub headers: BTreeMap<String, String>,
    /// For the whole exchange, from the connection attempt to the last byte of the answer; 1–30 s.
    pub timeout: Duration,
    /// How the event is laid out.
    pub content_mode: ContentMode,
    /// Answers with one of these HTTP statuses are final: the delivery is dead at once. In ascending order;
    /// see [`crate::webhook_rules::check_final_statuses`].
    pub final_statuses: Vec<u16>,
    /// How much it takes.
    pub limits: Limits,
    /// Signs every request.
    pub secret: SigningSecret,
    /// Signs too until the given time, so that a subscriber can rotate.
    pub previous_secret: Option<(SigningSecret, Timestamp)>,
}

impl Webhook {
    /// The secrets that sign a request made at `at`.
    pub fn active_secrets(&self, at: Timestamp) -> Vec<&SigningSecret> {
        let previous = self.previous_secret.as_ref().filter(|(_, until)| at < *until);
        std::iter::once(&self.secret).chain(previous.map(|(secret, _)| secret)).collect()
    }
}

/// A connection, as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    /// Its id.
    pub id: ConnectionId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// Unique within the organization.
    pub name: String,
    /// Counts the changes; a delivery carries the version it was matched with.
    pub version: i64,
    /// Nothing is delivered while this is false.
    pub enabled: bool,
    /// Why it is not enabled.
    pub disabled_reason: Option<String>,
    /// Since when its endpoint has failed without a success, as far as workers have found.
    pub failing_since: Option<Timestamp>,
    /// Where it receives.
    pub target: Target,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
}

/// A connection, and what those of its subscriptions say that have rules of their own: all that a worker
/// needs to know to make a delivery.
#[derive(Debug, Clone, PartialEq)]
pub struct Receiver {
    /// The connection. Its version is incremented by each change of the rules, too.
    pub connection: Connection,
    /// The rules, also of deleted subscriptions: their deliveries may still be under way.
    pub rules: HashMap<SubscriptionId, SubscriptionRules>,
}
