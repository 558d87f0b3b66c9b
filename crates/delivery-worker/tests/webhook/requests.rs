//! What is sent.

use bus_core::{
    connection::{ContentMode, Target},
    signature::{SigningSecret, verify},
    sink::{Failure, Outcome, Sink},
};
use jiff::{SignedDuration, Timestamp};

use crate::{
    EVENT, SECRET, at, attempt, connection, delivery,
    server::{Received, Server},
    sink, webhook,
};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const OTHER_SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

fn secret(text: &str) -> SigningSecret {
    SigningSecret::parse(text).unwrap()
}

fn verifies(received: &Received, secret_text: &str, now: Timestamp) -> bool {
    let secrets = [secret(secret_text)];
    verify(&secrets, &received.header_map(), &received.body, now, SignedDuration::from_secs(1)).is_ok()
}

#[tokio::test]
async fn structured_is_the_event_as_it_is_signed() {
    let server = Server::answering(OK).await;
    let report = attempt(&sink(), webhook(&server.url("/hook?key=a%20b"))).await;

    assert_eq!((report.outcome, report.status), (Outcome::Delivered, Some(200)));
    let received = server.only();
    assert_eq!(received.line, "POST /hook?key=a%20b HTTP/1.1");
    assert_eq!(received.body, EVENT);
    assert_eq!(
        received.names(),
        [
            "content-length",
            "content-type",
            "host",
            "user-agent",
            "webhook-id",
            "webhook-signature",
            "webhook-timestamp"
        ]
    );
    assert_eq!(received.header("content-type"), "application/cloudevents+json; charset=utf-8");
    assert_eq!(received.header("host"), server.address.to_string());
    assert_eq!(received.header("user-agent"), concat!("event-bus/", env!("CARGO_PKG_VERSION")));
    assert_eq!(received.header("webhook-id"), "00000000-0000-0000-0000-000000000003");
    assert_eq!(received.header("webhook-timestamp"), at().as_second().to_string());
    assert!(verifies(&received, SECRET, at()));
    assert!(!verifies(&received, OTHER_SECRET, at()));
}

