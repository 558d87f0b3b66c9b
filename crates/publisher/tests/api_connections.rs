//! Connections.

use crate::common::{Bus, Check as _, URL, pointers, problem};
use http::Method;
use serde_json::{Value, json};
use sqlx::Row as _;

const SECRET: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX";

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_created_read_changed_and_deleted() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let new = json!({
        "name": "orders", "kind": "webhook", "url": URL,
        "headers": { "X-Api-Key": "hunter2", "x-env": "test" },
    });
    let created = api.post("/v1/connections", new).await.expect(201);
    let path = format!("/v1/connections/{}", created.id());
    assert_eq!(created.headers["location"], path.as_str());
    assert!(created.text("/secret").starts_with("whsec_"));
    let mut shown = created.body.clone();
    shown.as_object_mut().unwrap().remove("secret");
    let expected = json!({
        "id": created.id(), "name": "orders", "kind": "webhook", "enabled": true, "url": URL,
        "headers": { "x-api-key": "***", "x-env": "test" }, "timeoutMs": 15000, "contentMode": "structured",
        "finalStatuses": [], "createdAt": created.text("/createdAt"), "updatedAt": created.text("/updatedAt"),
    });
    assert_eq!(shown, expected);
    assert_eq!(api.get(&path).await.expect(200).body, expected, "never again with the secret");

    // A merge patch: null removes, absent stays.
    let patch = json!({
        "name": "orders 2", "timeoutMs": 1000, "contentMode": "binary", "enabled": false,
        "headers": { "X-Env": null, "x-new": "1" },
    });
    let changed = api.patch(&path, patch).await.expect(200);
    assert_eq!(changed.body["headers"], json!({ "x-api-key": "***", "x-new": "1" }));
    assert_eq!(changed.body["name"], "orders 2");
    assert_eq!(changed.body["timeoutMs"], 1000);
    assert_eq!(changed.body["contentMode"], "binary");
    assert_eq!(changed.body["enabled"], false);
    assert_eq!(changed.body.get("secret"), None);
    let request = api
        .0
        .request(Method::PATCH, &path)
        .header("content-type", "application/merge-patch+json")
        .body(r#"{"timeoutMs":null,"contentMode":null,"enabled":null,"headers":null,"kind":"webhook"}"#);
    let reset = api.raw(Method::PATCH, &path, request).await.expect(200);
    assert_eq!(reset.body["timeoutMs"], 15000);
    assert_eq!(reset.body["contentMode"], "structured");
    assert_eq!(reset.body["enabled"], true);
    assert_eq!(reset.body["headers"], json!({}));

    tenant.subscription(created.id(), "a").await;
    api.delete(&path).await.is(204);
    problem(&api.get(&path).await, 404, "not-found");
    problem(&api.delete(&path).await, 404, "not-found");
    problem(&api.patch(&path, json!({ "name": "x" })).await, 404, "not-found");
    assert!(api.all("/v1/subscriptions", 50).await.is_empty(), "its subscriptions went with it");
    // Its name is free again.
    tenant.webhook("orders 2").await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_unique_and_lists_are_paged() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(tenant.webhook(&format!("hook {n}")).await);
    }
    let new = |name: &str| json!({ "name": name, "kind": "publisher" });
    problem(&tenant.api.post("/v1/connections", new("hook 3")).await, 409, "name-taken");
    other.api.post("/v1/connections", new("hook 3")).await.is(201);
    let rename = tenant.api.patch(&format!("/v1/connections/{}", ids[0]), json!({ "name": "hook 3" })).await;
    problem(&rename, 409, "name-taken");
    for limit in [1, 2, 5, 200] {
        let listed = tenant.api.all("/v1/connections", limit).await;
        assert_eq!(listed.iter().map(|item| item["id"].as_str().unwrap()).collect::<Vec<_>>(), ids);
    }
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_rotated_with_a_day_of_grace() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let new = json!({ "name": "a", "kind": "webhook", "url": URL, "secret": SECRET });
    let created = tenant.api.post("/v1/connections", new).await.expect(201);
    assert_eq!(created.text("/secret"), SECRET);
    let path = format!("/v1/connections/{}", created.id());
    let pool = bus.stack.owner_pool().await.unwrap();
    let stored = async || {
        let row = sqlx::query(
            "SELECT secret, previous_secret, version,
                    extract(epoch FROM previous_secret_until - now())::float8 / 3600 AS hours FROM connections",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        (
            row.get::<String, _>("secret"),
            row.get::<Option<String>, _>("previous_secret"),
            row.get::<Option<f64>, _>("hours"),
            row.get::<i64, _>("version"),
        )
    };
    // The same one again is no rotation.
    let same = tenant.api.patch(&path, json!({ "secret": SECRET })).await.expect(200);
    assert_eq!(same.text("/secret"), SECRET);
    assert_eq!(stored().await, (SECRET.to_owned(), None, None, 1));

    let rotated = tenant.api.patch(&path, json!({ "secret": null })).await.expect(200);
    let fresh = rotated.text("/secret").to_owned();
    assert_ne!(fresh, SECRET);
    let (secret, previous, hours, version) = stored().await;
    assert_eq!((secret, previous.as_deref(), version), (fresh, Some(SECRET), 2));
    let hours = hours.unwrap();
    assert!((23.0..=24.1).contains(&hours), "{hours}");
    for bad in ["secret", "whsec_", "whsec_c2hvcnQ=", "whsec_***"] {
        assert_eq!(pointers(&tenant.api.patch(&path, json!({ "secret": bad })).await), ["/secret"], "{bad}");
    }
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_pointed_at() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let create = async |more: Value| {
        let mut new = json!({ "name": "a", "kind": "webhook", "url": URL });
        new.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        tenant.api.post("/v1/connections", new).await
    };
    for url in [
        "",
        "example.com",
        "ftp://example.com/",
        "https://user:pw@example.com/",
        "https://example.com/#x",
        "https://example.com:0/",
        "http://127.0.0.1/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://localhost/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.1]/",
    ] {
        assert_eq!(pointers(&create(json!({ "url": url })).await), ["/url"], "{url}");
    }
    for (headers, pointer) in [
        (json!({ "webhook-id": "x" }), "/headers/webhook-id"),
        (json!({ "Content-Type": "x" }), "/headers/Content-Type"),
        (json!({ "ce-id": "x" }), "/headers/ce-id"),
        (json!({ "a b": "x" }), "/headers/a b"),
        (json!({ "a/b": "x" }), "/headers/a~1b"),
        (json!({ "x": "line\nbreak" }), "/headers/x"),
        (json!({ "x": "y", "X": "z" }), "/headers/x"),
        (json!({ "x": "y".repeat(9_000) }), "/headers"),
        (json!({ "authorization": "***" }), "/headers/authorization"),
        (json!({ "x": 1 }), "/headers/x"),
    ] {
        assert_eq!(pointers(&create(json!({ "headers": headers })).await), [pointer], "{headers}");
    }
    let many: serde_json::Map<_, _> = (0..33).map(|n| (format!("x-{n}"), "y".into())).collect();
    assert_eq!(pointers(&create(json!({ "headers": many })).await), ["/headers"]);
    for timeout in [999, 30_001, 0] {
        assert_eq!(pointers(&create(json!({ "timeoutMs": timeout })).await), ["/timeoutMs"]);
    }
    assert_eq!(pointers(&create(json!({ "timeoutMs": -1 })).await), ["/timeoutMs"]);
    assert_eq!(pointers(&create(json!({ "contentMode": "xml" })).await), ["/contentMode"]);
    assert_eq!(pointers(&create(json!({ "kind": "ntfy" })).await), ["/kind"]);
    assert_eq!(pointers(&create(json!({ "url": null })).await), ["/url"]);
    // All of them at once.
    let wrong =
        create(json!({ "name": "", "url": "x", "headers": { "host": "x" }, "timeoutMs": 1, "secret": "x" }));
    assert_eq!(pointers(&wrong.await), ["/name", "/url", "/headers/host", "/timeoutMs", "/secret"]);

    let given = json!({
        "name": "p", "kind": "publisher", "url": URL, "headers": {}, "timeoutMs": 1000, "contentMode": "binary",
        "finalStatuses": [], "secret": SECRET,
    });
    let all = ["/url", "/headers", "/timeoutMs", "/contentMode", "/finalStatuses", "/secret"];
    assert_eq!(pointers(&tenant.api.post("/v1/connections", given).await), all);
    let publisher = format!("/v1/connections/{}", tenant.publisher("p").await);
    let shown = tenant.api.get(&publisher).await.expect(200);
    let members: Vec<_> = shown.body.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(members, ["createdAt", "enabled", "id", "kind", "name", "updatedAt"]);
    assert_eq!(
        pointers(
            &tenant
                .api
                .patch(&publisher, json!({ "url": URL, "finalStatuses": [404], "secret": null }))
                .await
        ),
        ["/url", "/finalStatuses", "/secret"]
    );
    assert_eq!(pointers(&tenant.api.patch(&publisher, json!({ "kind": "webhook" })).await), ["/kind"]);

    let webhook = format!("/v1/connections/{}", tenant.webhook("w").await);
    let before = tenant.api.get(&webhook).await.expect(200).body;
    let patch = async |patch: Value| tenant.api.patch(&webhook, patch).await;
    assert_eq!(pointers(&patch(json!({ "name": null })).await), ["/name"]);
    assert_eq!(pointers(&patch(json!({ "url": null })).await), ["/url"]);
    assert_eq!(pointers(&patch(json!({ "url": "http://10.0.0.1" })).await), ["/url"]);
    assert_eq!(pointers(&patch(json!({ "headers": { "X-A": "1", "x-a": "2" } })).await), ["/headers/x-a"]);
    assert_eq!(pointers(&patch(json!({ "id": "x" })).await), ["/id"]);
    assert_eq!(pointers(&patch(json!("x")).await), [""]);
    assert_eq!(tenant.api.get(&webhook).await.expect(200).body, before, "nothing changed");
    bus.stop().await;
}

