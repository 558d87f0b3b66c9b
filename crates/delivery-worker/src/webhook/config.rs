//! The configuration of the webhook sink.

use std::{path::PathBuf, time::Duration};

use bus_core::webhook_rules::{MAX_TIMEOUT, MIN_TIMEOUT};
use http::HeaderValue;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// How webhooks are called.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SinkConfig {
    /// Networks that may be called although they are not public. Empty by default.
    pub allow_cidrs: Vec<IpNet>,
    /// The longest exchange, whatever a connection asks for, milliseconds, 1,000–30,000.
    pub max_timeout_ms: u64,
    /// The most of an answer's body that is read, bytes; then the connection is closed. 1 B–1 MiB. What a
    /// longer answer says of its deliveries is not heeded, so there should be room for the results of the
    /// largest batch: 100 events, each with an id of 255 characters and an error text of 1 KiB, take 128 KiB,
    /// and twice that if the text is full of escapes.
    pub max_answer_bytes: usize,
    /// The most idle connections that are kept open to one host and port, 0–1024.
    pub idle_per_host: usize,
    /// How long an idle connection is kept open, milliseconds, 1–300,000. A connection that the
    /// subscriber closes in the moment of a request costs an attempt; a time below the subscribers' own
    /// keep-alive times makes that rare.
    pub idle_timeout_ms: u64,
    /// Certificates (PEM) that are trusted in addition to Mozilla's root program, for private
    /// authorities.
    pub ca_file: Option<PathBuf>,
    /// The `user-agent` of every request, unless a connection has its own.
    pub user_agent: String,
}

impl Default for SinkConfig {
    fn default() -> Self {
        Self {
            allow_cidrs: Vec::new(),
            max_timeout_ms: 30_000,
            max_answer_bytes: 256 * 1024,
            idle_per_host: 64,
            idle_timeout_ms: 15_000,
            ca_file: None,
            user_agent: concat!("event-bus/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

impl SinkConfig {
    /// The longest exchange.
    pub fn max_timeout(&self) -> Duration {
        Duration::from_millis(self.max_timeout_ms)
    }

    /// The first value that is out of range, as a sentence.
    pub fn problem(&self) -> Option<String> {
        if !(MIN_TIMEOUT..=MAX_TIMEOUT).contains(&self.max_timeout()) {
            return Some("sink.max_timeout_ms must be between 1000 and 30000".into());
        }
        if !(1..=1024 * 1024).contains(&self.max_answer_bytes) {
            return Some("sink.max_answer_bytes must be between 1 and 1048576".into());
        }
        if self.idle_per_host > 1024 {
            return Some("sink.idle_per_host must be at most 1024".into());
        }
        if !(1..=300_000).contains(&self.idle_timeout_ms) {
            return Some("sink.idle_timeout_ms must be between 1 and 300000".into());
        }
        if HeaderValue::from_str(&self.user_agent).is_err() {
            return Some("sink.user_agent must be printable ASCII".into());
        }
        None
    }
}
