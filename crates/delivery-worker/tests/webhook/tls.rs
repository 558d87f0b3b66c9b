//! Whom the sink trusts.

use std::{error::Error, io::Write, sync::Arc};

use bus_core::sink::{Failure, Outcome};
use delivery_worker::webhook::{SinkConfig, SinkError, WebhookSink};
use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tempfile::NamedTempFile;
use tokio_rustls::TlsAcceptor;

use crate::{attempt, on_loopback, server::Server, sink, webhook};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

fn certificate(names: impl IntoIterator<Item = String>) -> CertifiedKey<KeyPair> {
    generate_simple_self_signed(names.into_iter().collect::<Vec<_>>()).unwrap()
}

async fn serve(certified: &CertifiedKey<KeyPair>) -> Server {
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    Server::start(move |peer, _| {
        let acceptor = acceptor.clone();
        async move {
            let Some(mut peer) = peer.secured(&acceptor).await else { return };
            while peer.request().await.is_some() && peer.send(OK).await.is_ok() {}
        }
    })
    .await
}

fn file(content: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

fn trusting(file: &NamedTempFile) -> Result<WebhookSink, SinkError> {
    WebhookSink::new(&SinkConfig { ca_file: Some(file.path().to_owned()), ..on_loopback() })
}

fn tls_cause(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed { failure: Failure::Connect(cause), .. } => cause,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_unknown_authority_is_refused_unless_it_is_configured() {
    let certified = certificate(["127.0.0.1".to_owned()]);
    let server = serve(&certified).await;
    let url = format!("https://{}/hook", server.address);

    let report = attempt(&sink(), webhook(&url)).await;
    assert_eq!(tls_cause(report.outcome), "TLS: invalid peer certificate: UnknownIssuer");
    assert!(server.received().is_empty());

    let file = file(&certified.cert.pem());
    let sink = trusting(&file).unwrap();
    for _ in 0..3 {
        assert_eq!(attempt(&sink, webhook(&url)).await.outcome, Outcome::Delivered);
    }
    assert_eq!(server.received().len(), 3);
    // The refused one and the pooled one.
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let certified = certificate((0..100).map(|n| format!("shop-{n}.example")));
    let server = serve(&certified).await;
    let file = file(&certified.cert.pem());
    let report = attempt(&trusting(&file).unwrap(), webhook(&format!("https://{}/", server.address))).await;
    let cause = tls_cause(report.outcome);
    assert!(cause.contains("certificate not valid for name"), "{cause}");
    // The certificate's hundred names would all be in it.
    assert!(cause.chars().count() <= 201, "{cause}");
    assert!(server.received().is_empty());
}

#[tokio::test]
async fn https_to_a_server_without_tls_is_a_connect_failure() {
    let server = Server::start(|mut peer, _| async move {
        peer.stream.readable().await.unwrap();
        peer.send("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        peer.hung_up().await;
    })
    .await;
    let report = attempt(&sink(), webhook(&format!("https://{}/", server.address))).await;
    assert!(tls_cause(report.outcome).starts_with("TLS: "));
}

#[test]
fn a_file_without_usable_certificates_is_refused() {
    for content in ["", "no PEM at all\n"] {
        let error = trusting(&file(content)).unwrap_err();
        assert!(matches!(error, SinkError::NoCertificate { .. }), "{error:?}");
    }
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let error = trusting(&file(broken)).unwrap_err();
    assert!(matches!(error, SinkError::Certificate { .. }), "{error:?}");
    let error = trusting(&file("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")).unwrap_err();
    assert!(matches!(error, SinkError::CaFile { .. }), "{error:?}");

    let missing = SinkConfig { ca_file: Some("/nonexistent/ca.pem".into()), ..on_loopback() };
    let error = WebhookSink::new(&missing).unwrap_err();
    assert_eq!(error.to_string(), "read the certificates in /nonexistent/ca.pem");
    assert!(error.source().is_some());
}