/// Invariant I2 rests on this: what matching must see is counted in the change's own transaction, and
/// what changes nothing is not counted.
#[tokio::test(flavor = "multi_thread")]
async fn every_change_counts_up_the_versions() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let version = async || -> i64 {
        sqlx::query_scalar("SELECT version FROM organizations").fetch_one(&pool).await.unwrap()
    };
    let connection_version = async || -> i64 {
        sqlx::query_scalar("SELECT version FROM connections").fetch_one(&pool).await.unwrap()
    };
    assert_eq!(version().await, 1);
    let id = tenant.webhook("a").await;
    let path = format!("/v1/connections/{id}");
    assert_eq!((version().await, connection_version().await), (2, 1));
    tenant.api.patch(&path, json!({ "timeoutMs": 2000 })).await.is(200);
    assert_eq!((version().await, connection_version().await), (3, 2));
    let unchanged = tenant.api.patch(&path, json!({ "timeoutMs": 2000 })).await.expect(200);
    tenant.api.patch(&path, json!({ "timeoutMs": 1 })).await.is(422);
    assert_eq!((version().await, connection_version().await), (3, 2));
    assert_eq!(tenant.api.get(&path).await.body, unchanged.body);

    let subscription = format!("/v1/subscriptions/{}", tenant.subscription(&id, "a").await);
    assert_eq!(version().await, 4);
    let again = json!({ "connectionId": id, "eventType": "a" });
    tenant.api.post("/v1/subscriptions", again).await.is(200);
    tenant.api.patch(&subscription, json!({ "enabled": true })).await.is(200);
    assert_eq!(version().await, 4, "nothing changed");
    tenant.api.patch(&subscription, json!({ "enabled": false })).await.is(200);
    assert_eq!(version().await, 5);
    let set = format!("{path}/subscriptions");
    let wanted = json!({ "subscriptions": [{ "eventType": "a", "enabled": false }] });
    tenant.api.put(&set, wanted).await.is(200);
    assert_eq!(version().await, 5, "nothing changed");
    tenant.api.put(&set, json!({ "subscriptions": [{ "eventType": "b" }] })).await.is(200);
    assert_eq!(version().await, 6);
    tenant.api.delete(&subscription).await.is(404);
    assert_eq!(version().await, 6);
    tenant.api.delete(&path).await.is(204);
    assert_eq!((version().await, connection_version().await), (7, 3));
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_set_shown_and_removed() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let new =
        json!({ "name": "slow", "kind": "webhook", "url": URL, "maxInFlight": 8, "ratePerSecond": 2.5 });
    let created = api.post("/v1/connections", new).await.expect(201);
    let path = format!("/v1/connections/{}", created.id());
    let limits = |body: &Value| {
        let of = |name: &str| body.get(name).cloned().unwrap_or(Value::Null);
        json!([of("maxInFlight"), of("ratePerSecond"), of("burst")])
    };
    assert_eq!(limits(&created.body), json!([8, 2.5, 3]));
    for (patch, expected) in [
        (json!({ "burst": 100 }), json!([8, 2.5, 100])),
        (json!({ "maxInFlight": null, "ratePerSecond": 50 }), json!([null, 50.0, 100])),
        (json!({ "burst": null }), json!([null, 50.0, 50])),
        (json!({ "name": "other" }), json!([null, 50.0, 50])),
        (json!({ "burst": 7 }), json!([null, 50.0, 7])),
        (json!({ "ratePerSecond": null }), json!([null, null, null])),
    ] {
        let changed = api.patch(&path, patch.clone()).await.expect(200);
        assert_eq!(limits(&changed.body), expected, "{patch}");
        assert_eq!(limits(&api.get(&path).await.expect(200).body), expected);
    }
    for (patch, pointer) in [
        (json!({ "maxInFlight": 0 }), "/maxInFlight"),
        (json!({ "maxInFlight": 10_001 }), "/maxInFlight"),
        (json!({ "ratePerSecond": 0 }), "/ratePerSecond"),
        (json!({ "ratePerSecond": 100_001 }), "/ratePerSecond"),
        (json!({ "ratePerSecond": 1, "burst": 0 }), "/burst"),
        (json!({ "burst": 5 }), "/burst"),
    ] {
        let refused = api.patch(&path, patch).await;
        assert_eq!(pointers(&refused), [pointer]);
    }
    let publisher = json!({ "name": "p", "kind": "publisher", "maxInFlight": 1 });
    assert_eq!(pointers(&api.post("/v1/connections", publisher).await), ["/maxInFlight"]);
    bus.stop().await;
}
