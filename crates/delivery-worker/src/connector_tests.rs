#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;

use rustls::RootCertStore;
use tokio::net::TcpListener;
use tower::ServiceExt;

use super::*;

fn allowing(nets: &[&str]) -> AddressPolicy {
    AddressPolicy::new(nets.iter().map(|net| net.parse().unwrap()).collect())
}

fn addresses(list: &[&str]) -> Vec<SocketAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

async fn dial(policy: AddressPolicy, uri: String) -> Result<Dialled, ConnectError> {
    GuardedConnector::new(policy).oneshot(uri.parse().unwrap()).await
}

#[test]
fn refused_answers_are_dropped_and_the_others_kept_in_order() {
    let guard = GuardedConnector::new(AddressPolicy::default());
    let answers = addresses(&["10.0.0.1:443", "[2606:4700::1]:443", "[::1]:443", "1.1.1.1:443"]);
    let permitted = guard.permitted(answers.into_iter()).unwrap();
    assert_eq!(permitted, addresses(&["[2606:4700::1]:443", "1.1.1.1:443"]));
}

#[test]
fn when_every_answer_is_refused_the_first_is_named() {
    let guard = GuardedConnector::new(AddressPolicy::default());
    let error = guard.permitted(addresses(&["10.0.0.1:80", "[::1]:80"]).into_iter()).unwrap_err();
    assert_eq!(error.failure(), Failure::AddressRefused("10.0.0.1".parse().unwrap()));
    let error = guard.permitted(std::iter::empty()).unwrap_err();
    assert!(matches!(error.failure(), Failure::Resolve(_)));
}

#[test]
fn a_name_with_many_addresses_is_not_dialled_at_all_of_them() {
    let guard = GuardedConnector::new(AddressPolicy::default());
    let answers = (0..1000u16).map(|port| SocketAddr::new(Ipv4Addr::new(1, 1, 1, 1).into(), port));
    assert_eq!(guard.permitted(answers).unwrap().len(), MAX_ADDRESSES);
}

#[tokio::test]
async fn the_next_address_is_tried_when_one_does_not_answer() {
    // 127.0.0.2 on the same port: nothing listens there.
    let (listener, port) = listen().await;
    let guard = GuardedConnector::new(allowing(&["127.0.0.0/8"]));
    let candidates = addresses(&[&format!("127.0.0.2:{port}"), &format!("127.0.0.1:{port}")]);
    let (dialled, accepted) = tokio::join!(guard.dial(candidates), listener.accept());
    assert_eq!(dialled.unwrap().inner().local_addr().unwrap(), accepted.unwrap().1);
}

#[tokio::test]
async fn a_connection_sends_small_writes_at_once() {
    let (_listener, port) = listen().await;
    let dialled = dial(allowing(&["127.0.0.0/8"]), format!("http://127.0.0.1:{port}/")).await.unwrap();
    assert!(dialled.inner().nodelay().unwrap());
}

/// Linux connects a dialled 0.0.0.0 to loopback. Only the address itself is allowed here, so that the
/// first check passes, and the second one must refuse.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_address_reached_is_judged_and_not_only_the_one_dialled() {
    let (_listener, port) = listen().await;
    let error = dial(allowing(&["0.0.0.0/32"]), format!("http://0.0.0.0:{port}/")).await.unwrap_err();
    assert_eq!(error.failure(), Failure::AddressRefused(Ipv4Addr::LOCALHOST.into()));
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_given_up() {
    // The listener's backlog takes the connection; no one ever answers the client's hello.
    let (_listener, port) = listen().await;
    let provider = rustls::crypto::ring::default_provider();
    let tls = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut connector = Connector::new(allowing(&["127.0.0.0/8"]), tls);
    connector.limit = Duration::from_millis(200);
    let error = connector.oneshot(format!("https://127.0.0.1:{port}/").parse().unwrap()).await.unwrap_err();
    assert_eq!(error.failure(), Failure::Timeout(Duration::from_millis(200)));
}

#[test]
fn causes_are_short() {
    let refused = io::Error::from_raw_os_error(111);
    let nested = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, "bad record"));
    assert_eq!(describe_io(&refused), "connection refused");
    assert_eq!(describe_io(&nested), "bad record");
    assert_eq!(ConnectError::Tls(Box::new(nested)).failure(), Failure::Connect("TLS: bad record".into()));
}
