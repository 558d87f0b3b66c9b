//! Several deliveries in one request, and answers that speak of each of them.

use std::time::Duration;

use bus_core::{
    cloudevent::{Limits, Submission, parse_http},
    connection::{ContentMode, Target},
    delivery::Delivery,
    signature::{SigningSecret, verify},
    sink::{AttemptReport, Failure, Outcome, Parcel, Sink},
};
use bytes::Bytes;
use delivery_worker::webhook::{SinkConfig, WebhookSink};
use jiff::SignedDuration;
use uuid::Uuid;

use crate::{EVENT, SECRET, at, attempt, connection, delivery, on_loopback, server::Server, sink, webhook};

fn numbered(number: u128) -> Delivery {
    let body = format!(
        r#"{{"specversion":"1.0","id":"e-{number}","source":"/s","type":"t","data":{{"n": {number}.0}}}}"#
    );
    let mut delivery = delivery(body.as_bytes());
    delivery.key.id = Uuid::from_u128(number).into();
    delivery
}

async fn send(sink: &WebhookSink, server: &Server, deliveries: &[Delivery]) -> Vec<AttemptReport> {
    let target = connection(Target::Webhook(Box::new(webhook(&server.url("/")))));
    sink.attempt(&target, Parcel::Batch(deliveries), at()).await
}

fn outcomes(reports: Vec<AttemptReport>) -> Vec<Outcome> {
    reports.into_iter().map(|report| report.outcome).collect()
}

/// A server that answers every request with this body.
async fn saying(status: u16, headers: &'static str, body: impl Into<String>) -> Server {
    let body = body.into();
    Server::start(move |mut peer, _| {
        let answer =
            format!("HTTP/1.1 {status} Some\r\n{headers}content-length: {}\r\n\r\n{body}", body.len());
        async move {
            // Answers above the limit are not read to their end.
            while peer.request().await.is_some() && peer.send(&answer).await.is_ok() {}
        }
    })
    .await
}

fn reported(error: &str) -> Outcome {
    Failure::Reported(error.into()).into()
}

fn later(millis: u64) -> Outcome {
    let why = "the subscriber asked to be called later".into();
    Outcome::Deferred { wait: Duration::from_millis(millis), why }
}

#[tokio::test]
async fn a_batch_is_one_signed_array_of_the_events_as_they_are() {
    let server = saying(204, "", "").await;
    let deliveries = [numbered(1), numbered(2), numbered(3)];
    let mut target = webhook(&server.url("/hook"));
    target.headers.insert("x-own".into(), "yes".into());
    target.content_mode = ContentMode::Binary;
    let target = connection(Target::Webhook(Box::new(target)));
    let reports = sink().attempt(&target, Parcel::Batch(&deliveries), at()).await;

    assert_eq!(outcomes(reports), [Outcome::Delivered, Outcome::Delivered, Outcome::Delivered]);
    let received = server.only();
    assert_eq!(received.header("content-type"), "application/cloudevents-batch+json; charset=utf-8");
    assert_eq!(received.header("x-own"), "yes");
    let bodies: Vec<&str> =
        deliveries.iter().map(|delivery| str::from_utf8(&delivery.body).unwrap()).collect();
    assert_eq!(received.body, format!("[{}]", bodies.join(",")).into_bytes(), "not a digit is changed");
    let secrets = [SigningSecret::parse(SECRET).unwrap()];
    verify(&secrets, &received.header_map(), &received.body, at(), SignedDuration::from_secs(1)).unwrap();
    let parsed = parse_http(&received.header_map(), &Bytes::from(received.body), &Limits::default()).unwrap();
    assert!(matches!(parsed, Submission::Batch(drafts) if drafts.len() == 3));
}

#[tokio::test]
async fn the_id_of_a_batch_is_that_of_its_deliveries_in_any_order() {
    let server = saying(204, "", "").await;
    let sink = sink();
    let (one, two, three) = (numbered(1), numbered(2), numbered(3));
    for batch in [
        vec![one.clone(), two.clone(), three.clone()],
        vec![three, one.clone(), two.clone()],
        vec![one.clone(), two],
        vec![one],
    ] {
        send(&sink, &server, &batch).await;
    }
    let received = server.received();
    let ids: Vec<&str> = received.iter().map(|request| request.header("webhook-id")).collect();
    assert_eq!(ids[0], ids[1]);
    assert_eq!(Uuid::parse_str(ids[0]).unwrap().get_version_num(), 5);
    assert!(ids[1] != ids[2] && ids[2] != ids[3] && ids[3] != numbered(1).key.id.to_string());
}

