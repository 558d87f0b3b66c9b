//! The archiver's configuration. `defaults.toml` beside `src/` is the reference.

use bus_core::{
    config::{Common, RoleConfig},
    pg::DayTable,
    streams::Archive,
};
use serde::Deserialize;

/// The archiver's own configuration.
#[derive(Debug, Clone, Deserialize)]
pub struct ArchiverConfig {
    /// What is created ahead and what is swept.
    pub maintenance: MaintenanceConfig,
    /// Where cold storage is.
    pub cold: cold_storage::Config,
    /// How streams and tables are moved there.
    pub archive: ArchiveConfig,
    /// What is kept how long.
    pub retention: RetentionConfig,
}

/// What is created ahead and what is swept.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaintenanceConfig {
    /// Days for which partitions exist ahead.
    pub partitions_ahead_days: i32,
    /// Finished outbox rows are kept this long, seconds: longer than the broker's sync interval (two
    /// minutes by default), so that they still tell what a broker that lost its last messages had.
    pub outbox_keep_s: u64,
    /// Rows of deliveries that are over, and have left the straight path, are kept this long, seconds.
    pub delivery_states_keep_s: u64,
}

/// How streams and tables are moved to cold storage.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArchiveConfig {
    /// A batch is closed when so many messages wait, 1–1,000,000.
    pub batch_messages: u64,
    /// A batch is closed when about so many bytes wait, 1 KiB–64 MiB.
    pub batch_bytes: u64,
    /// A batch is closed when its oldest message has waited so long, seconds.
    pub batch_age_s: u64,
    /// Whoever works on a stream or a table holds it so long after its last sign of life, seconds, 5–600.
    pub lease_s: u32,
}

/// What is kept how long.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionConfig {
    /// Events, with their bodies.
    pub events: TableRetention,
    /// History: what was attempted.
    pub delivery_attempts: TableRetention,
    /// What became of the ticks of schedules.
    pub occurrences: TableRetention,
    /// Who changed what.
    pub audit_records: TableRetention,
    /// Deliveries that were given up.
    pub dead_letters: Retention,
    /// Cold storage.
    pub cold: Retention,
}

/// What is kept how long, and what becomes of it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRetention {
    /// Days; 0 for ever.
    pub keep_days: u32,
    /// Whether it goes to cold storage.
    pub archive: Archive,
}

/// What is kept how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    /// Days; 0 for ever.
    pub keep_days: u32,
}

/// The longest retention in days, a hundred years; a calendar ends somewhere.
const LONGEST_DAYS: u32 = 36_500;

impl RetentionConfig {
    /// That of a table.
    pub fn of(&self, table: DayTable) -> TableRetention {
        match table {
            DayTable::Events => self.events,
            DayTable::DeliveryAttempts => self.delivery_attempts,
            DayTable::Occurrences => self.occurrences,
            DayTable::AuditRecords => self.audit_records,
        }
    }

    fn problem(&self, states_keep_s: u64, common: &Common) -> Option<String> {
        let tables = DayTable::ALL.map(|table| (table.name(), self.of(table).keep_days));
        let all = tables
            .into_iter()
            .chain([("dead_letters", self.dead_letters.keep_days), ("cold", self.cold.keep_days)]);
        for (name, days) in all {
            if days > LONGEST_DAYS {
                return Some(format!("retention.{name}.keep_days ({days}) must be at most {LONGEST_DAYS}"));
            }
        }
        if let Some(problem) = self.cold_problem(common) {
            return Some(problem);
        }
        let (events, attempts) = (self.events.keep_days, self.delivery_attempts.keep_days);
        if attempts != 0 && (events == 0 || attempts < events) {
            return Some(format!(
                "retention.delivery_attempts.keep_days ({attempts}) must be at least retention.events.keep_days \
                 ({events}): without its attempts an event is shown as pending"
            ));
        }
        if events == 0 {
            return None;
        }
        if u64::from(events) * 86_400 <= states_keep_s {
            return Some(format!(
                "retention.events.keep_days ({events}) must be longer than maintenance.delivery_states_keep_s \
                 ({states_keep_s}): deliveries that are open read their event"
            ));
        }
        let dead = self.dead_letters.keep_days;
        (dead == 0 || dead > events).then(|| {
            format!(
                "retention.dead_letters.keep_days ({dead}) must be at most retention.events.keep_days ({events}): a \
                 dead letter is replayed from its event"
            )
        })
    }
}

impl RetentionConfig {
    /// What is moved to cold storage must not expire there before it has gone from where it was.
    fn cold_problem(&self, common: &Common) -> Option<String> {
        let cold = self.cold.keep_days;
        if cold == 0 {
            return None;
        }
        let tables = DayTable::ALL
            .into_iter()
            .filter(|table| self.of(*table).archive == Archive::Archive)
            .map(|table| (format!("retention.{}.keep_days", table.name()), self.of(table).keep_days));
        let streams = common.streams.iter().filter(|(_, stream)| stream.archive == Archive::Archive).map(
            |(name, stream)| {
                let days = u32::try_from(stream.max_age_s.div_ceil(86_400)).unwrap_or(u32::MAX);
                (format!("streams.{name}.max_age_s in days"), days)
            },
        );
        let needs = |(_, days): &(String, u32)| *days == 0 || *days >= cold;
        tables.chain(streams).find(needs).map(|(key, days)| {
            format!(
                "retention.cold.keep_days ({cold}) must be longer than {key} ({days}; 0 is for ever), or 0"
            )
        })
    }
}

impl RoleConfig for ArchiverConfig {
    fn defaults() -> Vec<&'static str> {
        vec![include_str!("../defaults.toml")]
    }

    fn problem(&self, common: &Common) -> Option<String> {
        let between = |key: &str, value: u64, least: u64, most: u64| {
            (!(least..=most).contains(&value))
                .then(|| format!("{key} ({value}) must be between {least} and {most}"))
        };
        let ahead = u64::try_from(self.maintenance.partitions_ahead_days).unwrap_or(0);
        between("maintenance.partitions_ahead_days", ahead, 1, 31)
            .or_else(|| between("archive.batch_messages", self.archive.batch_messages, 1, 1_000_000))
            .or_else(|| between("archive.batch_bytes", self.archive.batch_bytes, 1_024, 64 * 1_024 * 1_024))
            .or_else(|| between("archive.lease_s", self.archive.lease_s.into(), 5, 600))
            .or_else(|| self.retention.problem(self.maintenance.delivery_states_keep_s, common))
            .or_else(|| self.cold.problem().map(|problem| format!("cold: {problem}")))
    }
}
