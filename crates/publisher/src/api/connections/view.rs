//! Connections as they are shown.

use std::collections::BTreeMap;

use bus_core::{
    connection::{Connection, ContentMode, Target},
    ids::ConnectionId,
    webhook_rules::{REDACTED, is_sensitive},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a connection can do: `webhook` publishes and receives signed HTTP requests; `publisher` is an
/// identity to publish under and receives nothing
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ConnectionKind)]
pub(super) enum Kind {
    Webhook,
    Publisher,
}

/// How an event is laid out in a request (CloudEvents HTTP binding): all of it as the JSON body
/// (`structured`), or the payload as the body and the attributes as `ce-` headers (`binary`)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ContentMode)]
pub(super) enum ContentModeName {
    Structured,
    Binary,
}

impl From<ContentModeName> for ContentMode {
    fn from(name: ContentModeName) -> Self {
        match name {
            ContentModeName::Structured => Self::Structured,
            ContentModeName::Binary => Self::Binary,
        }
    }
}

impl From<ContentMode> for ContentModeName {
    fn from(mode: ContentMode) -> Self {
        match mode {
            ContentMode::Structured => Self::Structured,
            ContentMode::Binary => Self::Binary,
        }
    }
}

/// A connection
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Connection)]
pub(in crate::api) struct ConnectionView {
    #[schema(value_type = Uuid)]
    id: ConnectionId,
    name: String,
    kind: Kind,
    /// Nothing is delivered while this is false.
    enabled: bool,
    /// Why the bus disabled the connection; gone when it is enabled again.
    #[serde(skip_serializing_if = "Option::is_none")]
    disabled_reason: Option<String>,
    /// Only of a webhook.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = "uri")]
    url: Option<String>,
    /// Only of a webhook. Values of headers that may carry a credential are shown as `***`: those whose
    /// name contains auth, cookie, credential, key, password, secret, signature or token.
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<BTreeMap<String, String>>,
    /// Since when every attempt has failed, while the bus leaves the endpoint alone now and then; gone after a success.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    failing_since: Option<Timestamp>,
    /// Only of a webhook; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_ms: Option<u64>,
    /// Only of a webhook.
    #[serde(skip_serializing_if = "Option::is_none")]
    content_mode: Option<ContentModeName>,
    /// Only of a webhook: answers with one of these HTTP statuses are final. In ascending order.
    #[serde(skip_serializing_if = "Option::is_none")]
    final_statuses: Option<Vec<u16>>,
    /// Only of a webhook that has one of its own: requests under way at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_in_flight: Option<u32>,
    /// Only of a webhook that has a rate limit: requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_per_second: Option<f64>,
    /// Only of a webhook that has a rate limit: how many requests may follow at once after a pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    burst: Option<u32>,
    /// A new signing secret, shown once when it is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(read_only)]
    secret: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
}

impl From<Connection> for ConnectionView {
    fn from(connection: Connection) -> Self {
        let mut view = Self {
            id: connection.id,
            name: connection.name,
            kind: Kind::Publisher,
            enabled: connection.enabled,
            disabled_reason: connection.disabled_reason,
            failing_since: connection.failing_since,
            url: None,
            headers: None,
            timeout_ms: None,
            content_mode: None,
            final_statuses: None,
            max_in_flight: None,
            rate_per_second: None,
            burst: None,
            secret: None,
            created_at: connection.created_at,
            updated_at: connection.updated_at,
        };
        if let Target::Webhook(webhook) = connection.target {
            view.kind = Kind::Webhook;
            view.url = Some(webhook.url.into());
            view.headers = Some(webhook.headers.into_iter().map(redact).collect());
            view.timeout_ms = u64::try_from(webhook.timeout.as_millis()).ok();
            view.content_mode = Some(webhook.content_mode.into());
            view.final_statuses = Some(webhook.final_statuses);
            view.max_in_flight = webhook.limits.max_in_flight;
            view.rate_per_second = webhook.limits.rate.map(|rate| rate.per_second);
            view.burst = webhook.limits.rate.map(|rate| rate.burst());
        }
        view
    }
}

impl ConnectionView {
    /// Shows a secret that was just set.
    pub(super) fn with_secret(self, secret: Option<String>) -> Self {
        Self { secret, ..self }
    }
}

fn redact((name, value): (String, String)) -> (String, String) {
    let value = if is_sensitive(&name) { REDACTED.to_owned() } else { value };
    (name, value)
}
