//! The webhook sink: one signed HTTP request per attempt.
//!
//! What counts as taken: a 2xx head whose body came to its end, or went past
//! [`SinkConfig::max_answer_bytes`], within the connection's timeout. What the body says does not matter.
//! A 2xx head whose body stalls or breaks off is a failure, since the subscriber may still be at work or
//! have crashed there; it gets the event again, under the same `webhook-id`. Any other status is that
//! status's failure as soon as the head is there. Redirects are failures: following one would send the
//! signed event to an address that its owner never gave (the CloudEvents webhook specification, §2, forbids it).
//!
//! A pooled connection that the subscriber closed costs no attempt as long as nothing was sent on it:
//! the request goes out on another one. When the closing and the request cross on the wire, the request
//! was sent and may have been worked on, so that attempt fails; see [`SinkConfig::idle_timeout_ms`].

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    address::AddressPolicy,
    cloudevent::{CloudEvent, STRUCTURED_CONTENT_TYPE},
    connection::{Connection, ContentMode, Target, Webhook},
    delivery::Delivery,
    signature::{self, WEBHOOK_ID, WEBHOOK_SIGNATURE, WEBHOOK_TIMESTAMP},
    sink::{AttemptReport, Failure, MAX_KEPT_ANSWER, Outcome, Sink},
    webhook_rules::{MAX_TIMEOUT, MIN_TIMEOUT, forbidden_header},
};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri,
    header::{CONTENT_LENGTH, CONTENT_TYPE, USER_AGENT},
};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioTimer},
};
use ipnet::IpNet;
use jiff::Timestamp;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::connector::{ConnectError, Connector, describe_io};

/// The media type of structured mode.
const STRUCTURED: HeaderValue = HeaderValue::from_static(STRUCTURED_CONTENT_TYPE);

/// The most that one connection buffers, bytes: bounds the head of an answer, which comes as one piece.
const MAX_BUFFER: usize = 64 * 1024;

/// The most characters of an error's cause that are kept: some quote what the subscriber sent.
const MAX_CAUSE: usize = 200;

/// How webhooks are called.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SinkConfig {
    /// Networks that may be called although they are not public. Empty by default.
    pub allow_cidrs: Vec<IpNet>,
    /// The longest exchange, whatever a connection asks for, milliseconds, 1,000–30,000.
    pub max_timeout_ms: u64,
    /// The most of an answer's body that is read, bytes; then the connection is closed. 1 B–1 MiB.
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
            max_answer_bytes: 64 * 1024,
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

/// Why the sink cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// See [`SinkConfig::problem`].
    #[error("{0}")]
    Config(String),
    /// The file of private authorities cannot be read, or is not PEM.
    #[error("read the certificates in {path}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The file has no certificate.
    #[error("there is no certificate in {path}")]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// What the file has is no certificate.
    #[error("trust the certificates in {path}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// TLS cannot be set up.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
}

/// Calls webhooks by Standard Webhooks 1.0 and the CloudEvents 1.0 HTTP binding, over HTTP/1.1.
///
/// Connections are pooled by host and port for all organizations together; each was judged by the
/// address policy when it was made. How many are open is bounded by the attempts in flight and the idle
/// limits.
#[derive(Debug, Clone)]
pub struct WebhookSink {
    client: Client<Connector, Full<Bytes>>,
    max_timeout: Duration,
    max_answer_bytes: usize,
    user_agent: HeaderValue,
}

impl WebhookSink {
    /// A sink with an empty pool.
    ///
    /// # Errors
    /// If a value is out of range or the file of certificates is not usable.
    pub fn new(config: &SinkConfig) -> Result<Self, SinkError> {
        if let Some(problem) = config.problem() {
            return Err(SinkError::Config(problem));
        }
        let policy = AddressPolicy::new(config.allow_cidrs.clone());
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_millis(config.idle_timeout_ms))
            .pool_max_idle_per_host(config.idle_per_host)
            .http1_max_buf_size(MAX_BUFFER)
            .retry_canceled_requests(true)
            .build(Connector::new(policy, tls(config.ca_file.as_deref())?));
        let user_agent = HeaderValue::from_str(&config.user_agent)
            .map_err(|error| SinkError::Config(error.to_string()))?;
        Ok(Self {
            client,
            max_timeout: config.max_timeout(),
            max_answer_bytes: config.max_answer_bytes,
            user_agent,
        })
    }

    fn request(
        &self,
        webhook: &Webhook,
        delivery: &Delivery,
        at: Timestamp,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let uri: Uri = webhook
            .url
            .as_str()
            .parse()
            .map_err(|_| Failure::Request("the URL cannot be sent in a request".into()))?;
        let (event_headers, body) = lay_out(webhook.content_mode, delivery)?;

        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, self.user_agent.clone());
        add_own_headers(&mut headers, webhook)?;
        headers.extend(event_headers);
        // The client would leave it out with an empty body, where some servers then answer 411
        // (RFC 9110 §8.6).
        headers.insert(CONTENT_LENGTH, body.len().into());

        let id = delivery.key.id.to_string();
        let timestamp = at.as_second();
        headers.insert(WEBHOOK_SIGNATURE, signature::sign(webhook.active_secrets(at), &id, timestamp, &body));
        headers.insert(WEBHOOK_TIMESTAMP, timestamp.into());
        let id = HeaderValue::try_from(id).expect("a UUID is visible ASCII");
        headers.insert(WEBHOOK_ID, id);

        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        Ok(request)
    }

    /// Sends the request and reads the answer into `answer`, which holds what came even if the caller
    /// stops waiting.
    async fn exchange(&self, request: Request<Full<Bytes>>, answer: &mut Answer) -> Result<(), Failure> {
        let response = self.client.request(request).await.map_err(|error| classify(&error))?;
        answer.status = Some(response.status().as_u16());
        let mut body = response.into_body();
        let mut read = 0;
        // Leaving the loop early drops the body, and with it the connection: nothing is drained.
        while read < self.max_answer_bytes {
            let Some(frame) = body.frame().await else { break };
            let frame = frame.map_err(|error| classify(&error))?;
            let Some(data) = frame.data_ref() else { continue };
            read += data.len();
            let room = MAX_KEPT_ANSWER - answer.kept.len();
            answer.kept.extend_from_slice(&data[..room.min(data.len())]);
        }
        Ok(())
    }

    async fn call(&self, webhook: &Webhook, delivery: &Delivery, at: Timestamp) -> (Outcome, Answer) {
        let mut answer = Answer::default();
        let request = match self.request(webhook, delivery, at) {
            Ok(request) => request,
            Err(failure) => return (Outcome::Failed(failure), answer),
        };
        let limit = webhook.timeout.min(self.max_timeout);
        let ended = tokio::time::timeout(limit, self.exchange(request, &mut answer)).await;
        let outcome = match (answer.status, ended) {
            (Some(status), _) if !(200..300).contains(&status) => Outcome::Failed(Failure::Status(status)),
            (_, Ok(Ok(()))) => Outcome::Delivered,
            (_, Ok(Err(failure))) => Outcome::Failed(failure),
            (_, Err(_)) => Outcome::Failed(Failure::Timeout(limit)),
        };
        (outcome, answer)
    }
}

