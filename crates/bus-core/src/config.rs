//! Configuration: defaults < TOML file < environment.
//!
//! `EVENT_BUS_<SECTION>__<KEY>` sets `section.key`; `DATABASE_URL` and `NATS_URL` set `postgres.url`
//! and `nats.url`. Every secret may be given as a file instead, with `_file` after its key: what a
//! Kubernetes secret volume holds never has to pass through the environment.

mod notify;

use std::{collections::BTreeMap, net::SocketAddr, path::Path, str::FromStr as _};

use async_nats::ServerAddr;
use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Toml},
    value::{Dict, Map, Value},
};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sqlx::postgres::PgConnectOptions;
use tracing_subscriber::EnvFilter;

pub use self::notify::{NotifyConfig, NotifyStrategy};
use crate::{
    queue::MAX_INLINE,
    streams::{self, Placement, StreamSpec},
};

/// The prefix of every variable.
pub const ENV_PREFIX: &str = "EVENT_BUS_";

/// Variables with our prefix that are a client's, not a binary's: `target/dev/env` exports them, and a
/// binary started from the same shell must not trip over them.
const CLIENT_VARIABLES: [&str; 2] = ["EVENT_BUS_URL", "EVENT_BUS_API_KEY"];

/// Keys (dotted) whose values are secret: taken from the environment as they are, never parsed as
/// numbers or dictionaries (figment issue #42), readable from `<key>_file`, and redacted when shown.
const SECRETS: [&str; 4] = ["postgres.url", "nats.url", "admin_token", "cold.secret_access_key"];

/// Where the deliveries wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// NATS JetStream: a delivery that succeeds writes nothing to the database.
    Jetstream,
    /// The database alone, for those who run no NATS.
    Postgres,
    /// The memory of the one process that has every role: for tests and embedding. What is queued does not
    /// survive it.
    Memory,
}

/// What every binary has.
#[derive(Debug, Clone, Deserialize)]
pub struct Common {
    /// Where the deliveries wait.
    pub backend: Backend,
    /// The first token of every subject and the start of every stream's name; separates deployments
    /// that share one NATS.
    pub prefix: String,
    /// How many lanes the deliveries are spread over, 1–256.
    pub lanes: u16,
    /// After binding, the process writes the addresses that it listens on here, as JSON.
    #[serde(default)]
    pub address_file: Option<std::path::PathBuf>,
    /// The database.
    pub postgres: PostgresConfig,
    /// The broker.
    pub nats: NatsConfig,
    /// The streams on the broker, by name.
    pub streams: BTreeMap<String, StreamSpec>,
    /// Hints between the processes.
    pub notify: NotifyConfig,
    /// The port for probes and metrics.
    pub admin: AdminConfig,
    /// Logs.
    pub telemetry: TelemetryConfig,
    /// Start and stop.
    pub shutdown: ShutdownConfig,
}

/// The database.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// `postgres://user:password@host:port/database`
    pub url: SecretString,
    /// The most connections that this process opens. The sum over all replicas must stay below the
    /// server's `max_connections`.
    pub max_connections: u32,
    /// How long a caller waits for a free connection, milliseconds.
    pub acquire_timeout_ms: u64,
    /// How long one statement may run, milliseconds.
    pub statement_timeout_ms: u64,
}

/// The broker.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsConfig {
    /// `nats://user:password@host:port`, or several separated by commas. Needed by the JetStream
    /// backend, and by hints that go over NATS.
    #[serde(default)]
    pub url: Option<SecretString>,
    /// A `.creds` file (JWT and seed), if the server wants one.
    #[serde(default)]
    pub credentials_file: Option<std::path::PathBuf>,
    /// Copies of each stream, 1–5 (JetStream's `num_replicas`).
    pub replicas: usize,
    /// On which servers the streams are.
    pub placement: Placement,
    /// How long the broker recognises a repeated message id, seconds (JetStream's `duplicate_window`).
    pub duplicate_window_s: u64,
    /// An unacknowledged delivery is given to another worker after this time, milliseconds
    /// (JetStream's `ack_wait`).
    pub ack_wait_ms: u64,
    /// The most deliveries that wait for an acknowledgement in one lane, all workers together
    /// (JetStream's `max_ack_pending`). Several deliveries in one message count as one.
    pub max_ack_pending: i64,
    /// New deliveries of one connection that share a message, 1–1,000; 1 for none. A worker that dies repeats at most so
    /// many for each message that it held.
    pub pack_deliveries: usize,
    /// The largest message that deliveries share, bytes, 1–262,144.
    pub pack_bytes: usize,
}

