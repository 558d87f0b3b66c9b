//! A receiver that does as little as possible for each request: it notes when each delivery came first, and answers 200.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use devkit::poll;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Builder,
    sync::oneshot,
};

use super::cost::{RECEIVER, Thread};

/// Deliveries that may be on their way while more is published: a long queue is not what is measured.
const AHEAD: usize = 50_000;
/// How long deliveries may take.
const DEADLINE: Duration = Duration::from_secs(300);

/// A server on a thread of its own, which lives as long as the process.
#[derive(Debug)]
pub(super) struct Receiver {
    address: SocketAddr,
    thread: Thread,
    expected: Arc<RwLock<Arc<Tally>>>,
    /// The number of the next event that is expected.
    next: AtomicU64,
}

/// What has come of one run. Its events bear the numbers from `first` on, and each is for `fan_out` subscriptions.
#[derive(Debug)]
pub(super) struct Tally {
    origin: Instant,
    first: u64,
    fan_out: usize,
    /// For each delivery when it came first, ns after `origin`; 0 while it has not.
    arrivals: Vec<AtomicU64>,
    distinct: AtomicUsize,
    repeated: AtomicUsize,
}

impl Receiver {
    pub(super) async fn start() -> Result<Self> {
        let expected = Arc::new(RwLock::new(Arc::new(Tally::new(0, 0, 1))));
        let (tell, told) = oneshot::channel();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::clone(&expected);
        let body = async move || {
            let bound = async {
                let listener =
                    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("bind the receiver")?;
                Ok((listener.local_addr()?, Thread::current()?, listener))
            };
            match bound.await {
                Ok((address, thread, listener)) => {
                    if tell.send(Ok((address, thread))).is_ok() {
                        accept(listener, shared).await;
                    }
                }
                // Whoever has gone away does not want to know.
                Err(failed) => drop(tell.send(Err::<_, anyhow::Error>(failed))),
            }
        };
        thread::Builder::new().name(RECEIVER.to_owned()).spawn(move || runtime.block_on(body()))?;
        let (address, thread) = told.await.context("the thread of the receiver has ended")??;
        Ok(Self { address, thread, expected, next: AtomicU64::new(0) })
    }

    /// Where the deliveries of the subscription in this place of an event's subscriptions go.
    pub(super) fn url(&self, place: usize) -> String {
        format!("http://{}/{place}", self.address)
    }

    pub(super) fn thread(&self) -> &Thread {
        &self.thread
    }

    /// From now on these are what is counted. No two events have the same number, so that one that comes late is not taken
    /// for another.
    pub(super) fn expect(&self, events: usize, fan_out: usize) -> Arc<Tally> {
        let first = self.next.fetch_add(events as u64, Ordering::Relaxed);
        let tally = Arc::new(Tally::new(first, events, fan_out));
        *self.expected.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&tally);
        tally
    }
}

impl Tally {
    fn new(first: u64, events: usize, fan_out: usize) -> Self {
        Self {
            origin: Instant::now(),
            first,
            fan_out,
            arrivals: (0..events * fan_out).map(|_| AtomicU64::new(0)).collect(),
            distinct: AtomicUsize::new(0),
            repeated: AtomicUsize::new(0),
        }
    }

    /// The number of the first event.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// How many deliveries there are to be.
    pub(super) fn deliveries(&self) -> usize {
        self.arrivals.len()
    }

    pub(super) fn distinct(&self) -> usize {
        self.distinct.load(Ordering::Acquire)
    }

    /// Those that had come before, and those of an earlier run.
    pub(super) fn repeated(&self) -> usize {
        self.repeated.load(Ordering::Relaxed)
    }

