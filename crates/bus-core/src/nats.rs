//! The connection to NATS, and the names of our streams and subjects.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_nats::{
    Client, ConnectOptions, Event, ServerAddr,
    jetstream::{
        Context, ErrorCode,
        consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
        context::{ContextBuilder, GetStreamErrorKind},
    },
};
use bytes::Bytes;
use futures::StreamExt as _;
use percent_encoding::percent_decode_str;
use secrecy::ExposeSecret as _;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::{
    audit::{Action, Record},
    config::{Common, NatsConfig},
    ids::{ConnectionId, OrganizationId},
    streams::{self, Archive, Described, OWN, Said},
};

/// The oldest server that does what we rely on; an older one ignores fields that it does not know
/// instead of refusing them.
const MIN_SERVER: (i64, i64, i64) = (2, 12, 0);

/// JetStream publishes that wait for their acknowledgement at one time, per process.
const MAX_ACKS_IN_FLIGHT: usize = 4_000;

/// How long a JetStream call may take, and a publish wait for its acknowledgement.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the server may take to answer when nothing is asked of it.
const ROUND_TRIP: Duration = Duration::from_secs(2);

/// What went wrong with the broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NatsError {
    /// The server cannot be used, and waiting will not help.
    #[error("nats-server is {found}, needs at least {}.{}.{}", MIN_SERVER.0, MIN_SERVER.1, MIN_SERVER.2)]
    TooOld {
        /// What it says it is.
        found: String,
    },
    /// The URL or the credentials cannot be read.
    #[error("{operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A call failed.
    #[error("{operation}")]
    Call {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: async_nats::Error,
    },
    /// A call about one stream failed.
    #[error("{operation} the stream {stream}")]
    Stream {
        /// What was being done.
        operation: &'static str,
        /// The stream.
        stream: String,
        /// Why it failed.
        #[source]
        source: async_nats::Error,
    },
}

/// Adds the operation's name to an error of async-nats.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, NatsError>;
}

impl<T, E: Into<async_nats::Error>> During<T> for Result<T, E> {
    fn during(self, operation: &'static str) -> Result<T, NatsError> {
        self.map_err(|source| NatsError::Call { operation, source: source.into() })
    }
}

/// A connection that heals by itself. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Nats {
    /// Core NATS.
    pub client: Client,
    /// JetStream.
    pub jetstream: Context,
    /// The names of everything that is ours.
    pub names: Names,
    /// The settings of streams and consumers.
    pub config: Arc<NatsConfig>,
    /// The streams that the configuration describes.
    pub streams: Arc<[Described]>,
    /// What was said about those that are not as described.
    pub(crate) said: Arc<Said>,
    /// Counts the connections that were made and the hints that may have been lost; 0 before the
    /// first. Whoever relies on core messages starts afresh when it changes.
    epoch: watch::Receiver<u64>,
    connected: watch::Receiver<bool>,
}

impl Nats {
    /// Starts connecting and returns at once: a broker that is away delays readiness and nothing else.
    pub async fn connect(common: &Common, role: &'static str) -> Result<Self, NatsError> {
        let config = &common.nats;
        let (epochs, epoch) = watch::channel(0);
        let (up, connected) = watch::channel(false);
        let mut options = ConnectOptions::new()
            .name(role)
            .retry_on_initial_connect()
            .connection_timeout(Duration::from_secs(5))
            .ping_interval(Duration::from_secs(10))
            .reconnect_delay_callback(|attempt| {
                Duration::from_millis(50 << attempt.min(6)).min(Duration::from_secs(2))
            })
            .event_callback(move |event| {
                let (epochs, up) = (epochs.clone(), up.clone());
                async move {
                    match event {
                        Event::Connected => {
                            info!("Connected to NATS");
                            epochs.send_modify(|epoch| *epoch += 1);
                            up.send_replace(true);
                        }
                        Event::Disconnected => {
                            warn!("Disconnected from NATS");
                            up.send_replace(false);
                        }
                        Event::SlowConsumer(_) => {
                            warn!("A NATS subscription fell behind; what it may have missed is read afresh");
                            epochs.send_modify(|epoch| *epoch += 1);
                        }
                        // Authorization errors and the like: without this line a wrong password would
                        // look like a broker that is away.
                        Event::ServerError(_) | Event::ClientError(_) => {
                            warn!(problem = %event, "NATS refuses");
                        }
                        other => debug!(event = %other, "NATS event"),
                    }
                }
            });
        if let Some(path) = &config.credentials_file {
            options = options
                .credentials_file(path)
                .await
                .map_err(|source| NatsError::Io { operation: "read nats.credentials_file", source })?;
        }
        let url = config.url.as_ref().map(|url| url.expose_secret().to_owned()).unwrap_or_default();
        let servers: Vec<ServerAddr> = url
            .split(',')
            .map(|server| server.trim().parse())
            .collect::<Result<_, _>>()
            .map_err(|source| NatsError::Io { operation: "read nats.url", source })?;
        // The client takes no credentials from a URL by itself; those of the first server are for all.
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        match servers.first().map(|first| (first.username(), first.password())) {
            Some((Some(user), Some(password))) => {
                options = options.user_and_password(decoded(user), decoded(password));
            }
            Some((Some(token), None)) => options = options.token(decoded(token)),
            _ => {}
        }
        let client = options.connect(servers).await.during("connect to NATS")?;
        let jetstream = ContextBuilder::new()
            .timeout(CALL_TIMEOUT)
            .ack_timeout(CALL_TIMEOUT)
            .max_ack_inflight(MAX_ACKS_IN_FLIGHT)
            .backpressure_on_inflight(true)
            .build(client.clone());
        Ok(Self {
            client,
            jetstream,
            names: Names::new(&common.prefix),
            config: Arc::new(config.clone()),
            streams: streams::described(common).into(),
            said: Arc::default(),
            epoch,
            connected,
        })
    }

