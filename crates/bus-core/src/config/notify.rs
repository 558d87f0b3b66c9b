//! What carries hints between the processes.

use serde::{Deserialize, Serialize};

use super::{Backend, Common};

/// What carries hints between the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotifyStrategy {
    /// By what is configured: NATS with the JetStream backend; with the Postgres backend both if there is
    /// a `nats.url`, else Postgres; memory with the memory backend.
    Auto,
    /// Nothing: everyone looks every `notify.poll_ms`. For a database that is behind a pooler in
    /// transaction mode, where `LISTEN` does not work, and no NATS.
    Polling,
    /// `LISTEN/NOTIFY`.
    Postgres,
    /// Core NATS.
    Nats,
    /// NATS and Postgres both, so that either may be away.
    Compose,
    /// Within the one process that has every role.
    Memory,
}

/// Hints between the processes. They save latency; without them everything is found by polling.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NotifyConfig {
    /// What carries them.
    pub strategy: NotifyStrategy,
    /// How long something may stay unseen that no hint announced, milliseconds, 10–60,000: the interval of
    /// [`NotifyStrategy::Polling`], and of the workers of the Postgres backend under every strategy.
    pub poll_ms: u64,
}

impl Common {
    /// What carries hints between the processes, `auto` resolved.
    pub fn notify_strategy(&self) -> NotifyStrategy {
        match (self.notify.strategy, self.backend) {
            (NotifyStrategy::Auto, Backend::Jetstream) => NotifyStrategy::Nats,
            (NotifyStrategy::Auto, Backend::Postgres) if self.nats.url.is_some() => NotifyStrategy::Compose,
            (NotifyStrategy::Auto, Backend::Postgres) => NotifyStrategy::Postgres,
            (NotifyStrategy::Auto, Backend::Memory) => NotifyStrategy::Memory,
            (chosen, _) => chosen,
        }
    }

    /// What is wrong with the section `[notify]`, if anything.
    pub(super) fn notify_problem(&self) -> Option<String> {
        let strategy = self.notify_strategy();
        if matches!(strategy, NotifyStrategy::Nats | NotifyStrategy::Compose) && self.nats.url.is_none() {
            return Some(
                "this notify.strategy needs nats.url: set NATS_URL or nats.url_file, or choose another \
                 strategy (\"auto\" takes what there is)"
                    .into(),
            );
        }
        if strategy == NotifyStrategy::Memory && self.backend != Backend::Memory {
            return Some("notify.strategy \"memory\" needs the memory backend: choose \"auto\"".into());
        }
        if !(10..=60_000).contains(&self.notify.poll_ms) {
            return Some("notify.poll_ms must be between 10 and 60000".into());
        }
        None
    }
}
