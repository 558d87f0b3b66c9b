//! The webhook sink: one signed HTTP request per attempt.
//!
//! What counts as an answer: a 2xx head whose body came to its end, or went past
//! [`SinkConfig::max_answer_bytes`], within the connection's timeout; [`bus_core::answer`] says what it means.
//! A 2xx head whose body stalls or breaks off is a failure, since the subscriber may still be at work or
//! have crashed there; it gets the event again, under the same `webhook-id`. Any other status is that
//! status's failure as soon as the head is there. Redirects are failures: following one would send the
//! signed event to an address that its owner never gave (the CloudEvents webhook specification, §2, forbids it).
//!
//! A batch is one request in the batched mode of CloudEvents, whatever the connection's content mode, which
//! is about single events. Its `webhook-id` is derived from the ids of its deliveries: the same for the same
//! deliveries in any order. Retries may be grouped otherwise, so a subscriber to batches tells what it has
//! had by the events in them.
//!
//! A pooled connection that the subscriber closed costs no attempt as long as nothing was sent on it:
//! the request goes out on another one. When the closing and the request cross on the wire, the request
//! was sent and may have been worked on, so that attempt fails; see [`SinkConfig::idle_timeout_ms`].

mod config;
mod tls;

use std::{error::Error, io, path::PathBuf, time::Duration};

use async_trait::async_trait;
use bus_core::{
    address::AddressPolicy,
    answer::{Answer, HttpAnswer},
    cloudevent::{self, BATCH_CONTENT_TYPE, CloudEvent, STRUCTURED_CONTENT_TYPE},
    connection::{Connection, ContentMode, Target, Webhook},
    delivery::Delivery,
    signature::{self, WEBHOOK_ID, WEBHOOK_SIGNATURE, WEBHOOK_TIMESTAMP},
    sink::{AttemptReport, Failure, MAX_KEPT_ANSWER, Outcome, Parcel, Sink},
    webhook_rules::forbidden_header,
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
use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

pub use self::config::SinkConfig;
use crate::connector::{ConnectError, Connector, describe_io};

/// The media type of structured mode.
const STRUCTURED: HeaderValue = HeaderValue::from_static(STRUCTURED_CONTENT_TYPE);

/// The media type of batched mode.
const BATCH: HeaderValue = HeaderValue::from_static(BATCH_CONTENT_TYPE);

/// The namespace (RFC 9562 §5.5) of the ids of batches. Arbitrary, and never to change.
const BATCHES: Uuid = Uuid::from_u128(0x55dc8e6a_47a9_4734_b606_a186a782debb);

/// The most that one connection buffers, bytes: bounds the head of an answer, which comes as one piece.
const MAX_BUFFER: usize = 64 * 1024;

/// The most characters of an error's cause that are kept: some quote what the subscriber sent.
const MAX_CAUSE: usize = 200;

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
            .build(Connector::new(policy, tls::client(config.ca_file.as_deref())?));
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
        parcel: Parcel<'_>,
        at: Timestamp,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let uri: Uri = webhook
            .url
            .as_str()
            .parse()
            .map_err(|_| Failure::Request("the URL cannot be sent in a request".into()))?;
        let (event_headers, body) = lay_out(webhook.content_mode, parcel)?;

        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, self.user_agent.clone());
        add_own_headers(&mut headers, webhook)?;
        headers.extend(event_headers);
        // The client would leave it out with an empty body, where some servers then answer 411
        // (RFC 9110 §8.6).
        headers.insert(CONTENT_LENGTH, body.len().into());

        let id = parcel_id(parcel).to_string();
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

    /// Makes the request and waits for what comes of it, which `received` keeps.
    async fn call(
        &self,
        webhook: &Webhook,
        parcel: Parcel<'_>,
        at: Timestamp,
        received: &mut Received,
    ) -> Result<Answer, Failure> {
        let request = self.request(webhook, parcel, at)?;
        let limit = webhook.timeout.min(self.max_timeout);
        match tokio::time::timeout(limit, self.exchange(request, at, received)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failure)) => received.by_head(at).ok_or(failure),
            Err(_) => received.by_head(at).ok_or(Failure::Timeout(limit)),
        }
    }

    /// Sends the request and reads the answer to its end, or to the limit.
    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        at: Timestamp,
        received: &mut Received,
    ) -> Result<Answer, Failure> {
        let response = self.client.request(request).await.map_err(|error| classify(&error))?;
        let (head, mut body) = response.into_parts();
        let (status, headers) = received.head.insert((head.status.as_u16(), head.headers));
        let mut complete = false;
        // Leaving the loop early drops the body, and with it the connection: nothing is drained.
        while received.body.len() <= self.max_answer_bytes {
            let Some(frame) = body.frame().await else {
                complete = true;
                break;
            };
            if let Some(data) = frame.map_err(|error| classify(&error))?.data_ref() {
                received.body.extend_from_slice(data);
            }
        }
        let body = complete.then_some(&received.body[..]);
        Ok(Answer::read(&HttpAnswer { status: *status, headers, body, at }))
    }
}

