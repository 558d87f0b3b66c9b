//! A TCP proxy on loopback that treats its connections as a bad network would, switched while it runs.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// What is read at a time, bytes.
const CHUNK: usize = 16 * 1024;
/// How many of them are under way in one direction of a connection.
const UNDER_WAY: usize = 32;

/// How a [`Proxy`] treats its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Everything passes.
    Open,
    /// Everything passes, and arrives so much later, in each direction.
    Slow(Duration),
    /// New connections are reset; those that there are go on.
    Refusing,
    /// A partition: connections stay, new ones are taken, and nothing passes. What was sent meanwhile arrives when it is
    /// over, unless the sender has given up.
    BlackHole,
    /// The server has forgotten its connections, and the clients do not know: what they send goes nowhere, and they are
    /// reset when it is over. A new connection fares likewise.
    HalfOpen,
}

/// A proxy before one server; it ends with the value, and so do its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    cuts: watch::Sender<()>,
    stop: CancellationToken,
}

impl Proxy {
    /// Starts one on a port of its own.
    ///
    /// # Errors
    /// If no port can be had.
    pub async fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("bind a proxy")?;
        let address = listener.local_addr()?;
        let (network, cuts, stop) =
            (watch::channel(Network::Open).0, watch::channel(()).0, CancellationToken::new());
        let path = Path { server, network: network.subscribe(), cuts: cuts.subscribe() };
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, path)));
        Ok(Self { address, network, cuts, stop })
    }

    /// Starts one before a server on a port of this machine.
    ///
    /// # Errors
    /// If no port can be had.
    pub async fn before(port: u16) -> Result<Self> {
        Self::start((Ipv4Addr::LOCALHOST, port).into()).await
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How it treats all connections from now on.
    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }

    /// Resets all connections that there are.
    pub fn cut(&self) {
        self.cuts.send_replace(());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What a connection needs to know.
#[derive(Debug, Clone)]
struct Path {
    server: SocketAddr,
    network: watch::Receiver<Network>,
    cuts: watch::Receiver<()>,
}

async fn accept(listener: TcpListener, path: Path) {
    // Dropped with this future, and then they end.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        // A failure is one of a single connection, or of the whole machine; the next one tells.
        let Ok((client, _)) = listener.accept().await else { continue };
        while connections.try_join_next().is_some() {}
        if *path.network.borrow() == Network::Refusing {
            let _ = client.set_zero_linger();
            continue;
        }
        let mut path = path.clone();
        // Only later cuts are meant for it.
        path.cuts.mark_unchanged();
        connections.spawn(connect(client, path));
    }
}

async fn connect(client: TcpStream, mut path: Path) {
    let _ = client.set_nodelay(true);
    let (mut from_client, mut to_client) = client.into_split();
    let mut network = path.network.clone();
    let carried = async {
        let passes = |network: &Network| !matches!(network, Network::BlackHole | Network::HalfOpen);
        // An error means that the proxy is gone, which drops this future too.
        if network.wait_for(passes).await.is_err() {
            return End::Reset;
        }
        let Ok(server) = TcpStream::connect(path.server).await else { return End::Reset };
        let _ = server.set_nodelay(true);
        let (from_server, to_server) = server.into_split();
        let both = async {
            tokio::join!(
                carry(&mut from_client, to_server, path.network.clone()),
                carry(from_server, &mut to_client, path.network.clone()),
            )
        };
        tokio::select! {
            _ = both => return End::Orderly,
            _ = network.wait_for(|network| *network == Network::HalfOpen) => {}
        }
        // The server's side is gone by now; the client's stays as it is until it may be told.
        let _ = network.wait_for(|network| *network != Network::HalfOpen).await;
        End::Reset
    };
    let end = tokio::select! {
        end = carried => end,
        _ = path.cuts.changed() => End::Reset,
    };
    if end == End::Reset {
        // Closing without lingering sends a reset instead of an orderly end, which dropping this half would send first.
        let _ = to_client.as_ref().set_zero_linger();
        to_client.forget();
    }
}

/// How a connection ends for the client.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Orderly,
    Reset,
}

/// One direction, to its orderly end or a failure.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut network: watch::Receiver<Network>,
) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Bytes)>(UNDER_WAY);
    let delays = network.clone();
    let read = async move {
        let mut chunk = vec![0; CHUNK];
        while let Ok(n @ 1..) = from.read(&mut chunk).await {
            let delay = match *delays.borrow() {
                Network::Slow(delay) => delay,
                _ => Duration::ZERO,
            };
            let chunk = Bytes::copy_from_slice(&chunk[..n]);
            if sender.send((Instant::now() + delay, chunk)).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, chunk)) = receiver.recv().await {
            sleep_until(due).await;
            let passes = network.wait_for(|network| *network != Network::BlackHole).await.is_ok();
            if !passes || to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}
