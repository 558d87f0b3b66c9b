//! A subscriber that is scripted per connection.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// A request as it came over the wire.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Received {
    /// The names as sent, sorted.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// The value of a header that is there once.
    pub(crate) fn header(&self, name: &str) -> &str {
        let values: Vec<&str> = self
            .headers
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.as_str())
            .collect();
        assert_eq!(values.len(), 1, "{name} in {:?}", self.headers);
        values[0]
    }

    pub(crate) fn header_map(&self) -> HeaderMap {
        let parse = |(name, value): &(String, String)| {
            (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())
        };
        self.headers.iter().map(parse).collect()
    }
}

/// One accepted connection.
pub(crate) struct Peer<S = TcpStream> {
    pub(crate) stream: S,
    log: Arc<Mutex<Vec<Received>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    /// Reads one request whole; `None` if the client closed the connection instead.
    pub(crate) async fn request(&mut self) -> Option<Received> {
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            self.more(&mut bytes).await?;
        };
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let line = lines.next().unwrap().to_owned();
        let headers: Vec<(String, String)> =
            lines.map(|line| line.split_once(": ").unwrap()).map(|(n, v)| (n.into(), v.into())).collect();
        let mut body = bytes.split_off(end + 4);
        let mut received = Received { line, headers, body: Vec::new() };
        let length: usize = received.header("content-length").parse().unwrap();
        while body.len() < length {
            self.more(&mut body).await?;
        }
        assert_eq!(body.len(), length, "nothing follows the body");
        received.body = body;
        self.log.lock().unwrap().push(received.clone());
        Some(received)
    }

    async fn more(&mut self, into: &mut Vec<u8>) -> Option<()> {
        match self.stream.read_buf(into).await {
            Ok(1..) => Some(()),
            Ok(0) | Err(_) => None,
        }
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref()).await?;
        self.stream.flush().await
    }

    /// Returns when the client has closed its side, with the number of bytes that it sent before.
    pub(crate) async fn hung_up(&mut self) -> usize {
        let mut rest = Vec::new();
        // A reset is an end, too.
        let _ = self.stream.read_to_end(&mut rest).await;
        rest.len()
    }
}

impl Peer {
    /// The same connection with TLS, if the client agrees to it.
    pub(crate) async fn secured(self, acceptor: &TlsAcceptor) -> Option<Peer<TlsStream<TcpStream>>> {
        let stream = acceptor.accept(self.stream).await.ok()?;
        Some(Peer { stream, log: self.log })
    }

    /// Ends the connection with a TCP reset.
    pub(crate) fn reset(self) {
        self.stream.set_zero_linger().unwrap();
    }
}

/// A listener on loopback; each connection is given to the script with its number, from 0.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Vec<Received>>>,
    connections: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start<F>(script: impl Fn(Peer, usize) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::start_on(Ipv4Addr::LOCALHOST.into(), script).await.unwrap()
    }

    pub(crate) async fn start_on<F>(
        address: IpAddr,
        script: impl Fn(Peer, usize) -> F + Send + 'static,
    ) -> io::Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let (kept, counter) = (log.clone(), connections.clone());
        let accepting = tokio::spawn(async move {
            let mut scripts = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = counter.fetch_add(1, Ordering::SeqCst);
                scripts.spawn(script(Peer { stream, log: kept.clone() }, number));
            }
        });
        Ok(Self { address, log, connections, accepting })
    }

    /// Gives the same answer to every request of every connection, until the client closes it.
    pub(crate) async fn answering(answer: &'static str) -> Self {
        Self::start(move |mut peer, _| async move {
            while peer.request().await.is_some() && peer.send(answer).await.is_ok() {}
        })
        .await
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.log.lock().unwrap().clone()
    }

    /// The only request so far.
    pub(crate) fn only(&self) -> Received {
        let mut received = self.received();
        assert_eq!(received.len(), 1);
        received.remove(0)
    }

    /// How many connections were accepted.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}