#[tokio::test]
async fn binary_is_the_payload_with_attributes_in_headers() {
    let server = Server::answering(OK).await;
    let mut target = webhook(&server.url("/"));
    target.content_mode = ContentMode::Binary;
    let report = attempt(&sink(), target).await;

    assert_eq!(report.outcome, Outcome::Delivered);
    let received = server.only();
    // The payload's own bytes: neither the space nor the digits are lost.
    assert_eq!(received.body, br#"{"total": 1.50, "big":12345678901234567890}"#);
    assert_eq!(
        received.names(),
        [
            "ce-id",
            "ce-region",
            "ce-source",
            "ce-specversion",
            "ce-subject",
            "ce-type",
            "content-length",
            "content-type",
            "host",
            "user-agent",
            "webhook-id",
            "webhook-signature",
            "webhook-timestamp"
        ]
    );
    assert_eq!(received.header("content-type"), "application/json");
    assert_eq!(received.header("ce-type"), "order.placed");
    assert_eq!(received.header("ce-subject"), "order%207");
    assert!(verifies(&received, SECRET, at()));
}

#[tokio::test]
async fn binary_without_a_payload_has_an_empty_body() {
    let server = Server::answering(OK).await;
    let mut target = webhook(&server.url("/"));
    target.content_mode = ContentMode::Binary;
    let event = delivery(br#"{"specversion":"1.0","id":"e","source":"/s","type":"t"}"#);
    let report = sink().attempt_one(&connection(Target::Webhook(Box::new(target))), &event, at()).await;

    assert_eq!(report.outcome, Outcome::Delivered);
    let received = server.only();
    assert_eq!((received.header("content-length"), received.body.len()), ("0", 0));
    assert!(!received.names().contains(&"content-type"), "{:?}", received.headers);
    assert!(verifies(&received, SECRET, at()));
}

#[tokio::test]
async fn every_attempt_has_the_same_id_and_its_own_time() {
    let server = Server::answering(OK).await;
    let sink = sink();
    let target = connection(Target::Webhook(Box::new(webhook(&server.url("/")))));
    let later = at() + SignedDuration::from_hours(1);
    for time in [at(), later] {
        assert_eq!(sink.attempt_one(&target, &delivery(EVENT), time).await.outcome, Outcome::Delivered);
    }
    let received = server.received();
    assert_eq!(received[0].header("webhook-id"), received[1].header("webhook-id"));
    assert!(verifies(&received[0], SECRET, at()));
    assert!(verifies(&received[1], SECRET, later) && !verifies(&received[1], SECRET, at()));
}

#[tokio::test]
async fn a_replaced_secret_signs_too_until_its_time() {
    let server = Server::answering(OK).await;
    let sink = sink();
    let mut target = webhook(&server.url("/"));
    target.previous_secret = Some((secret(OTHER_SECRET), at() + SignedDuration::from_secs(1)));
    let target = connection(Target::Webhook(Box::new(target)));
    let after = at() + SignedDuration::from_secs(1);
    sink.attempt_one(&target, &delivery(EVENT), at()).await;
    sink.attempt_one(&target, &delivery(EVENT), after).await;

    let received = server.received();
    assert_eq!(received[0].header("webhook-signature").split(' ').count(), 2);
    assert!(verifies(&received[0], SECRET, at()) && verifies(&received[0], OTHER_SECRET, at()));
    assert_eq!(received[1].header("webhook-signature").split(' ').count(), 1);
    assert!(verifies(&received[1], SECRET, after) && !verifies(&received[1], OTHER_SECRET, after));
}

#[tokio::test]
async fn own_headers_are_added_and_never_override() {
    let server = Server::answering(OK).await;
    let mut target = webhook(&server.url("/"));
    target.headers = [
        ("Authorization", "Bearer token"),
        ("User-Agent", "shop/1"),
        ("Webhook-Id", "forged"),
        ("webhook_signature", "forged"),
        ("WEBHOOK-TIMESTAMP", "1"),
        ("webhook-extra", "forged"),
        ("ce-id", "forged"),
        ("Content-Type", "text/plain"),
        ("Content-Length", "1"),
        ("Content-Encoding", "gzip"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "close"),
        ("Host", "internal"),
        ("Expect", "100-continue"),
        ("Accept-Encoding", "gzip"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    assert_eq!(attempt(&sink(), target).await.outcome, Outcome::Delivered);

    let received = server.only();
    assert_eq!(
        received.names(),
        [
            "authorization",
            "content-length",
            "content-type",
            "host",
            "user-agent",
            "webhook-id",
            "webhook-signature",
            "webhook-timestamp"
        ]
    );
    assert_eq!(received.header("authorization"), "Bearer token");
    assert_eq!(received.header("user-agent"), "shop/1");
    assert_eq!(received.header("host"), server.address.to_string());
    assert_eq!(received.body, EVENT);
    assert!(verifies(&received, SECRET, at()));
}

#[tokio::test]
async fn what_cannot_be_a_request_is_not_sent() {
    let server = Server::answering(OK).await;
    let sink = sink();
    let request_failure = |outcome| match outcome {
        Outcome::Failed { failure: Failure::Request(cause), .. } => cause,
        other => panic!("{other:?}"),
    };

    let report = sink.attempt_one(&connection(Target::Publisher), &delivery(EVENT), at()).await;
    assert_eq!(request_failure(report.outcome), "the connection receives nothing");

    let mut target = webhook(&server.url("/"));
    target.headers.insert("x-token".into(), "secret\r\nx: y".into());
    let cause = request_failure(attempt(&sink, target).await.outcome);
    assert_eq!(cause, "the header \"x-token\" is not valid");

    let mut target = webhook(&server.url("/"));
    target.content_mode = ContentMode::Binary;
    let target = connection(Target::Webhook(Box::new(target)));
    let report = sink.attempt_one(&target, &delivery(b"{}"), at()).await;
    assert_eq!(request_failure(report.outcome), "the event cannot be laid out in binary mode");

    assert_eq!(server.connections(), 0);
}
