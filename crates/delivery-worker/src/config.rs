//! The worker's own configuration.

use std::time::Duration;

use bus_core::{
    config::{Common, RoleConfig},
    retry::RetryPolicy,
};
use serde::Deserialize;

use crate::webhook::SinkConfig;

/// From the end of an attempt to its acknowledgement at the latest.
const ACK_MARGIN: Duration = Duration::from_secs(5);

/// The worker's own configuration. `defaults.toml` beside `src/` is the reference.
#[derive(Debug, Clone, Deserialize)]
pub struct WorkerConfig {
    /// How work is taken and tried again.
    pub worker: LoopConfig,
    /// How webhooks are sent.
    pub sink: SinkConfig,
}

/// How work is taken and tried again.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopConfig {
    /// Attempts under way at a time, all lanes together.
    pub in_flight: usize,
    /// Connections kept in memory.
    pub connection_cache: u64,
    /// The longest that a connection is kept without being read again, seconds. Changes are told at
    /// once; this covers a hint that was lost.
    pub connection_ttl_s: u64,
    /// Bodies above the queue's limit that are kept in memory, bytes in all.
    pub body_cache_bytes: u64,
    /// Receipts that may wait to be sent; more are dropped and counted.
    pub receipt_buffer: usize,
    /// When a failed delivery is tried again.
    pub retry: RetryPolicy,
}

impl RoleConfig for WorkerConfig {
    fn defaults() -> Vec<&'static str> {
        vec![include_str!("../defaults.toml")]
    }

    fn problem(&self, common: &Common) -> Option<String> {
        let timeout = self.sink.max_timeout();
        let ack_wait = Duration::from_millis(common.nats.ack_wait_ms);
        if timeout + ACK_MARGIN >= ack_wait {
            return Some(format!(
                "nats.ack_wait_ms ({ack_wait:?}) must exceed sink.max_timeout_ms ({timeout:?}) by more than \
                 {ACK_MARGIN:?}, or slow deliveries are repeated"
            ));
        }
        let drain = Duration::from_millis(common.shutdown.drain_ms);
        if timeout + crate::lane::PULL_WAIT >= drain {
            return Some(format!(
                "shutdown.drain_ms ({drain:?}) must exceed sink.max_timeout_ms ({timeout:?}) by more than {:?}, \
                 or a drain cuts deliveries off",
                crate::lane::PULL_WAIT
            ));
        }
        if self.worker.in_flight < usize::from(common.lanes) {
            return Some(format!(
                "worker.in_flight ({}) must be at least lanes ({})",
                self.worker.in_flight, common.lanes
            ));
        }
        let retry = self.worker.retry.problem().map(|problem| format!("worker.{problem}"));
        retry.or_else(|| self.sink.problem())
    }
}

#[cfg(test)]
mod tests {
    use bus_core::{config::load, telemetry::Chain};
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::defaults("EVENT_BUS_LANES", "4", None)]
    #[case::ack_wait("EVENT_BUS_NATS__ACK_WAIT_MS", "35000", Some("nats.ack_wait_ms"))]
    #[case::drain("EVENT_BUS_SHUTDOWN__DRAIN_MS", "30000", Some("shutdown.drain_ms"))]
    #[case::timeout("EVENT_BUS_SINK__MAX_TIMEOUT_MS", "60000", Some("sink.max_timeout_ms"))]
    #[case::in_flight("EVENT_BUS_WORKER__IN_FLIGHT", "3", Some("worker.in_flight"))]
    #[case::retry("EVENT_BUS_WORKER__RETRY__FACTOR", "0.5", Some("worker.retry.factor"))]
    #[case::unknown("EVENT_BUS_WORKER__IN_FLIHGT", "3", Some("in_flihgt"))]
    fn inequalities_are_checked_at_the_start(
        #[case] name: &str,
        #[case] value: &str,
        #[case] complaint: Option<&str>,
    ) {
        let environment =
            [("DATABASE_URL", "postgres://localhost/bus"), ("NATS_URL", "nats://localhost"), (name, value)];
        let loaded =
            load::<WorkerConfig>(None, environment.map(|(name, value)| (name.to_owned(), value.to_owned())));
        match (loaded, complaint) {
            (Ok(_), None) => {}
            (Err(refused), Some(complaint)) => {
                let text = Chain(&refused).to_string();
                assert!(text.contains(complaint), "{text}");
            }
            (Ok(_), Some(complaint)) => panic!("accepted, expected {complaint}"),
            (Err(refused), None) => panic!("{}", Chain(&refused)),
        }
    }
}
