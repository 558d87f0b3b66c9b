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
    /// What one connection may take.
    pub connection: ConnectionConfig,
    /// When an endpoint that fails is left alone.
    pub breaker: BreakerConfig,
}

/// What one connection may take, of all workers together.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionConfig {
    /// Requests under way at a time, unless the connection says otherwise. 1–10,000.
    pub in_flight: u32,
    /// A delivery that will have its place, or its token, within this time waits in memory; others are parked.
    /// Milliseconds, up to 1,000.
    pub wait_ms: u64,
    /// So many of the parked ones come back per second to a connection of which nothing better is known, or
    /// whose circuit was open. 1–10,000.
    pub backlog_per_s: f64,
}

/// When an endpoint that fails is left alone, and when it is given up.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BreakerConfig {
    /// Whether it ever is.
    pub enabled: bool,
    /// What counts is what failed within this time, seconds, 1–3,600.
    pub window_s: u64,
    /// With fewer attempts in the window the rate says nothing.
    pub min_attempts: u32,
    /// From this share of failures on the circuit opens, above 0 and up to 1.
    pub failure_rate: f64,
    /// So many failures in a row open it, too.
    pub consecutive: u32,
    /// How long it is open the first time, milliseconds, 100 or more; each time twice as long as the last one.
    pub open_ms: u64,
    /// How long at most, milliseconds, up to an hour.
    pub open_max_ms: u64,
    /// So many attempts at a time find out whether the endpoint works again.
    pub probes: u32,
    /// A connection that has failed for so long without a success is disabled, seconds; 0 for never.
    pub disable_after_s: u64,
}

impl ConnectionConfig {
    /// How long a delivery waits in memory.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_millis(self.wait_ms)
    }

    fn problem(&self) -> Option<&'static str> {
        if !(1..=10_000).contains(&self.in_flight) {
            return Some("worker.connection.in_flight must be between 1 and 10000");
        }
        if self.wait_ms > 1_000 {
            return Some(
                "worker.connection.wait_ms must be at most 1000: what waits in memory holds a slot of its lane",
            );
        }
        if !(1.0..=10_000.0).contains(&self.backlog_per_s) {
            return Some("worker.connection.backlog_per_s must be between 1 and 10000");
        }
        None
    }
}

impl BreakerConfig {
    pub(crate) fn window(&self) -> Duration {
        Duration::from_secs(self.window_s)
    }

    fn problem(&self) -> Option<&'static str> {
        if !(1..=3_600).contains(&self.window_s) {
            return Some("worker.breaker.window_s must be between 1 and 3600");
        }
        if self.min_attempts == 0 || self.consecutive == 0 || self.probes == 0 {
            return Some(
                "worker.breaker.min_attempts, worker.breaker.consecutive and worker.breaker.probes must be at least 1",
            );
        }
        if !(self.failure_rate > 0.0 && self.failure_rate <= 1.0) {
            return Some("worker.breaker.failure_rate must be above 0 and at most 1");
        }
        if self.open_ms < 100 || !(self.open_ms..=3_600_000).contains(&self.open_max_ms) {
            return Some(
                "worker.breaker.open_ms must be at least 100, and worker.breaker.open_max_ms between it and 3600000 (1 h)",
            );
        }
        None
    }
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
        if let Some(problem) = self.connection.problem().or_else(|| self.breaker.problem()) {
            return Some(problem.to_owned());
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
    #[case::connection("EVENT_BUS_WORKER__CONNECTION__IN_FLIGHT", "0", Some("worker.connection.in_flight"))]
    #[case::wait("EVENT_BUS_WORKER__CONNECTION__WAIT_MS", "1001", Some("worker.connection.wait_ms"))]
    #[case::backlog(
        "EVENT_BUS_WORKER__CONNECTION__BACKLOG_PER_S",
        "0.5",
        Some("worker.connection.backlog_per_s")
    )]
    #[case::backlog_whole("EVENT_BUS_WORKER__CONNECTION__BACKLOG_PER_S", "20", None)]
    #[case::breaker_window("EVENT_BUS_WORKER__BREAKER__WINDOW_S", "0", Some("worker.breaker.window_s"))]
    #[case::probes("EVENT_BUS_WORKER__BREAKER__PROBES", "0", Some("worker.breaker.probes"))]
    #[case::rate("EVENT_BUS_WORKER__BREAKER__FAILURE_RATE", "1.1", Some("worker.breaker.failure_rate"))]
    #[case::open("EVENT_BUS_WORKER__BREAKER__OPEN_MAX_MS", "4999", Some("worker.breaker.open_max_ms"))]
    #[case::breaker_off("EVENT_BUS_WORKER__BREAKER__ENABLED", "false", None)]
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
