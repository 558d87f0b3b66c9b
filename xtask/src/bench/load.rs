//! Publishes through the HTTP API, as fast as it is let or at a fixed rate.

use std::{
    io::Write as _,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, RETRY_AFTER},
};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    sync::{
        Mutex,
        mpsc::{self, Receiver, Sender},
    },
    task::JoinSet,
    time::sleep,
};

use super::{cost::LOAD, receiver::Tally, work::Work};

/// The size of a payload, bytes.
const PAYLOAD: usize = 512;
/// The pause of a request that is refused for now, if the answer names none.
const PAUSE: Duration = Duration::from_secs(1);

/// What is published, and how.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Where a publisher listens.
    pub(super) address: SocketAddr,
    /// The keys that publish, of one organization or of many; requests bear them in turn.
    pub(super) keys: Arc<[String]>,
    pub(super) event_type: &'static str,
    /// The number of the first event.
    pub(super) first: u64,
    pub(super) events: usize,
    /// Events of a request.
    pub(super) batch: usize,
    /// Requests under way at a time, each on a connection of its own.
    pub(super) in_flight: usize,
    pub(super) pace: Pace,
}

/// When the next request is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// As soon as one before it is answered, and the deliveries follow.
    Closed,
    /// As soon as one before it is answered; the deliveries may wait.
    Queueing,
    /// So long after the one before it, whatever has become of that.
    Every(Duration),
}

/// Connects, and is ready to publish. The work gives how many requests were refused for now, and sent again.
pub(super) async fn prepare(plan: Plan, tally: Arc<Tally>) -> Result<Work<usize>> {
    let (address, in_flight) = (plan.address, plan.in_flight);
    let connect = async move || {
        let mut connections = Vec::new();
        for _ in 0..in_flight {
            connections.push(connect(address).await.context("connect to the publisher")?);
        }
        Ok(connections)
    };
    Work::prepare(LOAD, connect, async move |connections, begun| {
        publish(plan, &tally, connections, begun).await
    })
    .await
}

