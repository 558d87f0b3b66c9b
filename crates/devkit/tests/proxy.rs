//! The proxy treats connections as it was told to.

#![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

use std::{io::ErrorKind, net::Ipv4Addr, time::Duration};

use devkit::proxy::{Network, Proxy};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

/// Long enough for anything on loopback to arrive, were it to.
const NOTHING: Duration = Duration::from_millis(200);
const DEADLINE: Duration = Duration::from_secs(10);

/// A server that sends back what it gets.
async fn echo() -> (Proxy, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut from, mut to) = stream.into_split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let proxy = Proxy::before(port).await.unwrap();
    let port = proxy.port();
    (proxy, port)
}

async fn connect(port: u16) -> TcpStream {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap()
}

async fn said(stream: &mut TcpStream, word: &[u8; 4]) {
    stream.write_all(word).await.unwrap();
    heard(stream, word).await;
}

async fn heard(stream: &mut TcpStream, word: &[u8; 4]) {
    let mut answer = [0; 4];
    timeout(DEADLINE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, word);
}

async fn reset(stream: &mut TcpStream) {
    let failed = timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::ConnectionReset, "{failed}");
}

async fn silent(stream: &mut TcpStream) {
    assert!(timeout(NOTHING, stream.read_u8()).await.is_err());
}

#[tokio::test]
async fn everything_passes_and_the_end_too() {
    let (_proxy, port) = echo().await;
    let mut stream = connect(port).await;
    said(&mut stream, b"ping").await;
    stream.shutdown().await.unwrap();
    assert_eq!(timeout(DEADLINE, stream.read_to_end(&mut Vec::new())).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn what_is_slow_takes_its_time_each_way_and_arrives_in_order() {
    const EACH_WAY: Duration = Duration::from_millis(100);
    let (proxy, port) = echo().await;
    let mut stream = connect(port).await;
    proxy.set(Network::Slow(EACH_WAY));
    let begun = Instant::now();
    stream.write_all(b"one.two.").await.unwrap();
    heard(&mut stream, b"one.").await;
    heard(&mut stream, b"two.").await;
    assert!(begun.elapsed() >= 2 * EACH_WAY);
}

#[tokio::test]
async fn connections_are_cut_and_refused() {
    let (proxy, port) = echo().await;
    let (mut first, mut second) = (connect(port).await, connect(port).await);
    said(&mut first, b"ping").await;
    said(&mut second, b"ping").await;
    proxy.set(Network::Refusing);
    said(&mut first, b"pong").await;
    reset(&mut connect(port).await).await;
    proxy.cut();
    reset(&mut first).await;
    reset(&mut second).await;
    proxy.set(Network::Open);
    said(&mut connect(port).await, b"ping").await;
}

#[tokio::test]
async fn nothing_passes_a_partition_until_it_is_over() {
    let (proxy, port) = echo().await;
    let mut old = connect(port).await;
    said(&mut old, b"ping").await;
    proxy.set(Network::BlackHole);
    let mut new = connect(port).await;
    old.write_all(b"late").await.unwrap();
    new.write_all(b"late").await.unwrap();
    silent(&mut old).await;
    silent(&mut new).await;
    proxy.set(Network::Open);
    heard(&mut old, b"late").await;
    heard(&mut new, b"late").await;
}

#[tokio::test]
async fn a_connection_that_the_server_forgot_is_silent_and_then_reset() {
    let (proxy, port) = echo().await;
    let mut stream = connect(port).await;
    said(&mut stream, b"ping").await;
    proxy.set(Network::HalfOpen);
    silent(&mut stream).await;
    stream.write_all(b"void").await.unwrap();
    silent(&mut stream).await;
    proxy.set(Network::Open);
    reset(&mut stream).await;
}