    /// Waits until there is a connection, then makes sure that the server is new enough and that the bus's own
    /// streams exist. Safe to call from any number of processes at a time, and again after the broker lost
    /// them. Consumers are created by those who pull from them.
    pub async fn prepare(&self) -> Result<(), NatsError> {
        self.wait_for_server().await?;
        for stream in self.streams.iter().filter(|stream| OWN.contains(&stream.name.as_str())) {
            streams::ensure(self, stream).await?;
        }
        Ok(())
    }

    /// Like [`Nats::prepare`], for the streams that are archived.
    pub async fn prepare_archived(&self) -> Result<(), NatsError> {
        self.wait_for_server().await?;
        for stream in self.streams.iter().filter(|stream| stream.archive == Archive::Archive) {
            streams::ensure(self, stream).await?;
        }
        Ok(())
    }

    /// Waits until there is a connection, and makes sure that the server is new enough.
    pub async fn wait_for_server(&self) -> Result<(), NatsError> {
        let mut connected = self.connected.clone();
        // The sender lives in the client's event task, as long as `self.client`.
        connected.wait_for(|connected| *connected).await.during("wait for NATS")?;
        if !self.client.is_server_compatible(MIN_SERVER.0, MIN_SERVER.1, MIN_SERVER.2) {
            return Err(NatsError::TooOld { found: self.client.server_info().version });
        }
        Ok(())
    }

    /// When the delivery stream was created, which tells it from one of the same name, and how many copies it has; `None`
    /// if there is none.
    pub async fn delivery_stream_created(&self) -> Result<Option<(String, usize)>, NatsError> {
        match self.jetstream.get_stream(&self.names.deliver_stream).await {
            Ok(stream) => {
                let info = stream.cached_info();
                Ok(Some((info.created.unix_timestamp_nanos().to_string(), info.config.num_replicas)))
            }
            Err(failed) => match failed.kind() {
                GetStreamErrorKind::JetStream(refused)
                    if refused.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(failed).during("look up the delivery stream"),
            },
        }
    }

    /// The lanes whose consumers have something to hand out, or have handed it out.
    pub async fn lanes(&self) -> Result<BTreeSet<u16>, NatsError> {
        const OPERATION: &str = "list the consumers of the delivery stream";
        let stream = self.jetstream.get_stream_no_info(&self.names.deliver_stream).await.during(OPERATION)?;
        let mut consumers = stream.consumers();
        let mut lanes = BTreeSet::new();
        while let Some(consumer) = consumers.next().await.transpose().during(OPERATION)? {
            if consumer.num_pending > 0 || consumer.num_ack_pending > 0 {
                lanes.extend(consumer.name.strip_prefix("lane-").and_then(|lane| lane.parse::<u16>().ok()));
            }
        }
        Ok(lanes)
    }

    /// Whether the audit stream holds so many percent of the bytes that it may hold.
    pub async fn audit_is_full(&self, percent: u64) -> Result<bool, NatsError> {
        let stream =
            self.jetstream.get_stream(&self.names.audit_stream).await.during("look at the audit stream")?;
        let info = stream.cached_info();
        let limit = u64::try_from(info.config.max_bytes).unwrap_or(u64::MAX);
        Ok(info.state.bytes.saturating_mul(100) >= limit.saturating_mul(percent))
    }

    /// The durable consumer of one lane, created if it is missing.
    pub async fn lane_consumer(&self, lane: u16) -> Result<PullConsumer, NatsError> {
        let name = format!("lane-{lane}");
        self.consumer(
            &self.names.deliver_stream,
            pull::Config {
                durable_name: Some(name),
                filter_subject: self.names.lane(lane),
                ack_wait: Duration::from_millis(self.config.ack_wait_ms),
                max_ack_pending: self.config.max_ack_pending,
                ..consumer_defaults()
            },
        )
        .await
    }

    /// The durable consumer through which the archivers share the receipts.
    pub async fn receipt_consumer(&self) -> Result<PullConsumer, NatsError> {
        self.consumer(
            &self.names.audit_stream,
            pull::Config {
                durable_name: Some("history".to_owned()),
                filter_subject: self.names.receipts(),
                // What an archiver that died had taken comes back after this time; history lags by it.
                ack_wait: Duration::from_secs(10),
                max_ack_pending: 100_000,
                ..consumer_defaults()
            },
        )
        .await
    }