/// The data of an event: JSON of [`PAYLOAD`] bytes with its number in it.
pub(super) fn write_payload(body: &mut Vec<u8>, number: u64) {
    const END: &[u8] = br#""}"#;
    let end = body.len() + PAYLOAD - END.len();
    write!(body, r#"{{"n":{number},"text":""#).expect("memory takes what is written");
    body.resize(end, b'x');
    body.extend_from_slice(END);
}

impl Plan {
    fn requests(&self) -> usize {
        self.events.div_ceil(self.batch)
    }

    /// The credential of one of the requests.
    fn authorization(&self, request: usize) -> Result<HeaderValue> {
        let key = self.keys.get(request % self.keys.len().max(1)).context("nobody has a key")?;
        Ok(HeaderValue::try_from(format!("Bearer {key}"))?)
    }

    /// The body of one of the requests.
    fn body(&self, request: usize) -> Bytes {
        let events = request * self.batch..self.events.min((request + 1) * self.batch);
        let mut body = Vec::with_capacity(events.len() * (PAYLOAD + 64));
        for (number, event) in (self.first + events.start as u64..).zip(events.clone()) {
            if self.batch > 1 {
                body.push(if event == events.start { b'[' } else { b',' });
            }
            write!(body, r#"{{"type":"{}","data":"#, self.event_type).expect("memory takes what is written");
            write_payload(&mut body, number);
            body.push(b'}');
        }
        if self.batch > 1 {
            body.push(b']');
        }
        body.into()
    }
}

type Connection = SendRequest<Full<Bytes>>;

async fn connect(address: SocketAddr) -> Result<Connection> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (connection, driver) = http1::handshake(TokioIo::new(stream)).await?;
    // What becomes of it is told to whoever sends a request.
    tokio::spawn(driver);
    Ok(connection)
}

async fn publish(plan: Plan, tally: &Tally, connections: Vec<Connection>, begun: Instant) -> Result<usize> {
    let plan = Arc::new(plan);
    let (tell, due) = mpsc::channel(plan.in_flight);
    let due = Arc::new(Mutex::new(due));
    let mut senders = JoinSet::new();
    for connection in connections {
        senders.spawn(send_due(connection, Arc::clone(&plan), Arc::clone(&due)));
    }
    // Without any sender there is nobody left to tell.
    drop(due);
    let telling = async {
        match plan.pace {
            Pace::Closed => tell_closed(&plan, Some(tally), tell).await,
            Pace::Queueing => tell_closed(&plan, None, tell).await,
            Pace::Every(period) => tell_every(period, plan.requests(), begun, tell),
        }
    };
    let sending = async {
        let mut refused = 0;
        while let Some(sent) = senders.join_next().await {
            refused += sent??;
        }
        Ok(refused)
    };
    let ((), refused) = tokio::try_join!(telling, sending)?;
    Ok(refused)
}

async fn tell_closed(plan: &Plan, follow: Option<&Tally>, tell: Sender<usize>) -> Result<()> {
    for request in 0..plan.requests() {
        if let Some(tally) = follow {
            tally.room(request * plan.batch).await?;
        }
        // Those who would hear it have failed, and say why themselves.
        if tell.send(request).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// From a thread of its own: the runtime's timers are exact to a millisecond, which is of the size of what is measured.
fn tell_every(period: Duration, requests: usize, begun: Instant, tell: Sender<usize>) -> Result<()> {
    let body = move || {
        let mut due = begun;
        for request in 0..requests {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            // With no connection free it waits here, and those behind it too; all the same each counts from when it was due.
            if tell.blocking_send(request).is_err() {
                return;
            }
            due += period;
        }
    };
    thread::Builder::new().name("pace".to_owned()).spawn(body)?;
    Ok(())
}

/// Sends what is due on one connection, until there is no more.
async fn send_due(
    mut connection: Connection,
    plan: Arc<Plan>,
    due: Arc<Mutex<Receiver<usize>>>,
) -> Result<usize> {
    let host = HeaderValue::try_from(plan.address.to_string())?;
    let mut refused = 0;
    loop {
        let next = due.lock().await.recv().await;
        let Some(request) = next else { return Ok(refused) };
        let body = plan.body(request);
        let authorization = plan.authorization(request)?;
        loop {
            let request = Request::post("/v1/events")
                .header(HOST, &host)
                .header(AUTHORIZATION, &authorization)
                .header(CONTENT_TYPE, "application/json")
                .body(Full::new(body.clone()))?;
            connection.ready().await.context("publish")?;
            let (head, answer) = connection.send_request(request).await.context("publish")?.into_parts();
            let answer = answer.collect().await.context("publish")?.to_bytes();
            match head.status {
                StatusCode::ACCEPTED => break,
                // The bus protects itself.
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                    refused += 1;
                    sleep(pause(&head.headers)).await;
                }
                status => bail!("publish: {status} {}", String::from_utf8_lossy(&answer)),
            }
        }
    }
}

fn pause(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    seconds.map_or(PAUSE, Duration::from_secs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)]

    use serde_json::Value;

    use super::*;

    fn plan(events: usize, batch: usize) -> Plan {
        Plan {
            address: ([127, 0, 0, 1], 1).into(),
            keys: ["key".to_owned(), "other".to_owned()].into(),
            event_type: "bench.one",
            first: 98,
            events,
            batch,
            in_flight: 1,
            pace: Pace::Closed,
        }
    }

    #[test]
    fn the_requests_hold_each_event_once_with_a_payload_of_the_same_size() {
        let plan = plan(7, 3);
        let mut numbers = Vec::new();
        for request in 0..plan.requests() {
            let body: Vec<Value> = serde_json::from_slice(&plan.body(request)).unwrap();
            for event in body {
                assert_eq!(event["type"], "bench.one");
                assert_eq!(event["data"].to_string().len(), PAYLOAD);
                numbers.push(event["data"]["n"].as_u64().unwrap());
            }
        }
        assert_eq!(numbers, [98, 99, 100, 101, 102, 103, 104]);
    }

    #[test]
    fn a_single_event_is_no_list() {
        let plan = plan(2, 1);
        let event: Value = serde_json::from_slice(&plan.body(1)).unwrap();
        assert_eq!(event["data"]["n"], 99);
    }

    #[test]
    fn the_keys_take_turns() {
        let plan = plan(7, 3);
        let borne: Vec<HeaderValue> =
            (0..plan.requests()).map(|request| plan.authorization(request).unwrap()).collect();
        assert_eq!(borne, ["Bearer key", "Bearer other", "Bearer key"]);
    }
}
