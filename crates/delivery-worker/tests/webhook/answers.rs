//! What comes back, and what does not.

use std::{net::Ipv4Addr, time::Duration};

use bus_core::sink::{Failure, MAX_KEPT_ANSWER, Outcome};
use delivery_worker::webhook::{SinkConfig, WebhookSink};
use tokio::{io::AsyncWriteExt, net::TcpSocket, sync::mpsc, time::interval};

use crate::{attempt, on_loopback, server::Server, sink, webhook};

/// A deadline that is met on purpose. Nothing is asserted about how long it took.
const IMPATIENT: Duration = Duration::from_millis(500);

/// The same where something must have come before it.
const LESS_IMPATIENT: Duration = Duration::from_secs(3);

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

fn failed(failure: Failure) -> Outcome {
    failure.into()
}

#[tokio::test]
async fn every_2xx_with_an_unrelated_body_is_success() {
    for (answer, status, body) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nerror", 200, "error"),
        ("HTTP/1.1 202 Accepted\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 202, "ok"),
        ("HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
        ("HTTP/1.1 299 Odd\r\ncontent-length: 0\r\n\r\n", 299, ""),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, ""),
    ] {
        let server = Server::answering(answer).await;
        let report = attempt(&sink(), webhook(&server.url("/"))).await;
        assert_eq!((report.outcome, report.status), (Outcome::Delivered, Some(status)));
        assert_eq!(report.answer, body);
    }
}