    /// Notes a delivery. Nothing is expected in such a place if there is no result.
    fn note(&self, number: u64, place: usize) -> Option<()> {
        if place >= self.fan_out {
            return None;
        }
        let event = number.checked_sub(self.first).and_then(|event| usize::try_from(event).ok());
        let arrival = event.and_then(|event| self.arrivals.get(event.checked_mul(self.fan_out)? + place));
        let now = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        let first = arrival.is_some_and(|arrival| {
            arrival.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        });
        if first {
            self.distinct.fetch_add(1, Ordering::Release);
        } else {
            self.repeated.fetch_add(1, Ordering::Relaxed);
        }
        Some(())
    }

    /// When each delivery came first, of those that have.
    pub(super) fn arrivals(&self) -> impl Iterator<Item = Option<Instant>> {
        self.arrivals.iter().map(|arrival| match arrival.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(self.origin + Duration::from_nanos(nanos)),
        })
    }

    /// Waits until every delivery has come, and gives when the last one did.
    pub(super) async fn complete(&self) -> Result<Instant> {
        let wanted = self.deliveries();
        poll("every delivery", DEADLINE, async || {
            let distinct = self.distinct();
            if distinct >= wanted { Ok(()) } else { Err(format!("{distinct} of {wanted}, the rest is lost")) }
        })
        .await?;
        self.arrivals().flatten().max().context("there was nothing to deliver")
    }

    /// Waits until so many events may have been published.
    pub(super) async fn room(&self, events: usize) -> Result<()> {
        let wanted = (events * self.fan_out).saturating_sub(AHEAD);
        poll("the deliveries to follow", DEADLINE, async || {
            let distinct = self.distinct();
            if distinct >= wanted { Ok(()) } else { Err(format!("{distinct} have come")) }
        })
        .await
    }
}

async fn accept(listener: TcpListener, expected: Arc<RwLock<Arc<Tally>>>) {
    // A listener on the loopback interface fails only when this process has no room for another connection; then whoever
    // waits for deliveries says what is missing.
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, Arc::clone(&expected)));
    }
}

async fn serve(stream: TcpStream, expected: Arc<RwLock<Arc<Tally>>>) {
    // Without it the second half of an answer may wait for the client's acknowledgement.
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| answer(request, &expected));
    // A client that goes away is an ordinary end.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(
    request: Request<Incoming>,
    expected: &RwLock<Arc<Tally>>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let place = head.uri.path().trim_start_matches('/').parse().ok();
    let noted = number(&body).zip(place).and_then(|(number, place)| {
        expected.read().unwrap_or_else(PoisonError::into_inner).note(number, place)
    });
    let mut response = Response::new(Empty::new());
    if noted.is_none() {
        *response.status_mut() = StatusCode::BAD_REQUEST;
    }
    Ok(response)
}

/// The number of the event in a body; nothing else in it is read.
fn number(body: &[u8]) -> Option<u64> {
    const NAME: &[u8] = br#""n":"#;
    let digits = &body[memmem::find(body, NAME)? + NAME.len()..];
    let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
    std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)]

    use super::*;

    #[test]
    fn each_delivery_counts_once() {
        let tally = Tally::new(100, 2, 3);
        assert_eq!(tally.deliveries(), 6);
        for (number, place) in [(100, 0), (100, 2), (101, 0), (100, 2), (99, 1), (102, 0)] {
            tally.note(number, place).unwrap();
        }
        assert_eq!((tally.distinct(), tally.repeated()), (3, 3));
        assert_eq!(tally.note(100, 3), None, "there is no such subscription");
        let arrived: Vec<bool> = tally.arrivals().map(|arrival| arrival.is_some()).collect();
        assert_eq!(arrived, [true, false, true, true, false, false]);
    }

    #[test]
    fn the_number_is_found_wherever_it_is() {
        assert_eq!(number(br#"{"id":"1","data":{"n":4711,"text":"x"}}"#), Some(4711));
        assert_eq!(number(br#"{"n":12"#), Some(12));
        assert_eq!(number(br#"{"n":-1}"#), None);
        assert_eq!(number(b"{}"), None);
    }
}