/// The port for probes and metrics.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// Logs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TelemetryConfig {
    /// For people or for machines.
    pub format: LogFormat,
    /// A `tracing` filter: `info`, or `info,bus_core=debug`.
    pub filter: String,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Start and stop.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConfig {
    /// After a signal, work in flight may take this long, milliseconds. Less than
    /// [`ShutdownConfig::grace_s`].
    pub drain_ms: u64,
    /// After this time whoever sent the signal kills the process, seconds: the deployment's
    /// `terminationGracePeriodSeconds`.
    pub grace_s: u64,
}

/// Every top-level key of any role. One file or one environment may serve all binaries, so a section
/// that belongs to another role is accepted; a name that belongs to none is refused.
const KNOWN: [&str; 24] = [
    "backend",
    "prefix",
    "lanes",
    "address_file",
    "postgres",
    "nats",
    "streams",
    "notify",
    "admin",
    "audit",
    "telemetry",
    "shutdown",
    "http",
    "scheduler",
    "schedules",
    "admin_token",
    "publish",
    "replay",
    "sink",
    "worker",
    "maintenance",
    "cold",
    "archive",
    "retention",
];

/// What one role has besides [`Common`].
pub trait RoleConfig: DeserializeOwned + Send + Sync + 'static {
    /// Whether it is the process of every role, which alone can use [`Backend::Memory`].
    const EVERY_ROLE: bool = false;

    /// The defaults, as TOML documents that are also the reference; a later one wins.
    fn defaults() -> Vec<&'static str>;

    /// The first thing that makes this configuration unusable, as a sentence.
    fn problem(&self, common: &Common) -> Option<String>;

    /// The ports that the role listens on besides the admin port, by name.
    fn listen(&self) -> Vec<(&'static str, SocketAddr)> {
        Vec::new()
    }
}

/// The defaults of [`Common`].
pub const COMMON_DEFAULTS: &str = include_str!("../defaults.toml");

