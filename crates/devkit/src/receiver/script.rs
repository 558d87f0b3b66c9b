//! What a receiver answers.

use std::{collections::VecDeque, convert::Infallible, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::Frame;

use super::Received;

/// How many bytes an endless body yields at a time.
const CHUNK: usize = 16 * 1024;

/// One answer to one request.
#[derive(Debug, Clone)]
pub struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    delay: Duration,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Full(Bytes),
    Drip { body: Bytes, interval: Duration },
    Endless,
    Hang,
    Reset,
}

impl Answer {
    /// An empty answer with this status.
    ///
    /// # Panics
    /// If it is no HTTP status.
    #[must_use]
    pub fn status(status: u16) -> Self {
        Self {
            status: StatusCode::from_u16(status).expect("a script names an HTTP status"),
            headers: HeaderMap::new(),
            delay: Duration::ZERO,
            content: Content::Full(Bytes::new()),
        }
    }

    /// 200, empty.
    #[must_use]
    pub fn ok() -> Self {
        Self::status(200)
    }

    /// 307 to another place.
    #[must_use]
    pub fn redirect(to: &str) -> Self {
        Self::status(307).header(header::LOCATION.as_str(), to)
    }

    /// No answer at all; the connection stays open.
    #[must_use]
    pub fn hang() -> Self {
        Self { content: Content::Hang, ..Self::ok() }
    }

    /// No answer; the connection is reset.
    #[must_use]
    pub fn reset() -> Self {
        Self { content: Content::Reset, ..Self::ok() }
    }

    /// A head at once, then the body, one byte per interval.
    #[must_use]
    pub fn drip(body: impl Into<Bytes>, interval: Duration) -> Self {
        Self { content: Content::Drip { body: body.into(), interval }, ..Self::ok() }
    }

    /// A head, then a body without end, as fast as the client reads.
    #[must_use]
    pub fn endless() -> Self {
        Self { content: Content::Endless, ..Self::ok() }
    }

    /// With a header.
    ///
    /// # Panics
    /// If it is no valid header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let name: HeaderName = name.parse().expect("a script names a valid header");
        self.headers.append(name, HeaderValue::from_str(value).expect("a script gives a valid header value"));
        self
    }

    /// With a body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.content = Content::Full(body.into());
        self
    }

    /// After a pause.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

/// The answers of one path, in order: first the listed ones, one per request, then always the last.
#[derive(Debug, Clone)]
pub struct Script {
    first: VecDeque<Answer>,
    then: Then,
}

#[derive(Clone)]
enum Then {
    Always(Box<Answer>),
    Decided(Arc<dyn Fn(&Received) -> Answer + Send + Sync>),
}

impl fmt::Debug for Then {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always(answer) => answer.fmt(f),
            Self::Decided(_) => f.write_str("decided"),
        }
    }
}

impl Script {
    /// These answers in turn, then 200.
    #[must_use]
    pub fn sequence(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self { first: answers.into_iter().collect(), ..Answer::ok().into() }
    }

    /// What `decide` says of each request. It is called while the receiver is locked, so it must be quick, and must not
    /// ask the receiver.
    #[must_use]
    pub fn decided_by(decide: impl Fn(&Received) -> Answer + Send + Sync + 'static) -> Self {
        Self { first: VecDeque::new(), then: Then::Decided(Arc::new(decide)) }
    }

    /// Fails `n` times with this status, then 200.
    #[must_use]
    pub fn fail_first(n: usize, status: u16) -> Self {
        Self::sequence(vec![Answer::status(status); n])
    }

    /// What comes when the listed answers are used up.
    #[must_use]
    pub fn then(mut self, answer: Answer) -> Self {
        self.then = Then::Always(Box::new(answer));
        self
    }

    /// How to treat the next request.
    pub(super) fn next(&mut self, request: &Received) -> Conduct {
        let answer = self.first.pop_front().unwrap_or_else(|| match &self.then {
            Then::Always(answer) => answer.as_ref().clone(),
            Then::Decided(decide) => decide(request),
        });
        let Answer { status, headers, delay, content } = answer;
        let body = match content {
            Content::Hang => return Conduct::Hang,
            Content::Reset => return Conduct::Reset,
            Content::Full(body) => full(body),
            Content::Drip { body, interval } => dripping(body, interval),
            Content::Endless => endless(),
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Conduct::Respond { delay, response }
    }
}

impl Default for Script {
    fn default() -> Self {
        Answer::ok().into()
    }
}

impl From<Answer> for Script {
    fn from(answer: Answer) -> Self {
        Self { first: VecDeque::new(), then: Then::Always(Box::new(answer)) }
    }
}

/// What the server is to do with a request.
pub(super) enum Conduct {
    Respond { delay: Duration, response: Response<BoxBody<Bytes, Infallible>> },
    Hang,
    Reset,
}

pub(super) fn full(body: Bytes) -> BoxBody<Bytes, Infallible> {
    Full::new(body).boxed()
}

fn dripping(body: Bytes, interval: Duration) -> BoxBody<Bytes, Infallible> {
    let drops = stream::unfold(body, move |mut left| async move {
        if left.is_empty() {
            return None;
        }
        tokio::time::sleep(interval).await;
        let drop = left.split_to(1);
        Some((Ok(Frame::data(drop)), left))
    });
    StreamBody::new(drops).boxed()
}

fn endless() -> BoxBody<Bytes, Infallible> {
    let chunk = Bytes::from_static(&[b'x'; CHUNK]);
    StreamBody::new(stream::repeat_with(move || Ok(Frame::data(chunk.clone())))).boxed()
}
