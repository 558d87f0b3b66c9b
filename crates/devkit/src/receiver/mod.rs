//! A webhook receiver: a real HTTP/1.1 server that records what comes and answers as its script says.

mod script;

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::script::Conduct;
pub use self::script::{Answer, Script};

/// The largest request body that is taken, in bytes; a larger one is answered 413 and not recorded.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// How many bytes of bodies are kept; beyond it the oldest requests of a path make room, and only stay
/// counted.
const MAX_KEPT: usize = 128 * 1024 * 1024;
/// What a recorded request costs beside its body, roughly.
const REQUEST_COST: usize = 1024;
/// How long [`Receiver::wait_for`] waits.
const WAIT: Duration = Duration::from_secs(30);

/// A request that came.
#[derive(Debug, Clone)]
pub struct Received {
    /// Its method.
    pub method: Method,
    /// Its path.
    pub path: String,
    /// What came after the `?`.
    pub query: Option<String>,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body, byte for byte.
    pub body: Bytes,
    /// When its body was complete.
    pub at: Instant,
    /// When its body was complete, by the wall clock.
    pub time: Timestamp,
}

impl Received {
    /// A header's value; empty if it is absent or not text.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// If it is not JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{} received what is not JSON: {error}", self.path))
    }
}

/// A server on a loopback port of its own; it ends with the value.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told after every change of `state` that somebody may wait for.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    paths: HashMap<String, PathState>,
    kept: usize,
}

#[derive(Debug, Default)]
struct PathState {
    script: Script,
    received: VecDeque<Received>,
    count: usize,
    in_flight: usize,
    peak: usize,
}

impl Receiver {
    /// Starts one. Every path answers 200 until a script says otherwise.
    ///
    /// # Errors
    /// If no port can be had.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("bind a receiver")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: watch::channel(()).0 });
        let stop = CancellationToken::new();
        tokio::spawn(accept(listener, shared.clone(), stop.clone()));
        Ok(Self { address, shared, stop })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a path (`/orders`).
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A URL of a path for which nobody gets a connection: it asks for TLS where none is spoken.
    #[must_use]
    pub fn url_without_tls(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    /// Sets what a path answers from now on.
    pub fn script(&self, path: &str, script: impl Into<Script>) {
        self.shared.lock().paths.entry(path.to_owned()).or_default().script = script.into();
    }

    /// How many requests a path has had.
    #[must_use]
    pub fn count(&self, path: &str) -> usize {
        self.shared.lock().paths.get(path).map_or(0, |state| state.count)
    }

    /// How many requests all paths have had.
    #[must_use]
    pub fn total(&self) -> usize {
        self.shared.lock().paths.values().map(|state| state.count).sum()
    }

    /// How many requests of all paths are open at this moment: received, and not answered yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.lock().paths.values().map(|state| state.in_flight).sum()
    }

    /// The most requests of a path that were open at the same time.
    #[must_use]
    pub fn peak_in_flight(&self, path: &str) -> usize {
        self.shared.lock().paths.get(path).map_or(0, |state| state.peak)
    }

    /// The requests of a path, oldest first.
    #[must_use]
    pub fn received(&self, path: &str) -> Vec<Received> {
        self.received_after(path, 0)
    }

    /// The requests of a path beyond its first `n`, oldest first: for who looks again and again while many
    /// come.
    #[must_use]
    pub fn received_after(&self, path: &str, n: usize) -> Vec<Received> {
        let state = self.shared.lock();
        state.paths.get(path).map_or_else(Vec::new, |state| {
            let forgotten = state.count - state.received.len();
            state.received.iter().skip(n.saturating_sub(forgotten)).cloned().collect()
        })
    }

    /// The requests of a path once there are at least `n`.
    ///
    /// # Panics
    /// After 30 s, with the number there is.
    pub async fn wait_for(&self, path: &str, n: usize) -> Vec<Received> {
        self.wait_for_within(path, n, WAIT).await
    }

    /// The requests of a path once there are at least `n`.
    ///
    /// # Panics
    /// After `deadline`, with the number there is.
    pub async fn wait_for_within(&self, path: &str, n: usize, deadline: Duration) -> Vec<Received> {
        let mut changed = self.shared.changed.subscribe();
        let arrival = changed.wait_for(|()| self.count(path) >= n);
        if timeout(deadline, arrival).await.is_err() {
            panic!("waited {deadline:?} for {n} requests to {path}; there were {}", self.count(path));
        }
        self.received(path)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the state of a receiver")
    }

    /// Notes a request and says how to answer it.
    fn record(&self, request: Received) -> Conduct {
        let mut guard = self.lock();
        let state = &mut *guard;
        let path = state.paths.entry(request.path.clone()).or_default();
        path.count += 1;
        let answer = path.script.next(&request);
        state.kept += request.body.len() + REQUEST_COST;
        path.received.push_back(request);
        while state.kept > MAX_KEPT
            && let Some(oldest) = path.received.pop_front()
        {
            state.kept -= oldest.body.len() + REQUEST_COST;
        }
        drop(guard);
        self.changed.send_replace(());
        answer
    }
}

/// Counts a request as open for as long as it lives.
struct InFlight<'a> {
    shared: &'a Shared,
    path: String,
}

impl<'a> InFlight<'a> {
    fn new(shared: &'a Shared, path: &str) -> Self {
        let mut state = shared.lock();
        let entry = state.paths.entry(path.to_owned()).or_default();
        entry.in_flight += 1;
        entry.peak = entry.peak.max(entry.in_flight);
        Self { shared, path: path.to_owned() }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.shared.lock().paths.get_mut(&self.path) {
            entry.in_flight -= 1;
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let connections = TaskTracker::new();
    while let Some(Ok((stream, _))) = stop.run_until_cancelled(listener.accept()).await {
        let (shared, stop) = (shared.clone(), stop.clone());
        connections.spawn(async move {
            stop.run_until_cancelled(serve(stream, shared)).await;
        });
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    // Without it the second half of an answer may wait 40 ms for the client's acknowledgement.
    let _ = stream.set_nodelay(true);
    let (reset, mut must_reset) = watch::channel(false);
    let service = service_fn(|request| answer(request, &shared, &reset));
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // A client that goes away is an ordinary end.
        _ = &mut connection => {}
        _ = must_reset.wait_for(|reset| *reset) => {
            let stream = connection.into_parts().io.into_inner();
            // Closing without lingering sends a reset instead of an orderly end.
            let _ = stream.set_zero_linger();
        }
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(
    request: Request<Incoming>,
    shared: &Shared,
    reset: &watch::Sender<bool>,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let _open = InFlight::new(shared, head.uri.path());
    let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
        let mut refusal = Response::new(script::full(Bytes::new()));
        *refusal.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
        return Ok(refusal);
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "a receiver is the outside world: its clock is the real one"
    )]
    let time = Timestamp::now();
    let received = Received {
        method: head.method,
        path: head.uri.path().to_owned(),
        query: head.uri.query().map(str::to_owned),
        headers: head.headers,
        body: body.to_bytes(),
        at: Instant::now(),
        time,
    };
    match shared.record(received) {
        Conduct::Respond { delay, response } => {
            tokio::time::sleep(delay).await;
            Ok(response)
        }
        Conduct::Hang => std::future::pending().await,
        Conduct::Reset => {
            reset.send_replace(true);
            std::future::pending().await
        }
    }
}
