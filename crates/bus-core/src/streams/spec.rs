//! What the configuration says about a stream, and what follows from that for the broker.

use std::time::Duration;

use async_nats::jetstream::stream::{self, Config, DiscardPolicy, RetentionPolicy, StorageType};
use serde::{Deserialize, Serialize};

use crate::config::{Common, NatsConfig};

/// Where a stream on the broker says that it is archived, so that a configuration which no longer says so is
/// noticed.
const ARCHIVE_METADATA: &str = "event-bus.archive";

/// One stream: a section `[streams.<name>]`. `streams.toml` beside `src/` is the reference.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSpec {
    /// What it catches, below the deployment's prefix; with none it is not wanted.
    pub subjects: Vec<String>,
    /// What ends a message's stay besides the limits.
    #[serde(default)]
    pub retention: RetentionPolicy,
    /// How long a message is kept, seconds; 0 for ever.
    pub max_age_s: u64,
    /// How many bytes are kept; -1 without a limit.
    pub max_bytes: i64,
    /// How many messages are kept; -1 without a limit.
    #[serde(default = "unlimited")]
    pub max_messages: i64,
    /// Where the messages are.
    #[serde(default)]
    pub storage: StorageType,
    /// Copies, 1–5; [`NatsConfig::replicas`] if absent.
    #[serde(default)]
    pub replicas: Option<usize>,
    /// On which servers; [`NatsConfig::placement`] if absent.
    #[serde(default)]
    pub placement: Option<Placement>,
    /// How long a repeated message id is recognised, seconds; [`NatsConfig::duplicate_window_s`] if absent.
    #[serde(default)]
    pub duplicate_window_s: Option<u64>,
    /// What a full stream does. If absent it refuses what comes, unless what is old may go anyway.
    #[serde(default)]
    pub discard: Option<DiscardPolicy>,
    /// What becomes of messages that are too old.
    #[serde(default)]
    pub archive: Archive,
}

/// On which servers of a cluster, or of several, the copies of a stream are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// The name of the cluster; empty for the one that the stream is created in.
    #[serde(default)]
    pub cluster: String,
    /// Only servers that have all of these tags.
    #[serde(default)]
    pub tags: Vec<String>,
}

impl Placement {
    /// In the broker's terms; nothing if nothing is said.
    fn described(&self) -> Option<stream::Placement> {
        let cluster = Some(self.cluster.clone()).filter(|cluster| !cluster.is_empty());
        let tags = self.tags.clone();
        (cluster.is_some() || !tags.is_empty()).then_some(stream::Placement { cluster, tags })
    }
}

fn unlimited() -> i64 {
    -1
}

/// What becomes of messages that are too old.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Archive {
    /// The broker removes them.
    #[default]
    Drop,
    /// The archiver copies them to cold storage, and removes what it has confirmed there. The broker removes
    /// nothing by itself.
    Archive,
}

impl Archive {
    /// What a stream on the broker says.
    pub(super) fn of(config: &Config) -> Self {
        if config.metadata.contains_key(ARCHIVE_METADATA) { Self::Archive } else { Self::Drop }
    }
}

impl StreamSpec {
    /// What a full stream does.
    pub(super) fn discard(&self) -> DiscardPolicy {
        let old_may_go = self.retention == RetentionPolicy::Limits && self.archive == Archive::Drop;
        let by_default = if old_may_go { DiscardPolicy::Old } else { DiscardPolicy::New };
        self.discard.unwrap_or(by_default)
    }

    /// How long the broker itself keeps a message, seconds; 0 for ever.
    pub(super) fn broker_max_age_s(&self) -> u64 {
        match self.archive {
            Archive::Drop => self.max_age_s,
            Archive::Archive => 0,
        }
    }

    /// How long a repeated message id is recognised, seconds.
    pub(super) fn duplicate_window_s(&self, nats: &NatsConfig) -> u64 {
        self.duplicate_window_s.unwrap_or(nats.duplicate_window_s)
    }
}

/// A stream as the configuration describes it, in the broker's terms.
#[derive(Debug, Clone)]
pub struct Described {
    /// Its name in the configuration.
    pub name: String,
    /// What becomes of messages that are too old.
    pub archive: Archive,
    /// How long a message is kept, whoever removes it then; zero for ever.
    pub keep: Duration,
    /// What the broker is told.
    pub config: Config,
}

impl Described {
    /// What the broker is told about a stream that exists: what the configuration says nothing about (a
    /// description, a limit per subject) stays as it is, and so does a placement, if none is described.
    pub(super) fn over(&self, existing: &Config) -> Config {
        let ours = self.config.clone();
        let mut metadata = existing.metadata.clone();
        metadata.remove(ARCHIVE_METADATA);
        metadata.extend(ours.metadata);
        Config {
            name: ours.name,
            subjects: ours.subjects,
            retention: ours.retention,
            max_age: ours.max_age,
            max_bytes: ours.max_bytes,
            max_messages: ours.max_messages,
            storage: ours.storage,
            num_replicas: ours.num_replicas,
            placement: ours.placement.or_else(|| existing.placement.clone()),
            duplicate_window: ours.duplicate_window,
            discard: ours.discard,
            metadata,
            ..existing.clone()
        }
    }
}

/// The streams that the configuration describes.
pub fn described(common: &Common) -> Vec<Described> {
    let wanted = common.streams.iter().filter(|(_, spec)| !spec.subjects.is_empty());
    wanted.map(|(name, spec)| describe(common, name, spec)).collect()
}

fn describe(common: &Common, name: &str, spec: &StreamSpec) -> Described {
    let archived = || (ARCHIVE_METADATA.to_owned(), "true".to_owned());
    let config = Config {
        name: stream_name(&common.prefix, name),
        subjects: spec.subjects.iter().map(|subject| format!("{}.{subject}", common.prefix)).collect(),
        retention: spec.retention,
        max_age: Duration::from_secs(spec.broker_max_age_s()),
        max_bytes: spec.max_bytes,
        max_messages: spec.max_messages,
        storage: spec.storage,
        num_replicas: spec.replicas.unwrap_or(common.nats.replicas),
        placement: spec.placement.as_ref().unwrap_or(&common.nats.placement).described(),
        duplicate_window: Duration::from_secs(spec.duplicate_window_s(&common.nats)),
        discard: spec.discard(),
        metadata: (spec.archive == Archive::Archive).then(archived).into_iter().collect(),
        ..Config::default()
    };
    Described {
        name: name.to_owned(),
        archive: spec.archive,
        keep: Duration::from_secs(spec.max_age_s),
        config,
    }
}

/// What the broker calls the stream that the configuration calls `name`.
pub fn stream_name(prefix: &str, name: &str) -> String {
    format!("{prefix}_{name}").to_ascii_uppercase()
}
