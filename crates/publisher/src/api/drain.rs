//! Reads what a refused request still has to say.
//!
//! A client that is still sending when its connection is closed may never see the answer: the reset
//! overtakes it. So a refusal waits for the rest of the body, within bounds, and throws it away.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
};
use http::header::EXPECT;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::sync::oneshot;

/// The most bytes that are thrown away; more than that, and the connection is closed.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// How long the rest may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A body on loan to a handler. What the handler leaves of it comes back.
struct Lent {
    body: Body,
    untouched: bool,
    back: Option<oneshot::Sender<Rest>>,
}

/// What a handler left of a body.
struct Rest {
    body: Body,
    untouched: bool,
}

/// Where the rest of a request's body will be.
pub(super) struct Leftover {
    rest: oneshot::Receiver<Rest>,
    /// The client waits to be told that it may send (RFC 9110 §10.1.1).
    expects: bool,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.untouched = false;
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let body = std::mem::take(&mut self.body);
        if let Some(back) = self.back.take().filter(|_| !body.is_end_stream()) {
            // Nobody wants it when the request itself was given up.
            let _ = back.send(Rest { body, untouched: self.untouched });
        }
    }
}

/// Lends the request's body to whoever handles the request; none if it has none.
pub(super) fn lend(request: Request) -> (Request, Option<Leftover>) {
    if request.body().is_end_stream() {
        return (request, None);
    }
    let expects = request.headers().contains_key(EXPECT);
    let (back, rest) = oneshot::channel();
    let request = request.map(|body| Body::new(Lent { body, untouched: true, back: Some(back) }));
    (request, Some(Leftover { rest, expects }))
}

impl Leftover {
    /// Reads the rest and throws it away.
    pub(super) async fn drain(mut self) {
        let Ok(Rest { mut body, untouched }) = self.rest.try_recv() else { return };
        if untouched && self.expects {
            // To read would be to ask for the body. The refusal goes out instead.
            return;
        }
        let read = async {
            let mut bytes = 0;
            while let Some(Ok(frame)) = body.frame().await {
                bytes += frame.data_ref().map_or(0, Bytes::len);
                if bytes > MAX_BYTES {
                    return;
                }
            }
        };
        // Whatever stopped it, the answer follows.
        let _ = tokio::time::timeout(TIMEOUT, read).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures::{StreamExt as _, stream};

    use super::*;

    /// A request whose body counts the chunks of 1 MiB that were read of it.
    fn request(chunks: usize, expects: bool) -> (Request, Arc<AtomicUsize>) {
        let read = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&read);
        let body = stream::iter(0..chunks).map(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok::<_, std::io::Error>(vec![0; 1024 * 1024])
        });
        let mut request = Request::new(Body::from_stream(body));
        if expects {
            request.headers_mut().insert(EXPECT, "100-continue".parse().unwrap());
        }
        (request, read)
    }

    #[tokio::test]
    async fn the_rest_is_read_up_to_a_bound() {
        for (chunks, frames, expects, read) in
            [(5, 0, false, 5), (5, 2, false, 5), (5, 2, true, 5), (5, 0, true, 0), (100, 0, false, 17)]
        {
            let (request, counter) = request(chunks, expects);
            let (request, leftover) = lend(request);
            let mut body = request.into_body();
            for _ in 0..frames {
                body.frame().await.unwrap().unwrap();
            }
            drop(body);
            leftover.unwrap().drain().await;
            assert_eq!(counter.load(Ordering::SeqCst), read, "{chunks} {frames} {expects}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_that_does_not_come_is_not_waited_for_long() {
        let body = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let (request, leftover) = lend(Request::new(body));
        drop(request);
        leftover.unwrap().drain().await;
    }

    #[test]
    fn no_body_no_rest() {
        assert!(lend(Request::new(Body::empty())).1.is_none());
    }
}
