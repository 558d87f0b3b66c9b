//! What the bus renders, read by independent implementations: see [`devkit::independent`].

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bus_core::{
    clock::{Clock, SystemClock},
    cloudevent::{BATCH_CONTENT_TYPE, CloudEvent, Data, ExtensionValue, STRUCTURED_CONTENT_TYPE, to_batch},
    signature::{SigningSecret, sign},
};
use bytes::Bytes;
use devkit::independent::verdicts;
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use rand::SeedableRng;
use serde_json::{Value, json, value::RawValue};

fn request(mode: &str, secret: Option<&SigningSecret>, headers: &HeaderMap, body: &Bytes) -> Value {
    let headers: BTreeMap<&str, &str> =
        headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    json!({
        "mode": mode,
        "secret": secret.map(SigningSecret::expose),
        "headers": headers,
        "body_base64": BASE64_STANDARD.encode(body),
    })
}

fn signed(mut headers: HeaderMap, secrets: &[SigningSecret], at: i64, body: &[u8]) -> HeaderMap {
    headers.insert("webhook-id", HeaderValue::from_static("dlv_1"));
    headers.insert("webhook-timestamp", HeaderValue::from(at));
    headers.insert("webhook-signature", sign(secrets, "dlv_1", at, body));
    headers
}

fn content_type(value: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(value))])
}

fn event(data: Option<Data>, datacontenttype: Option<&str>) -> CloudEvent {
    CloudEvent {
        id: "8f3a-é 100%\"".to_owned(),
        source: "/orders/~?q=ü".to_owned(),
        r#type: "order.created".to_owned(),
        subject: Some("größe 😀, \"quoted\"".to_owned()),
        time: Some("2026-01-31T09:30:00.25Z".parse().unwrap()),
        datacontenttype: datacontenttype.map(str::to_owned),
        dataschema: Some("https://schemas.example/order".to_owned()),
        extensions: BTreeMap::from([
            ("count".to_owned(), ExtensionValue::Integer(-7)),
            ("flag".to_owned(), ExtensionValue::Bool(true)),
            (
                "traceparent".to_owned(),
                ExtensionValue::String("00-0af7651916cd43dd-b7ad6b7169203331-01".to_owned()),
            ),
        ]),
        data,
    }
}

fn raw(text: &str) -> Option<Data> {
    Some(Data::Json(RawValue::from_string(text.to_owned()).unwrap()))
}

/// Events, and what a reader must find as their payload.
fn events() -> Vec<(CloudEvent, Option<(&'static str, Value)>)> {
    vec![
        (
            event(raw(r#"{"total": 12.50, "items": [1, {"ü": null}]}"#), None),
            Some(("data", json!({"total": 12.5, "items": [1, {"ü": null}]}))),
        ),
        (event(raw("0"), Some("application/json")), Some(("data", json!(0)))),
        (event(raw("false"), Some("application/vnd.order+json")), Some(("data", json!(false)))),
        (event(raw("\"text\""), None), Some(("data", json!("text")))),
        (event(raw("[]"), None), Some(("data", json!([])))),
        (event(None, None), None),
        (
            event(Some(Data::Bytes(Bytes::from_static(b"\0\xFF\x10"))), Some("application/octet-stream")),
            Some(("data_base64", json!("AP8Q"))),
        ),
    ]
}

/// The attributes that a reader must find, with extensions as text in binary mode.
fn attributes(event: &CloudEvent, binary: bool) -> Value {
    let content_type = event
        .datacontenttype
        .clone()
        .or_else(|| (binary && event.json_payload().is_some()).then(|| "application/json".to_owned()));
    let mut expected = json!({
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.r#type,
        "subject": event.subject,
        "time": "2026-01-31T09:30:00.250000+00:00",
        "dataschema": event.dataschema,
        "count": -7,
        "flag": true,
        "traceparent": event.extensions["traceparent"].to_string(),
    });
    if binary {
        expected["count"] = json!("-7");
        expected["flag"] = json!("true");
    }
    if let Some(content_type) = content_type {
        expected["datacontenttype"] = json!(content_type);
    }
    expected
}

#[test]
fn independent_implementations_verify_and_parse_what_we_render() {
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    let (old, new) = (SigningSecret::generate(&mut rng), SigningSecret::generate(&mut rng));
    let now = SystemClock.now().as_second();
    let (mut requests, mut expected) = (Vec::new(), Vec::new());
    let mut all = Vec::new();
    for (event, payload) in events() {
        for binary in [false, true] {
            let (headers, body) = if binary {
                event.to_binary()
            } else {
                (content_type(STRUCTURED_CONTENT_TYPE), event.to_structured())
            };
            // The library verifies text only.
            let text = std::str::from_utf8(&body).is_ok();
            let headers = signed(headers, &[old.clone(), new.clone()], now, &body);
            let mut found = attributes(&event, binary);
            if let Some((member, value)) = &payload {
                found[*member] = value.clone();
            }
            if !binary {
                all.push((body.clone(), found.clone()));
            }
            requests.push(request(
                if binary { "binary" } else { "structured" },
                text.then_some(&new),
                &headers,
                &body,
            ));
            let signature = if text { "valid" } else { "unchecked" };
            expected.push(json!({"signature": signature, "events": [found], "error": null}));
        }
    }
    let body = to_batch(all.iter().map(|(body, _)| &body[..]));
    let headers = signed(content_type(BATCH_CONTENT_TYPE), std::slice::from_ref(&new), now, &body);
    requests.push(request("batch", Some(&new), &headers, &body));
    let found: Vec<_> = all.into_iter().map(|(_, found)| found).collect();
    expected.push(json!({"signature": "valid", "events": found, "error": null}));

    for ((request, expected), verdict) in requests.iter().zip(&expected).zip(verdicts(&requests).unwrap()) {
        assert_eq!(&verdict, expected, "{request}");
    }
}

#[test]
fn independent_implementations_refuse_what_was_tampered_with() {
    let mut rng = rand::rngs::StdRng::seed_from_u64(2);
    let (ours, other) = (SigningSecret::generate(&mut rng), SigningSecret::generate(&mut rng));
    let now = SystemClock.now().as_second();
    let body = event(raw("1"), None).to_structured();
    let headers = |secret: &SigningSecret, at| {
        signed(content_type(STRUCTURED_CONTENT_TYPE), std::slice::from_ref(secret), at, &body)
    };
    let changed = Bytes::from(format!("{} ", String::from_utf8_lossy(&body)));
    let requests = [
        request("structured", Some(&ours), &headers(&ours, now), &body),
        request("structured", Some(&ours), &headers(&other, now), &body),
        request("structured", Some(&ours), &headers(&ours, now), &changed),
        request("structured", Some(&ours), &headers(&ours, now - 600), &body),
        request("binary", None, &headers(&ours, now), &body),
    ];
    let verdicts = verdicts(&requests).unwrap();
    assert_eq!(verdicts[0]["signature"], "valid");
    for verdict in &verdicts[1..4] {
        assert!(verdict["signature"].as_str().unwrap().starts_with("WebhookVerificationError"), "{verdict}");
    }
    assert!(verdicts[4]["error"].is_string(), "{}", verdicts[4]);
}