    async fn consumer(&self, stream: &str, config: pull::Config) -> Result<PullConsumer, NatsError> {
        self.jetstream.create_consumer_on_stream(config, stream).await.during("create a consumer")
    }

    /// Whether there is a connection now.
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }

    /// Follows whether there is a connection.
    pub fn connection(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }

    /// How many connections have been made. Unlike [`Nats::epoch`] it counts one before anything comes by it.
    pub(crate) fn connections(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Follows the moments from which core messages may have been missed.
    pub fn epoch(&self) -> watch::Receiver<u64> {
        self.epoch.clone()
    }

    /// Returns when the server has done what this connection asked for before: it answers in order.
    pub(crate) async fn round_trip(&self) -> Result<(), NatsError> {
        const OPERATION: &str = "ask the server for a sign of life";
        // To ask may take as long: in a partition the client has no room for what it is told to send.
        let asked = async {
            let inbox = self.client.new_inbox();
            let mut answer = self.client.subscribe(inbox.clone()).await.during(OPERATION)?;
            self.client.publish(inbox, Bytes::new()).await.during(OPERATION)?;
            answer.next().await.map(drop).ok_or("the client is closed").during(OPERATION)
        };
        tokio::time::timeout(ROUND_TRIP, asked).await.during(OPERATION)?
    }

    /// Sends what is buffered (the last acknowledgements), for at most two seconds.
    pub async fn flush(&self) {
        if self.is_connected()
            && tokio::time::timeout(Duration::from_secs(2), self.client.flush()).await.is_err()
        {
            warn!("The last messages to NATS may not have been sent");
        }
    }
}

fn consumer_defaults() -> pull::Config {
    pull::Config {
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        // We count attempts ourselves: JetStream has no dead letters, it only stops showing the message.
        max_deliver: -1,
        ..pull::Config::default()
    }
}

/// The names of streams and subjects of one deployment.
#[derive(Debug, Clone)]
pub struct Names {
    /// The first token of every subject.
    pub prefix: Arc<str>,
    /// The work queue.
    pub deliver_stream: String,
    /// Dead letters.
    pub dead_stream: String,
    /// Receipts and audit records.
    pub audit_stream: String,
}

impl Names {
    /// The names under `prefix`.
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.into(),
            deliver_stream: streams::stream_name(prefix, streams::DELIVER),
            dead_stream: streams::stream_name(prefix, streams::DEAD),
            audit_stream: streams::stream_name(prefix, streams::AUDIT),
        }
    }

    /// Everything in one lane.
    pub fn lane(&self, lane: u16) -> String {
        format!("{}.deliver.{lane}.>", self.prefix)
    }

    /// The deliveries of one connection.
    pub fn deliver(&self, lane: u16, organization: OrganizationId, connection: ConnectionId) -> String {
        format!("{}.deliver.{lane}.{organization}.{connection}", self.prefix)
    }

    /// The deliveries of one connection, whatever their lane.
    pub fn deliveries_of(&self, organization: OrganizationId, connection: ConnectionId) -> String {
        format!("{}.deliver.*.{organization}.{connection}", self.prefix)
    }

    /// The dead letters of one connection.
    pub fn dead(&self, organization: OrganizationId, connection: ConnectionId) -> String {
        format!("{}.dead.events.{organization}.{connection}", self.prefix)
    }

    /// The dead letters of one organization.
    pub fn all_dead(&self, organization: OrganizationId) -> String {
        format!("{}.dead.events.{organization}.>", self.prefix)
    }

    /// Messages that could not be read.
    pub fn malformed(&self) -> String {
        format!("{}.dead.events.malformed", self.prefix)
    }

    /// All receipts.
    pub fn receipts(&self) -> String {
        format!("{}.events.audit.receipt.>", self.prefix)
    }

    /// The receipts of one organization.
    pub fn receipt(&self, organization: OrganizationId) -> String {
        format!("{}.events.audit.receipt.{organization}", self.prefix)
    }

    /// Whether a message is a list of receipts.
    pub fn is_receipt(&self, subject: &str) -> bool {
        self.audit_kind(subject).is_some_and(|(kind, _)| kind == "receipt")
    }

    /// An audit record: `change` or `access`, and whose, `_` for what belongs to no organization alone.
    pub fn audit_record(&self, record: &Record) -> String {
        let kind = if record.action == Action::PayloadRead.as_str() { "access" } else { "change" };
        let whose = record.organization_id.map_or_else(|| "_".to_owned(), |id| id.to_string());
        format!("{}.events.audit.{kind}.{whose}", self.prefix)
    }

    /// Whether a message is an audit record.
    pub fn is_audit_record(&self, subject: &str) -> bool {
        self.audit_kind(subject).is_some_and(|(kind, _)| kind == "change" || kind == "access")
    }

    fn audit_kind<'a>(&self, subject: &'a str) -> Option<(&'a str, &'a str)> {
        subject.strip_prefix(&*self.prefix)?.strip_prefix(".events.audit.")?.split_once('.')
    }

    /// Hints (core NATS).
    pub fn wake_hints(&self) -> String {
        format!("{}.wake.hints", self.prefix)
    }
}
