//! The publisher's own configuration.

use std::net::SocketAddr;

use bus_core::{
    config::{Common, RoleConfig},
    pg::{MAX_PER_SECOND, PublishQuota, PublishRate, QuotaPeriod},
};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use serde::Deserialize;

use crate::limits::{self, Defaults, MAX_RATE, MIN_RATE};

/// The publisher's own configuration. `defaults.toml` beside `src/` is the reference.
#[derive(Debug, Clone, Deserialize)]
pub struct PublisherConfig {
    /// The API's port.
    pub http: HttpConfig,
    /// Opens `/v1/admin`.
    #[serde(default)]
    pub admin_token: Option<SecretString>,
    /// The way of an event into the bus.
    pub publish: PublishConfig,
    /// What the API must know of the sinks.
    pub sink: SinkRules,
    /// Replays.
    pub replay: ReplayConfig,
    /// Events that recur, or are due later.
    pub schedules: SchedulesConfig,
    /// Audit records.
    pub audit: AuditConfig,
}

/// Audit records. Changes always leave one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditConfig {
    /// Whether reading what an event says leaves one, too.
    pub payload_access: bool,
}

/// Events that recur, or are due later.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulesConfig {
    /// The shortest time between two ticks of a schedule, seconds.
    pub min_interval_s: u64,
    /// The most schedules of an organization that are not over.
    pub max_per_organization: u32,
    /// How far ahead an event may be due, days.
    pub max_ahead_days: u32,
}

impl SchedulesConfig {
    /// The most that [`max_ahead_days`](Self::max_ahead_days) can be: ten years.
    const MAX_AHEAD_DAYS: u32 = 3_660;

    /// An event that is published `now` is due before this time, or refused.
    pub fn deliver_before(&self, now: Timestamp) -> Timestamp {
        let ahead = SignedDuration::from_hours(i64::from(self.max_ahead_days) * 24);
        now.saturating_add(ahead).unwrap_or(Timestamp::MAX)
    }
}

/// Replays.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplayConfig {
    /// How many deliveries of a job come back in a second, unless its request says so; 1–10,000.
    pub per_second: u32,
}

/// The API's port.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// The way of an event into the bus.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishConfig {
    /// The most bytes of one event, as it is delivered.
    pub max_event_bytes: usize,
    /// The most bytes of a request.
    pub max_body_bytes: usize,
    /// The most events of a request.
    pub max_batch: usize,
    /// The most bytes of requests that wait for their commit; more are answered 503.
    pub max_waiting_bytes: usize,
    /// How long a request may wait for room among them, milliseconds.
    pub max_wait_ms: u64,
    /// Transactions at a time.
    pub committers: usize,
    /// The most events of a transaction.
    pub max_group: usize,
    /// How long (source, id) and an Idempotency-Key are remembered, seconds.
    pub dedup_window_s: u64,
    /// A fan-out that is not finished after this time is taken over by any replica, seconds.
    pub outbox_lease_s: u64,
    /// Fan-outs under way at a time; what does not fit is left to the relay.
    pub fan_outs: usize,
    /// Events that may wait to be fanned out; more are answered 503. 0 is no limit.
    pub max_outbox_events: u64,
    /// How long a fan-out may be unfinished, seconds; then events are answered 503. 0 is no limit.
    pub max_outbox_age_s: u64,
    /// The limits of organizations that have none of their own.
    pub limits: LimitsConfig,
    /// When a broker is met for the first time, what was fanned out since its predecessor was known to be there, and so
    /// many seconds before, is compared with history. Must cover the server's `sync_interval`, 120 s by default.
    pub reconcile_window_s: u64,
    /// The same if the delivery stream is another one, seconds: as long as a delivery lives (`worker.lifetime_s`).
    pub reconcile_stream_s: u64,
}

/// The limits of organizations that have none of their own.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsConfig {
    /// Events a second, in the long run; 0 is no limit.
    pub rate: f64,
    /// Events at once.
    pub burst: u64,
    /// Events in a period; 0 is no limit.
    pub quota: u64,
    /// `day` or `month`, UTC.
    pub quota_period: String,
}

impl LimitsConfig {
    /// As the publisher enforces them.
    pub fn defaults(&self) -> Defaults {
        let period = self.quota_period.parse().unwrap_or(QuotaPeriod::Day);
        Defaults {
            rate: PublishRate { per_second: self.rate, burst: self.burst },
            quota: PublishQuota { events: self.quota, period },
        }
    }

    fn problem(&self) -> Option<String> {
        if !limits::is_rate(self.rate) {
            return Some(format!("publish.limits.rate must be 0, or between {MIN_RATE} and {MAX_RATE}"));
        }
        if self.rate > 0.0 && self.burst == 0 {
            return Some("publish.limits.burst must be at least 1 if there is a publish.limits.rate".into());
        }
        if self.quota_period.parse::<QuotaPeriod>().is_err() {
            return Some(r#"publish.limits.quota_period must be "day" or "month""#.into());
        }
        None
    }
}

/// What the API must know of the sinks. The section is shared with the worker's, whose other keys do not
/// matter here.
#[derive(Debug, Clone, Deserialize)]
pub struct SinkRules {
    /// Addresses that are not public and may be delivered to all the same.
    pub allow_cidrs: Vec<IpNet>,
}

impl RoleConfig for PublisherConfig {
    fn defaults() -> Vec<&'static str> {
        vec![include_str!("../defaults.toml")]
    }

