//! The worker's own configuration.

use std::time::Duration;

use bus_core::{
    config::{Common, RoleConfig},
    retry::{RetryPolicy, Rules},
    subscription::BatchPolicy,
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
    /// No deferral that a subscriber asks for is shorter, milliseconds, 100 or more.
    pub defer_min_ms: u64,
    /// No deferral is longer, milliseconds, up to 30 days.
    pub defer_max_ms: u64,
    /// No attempt is made later than this after a delivery was first enqueued, or replayed, seconds,
    /// 60–2,592,000 (30 days).
    pub lifetime_s: u64,
    /// A delivery that was handed out this often in one turn without any result takes its workers down with
    /// it, and is dead-lettered. 2–1,000.
    pub max_handed_out: u32,
    /// When a failed delivery is tried again.
    pub retry: RetryPolicy,
}

impl LoopConfig {
    /// How long a delivery lives.
    pub fn lifetime(&self) -> Duration {
        Duration::from_secs(self.lifetime_s)
    }

    /// What the consequences of an attempt go by.
    pub fn rules<'a>(&self, policy: &'a RetryPolicy, final_statuses: &'a [u16]) -> Rules<'a> {
        Rules {
            policy,
            final_statuses,
            defer_min: Duration::from_millis(self.defer_min_ms),
            defer_max: Duration::from_millis(self.defer_max_ms),
            lifetime: self.lifetime(),
        }
    }

    fn problem(&self) -> Option<String> {
        if self.defer_min_ms < 100 {
            return Some("worker.defer_min_ms must be at least 100, or a deferral makes a hot loop".into());
        }
        if !(self.defer_min_ms..=2_592_000_000).contains(&self.defer_max_ms) {
            return Some(
                "worker.defer_max_ms must be between worker.defer_min_ms and 2592000000 (30 days)".into(),
            );
        }
        if !(60..=2_592_000).contains(&self.lifetime_s) {
            return Some("worker.lifetime_s must be between 60 and 2592000 (30 days)".into());
        }
        if !(2..=1_000).contains(&self.max_handed_out) {
            return Some("worker.max_handed_out must be between 2 and 1000".into());
        }
        self.retry.problem().map(|problem| format!("worker.{problem}"))
    }
}

impl WorkerConfig {
    /// The longest that a batch is gathered: as long as a subscription may ask for, if that leaves time for
    /// the attempt before `nats.ack_wait_ms` is over. A batch's deliveries are held from the first moment.
    pub fn longest_gathering(&self, common: &Common) -> Duration {
        let ack_wait = Duration::from_millis(common.nats.ack_wait_ms);
        let spare = ack_wait.saturating_sub(self.sink.max_timeout() + ACK_MARGIN);
        spare.min(Duration::from_millis(BatchPolicy::MAX_WAIT_MS.into()))
    }
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
        let window = Duration::from_secs(common.nats.duplicate_window_s);
        if ack_wait + timeout + ACK_MARGIN >= window {
            return Some(format!(
                "nats.duplicate_window_s ({window:?}) must exceed nats.ack_wait_ms ({ack_wait:?}) and \
                 sink.max_timeout_ms ({timeout:?}) together by more than {ACK_MARGIN:?}, or a retry whose worker died is \
                 not recognised when it is repeated"
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
        self.worker.problem().or_else(|| self.sink.problem())
    }
}

#[cfg(test)]
mod tests {
    use bus_core::{config::load, telemetry::Chain};
    use rstest::rstest;

    use super::*;

    #[test]
    fn gathering_and_attempt_together_stay_below_ack_wait() {
        let longest = |ack_wait_ms: &str| {
            let environment = [
                ("DATABASE_URL", "postgres://localhost/bus"),
                ("NATS_URL", "nats://localhost"),
                ("EVENT_BUS_NATS__ACK_WAIT_MS", ack_wait_ms),
            ];
            let loaded = load::<WorkerConfig>(
                None,
                environment.map(|(name, value)| (name.to_owned(), value.to_owned())),
            )
            .unwrap_or_else(|refused| panic!("{}", Chain(&refused)));
            loaded.config.longest_gathering(&loaded.common)
        };
        assert_eq!(longest("60000"), Duration::from_secs(5));
        assert_eq!(longest("36500"), Duration::from_millis(1_500));
    }

    #[rstest]
    #[case::defaults("EVENT_BUS_LANES", "4", None)]
    #[case::ack_wait("EVENT_BUS_NATS__ACK_WAIT_MS", "35000", Some("nats.ack_wait_ms"))]
    #[case::drain("EVENT_BUS_SHUTDOWN__DRAIN_MS", "30000", Some("shutdown.drain_ms"))]
    #[case::window("EVENT_BUS_NATS__DUPLICATE_WINDOW_S", "95", Some("nats.duplicate_window_s"))]
    #[case::grace("EVENT_BUS_SHUTDOWN__GRACE_S", "45", Some("shutdown.grace_s"))]
    #[case::timeout("EVENT_BUS_SINK__MAX_TIMEOUT_MS", "60000", Some("sink.max_timeout_ms"))]
    #[case::in_flight("EVENT_BUS_WORKER__IN_FLIGHT", "3", Some("worker.in_flight"))]
    #[case::retry("EVENT_BUS_WORKER__RETRY__FACTOR", "0.5", Some("worker.retry.factor"))]
    #[case::attempts("EVENT_BUS_WORKER__RETRY__MAX_ATTEMPTS", "101", Some("worker.retry.max_attempts"))]
    #[case::defer_min("EVENT_BUS_WORKER__DEFER_MIN_MS", "99", Some("worker.defer_min_ms"))]
    #[case::defer_order("EVENT_BUS_WORKER__DEFER_MAX_MS", "999", Some("worker.defer_max_ms"))]
    #[case::defer_max("EVENT_BUS_WORKER__DEFER_MAX_MS", "2592000001", Some("worker.defer_max_ms"))]
    #[case::lifetime("EVENT_BUS_WORKER__LIFETIME_S", "59", Some("worker.lifetime_s"))]
    #[case::handed_out("EVENT_BUS_WORKER__MAX_HANDED_OUT", "1", Some("worker.max_handed_out"))]
    #[case::delays("EVENT_BUS_WORKER__RETRY__DELAYS_MS", "[200, 5000]", None)]
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
