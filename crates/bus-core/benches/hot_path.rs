//! What an event and a delivery cost where no network is: reading, writing, matching, filtering, signing.
//!
//! `cargo bench -p bus-core`; one of them: `cargo bench -p bus-core -- matching`.

#![allow(clippy::unwrap_used, missing_docs)]

use bus_core::{
    cloudevent::{CloudEvent, Data, Limits, parse_http},
    filter::PayloadFilter,
    matcher::{Candidate, Snapshot, Subject},
    pattern::TypePattern,
    signature::{SigningSecret, sign},
};
use bytes::Bytes;
use divan::{Bencher, black_box, counter::BytesCount};
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use jiff::Timestamp;
use serde_json::{Value, value::RawValue};
use uuid::Uuid;

/// Bytes of an event's payload.
const PAYLOAD: usize = 512;

fn main() {
    divan::main();
}

fn payload() -> String {
    let text =
        format!(r#"{{"customer":"c-1","total":1999,"lines":[{{"sku":"a","n":2}}],"note":"{:.<430}"}}"#, "");
    assert!(text.len().abs_diff(PAYLOAD) < 20);
    text
}

fn event() -> CloudEvent {
    CloudEvent {
        id: Uuid::from_u128(7).to_string(),
        source: "/shop".into(),
        r#type: "order.created".into(),
        subject: None,
        time: Some(Timestamp::UNIX_EPOCH),
        datacontenttype: None,
        dataschema: None,
        extensions: std::collections::BTreeMap::new(),
        data: Some(Data::Json(RawValue::from_string(payload()).unwrap())),
    }
}

/// A request's events, as plain JSON.
#[divan::bench(args = [1, 100])]
fn reading_a_request(bencher: Bencher<'_, '_>, events: usize) {
    let one = format!(r#"{{"type":"order.created","data":{}}}"#, payload());
    let text = if events == 1 { one } else { format!("[{}]", vec![one; events].join(",")) };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let (body, limits) = (Bytes::from(text), Limits::default());
    bencher
        .counter(BytesCount::new(body.len()))
        .bench_local(|| parse_http(black_box(&headers), black_box(&body), &limits).unwrap());
}

/// The bytes that are stored and delivered.
#[divan::bench]
fn writing_an_event(bencher: Bencher<'_, '_>) {
    let event = event();
    bencher.counter(BytesCount::new(PAYLOAD)).bench_local(|| black_box(&event).to_structured());
}

/// Laying it out in headers, for connections in binary mode.
#[divan::bench]
fn reading_a_stored_event_for_binary_mode(bencher: Bencher<'_, '_>) {
    let stored = event().to_structured();
    bencher.bench_local(|| CloudEvent::from_structured(black_box(&stored)).unwrap().to_binary());
}

/// The signature of one attempt.
#[divan::bench(args = [PAYLOAD, 64 * 1024])]
fn signing(bencher: Bencher<'_, '_>, bytes: usize) {
    let secret = SigningSecret::generate(&mut rand::rng());
    let body = vec![b'x'; bytes];
    bencher.counter(BytesCount::new(bytes)).bench_local(|| {
        sign([&secret], "0198f0c4-0000-7000-8000-000000000000", 1_800_000_000, black_box(&body))
    });
}

/// One payload filter on a payload that is read already.
#[divan::bench(args = ["$.total", "$[?@.total > 1000]", "$[?@.customer == 'c-1' && @.lines[?@.n > 1]]", "$..sku"])]
fn filtering(bencher: Bencher<'_, '_>, path: &str) {
    let (filter, payload) = (PayloadFilter::parse(path).unwrap(), payload());
    let payload: Value = serde_json::from_str(&format!("[{payload}]")).unwrap();
    bencher.bench_local(|| filter.matches(black_box(&payload)));
}

/// An organization of so many subscriptions, of which one in a hundred is of the event's type, every second of these with a
/// filter; of those that have one, none matches.
#[divan::bench(args = [100, 10_000, 100_000])]
fn matching(bencher: Bencher<'_, '_>, subscriptions: u128) {
    let candidates = (0..subscriptions).map(|n| Candidate {
        subscription: Uuid::from_u128(n).into(),
        connection: Uuid::from_u128(n).into(),
        connection_version: 1,
        enabled: true,
        event_type: TypePattern::parse(&if n % 100 == 0 {
            "order.created".to_owned()
        } else {
            format!("other.{n}")
        })
        .unwrap(),
        publisher: None,
        filter: (n % 200 == 0)
            .then(|| PayloadFilter::parse(&format!("$[?@.customer == 'c-{}']", n + 2)).unwrap()),
    });
    let (snapshot, payload) = (Snapshot::new(1, None, candidates.collect()), payload());
    let payload = RawValue::from_string(payload).unwrap();
    let subject = Subject { event_type: "order.created", publisher: None, payload: Some(&payload) };
    bencher.bench_local(|| black_box(&snapshot).matching(black_box(subject)).len());
}