#[async_trait]
impl Sink for WebhookSink {
    async fn attempt(&self, connection: &Connection, delivery: &Delivery, at: Timestamp) -> AttemptReport {
        let started = Instant::now();
        let (outcome, answer) = match &connection.target {
            Target::Webhook(webhook) => self.call(webhook, delivery, at).await,
            Target::Publisher => {
                let failure = Failure::Request("the connection receives nothing".into());
                (Outcome::Failed(failure), Answer::default())
            }
        };
        AttemptReport {
            outcome,
            status: answer.status,
            answer: answer.kept.freeze(),
            duration: started.elapsed(),
        }
    }
}

/// What came of an answer so far.
#[derive(Default)]
struct Answer {
    status: Option<u16>,
    kept: BytesMut,
}

/// The headers that describe the event, and the body.
fn lay_out(mode: ContentMode, delivery: &Delivery) -> Result<(HeaderMap, Bytes), Failure> {
    match mode {
        ContentMode::Structured => {
            Ok((HeaderMap::from_iter([(CONTENT_TYPE, STRUCTURED)]), delivery.body.clone()))
        }
        ContentMode::Binary => CloudEvent::from_structured(&delivery.body)
            .map(|event| event.to_binary())
            .map_err(|_| Failure::Request("the event cannot be laid out in binary mode".into())),
    }
}

/// The connection's own headers. They were checked when they were stored; a name that was forbidden
/// since is left out rather than letting it fail every delivery.
fn add_own_headers(headers: &mut HeaderMap, webhook: &Webhook) -> Result<(), Failure> {
    for (name, value) in webhook.headers.iter().filter(|(name, _)| !forbidden_header(name)) {
        let invalid = || Failure::Request(format!("the header {name:?} is not valid"));
        let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
        let mut value = HeaderValue::from_str(value).map_err(|_| invalid())?;
        // Often a credential: keeps it out of Debug output.
        value.set_sensitive(true);
        headers.insert(parsed, value);
    }
    Ok(())
}

/// The connector's own error if it is in the chain, else the innermost cause.
fn classify(error: &(dyn Error + 'static)) -> Failure {
    let mut innermost = error;
    loop {
        if let Some(error) = innermost.downcast_ref::<ConnectError>() {
            return shorten(error.failure());
        }
        match innermost.source() {
            Some(source) => innermost = source,
            None => break,
        }
    }
    shorten(Failure::Exchange(match innermost.downcast_ref::<io::Error>() {
        Some(error) => describe_io(error),
        None => innermost.to_string(),
    }))
}

fn shorten(mut failure: Failure) -> Failure {
    if let Failure::Resolve(cause) | Failure::Connect(cause) | Failure::Exchange(cause) = &mut failure
        && let Some((end, _)) = cause.char_indices().nth(MAX_CAUSE)
    {
        cause.truncate(end);
        cause.push('…');
    }
    failure
}

fn tls(ca_file: Option<&Path>) -> Result<ClientConfig, SinkError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = ca_file {
        trust(&mut roots, path)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(SinkError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

fn trust(roots: &mut RootCertStore, path: &Path) -> Result<(), SinkError> {
    let unreadable = |source| SinkError::CaFile { path: path.to_owned(), source };
    let mut found = false;
    for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
        let certificate = certificate.map_err(unreadable)?;
        roots.add(certificate).map_err(|source| SinkError::Certificate { path: path.to_owned(), source })?;
        found = true;
    }
    if found { Ok(()) } else { Err(SinkError::NoCertificate { path: path.to_owned() }) }
}