#[async_trait]
impl Sink for WebhookSink {
    async fn attempt(
        &self,
        connection: &Connection,
        parcel: Parcel<'_>,
        at: Timestamp,
    ) -> Vec<AttemptReport> {
        let started = Instant::now();
        let mut received = Received::default();
        let answer = match &connection.target {
            _ if parcel.deliveries().is_empty() => return Vec::new(),
            Target::Webhook(webhook) => self.call(webhook, parcel, at, &mut received).await,
            Target::Publisher => Err(Failure::Request("the connection receives nothing".into())),
        };
        let duration = started.elapsed();
        let status = received.head.as_ref().map(|(status, _)| *status);
        let kept = received.kept();
        let report = |delivery: &Delivery| AttemptReport {
            outcome: match &answer {
                Ok(answer) => answer.about(&delivery.body).clone(),
                Err(failure) => Outcome::from(failure.clone()),
            },
            status,
            answer: kept.clone(),
            duration,
        };
        parcel.deliveries().iter().map(report).collect()
    }
}

/// What came of an answer so far.
#[derive(Default)]
struct Received {
    head: Option<(u16, HeaderMap)>,
    /// At most one frame longer than what is read.
    body: BytesMut,
}

impl Received {
    /// What the answer says if its body does not matter, because its status is not 2xx.
    fn by_head(&self, at: Timestamp) -> Option<Answer> {
        let (status, headers) = self.head.as_ref().filter(|(status, _)| !(200..300).contains(status))?;
        Some(Answer::read(&HttpAnswer { status: *status, headers, body: None, at }))
    }

    /// The start of the body, in memory of its own.
    fn kept(&self) -> Bytes {
        Bytes::copy_from_slice(&self.body[..self.body.len().min(MAX_KEPT_ANSWER)])
    }
}

/// What `webhook-id` names: the delivery, or the deliveries of a batch in whatever order.
fn parcel_id(parcel: Parcel<'_>) -> Uuid {
    match parcel {
        Parcel::Single(delivery) => delivery.key.id.0,
        Parcel::Batch(deliveries) => {
            let mut ids: Vec<Uuid> = deliveries.iter().map(|delivery| delivery.key.id.0).collect();
            ids.sort_unstable();
            let bytes: Vec<u8> = ids.into_iter().flat_map(Uuid::into_bytes).collect();
            Uuid::new_v5(&BATCHES, &bytes)
        }
    }
}

/// The headers that describe the events, and the body.
fn lay_out(mode: ContentMode, parcel: Parcel<'_>) -> Result<(HeaderMap, Bytes), Failure> {
    let with_type = |content_type, body| Ok((HeaderMap::from_iter([(CONTENT_TYPE, content_type)]), body));
    match (parcel, mode) {
        (Parcel::Batch(deliveries), _) => {
            with_type(BATCH, cloudevent::to_batch(deliveries.iter().map(|delivery| &delivery.body[..])))
        }
        (Parcel::Single(delivery), ContentMode::Structured) => with_type(STRUCTURED, delivery.body.clone()),
        (Parcel::Single(delivery), ContentMode::Binary) => CloudEvent::from_structured(&delivery.body)
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