/// The defaults of [`Common::streams`].
pub const STREAM_DEFAULTS: &str = include_str!("../streams.toml");

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A key is missing, unknown, or of the wrong type.
    #[error("read the configuration")]
    Extract(#[source] Box<figment::Error>),
    /// A secret's file cannot be read.
    #[error("read the secret file {path} named by {key}")]
    SecretFile {
        /// The key that names the file.
        key: String,
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The values do not go together.
    #[error("{0}")]
    Problem(String),
}

/// A read configuration, and what may be shown of it.
#[derive(Debug)]
pub struct Loaded<C> {
    /// What is common to all roles.
    pub common: Common,
    /// The role's own values.
    pub config: C,
    /// The effective configuration, dotted key to value, secrets redacted.
    pub shown: BTreeMap<String, String>,
}

/// Reads what every binary has: for a tool, which has no role.
pub fn load_common(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Common, ConfigError> {
    load::<NoRole>(file, environment).map(|loaded| loaded.common)
}

/// What a tool has of its own to configure: nothing.
#[derive(Debug, Deserialize)]
struct NoRole {}

impl RoleConfig for NoRole {
    fn defaults() -> Vec<&'static str> {
        Vec::new()
    }

    fn problem(&self, _: &Common) -> Option<String> {
        None
    }
}

/// Reads the configuration of one role. `environment` is an argument so that tests need not touch the
/// process's own.
pub fn load<C: RoleConfig>(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded<C>, ConfigError> {
    let mut figment = Figment::from(Toml::string(COMMON_DEFAULTS)).merge(Toml::string(STREAM_DEFAULTS));
    for defaults in C::defaults() {
        figment = figment.merge(Toml::string(defaults));
    }
    if let Some(file) = file {
        figment = figment.merge(Toml::file_exact(file));
    }
    figment = figment.merge(Environment(environment.into_iter().collect()));
    figment = resolve_secret_files(figment)?;
    let extract_failed = |error| ConfigError::Extract(Box::new(error));
    let all: Dict = figment.extract().map_err(extract_failed)?;
    if let Some(unknown) = all.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(ConfigError::Problem(format!(
            "unknown key {unknown:?} (from a file or {ENV_PREFIX}{}); known are {}",
            unknown.to_ascii_uppercase(),
            KNOWN.join(", ")
        )));
    }
    let common: Common = figment.extract().map_err(extract_failed)?;
    let config: C = figment.extract().map_err(extract_failed)?;
    if common.backend == Backend::Memory && !C::EVERY_ROLE {
        return Err(ConfigError::Problem(
            "the memory backend is the memory of one process, which must have every role: run `event-bus`, or \
             set backend to \"jetstream\" or \"postgres\""
                .into(),
        ));
    }
    if let Some(problem) = common.problem().or_else(|| config.problem(&common)) {
        return Err(ConfigError::Problem(problem));
    }
    Ok(Loaded { common, config, shown: show(&all) })
}

impl Common {
    fn problem(&self) -> Option<String> {
        let prefix_ok = !self.prefix.is_empty()
            && self.prefix.len() <= 32
            && self
                .prefix
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !prefix_ok {
            return Some("prefix must be 1–32 of a-z, 0-9 and '-'".into());
        }
        if !(1..=256).contains(&self.lanes) {
            return Some("lanes must be between 1 and 256".into());
        }
        if !(1..=5).contains(&self.nats.replicas) {
            return Some("nats.replicas must be between 1 and 5".into());
        }
        if !(1..=1_000).contains(&self.nats.pack_deliveries) {
            return Some("nats.pack_deliveries must be between 1 and 1,000".into());
        }
        if !(1..=MAX_INLINE).contains(&self.nats.pack_bytes) {
            return Some(format!("nats.pack_bytes must be between 1 and {MAX_INLINE}"));
        }
        if self.backend == Backend::Jetstream && self.nats.url.is_none() {
            return Some("the jetstream backend needs nats.url: set NATS_URL or nats.url_file".into());
        }
        if let Some(problem) = self.notify_problem() {
            return Some(problem);
        }
        if let Some(problem) = streams::problem(&self.streams, &self.nats) {
            return Some(problem);
        }
        // One of them listens for hints where Postgres carries them.
        let listens = matches!(self.notify_strategy(), NotifyStrategy::Postgres | NotifyStrategy::Compose);
        let needed = match self.backend {
            Backend::Postgres => 6,
            Backend::Jetstream | Backend::Memory => 2 + u32::from(listens),
        };
        if self.postgres.max_connections < needed {
            return Some(format!("postgres.max_connections must be at least {needed}"));
        }
        if PgConnectOptions::from_str(self.postgres.url.expose_secret()).is_err() {
            return Some(
                "postgres.url is not a URL of a database (postgres://user:password@host/database)".into(),
            );
        }
        let nats = self.nats.url.as_ref().map(|url| url.expose_secret()).unwrap_or_default();
        if nats.split(',').any(|server| !nats.is_empty() && server.trim().parse::<ServerAddr>().is_err()) {
            return Some("nats.url is not a list of servers (nats://user:password@host:port)".into());
        }
        let grace = self.shutdown.grace_s.saturating_mul(1_000);
        if self.shutdown.drain_ms >= grace {
            return Some(format!(
                "shutdown.drain_ms ({}) must be less than shutdown.grace_s ({}), or a drain is killed before it ends",
                self.shutdown.drain_ms, self.shutdown.grace_s
            ));
        }
        if let Err(refused) = EnvFilter::try_new(&self.telemetry.filter) {
            return Some(format!("telemetry.filter: {refused}"));
        }
        None
    }
}

/// `x_file = "path"` beside a secret `x` sets `x` to the file's content, without its last line break.
fn resolve_secret_files(mut figment: Figment) -> Result<Figment, ConfigError> {
    for secret in SECRETS {
        let key = format!("{secret}_file");
        let Ok(value) = figment.find_value(&key) else { continue };
        let path = value.as_str().unwrap_or_default().to_owned();
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::SecretFile {
            key: key.clone(),
            path,
            source,
        })?;
        let mut dict = Dict::new();
        insert(&mut dict, secret, Value::from(text.trim_end_matches(['\r', '\n'])));
        // The `_file` key has done its work; removing it lets `deny_unknown_fields` stay strict.
        figment = without(figment, &key)?.merge(Literal(dict));
    }
    Ok(figment)
}

