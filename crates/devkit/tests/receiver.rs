//! The receiver records what comes, and misbehaves as told.

#![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

use std::time::Duration;

use devkit::receiver::{Answer, Receiver, Script};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const SHORT: Duration = Duration::from_millis(200);

fn client() -> reqwest::Client {
    devkit::install_tls_provider();
    reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().unwrap()
}

#[tokio::test]
async fn every_byte_of_a_request_is_recorded() {
    let receiver = Receiver::start().await.unwrap();
    let body = vec![0, 255, b'{', 13, 10];
    let request = client().post(receiver.url("/orders?x=1")).header("webhook-id", "a").body(body.clone());
    assert_eq!(request.send().await.unwrap().status(), 200);

    let received = receiver.wait_for("/orders", 1).await;
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].body, body);
    assert_eq!(received[0].header("Webhook-Id"), "a");
    assert_eq!(received[0].query.as_deref(), Some("x=1"));
    assert_eq!(receiver.count("/other"), 0);
}

#[tokio::test]
async fn answers_come_in_the_order_of_the_script() {
    let receiver = Receiver::start().await.unwrap();
    receiver.script(
        "/a",
        Script::sequence([
            Answer::status(503).header("retry-after", "7"),
            Answer::redirect("http://elsewhere/"),
        ])
        .then(Answer::status(201).body("made")),
    );
    let client = client();
    let first = client.post(receiver.url("/a")).send().await.unwrap();
    assert_eq!((first.status().as_u16(), first.headers()["retry-after"].to_str().unwrap()), (503, "7"));
    let second = client.post(receiver.url("/a")).send().await.unwrap();
    assert_eq!(
        (second.status().as_u16(), second.headers()["location"].to_str().unwrap()),
        (307, "http://elsewhere/")
    );
    for _ in 0..2 {
        let rest = client.post(receiver.url("/a")).send().await.unwrap();
        assert_eq!((rest.status().as_u16(), rest.text().await.unwrap()), (201, "made".to_owned()));
    }
    receiver.script("/b", Script::fail_first(1, 500));
    let statuses = [
        client.post(receiver.url("/b")).send().await.unwrap().status().as_u16(),
        client.post(receiver.url("/b")).send().await.unwrap().status().as_u16(),
    ];
    assert_eq!(statuses, [500, 200]);
}

#[tokio::test]
async fn a_hanging_path_records_and_says_nothing() {
    let receiver = Receiver::start().await.unwrap();
    receiver.script("/hang", Answer::hang());
    let request = client().post(receiver.url("/hang")).timeout(SHORT).send().await;
    assert!(request.unwrap_err().is_timeout());
    assert_eq!(receiver.count("/hang"), 1);
    assert_eq!(receiver.peak_in_flight("/hang"), 1);
}

#[tokio::test]
async fn a_reset_is_a_reset_and_not_an_orderly_end() {
    let receiver = Receiver::start().await.unwrap();
    receiver.script("/reset", Answer::reset());
    let mut stream = TcpStream::connect(receiver.address()).await.unwrap();
    stream.write_all(b"POST /reset HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    let error = stream.read(&mut [0; 16]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_dripping_body_comes_byte_by_byte_and_an_endless_one_never_ends() {
    let receiver = Receiver::start().await.unwrap();
    receiver.script("/drip", Answer::drip("abc", Duration::from_millis(1)));
    let mut dripping = client().get(receiver.url("/drip")).send().await.unwrap();
    let mut pieces = Vec::new();
    while let Some(piece) = dripping.chunk().await.unwrap() {
        pieces.extend(piece);
    }
    assert_eq!(pieces, b"abc");

    receiver.script("/endless", Answer::endless());
    let mut endless = client().get(receiver.url("/endless")).send().await.unwrap();
    let mut size = 0;
    while size < 10_000_000 {
        size += endless.chunk().await.unwrap().unwrap().len();
    }
}

#[tokio::test]
async fn waiting_for_requests_that_never_come_ends() {
    let receiver = Receiver::start().await.unwrap();
    let waiting = receiver.wait_for_within("/none", 1, SHORT);
    let ended = futures::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(waiting)).await;
    let message = *ended.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("for 1 requests to /none; there were 0"), "{message}");
}

#[tokio::test]
async fn its_port_closes_with_it() {
    let receiver = Receiver::start().await.unwrap();
    let address = receiver.address();
    drop(receiver);
    devkit::wait_until("the port to close", Duration::from_secs(10), || async {
        TcpStream::connect(address).await.map_or(Ok(()), |_| Err("open"))
    })
    .await;
}