    fn problem(&self, common: &Common) -> Option<String> {
        let publish = &self.publish;
        let needed = u32::try_from(publish.committers).unwrap_or(u32::MAX).saturating_add(2);
        if common.postgres.max_connections < needed {
            return Some(format!(
                "postgres.max_connections ({}) must be at least publish.committers + 2 ({needed})",
                common.postgres.max_connections
            ));
        }
        if publish.committers == 0 || publish.fan_outs == 0 || publish.max_group == 0 {
            return Some(
                "publish.committers, publish.fan_outs and publish.max_group must be at least 1".into(),
            );
        }
        if !(1..=MAX_PER_SECOND).contains(&self.replay.per_second) {
            return Some(format!("replay.per_second must be between 1 and {MAX_PER_SECOND}"));
        }
        let schedules = &self.schedules;
        if schedules.min_interval_s == 0 || schedules.max_per_organization == 0 {
            return Some(
                "schedules.min_interval_s and schedules.max_per_organization must be at least 1".into(),
            );
        }
        if !(1..=SchedulesConfig::MAX_AHEAD_DAYS).contains(&schedules.max_ahead_days) {
            return Some(format!(
                "schedules.max_ahead_days must be between 1 and {}",
                SchedulesConfig::MAX_AHEAD_DAYS
            ));
        }
        if publish.max_event_bytes > publish.max_body_bytes {
            return Some("publish.max_event_bytes must not exceed publish.max_body_bytes".into());
        }
        if publish.max_body_bytes > publish.max_waiting_bytes {
            return Some("publish.max_body_bytes must not exceed publish.max_waiting_bytes".into());
        }
        // A fan-out that succeeds late must still find its message ids remembered.
        if publish.outbox_lease_s * 2 > common.nats.duplicate_window_s {
            return Some(format!(
                "publish.outbox_lease_s ({}) must be at most half of nats.duplicate_window_s ({})",
                publish.outbox_lease_s, common.nats.duplicate_window_s
            ));
        }
        if publish.reconcile_window_s > publish.reconcile_stream_s {
            return Some("publish.reconcile_window_s must not exceed publish.reconcile_stream_s".into());
        }
        publish.limits.problem()
    }

    fn listen(&self) -> Vec<(&'static str, SocketAddr)> {
        vec![("http", self.http.listen)]
    }
}

#[cfg(test)]
mod tests {
    use bus_core::config::load;

    use super::*;

    fn with(extra: &[(&str, &str)]) -> Result<PublisherConfig, String> {
        let base = [("DATABASE_URL", "postgres://localhost/bus"), ("NATS_URL", "nats://localhost")];
        let environment = base.iter().chain(extra).map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        load::<PublisherConfig>(None, environment)
            .map(|loaded| loaded.config)
            .map_err(|refused| bus_core::telemetry::Chain(&refused).to_string())
    }

    #[test]
    fn the_defaults_are_usable() {
        with(&[]).expect("nothing but the two URLs is needed");
    }

    #[test]
    fn an_admin_token_of_digits_is_text() {
        let config = with(&[("EVENT_BUS_ADMIN_TOKEN", "007")]).expect("a token is text");
        assert_eq!(config.admin_token.expect("it was given").expose_secret(), "007");
    }

    #[test]
    fn schedules_have_bounds_of_their_own() {
        for (key, bad) in [
            ("MIN_INTERVAL_S", "0"),
            ("MAX_PER_ORGANIZATION", "0"),
            ("MAX_AHEAD_DAYS", "0"),
            ("MAX_AHEAD_DAYS", "3661"),
        ] {
            let name = format!("EVENT_BUS_SCHEDULES__{key}");
            let refused = with(&[(&name, bad)]).expect_err(bad);
            assert!(refused.contains(&format!("schedules.{}", key.to_lowercase())), "{refused}");
            with(&[(&name, "1")]).expect("1 is usable");
        }
        let config = with(&[]).expect("the defaults").schedules;
        let bound = config.deliver_before(Timestamp::UNIX_EPOCH);
        assert_eq!(bound.to_string(), "1971-01-02T00:00:00Z", "366 days later");
        assert_eq!(config.deliver_before(Timestamp::MAX), Timestamp::MAX);
    }

    #[test]
    fn a_rate_that_never_lets_anything_through_is_refused_by_name() {
        let rate = |rate| {
            with(&[("EVENT_BUS_PUBLISH__LIMITS__RATE", rate), ("EVENT_BUS_PUBLISH__LIMITS__BURST", "1")])
        };
        for bad in ["1e-300", "0.0009", "-1.0", "1000001.0"] {
            assert!(rate(bad).expect_err(bad).contains("publish.limits.rate"), "{bad}");
        }
        rate("0.001").expect("one in 1,000 s is a rate");
    }

    #[test]
    fn a_lease_beyond_the_duplicate_window_is_refused_by_name() {
        let refused = with(&[("EVENT_BUS_PUBLISH__OUTBOX_LEASE_S", "90")]).expect_err("90 > 120 / 2");
        assert!(refused.contains("publish.outbox_lease_s (90)"), "{refused}");
    }

    use secrecy::ExposeSecret as _;
}
