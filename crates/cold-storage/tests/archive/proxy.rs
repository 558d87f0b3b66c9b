//! A proxy before an S3 that fails as told.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};
use url::Url;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Answers 503 without doing anything.
    Unavailable,
    /// Closes the connection after the first bytes of the body, without doing anything.
    Tear,
    /// Does it, and closes the connection without an answer.
    LoseAnswer,
    /// Does it, and never answers.
    Hang,
    /// Flips a bit in the middle of what is stored.
    FlipBit,
}

/// What happens to which requests.
pub(crate) struct Rule {
    pub(crate) methods: &'static [Method],
    /// A part of the path.
    pub(crate) path: &'static str,
    pub(crate) fault: Fault,
    /// So many requests are let through first.
    pub(crate) after: usize,
    /// Then so many fail.
    pub(crate) times: usize,
}

impl Rule {
    /// One upload to this path fails.
    pub(crate) fn upload(path: &'static str, fault: Fault) -> Self {
        Self { methods: &[Method::PUT], path, fault, after: 0, times: 1 }
    }

    /// Every request that changes something fails.
    pub(crate) fn changes(fault: Fault) -> Self {
        let methods = &[Method::PUT, Method::DELETE, Method::POST];
        Self { methods, path: "", fault, after: 0, times: usize::MAX }
    }
}

#[derive(Default)]
struct State {
    rule: Option<Rule>,
    fired: usize,
}

pub(crate) struct Proxy {
    url: Url,
    state: Arc<Mutex<State>>,
    _server: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(upstream: Url) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let state = Arc::<Mutex<State>>::default();
        let mut server = JoinSet::new();
        let (shared, client) = (state.clone(), reqwest::Client::new());
        server.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                connection.set_nodelay(true).unwrap();
                let (state, client, upstream) = (shared.clone(), client.clone(), upstream.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        answer(state.clone(), client.clone(), upstream.clone(), request)
                    });
                    // An error is what was asked for, or the client's end.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
                });
            }
        });
        Self { url, state, _server: server }
    }

    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    pub(crate) fn rule(&self, rule: Rule) {
        *self.state.lock().unwrap() = State { rule: Some(rule), fired: 0 };
    }

    /// Ends the rule; whether it hit anything.
    pub(crate) fn clear(&self) -> bool {
        std::mem::take(&mut *self.state.lock().unwrap()).fired > 0
    }
}

/// What the rule says about this request.
fn verdict(state: &Mutex<State>, request: &Request<Incoming>) -> Option<Fault> {
    let State { rule, fired } = &mut *state.lock().unwrap();
    let rule = rule.as_mut()?;
    if !rule.methods.contains(request.method()) || !request.uri().path().contains(rule.path) {
        return None;
    }
    if rule.after > 0 {
        rule.after -= 1;
        return None;
    }
    rule.times = rule.times.checked_sub(1)?;
    *fired += 1;
    Some(rule.fault)
}

/// Closes the connection.
#[derive(Debug, thiserror::Error)]
#[error("torn")]
struct Torn;

async fn answer(
    state: Arc<Mutex<State>>,
    client: reqwest::Client,
    upstream: Url,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Torn> {
    let fault = verdict(&state, &request);
    let (head, mut body) = request.into_parts();
    match fault {
        Some(Fault::Unavailable) => {
            let _ = body.collect().await;
            let answer = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE);
            return Ok(answer.body(Full::default()).unwrap());
        }
        Some(Fault::Tear) => {
            let _ = body.frame().await;
            return Err(Torn);
        }
        _ => {}
    }
    let mut body = Vec::from(body.collect().await.map_err(|_| Torn)?.to_bytes());
    if fault == Some(Fault::FlipBit) {
        let middle = body.len() / 2;
        body[middle] ^= 1;
    }
    let url = upstream.join(head.uri.path_and_query().unwrap().as_str()).unwrap();
    let mut headers = head.headers;
    headers.remove(http::header::HOST);
    // By this a store notices what was changed on its way; what changes later, it does not.
    headers.remove("x-amz-checksum-sha256");
    let answered =
        client.request(head.method, url).headers(headers).body(body).send().await.map_err(|_| Torn)?;
    let mut answer = Response::builder().status(answered.status());
    for (name, value) in answered.headers() {
        if *name != http::header::TRANSFER_ENCODING && *name != http::header::CONNECTION {
            answer = answer.header(name, value);
        }
    }
    let body = answered.bytes().await.map_err(|_| Torn)?;
    match fault {
        Some(Fault::LoseAnswer) => Err(Torn),
        Some(Fault::Hang) => match std::future::pending::<Infallible>().await {},
        _ => Ok(answer.body(Full::new(body)).unwrap()),
    }
}