#[tokio::test]
async fn outcomes_are_mapped_by_id() {
    let body = r#"{"success": false, "error": "outer",
        "results": {"e-3": {"retryAfter": 1500}, "e-1": {"success": true}, "e-9": {"success": true}}}"#;
    let server = saying(200, "", body).await;
    let reports = send(&sink(), &server, &[numbered(1), numbered(2), numbered(3)]).await;
    assert!(reports.iter().all(|report| report.status == Some(200) && report.answer == body));
    assert_eq!(outcomes(reports), [Outcome::Delivered, reported("outer"), later(1_500)]);
}

#[tokio::test]
async fn a_single_delivery_may_be_answered_in_either_form() {
    for (body, outcome) in [
        (r#"{"success": true}"#, Outcome::Delivered),
        (r#"{"retryAfter": 5}"#, later(5)),
        (r#"{"success": false, "error": "no stock"}"#, reported("no stock")),
        (r#"{"results": {"e-1": {"success": false, "error": "no stock"}}}"#, reported("no stock")),
        (r#"{"results": {"e-2": {"success": false, "error": "no stock"}}}"#, Outcome::Delivered),
    ] {
        let server = saying(200, "content-type: application/json\r\n", body).await;
        assert_eq!(attempt(&sink(), webhook(&server.url("/"))).await.outcome, outcome, "{body}");
    }
}

#[tokio::test]
async fn retry_after_is_a_deferral_or_a_bound() {
    const HEADERS: &str =
        "date: Sun, 06 Nov 1994 08:49:37 GMT\r\nretry-after: Sun, 06 Nov 1994 08:50:07 GMT\r\n";
    let wait = Duration::from_secs(30);
    for status in [429, 503] {
        let server = saying(status, HEADERS, "").await;
        let reports = send(&sink(), &server, &[numbered(1), numbered(2)]).await;
        for outcome in outcomes(reports) {
            assert!(matches!(outcome, Outcome::Deferred { wait: asked, .. } if asked == wait), "{outcome:?}");
        }
    }
    let server = saying(500, HEADERS, "").await;
    let failed = Outcome::Failed { failure: Failure::Status(500), not_before: Some(wait) };
    assert_eq!(attempt(&sink(), webhook(&server.url("/"))).await.outcome, failed);
}

#[tokio::test]
async fn what_is_cut_off_at_the_limit_says_nothing() {
    let limit = 4_096;
    let sink = WebhookSink::new(&SinkConfig { max_answer_bytes: limit, ..on_loopback() }).unwrap();
    let body = |length: usize| format!("{:<length$}", r#"{"success":false}"#);
    for (length, outcome) in [(limit, reported("no reason given")), (limit + 1, Outcome::Delivered)] {
        let server = saying(200, "", body(length)).await;
        assert_eq!(attempt(&sink, webhook(&server.url("/"))).await.outcome, outcome, "{length}");
    }
}

#[tokio::test]
async fn the_results_of_the_largest_batch_have_room() {
    let deliveries: Vec<Delivery> = (0..100).map(numbered).collect();
    let results: Vec<String> = (0..100)
        .map(|n| format!(r#""e-{n}": {{"success": {}, "error": "{}"}}"#, n % 2 == 0, "\\n".repeat(1_000)))
        .collect();
    let server = saying(200, "", format!(r#"{{"results": {{{}}}}}"#, results.join(","))).await;
    let outcomes = outcomes(send(&sink(), &server, &deliveries).await);
    assert_eq!(outcomes.len(), 100);
    for (n, outcome) in outcomes.iter().enumerate() {
        assert_eq!(*outcome == Outcome::Delivered, n % 2 == 0, "{n}");
    }
}

#[tokio::test]
async fn a_failure_of_the_request_is_that_of_every_delivery() {
    let server = Server::start(|mut peer, _| async move {
        peer.request().await.unwrap();
    })
    .await;
    let outcomes = outcomes(send(&sink(), &server, &[numbered(1), numbered(2)]).await);
    assert_eq!(outcomes[0], outcomes[1]);
    assert!(matches!(outcomes[0], Outcome::Failed { failure: Failure::Exchange(_), not_before: None }));
}

#[tokio::test]
async fn an_empty_batch_is_no_request() {
    let server = saying(204, "", "").await;
    assert_eq!(send(&sink(), &server, &[]).await, []);
    assert_eq!(server.connections(), 0);
    assert_eq!(attempt(&sink(), webhook(&server.url("/"))).await.outcome, Outcome::Delivered);
    assert_eq!(server.only().body, EVENT);
}
