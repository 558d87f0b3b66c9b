//! What is not dialled.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bus_core::sink::{Failure, Outcome};
use delivery_worker::webhook::{SinkConfig, WebhookSink};

use crate::{attempt, on_loopback, server::Server, sink, webhook};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

fn refused(outcome: Outcome) -> IpAddr {
    match outcome {
        Outcome::Failed { failure: Failure::AddressRefused(address), .. } => address,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn by_default_no_spelling_of_loopback_is_dialled() {
    let server = Server::answering(OK).await;
    let sink = WebhookSink::new(&SinkConfig::default()).unwrap();
    let port = server.address.port();
    for host in [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::7f00:1]",
        "[64:ff9b::7f00:1]",
        "0.0.0.0",
        "[::]",
        // A name: refused by what it resolves to.
        "localhost",
    ] {
        for scheme in ["http", "https"] {
            let report = attempt(&sink, webhook(&format!("{scheme}://{host}:{port}/"))).await;
            let address = refused(report.outcome);
            assert!(host != "localhost" || address.is_loopback(), "{address}");
            assert_eq!(report.status, None);
        }
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn other_networks_than_the_allowed_stay_refused() {
    for address in
        ["10.0.0.1", "169.254.169.254", "192.168.0.1", "[fd00:ec2::254]", "[fe80::1]", "[2002:7f00:1::]"]
    {
        let report = attempt(&sink(), webhook(&format!("http://{address}/"))).await;
        assert_eq!(refused(report.outcome).to_string(), address.trim_matches(['[', ']']));
    }
}

#[tokio::test]
async fn an_allowed_loopback_is_dialled_in_every_spelling() {
    let server = Server::answering(OK).await;
    let sink = sink();
    let port = server.address.port();
    let hosts = ["127.0.0.1", "2130706433", "0x7f.1", "localhost"];
    for host in hosts {
        let report = attempt(&sink, webhook(&format!("http://{host}:{port}/"))).await;
        assert_eq!(report.outcome, Outcome::Delivered, "{host}");
    }
    assert_eq!(server.received().len(), hosts.len());
}

/// With IPv6 switched off in the kernel there is nothing to dial, and the test says so.
#[tokio::test]
async fn ipv6_literals_are_dialled_when_allowed() {
    let answer = |mut peer: crate::server::Peer, _| async move {
        while peer.request().await.is_some() && peer.send(OK).await.is_ok() {}
    };
    let Ok(server) = Server::start_on(Ipv6Addr::LOCALHOST.into(), answer).await else {
        eprintln!("skipped: there is no IPv6 loopback here");
        return;
    };
    let report = attempt(&sink(), webhook(&server.url("/"))).await;
    assert_eq!(report.outcome, Outcome::Delivered);
    assert_eq!(server.only().header("host"), server.address.to_string());

    // Mapped: judged as 127.0.0.1, and dialled.
    let mapped = Server::start_on(Ipv4Addr::LOCALHOST.into(), answer).await.unwrap();
    let url = format!("http://[::ffff:127.0.0.1]:{}/", mapped.address.port());
    let only_v6 = SinkConfig { allow_cidrs: vec!["::/0".parse().unwrap()], ..SinkConfig::default() };
    let report = attempt(&WebhookSink::new(&only_v6).unwrap(), webhook(&url)).await;
    assert_eq!(refused(report.outcome).to_canonical(), Ipv4Addr::LOCALHOST);
    assert_eq!(mapped.connections(), 0);
    let only_v4 = SinkConfig { allow_cidrs: vec!["127.0.0.0/8".parse().unwrap()], ..SinkConfig::default() };
    let report = attempt(&WebhookSink::new(&only_v4).unwrap(), webhook(&url)).await;
    assert_eq!(report.outcome, Outcome::Delivered);
}

/// Linux connects 0.0.0.0 to loopback: the address that was reached is judged, before a byte is sent.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_address_reached_must_be_allowed_too() {
    let server = Server::answering(OK).await;
    let config = SinkConfig { allow_cidrs: vec!["0.0.0.0/32".parse().unwrap()], ..on_loopback() };
    let sink = WebhookSink::new(&config).unwrap();
    let report = attempt(&sink, webhook(&format!("http://0.0.0.0:{}/", server.address.port()))).await;
    assert_eq!(refused(report.outcome), Ipv4Addr::LOCALHOST);
    assert!(server.received().is_empty());
}

#[tokio::test]
async fn a_name_without_an_address_does_not_resolve() {
    // A label has at most 63 characters (RFC 1035 §2.3.4): fails without asking any server.
    let host = format!("{}.invalid", "a".repeat(64));
    let report = attempt(&sink(), webhook(&format!("http://{host}/"))).await;
    let Outcome::Failed { failure: Failure::Resolve(cause), .. } = report.outcome else {
        panic!("{:?}", report.outcome)
    };
    assert!(!cause.contains("aaaa"), "{cause}");
}
