//! Received requests, read by independent implementations of Standard Webhooks and CloudEvents.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use devkit::{
    independent::verdicts,
    receiver::{Received, Receiver},
    stack::{Stack, StackOptions},
};
use serde_json::{Value, json};
use system_tests::Tenant;

fn request(mode: &str, secret: &str, received: &Received) -> Value {
    let headers: BTreeMap<&str, &str> =
        received.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    let body = BASE64_STANDARD.encode(&received.body);
    json!({ "mode": mode, "secret": secret, "headers": headers, "body_base64": body })
}

#[tokio::test]
async fn a_subscriber_verifies_and_parses_with_libraries_of_its_own() {
    let mut stack = Stack::start(StackOptions::default()).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let mut secrets = BTreeMap::new();
    for mode in ["structured", "binary"] {
        let url = receiver.url(&format!("/{mode}"));
        let wanted = json!({ "name": mode, "kind": "webhook", "url": url, "contentMode": mode });
        let created = tenant.api.post("/v1/connections", &wanted).await.unwrap().expect(201);
        tenant.subscribe(created.id(), "read.>").await.unwrap();
        secrets.insert(mode, created.text("/secret").to_owned());
    }
    // Published in each mode of the API, since none may change what arrives.
    let plain = json!({ "type": "read.plain", "source": "/shop", "data": { "total": 12.5, "note": "żółć" } });
    tenant.api.publish(&plain).await.unwrap().expect(202);
    let structured = json!({ "specversion": "1.0", "id": "s-1", "source": "/shop", "type": "read.structured",
                             "subject": "größe", "data": [1, { "ü": null }] });
    tenant.api.publish_structured(&structured).await.unwrap().expect(202);
    let batch = ["read.batch.a", "read.batch.b"].map(
        |name| json!({ "specversion": "1.0", "id": name, "source": "/shop", "type": name, "data": "text" }),
    );
    tenant.api.publish_batch(&batch).await.unwrap().expect(202);

    for (mode, secret) in &secrets {
        let received = receiver.wait_for(&format!("/{mode}"), 4).await;
        let requests: Vec<Value> = received.iter().map(|received| request(mode, secret, received)).collect();
        let mut payloads = BTreeMap::new();
        for verdict in verdicts(&requests).unwrap() {
            assert_eq!(
                (&verdict["signature"], &verdict["error"]),
                (&json!("valid"), &Value::Null),
                "{verdict}"
            );
            let event = &verdict["events"][0];
            assert_eq!(event["source"], "/shop");
            payloads.insert(event["type"].as_str().unwrap().to_owned(), event["data"].clone());
        }
        let expected = [
            ("read.plain", plain["data"].clone()),
            ("read.structured", structured["data"].clone()),
            ("read.batch.a", json!("text")),
            ("read.batch.b", json!("text")),
        ];
        assert_eq!(payloads, expected.map(|(name, data)| (name.to_owned(), data)).into());
    }
    stack.shutdown().await.unwrap();
}
