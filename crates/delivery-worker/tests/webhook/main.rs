//! The webhook sink against real sockets on loopback. The servers write their answers byte by byte, so
//! that they can misbehave in ways that a web framework would not let them.
#![allow(clippy::unwrap_used)]

mod answers;
mod batches;
mod guard;
mod requests;
mod server;
mod tls;

use std::{collections::BTreeMap, time::Duration};

use bus_core::{
    connection::{Connection, ContentMode, Limits, Target, Webhook},
    delivery::{Delivery, DeliveryKey},
    signature::SigningSecret,
    sink::{AttemptReport, Sink},
};
use bytes::Bytes;
use delivery_worker::webhook::{SinkConfig, WebhookSink};
use jiff::Timestamp;
use url::Url;
use uuid::Uuid;

/// Long enough that no test meets it by accident.
const PATIENT: Duration = Duration::from_secs(30);

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const EVENT: &[u8] = br#"{"specversion":"1.0","id":"e-1","source":"/shop","type":"order.placed","subject":"order 7","datacontenttype":"application/json","region":"eu","data":{"total": 1.50, "big":12345678901234567890}}"#;

fn at() -> Timestamp {
    "2026-01-02T03:04:05.678Z".parse().unwrap()
}

fn webhook(url: &str) -> Webhook {
    Webhook {
        url: Url::parse(url).unwrap(),
        headers: BTreeMap::new(),
        timeout: PATIENT,
        content_mode: ContentMode::Structured,
        final_statuses: Vec::new(),
        limits: Limits::default(),
        secret: SigningSecret::parse(SECRET).unwrap(),
        previous_secret: None,
    }
}

fn connection(target: Target) -> Connection {
    Connection {
        id: Uuid::from_u128(1).into(),
        organization: Uuid::from_u128(2).into(),
        name: "shop".into(),
        version: 1,
        enabled: true,
        disabled_reason: None,
        failing_since: None,
        target,
        created_at: at(),
        updated_at: at(),
    }
}

fn delivery(body: &[u8]) -> Delivery {
    let key = DeliveryKey {
        id: Uuid::from_u128(3).into(),
        event: Uuid::from_u128(4).into(),
        organization: Uuid::from_u128(2).into(),
        subscription: Uuid::from_u128(5).into(),
        connection: Uuid::from_u128(1).into(),
        connection_version: 1,
    };
    Delivery { key, body: Bytes::copy_from_slice(body) }
}

/// The development stack's configuration: loopback is allowed.
fn on_loopback() -> SinkConfig {
    let allow_cidrs = vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
    SinkConfig { allow_cidrs, ..SinkConfig::default() }
}

fn sink() -> WebhookSink {
    WebhookSink::new(&on_loopback()).unwrap()
}

/// One attempt to deliver [`EVENT`] now.
async fn attempt(sink: &WebhookSink, webhook: Webhook) -> AttemptReport {
    sink.attempt_one(&connection(Target::Webhook(Box::new(webhook))), &delivery(EVENT), at()).await
}

#[test]
fn configuration_has_defaults_and_no_unknown_keys() {
    let config: SinkConfig = serde_json::from_str("{}").unwrap();
    assert_eq!((config.max_answer_bytes, config.idle_per_host), (262_144, 64));
    assert!(config.allow_cidrs.is_empty() && config.problem().is_none());
    let config: SinkConfig = serde_json::from_str(r#"{"allow_cidrs":["10.0.0.0/8","fd00::/8"]}"#).unwrap();
    assert_eq!(config.allow_cidrs.len(), 2);
    assert!(serde_json::from_str::<SinkConfig>(r#"{"allow_cidr":[]}"#).is_err());
}

#[test]
fn configuration_out_of_range_is_refused() {
    for (broken, key) in [
        (SinkConfig { max_answer_bytes: 0, ..SinkConfig::default() }, "max_answer_bytes"),
        (SinkConfig { max_answer_bytes: 1_048_577, ..SinkConfig::default() }, "max_answer_bytes"),
        (SinkConfig { idle_per_host: 1025, ..SinkConfig::default() }, "idle_per_host"),
        (SinkConfig { idle_timeout_ms: 0, ..SinkConfig::default() }, "idle_timeout_ms"),
        (SinkConfig { user_agent: "a\nb".into(), ..SinkConfig::default() }, "user_agent"),
    ] {
        let error = WebhookSink::new(&broken).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
}