#[tokio::test]
async fn every_other_status_is_a_failure_with_its_answer() {
    for (answer, status) in [
        ("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops", 500),
        ("HTTP/1.1 410 Gone\r\ncontent-length: 4\r\n\r\noops", 410),
        ("HTTP/1.1 304 Not Modified\r\n\r\n", 304),
        ("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", 101),
    ] {
        let server = Server::answering(answer).await;
        let report = attempt(&sink(), webhook(&server.url("/"))).await;
        assert_eq!((report.outcome, report.status), (failed(Failure::Status(status)), Some(status)));
        assert_eq!(report.answer, answer.split_once("\r\n\r\n").unwrap().1);
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let target = Server::answering(OK).await;
    let location = target.url("/elsewhere");
    for status in [301, 302, 303, 307, 308] {
        let location = location.clone();
        let server = Server::start(move |mut peer, _| {
            let location = location.clone();
            async move {
                peer.request().await.unwrap();
                let head =
                    format!("HTTP/1.1 {status} Moved\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n");
                peer.send(head).await.unwrap();
            }
        })
        .await;
        let report = attempt(&sink(), webhook(&server.url("/"))).await;
        assert_eq!(report.outcome, failed(Failure::Status(status)));
        assert_eq!(server.received().len(), 1);
    }
    assert_eq!(target.connections(), 0);
}

/// A server that sends `before` and then nothing more, and reports when the client has hung up.
async fn stalling(before: &'static str) -> (Server, mpsc::UnboundedReceiver<()>) {
    let (hung_up, hang_ups) = mpsc::unbounded_channel();
    let server = Server::start(move |mut peer, _| {
        let hung_up = hung_up.clone();
        async move {
            peer.request().await.unwrap();
            peer.send(before).await.unwrap();
            assert_eq!(peer.hung_up().await, 0);
            hung_up.send(()).unwrap();
        }
    })
    .await;
    (server, hang_ups)
}

#[tokio::test]
async fn an_answer_that_never_begins_times_out() {
    let (server, mut hang_ups) = stalling("").await;
    let mut target = webhook(&server.url("/"));
    target.timeout = IMPATIENT;
    let report = attempt(&sink(), target).await;
    assert_eq!((report.outcome, report.status), (failed(Failure::Timeout(IMPATIENT)), None));
    // The connection is not kept: what it still brings would be taken for the next answer.
    hang_ups.recv().await.unwrap();
}

#[tokio::test]
async fn a_body_that_stalls_after_2xx_times_out() {
    let (server, mut hang_ups) = stalling("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
    let mut target = webhook(&server.url("/"));
    target.timeout = LESS_IMPATIENT;
    let report = attempt(&sink(), target).await;
    assert_eq!((report.outcome, report.status), (failed(Failure::Timeout(LESS_IMPATIENT)), Some(200)));
    assert_eq!(report.answer, "half");
    hang_ups.recv().await.unwrap();
}

#[tokio::test]
async fn a_body_that_stalls_after_another_status_is_that_status() {
    let (server, mut hang_ups) = stalling("HTTP/1.1 503 Busy\r\ncontent-length: 9\r\n\r\nhalf").await;
    let mut target = webhook(&server.url("/"));
    target.timeout = LESS_IMPATIENT;
    let report = attempt(&sink(), target).await;
    assert_eq!(report.outcome, failed(Failure::Status(503)));
    assert_eq!(report.answer, "half");
    hang_ups.recv().await.unwrap();
}

#[tokio::test]
async fn one_deadline_covers_a_body_that_drips() {
    let server = Server::start(|mut peer, _| async move {
        peer.request().await.unwrap();
        peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let mut drops = interval(Duration::from_millis(20));
        while peer.send("1\r\n.\r\n").await.is_ok() {
            drops.tick().await;
        }
    })
    .await;
    let mut target = webhook(&server.url("/"));
    target.timeout = IMPATIENT;
    let report = attempt(&sink(), target).await;
    assert_eq!(report.outcome, failed(Failure::Timeout(IMPATIENT)));
}

#[tokio::test]
async fn one_deadline_covers_a_head_that_drips() {
    let server = Server::start(|mut peer, _| async move {
        peer.request().await.unwrap();
        let mut drops = interval(Duration::from_millis(20));
        while peer.send("HTTP/1.1 100 Continue\r\n\r\n").await.is_ok() {
            drops.tick().await;
        }
    })
    .await;
    let mut target = webhook(&server.url("/"));
    target.timeout = IMPATIENT;
    let report = attempt(&sink(), target).await;
    assert_eq!((report.outcome, report.status), (failed(Failure::Timeout(IMPATIENT)), None));
}

#[tokio::test]
async fn one_deadline_covers_the_connection() {
    // TCP connects; the TLS handshake is never answered.
    let silent = Server::start(|mut peer, _| async move {
        peer.hung_up().await;
    })
    .await;
    let mut target = webhook(&format!("https://{}/", silent.address));
    target.timeout = IMPATIENT;
    let report = attempt(&sink(), target).await;
    assert_eq!((report.outcome, report.status), (failed(Failure::Timeout(IMPATIENT)), None));
}

#[tokio::test]
async fn nothing_listens() {
    // Bound, so that no one else takes the port, but not listening.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let url = format!("http://{}/?secret=1", socket.local_addr().unwrap());
    let report = attempt(&sink(), webhook(&url)).await;
    assert_eq!(report.outcome, failed(Failure::Connect("connection refused".into())));
}

#[tokio::test]
async fn a_connection_that_breaks_is_a_failure() {
    for (sent, status) in [("", None), ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", Some(200))] {
        for reset in [false, true] {
            let server = Server::start(move |mut peer, _| async move {
                peer.request().await.unwrap();
                peer.send(sent).await.unwrap();
                if reset {
                    peer.reset();
                }
            })
            .await;
            let report = attempt(&sink(), webhook(&server.url("/?secret=1"))).await;
            let Outcome::Failed { failure: Failure::Exchange(cause), .. } = &report.outcome else {
                panic!("{:?}", report.outcome)
            };
            assert!(!cause.contains("secret") && !cause.contains("127.0.0.1"), "{cause}");
            // A reset may overtake what was sent before it.
            assert!(report.status == status || (reset && report.status.is_none()), "{:?}", report.status);
            assert_eq!(server.received().len(), 1, "a request that was sent is not sent again");
        }
    }
}

#[tokio::test]
async fn what_is_not_http_is_a_failure() {
    for noise in [
        "SSH-2.0-OpenSSH_9.9\r\n\r\n",
        "HTTP/9.9 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    ] {
        let server = Server::answering(noise).await;
        let report = attempt(&sink(), webhook(&server.url("/"))).await;
        assert!(
            matches!(report.outcome, Outcome::Failed { failure: Failure::Exchange(_), .. }),
            "{:?}",
            report.outcome
        );
    }
}

/// How many bytes a server could send of something endless before the client hung up. What the kernel
/// buffers on both sides counts too: some megabytes.
async fn pushed_endlessly(start: &'static str, piece: &'static str) -> (Outcome, Option<u16>, usize, usize) {
    let (pushed, mut totals) = mpsc::unbounded_channel();
    let server = Server::start(move |mut peer, _| {
        let pushed = pushed.clone();
        async move {
            peer.request().await.unwrap();
            peer.send(start).await.unwrap();
            let piece = piece.repeat(1024);
            let mut total = 0;
            while let Ok(written) = peer.stream.write(piece.as_bytes()).await {
                total += written;
            }
            pushed.send(total).unwrap();
        }
    })
    .await;
    let report = attempt(&sink(), webhook(&server.url("/"))).await;
    (report.outcome, report.status, report.answer.len(), totals.recv().await.unwrap())
}

/// Far more than any socket buffer here, far less than a process could not hold.
const MUCH: usize = 64 * 1024 * 1024;

#[tokio::test]
async fn an_endless_body_is_cut_off() {
    for start in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999\r\n\r\n"] {
        let (outcome, status, kept, pushed) = pushed_endlessly(start, "0123456789abcdef").await;
        assert_eq!((outcome, status, kept), (Outcome::Delivered, Some(200), MAX_KEPT_ANSWER));
        assert!(pushed < MUCH, "{pushed}");
    }
    let chunked = "HTTP/1.1 500 Oops\r\ntransfer-encoding: chunked\r\n\r\n";
    let (outcome, _, kept, pushed) = pushed_endlessly(chunked, "4\r\n....\r\n").await;
    assert_eq!((outcome, kept), (failed(Failure::Status(500)), MAX_KEPT_ANSWER));
    assert!(pushed < MUCH, "{pushed}");
}

#[tokio::test]
async fn an_endless_head_is_cut_off() {
    let (outcome, status, _, pushed) =
        pushed_endlessly("HTTP/1.1 200 OK\r\nx-long: ", "0123456789abcdef").await;
    assert!(matches!(outcome, Outcome::Failed { failure: Failure::Exchange(_), .. }), "{outcome:?}");
    assert_eq!(status, None);
    assert!(pushed < MUCH, "{pushed}");
}

#[tokio::test]
async fn a_long_answer_is_kept_in_part() {
    let server = Server::start(|mut peer, _| async move {
        while peer.request().await.is_some() {
            let body = "0123456789abcdef".repeat(2048);
            peer.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
                .await
                .unwrap();
        }
    })
    .await;
    let sink = sink();
    for _ in 0..3 {
        let report = attempt(&sink, webhook(&server.url("/"))).await;
        assert_eq!(report.outcome, Outcome::Delivered);
        assert_eq!(report.answer, "0123456789abcdef".repeat(1024));
    }
    // It was read to its end, though, so that the connection could be used again.
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn connections_are_used_again() {
    let server = Server::answering(OK).await;
    let sink = sink();
    for _ in 0..10 {
        assert_eq!(attempt(&sink, webhook(&server.url("/"))).await.outcome, Outcome::Delivered);
    }
    assert_eq!((server.received().len(), server.connections()), (10, 1));
}

#[tokio::test]
async fn no_connection_is_kept_when_none_may_be_idle() {
    let server = Server::answering(OK).await;
    let sink = WebhookSink::new(&SinkConfig { idle_per_host: 0, ..on_loopback() }).unwrap();
    for _ in 0..3 {
        assert_eq!(attempt(&sink, webhook(&server.url("/"))).await.outcome, Outcome::Delivered);
    }
    assert_eq!(server.connections(), 3);
}

#[tokio::test]
async fn an_idle_connection_is_closed_in_time() {
    let (server, mut hang_ups) = stalling(OK).await;
    let sink = WebhookSink::new(&SinkConfig { idle_timeout_ms: 50, ..on_loopback() }).unwrap();
    assert_eq!(attempt(&sink, webhook(&server.url("/"))).await.outcome, Outcome::Delivered);
    hang_ups.recv().await.unwrap();
}

/// The subscriber closes each connection after one answer, without having announced it.
#[tokio::test]
async fn a_connection_that_was_closed_while_idle_costs_no_attempt() {
    let (closed, mut closings) = mpsc::unbounded_channel();
    let server = Server::start(move |mut peer, _| {
        let closed = closed.clone();
        async move {
            peer.request().await.unwrap();
            peer.send(OK).await.unwrap();
            peer.stream.shutdown().await.unwrap();
            // The client hangs up as soon as it has seen that.
            assert_eq!(peer.hung_up().await, 0);
            closed.send(()).unwrap();
        }
    })
    .await;
    let sink = sink();
    for _ in 0..20 {
        assert_eq!(attempt(&sink, webhook(&server.url("/"))).await.outcome, Outcome::Delivered);
        closings.recv().await.unwrap();
    }
    assert_eq!((server.received().len(), server.connections()), (20, 20));
}

/// The same without waiting, so that the next request races with the closing. Where it loses, it was
/// never sent, and goes out on a new connection. Where it wins, it was sent, and that attempt is charged:
/// the subscriber's side, which still reads, has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_request_that_was_sent_is_charged() {
    let (closed, mut closings) = mpsc::unbounded_channel();
    let server = Server::start(move |mut peer, _| {
        let closed = closed.clone();
        async move {
            peer.request().await.unwrap();
            peer.send(OK).await.unwrap();
            peer.stream.shutdown().await.unwrap();
            let mut late = 0;
            while peer.request().await.is_some() {
                late += 1;
            }
            closed.send(late).unwrap();
        }
    })
    .await;
    let sink = sink();
    let mut charged = 0;
    for _ in 0..1000 {
        match attempt(&sink, webhook(&server.url("/"))).await.outcome {
            Outcome::Delivered => {}
            Outcome::Failed { failure: Failure::Exchange(_), .. } => charged += 1,
            other => panic!("{other:?}"),
        }
    }
    drop(sink);
    let mut late = 0;
    for _ in 0..server.connections() {
        late += closings.recv().await.unwrap();
    }
    assert_eq!(charged, late);
}