fn without(figment: Figment, key: &str) -> Result<Figment, ConfigError> {
    let mut dict: Dict = figment.extract().map_err(|error| ConfigError::Extract(Box::new(error)))?;
    let mut path: Vec<&str> = key.split('.').collect();
    let last = path.pop().unwrap_or_default();
    let mut at = &mut dict;
    for part in path {
        match at.get_mut(part) {
            Some(Value::Dict(_, inner)) => at = inner,
            _ => return Ok(figment),
        }
    }
    at.remove(last);
    Ok(Figment::from(Literal(dict)))
}

fn insert(dict: &mut Dict, dotted: &str, value: Value) {
    match dotted.split_once('.') {
        None => {
            dict.insert(dotted.to_owned(), value);
        }
        Some((head, rest)) => {
            let inner = dict.entry(head.to_owned()).or_insert_with(|| Value::from(Dict::new()));
            if let Value::Dict(_, inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

/// Brackets in the value of a variable.
const MAX_NESTING: usize = 100;

/// Values that are set already, as a provider.
struct Literal(Dict);

impl Provider for Literal {
    fn metadata(&self) -> Metadata {
        Metadata::named("secret files")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.0.clone()))
    }
}

/// The environment. figment's own provider parses every value, so that a token of digits becomes a
/// number; this one leaves secrets, addresses, and what it cannot read alone.
struct Environment(BTreeMap<String, String>);

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named("environment")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let mut dict = Dict::new();
        for (name, key) in [("DATABASE_URL", "postgres.url"), ("NATS_URL", "nats.url")] {
            if let Some(text) = self.0.get(name) {
                insert(&mut dict, key, Value::from(text.as_str()));
            }
        }
        for (name, text) in &self.0 {
            let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
            if CLIENT_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let key = rest.to_ascii_lowercase().replace("__", ".");
            let text_only = SECRETS.contains(&key.as_str()) || key.ends_with("_file") || key == "prefix";
            let text_only = text_only || !is_parseable(text);
            let value = if text_only {
                Value::from(text.as_str())
            } else {
                text.parse().unwrap_or_else(|infallible: std::convert::Infallible| match infallible {})
            };
            insert(&mut dict, &key, value);
        }
        Ok(Profile::Default.collect(dict))
    }
}

/// figment 0.10's parser panics at some texts that are not ASCII, and overflows the stack at deep nesting; no list or
/// table of ours has either.
fn is_parseable(text: &str) -> bool {
    text.is_ascii() && text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count() <= MAX_NESTING
}

fn show(values: &Dict) -> BTreeMap<String, String> {
    let mut shown = BTreeMap::new();
    flatten("", values, &mut shown);
    for secret in SECRETS {
        if let Some(value) = shown.get_mut(secret) {
            *value = "[redacted]".to_owned();
        }
    }
    shown
}

fn flatten(prefix: &str, dict: &Dict, into: &mut BTreeMap<String, String>) {
    for (key, value) in dict {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Dict(_, inner) => flatten(&key, inner, into),
            other => {
                let text = serde_json::to_string(other).unwrap_or_default();
                into.insert(key, text);
            }
        }
    }
}
