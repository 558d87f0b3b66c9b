//! Dials subscribers, and no one else.
//!
//! The guard sits where the connection is made, so that nothing between the check and the use of an
//! address can change it: a name that resolves to something else the second time (DNS rebinding) finds
//! its answers judged, and the judged address is the one dialled. Redirects need no rule of their own,
//! as no one follows them.

use std::{
    error::Error,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bus_core::{address::AddressPolicy, sink::Failure, webhook_rules::MAX_TIMEOUT};
use http::{Uri, uri::Scheme};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tokio::net::{TcpStream, lookup_host};
use tower::Service;

/// The most addresses of one host that are tried; a name may have thousands.
const MAX_ADDRESSES: usize = 8;

/// How long an address may take while others are left to try, so that one that swallows packets does
/// not use up the time of all.
const DIAL_LIMIT: Duration = Duration::from_secs(3);

/// How long resolving, dialling and the TLS handshake may take together. Each request has a deadline of
/// its own, never later than this; but when a pooled connection becomes free before a new one is made,
/// the client uses that and lets the other finish in the background, where only this limit ends it.
const CONNECT_LIMIT: Duration = MAX_TIMEOUT;

type Dialled = TokioIo<TcpStream>;
type BoxFuture<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// Why no connection was made. The client wraps errors, but keeps this one in the chain of sources.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the URL names no host")]
    NoHost,
    #[error("resolve the host name")]
    Resolve(#[source] io::Error),
    #[error("the host name has no address")]
    NoAddress,
    #[error("the address {0} is not allowed")]
    AddressRefused(IpAddr),
    #[error("dial the host")]
    Dial(#[source] io::Error),
    #[error("secure the connection")]
    Tls(#[source] Box<dyn Error + Send + Sync>),
    #[error("no connection within {0:?}")]
    Timeout(Duration),
}

impl ConnectError {
    /// As it is shown to the subscriber's owner.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::NoHost => Failure::Request(self.to_string()),
            Self::Resolve(error) => Failure::Resolve(describe_io(error)),
            Self::NoAddress => Failure::Resolve(self.to_string()),
            Self::AddressRefused(address) => Failure::AddressRefused(*address),
            Self::Dial(error) => Failure::Connect(describe_io(error)),
            Self::Tls(error) => Failure::Connect(match error.downcast_ref() {
                Some(error) => format!("TLS: {}", describe_io(error)),
                None => format!("TLS: {error}"),
            }),
            Self::Timeout(limit) => Failure::Timeout(*limit),
        }
    }
}

/// Short, and without the operating system's error number where the kind says as much.
pub(crate) fn describe_io(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(inner) => describe_io(inner),
        None if error.raw_os_error().is_some() => error.kind().to_string(),
        None => error.to_string(),
    }
}

/// Resolves a host and dials the addresses that the policy permits.
#[derive(Debug, Clone)]
pub(crate) struct GuardedConnector {
    policy: AddressPolicy,
}

impl GuardedConnector {
    pub(crate) fn new(policy: AddressPolicy) -> Self {
        Self { policy }
    }

    async fn connect(self, uri: Uri) -> Result<Dialled, ConnectError> {
        let addresses = self.resolve(&uri).await?;
        self.dial(addresses).await
    }

    /// The first of the addresses that takes the connection, else the last one's error.
    async fn dial(&self, addresses: Vec<SocketAddr>) -> Result<Dialled, ConnectError> {
        let mut left = addresses.len();
        let mut outcome = Err(ConnectError::NoAddress);
        for address in addresses {
            left -= 1;
            let dialling = TcpStream::connect(address);
            let dialled = if left == 0 {
                dialling.await
            } else {
                tokio::time::timeout(DIAL_LIMIT, dialling)
                    .await
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            };
            match dialled {
                Ok(stream) => return self.accept(stream),
                Err(error) => outcome = Err(ConnectError::Dial(error)),
            }
        }
        outcome
    }

    /// The permitted addresses of the URI's host, at least one, in the resolver's order. An address
    /// literal is its own only answer, and judged like any other.
    async fn resolve(&self, uri: &Uri) -> Result<Vec<SocketAddr>, ConnectError> {
        let host = uri.host().ok_or(ConnectError::NoHost)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let default_port = if uri.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
        let port = uri.port_u16().unwrap_or(default_port);
        let answers = lookup_host((host, port)).await.map_err(ConnectError::Resolve)?;
        self.permitted(answers)
    }

    fn permitted(&self, answers: impl Iterator<Item = SocketAddr>) -> Result<Vec<SocketAddr>, ConnectError> {
        let (mut permitted, mut refused) = (Vec::new(), None);
        for answer in answers {
            if !self.policy.permits(answer.ip()) {
                refused.get_or_insert(answer.ip());
            } else if permitted.len() < MAX_ADDRESSES {
                permitted.push(answer);
            }
        }
        match refused {
            _ if !permitted.is_empty() => Ok(permitted),
            Some(address) => Err(ConnectError::AddressRefused(address)),
            None => Err(ConnectError::NoAddress),
        }
    }

    /// Judges the address that the connection really has: an operating system may put another in the
    /// place of the one dialled (Linux takes 0.0.0.0 as loopback), and so may a transparent proxy.
    fn accept(&self, stream: TcpStream) -> Result<Dialled, ConnectError> {
        let peer = stream.peer_addr().map_err(ConnectError::Dial)?.ip();
        if !self.policy.permits(peer) {
            return Err(ConnectError::AddressRefused(peer));
        }
        stream.set_nodelay(true).map_err(ConnectError::Dial)?;
        Ok(TokioIo::new(stream))
    }
}

impl Service<Uri> for GuardedConnector {
    type Response = Dialled;
    type Error = ConnectError;
    type Future = BoxFuture<Dialled, ConnectError>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

/// [`GuardedConnector`] with TLS for `https`, and a time limit.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    https: HttpsConnector<GuardedConnector>,
    limit: Duration,
}

impl Connector {
    pub(crate) fn new(policy: AddressPolicy, tls: ClientConfig) -> Self {
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(GuardedConnector::new(policy));
        Self { https, limit: CONNECT_LIMIT }
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<Dialled>;
    type Error = ConnectError;
    type Future = BoxFuture<Self::Response, ConnectError>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.https.call(uri);
        let limit = self.limit;
        Box::pin(async move {
            let connected =
                tokio::time::timeout(limit, connecting).await.map_err(|_| ConnectError::Timeout(limit))?;
            // What is not the guard's own error is TLS: the handshake, or a name that no certificate
            // can bear.
            connected.map_err(|error| match error.downcast() {
                Ok(error) => *error,
                Err(error) => ConnectError::Tls(error),
            })
        })
    }
}

#[cfg(test)]
#[path = "connector_tests.rs"]
mod tests;
