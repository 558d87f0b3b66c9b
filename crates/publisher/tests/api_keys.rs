//! Organizations, keys, and what each scope allows.

use crate::common::{Bus, Caller, Check as _, URL, pointers, problem};
use devkit::client::Reply;
use http::{Method, header::AUTHORIZATION};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn organizations_are_created_listed_and_read() {
    let mut bus = Bus::start().await;
    let path = "/v1/admin/organizations";
    let mut ids = Vec::new();
    for name in ["one", "two", "drei ✓"] {
        let created = bus.admin.post(path, json!({ "name": name })).await.expect(201);
        assert_eq!(created.text("/name"), name);
        assert_eq!(created.headers["location"], format!("{path}/{}", created.id()));
        assert_eq!(bus.admin.get(&format!("{path}/{}", created.id())).await.expect(200).body, created.body);
        ids.push(created.id().to_owned());
    }
    problem(&bus.admin.post(path, json!({ "name": "two" })).await, 409, "name-taken");
    for name in ["", " x", "x\n", &"x".repeat(201)] {
        assert_eq!(pointers(&bus.admin.post(path, json!({ "name": name })).await), ["/name"], "{name:?}");
    }
    let listed = bus.admin.all(path, 2).await;
    assert_eq!(listed.iter().map(|item| item["id"].as_str().unwrap()).collect::<Vec<_>>(), ids);
    problem(&bus.admin.get(&format!("{path}/not-an-id")).await, 404, "not-found");
    problem(&bus.anonymous().get(path).await, 401, "unauthorized");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_shown_once_and_ends_when_revoked() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let new = json!({ "name": "ci", "scopes": ["read", "publish"], "expiresAt": "2999-01-01T00:00:00Z" });
    let created = bus.admin.post(&tenant.keys(), new).await.expect(201);
    let key = created.text("/key").to_owned();
    assert!(key.starts_with("ebk_") && key.len() == 47, "{key}");
    assert_eq!(created.body["scopes"], json!(["publish", "read"]));
    assert_eq!(created.body["connectionId"], Value::Null);
    assert_eq!(created.text("/expiresAt"), "2999-01-01T00:00:00Z");

    let listed = bus.admin.all(&tenant.keys(), 1).await;
    assert_eq!(listed.len(), 2);
    assert!(!json!(listed).to_string().contains("ebk_"), "a list shows no key");

    let client = Caller(bus.admin.0.with_token(&key));
    client.get("/v1/events").await.is(200);
    client.post("/v1/events", json!({ "type": "a", "data": 1 })).await.is(202);
    let revoke = format!("{}/{}", tenant.keys(), created.id());
    bus.admin.delete(&revoke).await.is(204);
    bus.admin.delete(&revoke).await.is(204);
    // At once, also for publishing, whose look-up is cached.
    problem(&client.get("/v1/events").await, 401, "unauthorized");
    problem(&client.post("/v1/events", json!({ "type": "a", "data": 1 })).await, 401, "unauthorized");
    problem(&client.post("/v1/events", json!({ "type": "a", "data": 1 })).await, 401, "unauthorized");
    let listed = bus.admin.all(&tenant.keys(), 50).await;
    assert!(listed.iter().any(|item| item["id"] == created.id() && item["revokedAt"].is_string()));
    problem(&bus.admin.delete(&format!("{}/{}", tenant.keys(), tenant.id)).await, 404, "not-found");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_checked_when_they_are_created() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let foreign = other.webhook("theirs").await;
    let create = async |key: Value| bus.admin.post(&tenant.keys(), key).await;
    assert_eq!(pointers(&create(json!({ "name": "", "scopes": [] })).await), ["/name", "/scopes"]);
    assert_eq!(pointers(&create(json!({ "name": "a", "scopes": ["write"] })).await), ["/scopes/0"]);
    let past = json!({ "name": "a", "scopes": ["read"], "expiresAt": "2020-01-01T00:00:00Z" });
    assert_eq!(pointers(&create(past).await), ["/expiresAt"]);
    let bound = |id: &str| json!({ "name": "a", "scopes": ["read"], "connectionId": id });
    let unknown = create(bound("01890000-0000-7000-8000-000000000000")).await;
    assert_eq!(pointers(&unknown), ["/connectionId"]);
    let theirs = create(bound(&foreign)).await;
    assert_eq!(theirs.body["errors"], unknown.body["errors"], "I3: like an id that nobody has");
    let nowhere = "/v1/admin/organizations/01890000-0000-7000-8000-000000000000/keys";
    problem(&bus.admin.post(nowhere, json!({ "name": "a", "scopes": ["read"] })).await, 404, "not-found");
    problem(&bus.admin.get(nowhere).await, 404, "not-found");
    bus.stop().await;
}

/// Every operation with a request that would succeed, or fail later than at the credential.
fn attempts(
    connection: &str,
    subscription: &str,
) -> Vec<(Method, String, Option<Value>, &'static [&'static str])> {
    const MANAGE: &[&str] = &["subscribe", "admin"];
    const LOOK: &[&str] = &["subscribe", "read", "admin"];
    const HISTORY: &[&str] = &["read", "admin"];
    let (get, post, put, patch) = (Method::GET, Method::POST, Method::PUT, Method::PATCH);
    let nothing = json!({});
    let event = json!({ "type": "a", "data": 1 });
    vec![
        (post.clone(), "/v1/events".into(), Some(event.clone()), &["publish", "admin"]),
        (get.clone(), "/v1/events".into(), None, HISTORY),
        (get.clone(), "/v1/events/none".into(), None, HISTORY),
        (get.clone(), "/v1/events/none/deliveries".into(), None, HISTORY),
        (post.clone(), "/v1/connections".into(), Some(nothing.clone()), MANAGE),
        (get.clone(), "/v1/connections".into(), None, LOOK),
        (get.clone(), format!("/v1/connections/{connection}"), None, LOOK),
        (patch.clone(), format!("/v1/connections/{connection}"), Some(nothing.clone()), MANAGE),
        (Method::DELETE, "/v1/connections/none".into(), None, MANAGE),
        (put, format!("/v1/connections/{connection}/subscriptions"), Some(nothing.clone()), MANAGE),
        (post.clone(), "/v1/subscriptions".into(), Some(nothing.clone()), MANAGE),
        (get.clone(), "/v1/subscriptions".into(), None, LOOK),
        (get, format!("/v1/subscriptions/{subscription}"), None, LOOK),
        (patch, format!("/v1/subscriptions/{subscription}"), Some(nothing), MANAGE),
        (Method::DELETE, "/v1/subscriptions/none".into(), None, MANAGE),
        (post, "/v1/subscriptions/explain".into(), Some(json!({ "event": event })), LOOK),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn each_scope_opens_its_operations_and_no_others() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let subscription = tenant.subscription(&connection, "a").await;
    for scope in ["publish", "subscribe", "read", "admin"] {
        let client = tenant.key(json!({ "scopes": [scope] })).await;
        for (method, path, body, scopes) in attempts(&connection, &subscription) {
            let reply = client.send(method.clone(), &path, body).await;
            let allowed = !matches!(reply.status, 401 | 403);
            assert_eq!(allowed, scopes.contains(&scope), "{scope}: {method} {path}: {:#}", reply.body);
            if !allowed {
                problem(&reply, 403, "forbidden");
            }
        }
    }
    for (method, path, body, _) in attempts(&connection, &subscription) {
        // The admin token belongs to no organization.
        problem(&bus.admin.send(method, &path, body).await, 403, "forbidden");
    }
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_key_administers_the_keys_of_its_own_organization_only() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let admin = tenant.key(json!({ "scopes": ["admin"] })).await;
    let new = json!({ "name": "b", "scopes": ["read"] });
    let created = admin.post(&tenant.keys(), new.clone()).await.expect(201);
    assert_eq!(admin.all(&tenant.keys(), 50).await.len(), 3);
    admin.delete(&format!("{}/{}", tenant.keys(), created.id())).await.is(204);
    admin.get(&format!("/v1/admin/organizations/{}", tenant.id)).await.is(200);

    problem(&admin.post("/v1/admin/organizations", json!({ "name": "x" })).await, 403, "forbidden");
    problem(&admin.get("/v1/admin/organizations").await, 403, "forbidden");
    let theirs = bus.admin.all(&other.keys(), 50).await;
    problem(&admin.post(&other.keys(), new).await, 404, "not-found");
    problem(&admin.get(&other.keys()).await, 404, "not-found");
    let key = format!("{}/{}", other.keys(), theirs[0]["id"].as_str().unwrap());
    problem(&admin.delete(&key).await, 404, "not-found");
    // Not through its own organization's path either.
    let key = format!("{}/{}", tenant.keys(), theirs[0]["id"].as_str().unwrap());
    problem(&admin.delete(&key).await, 404, "not-found");
    assert_eq!(bus.admin.all(&other.keys(), 50).await, theirs);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_bearer_tokens() {
    let mut bus = Bus::start().await;
    let anonymous = bus.anonymous();
    let ask = async |value: &str| -> Reply {
        let request = anonymous.0.request(Method::GET, "/v1/connections").header(AUTHORIZATION, value);
        anonymous.raw(Method::GET, "/v1/connections", request).await
    };
    let unknown = format!("Bearer ebk_{}", "A".repeat(43));
    let long = format!("Bearer {}", "A".repeat(4096));
    for value in ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer wrong", &unknown, &long] {
        problem(&ask(value).await, 401, "unauthorized");
    }
    problem(&anonymous.get("/v1/connections").await, 401, "unauthorized");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bound_key_sees_its_own_connection_only() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (own, other) = (tenant.webhook("own").await, tenant.webhook("other").await);
    let (mine, theirs) = (tenant.subscription(&own, "a").await, tenant.subscription(&other, "a").await);
    let scopes = json!(["publish", "subscribe", "read"]);
    let bound = tenant.key(json!({ "scopes": scopes, "connectionId": own })).await;

    let ids = |items: Vec<Value>| {
        items.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(bound.all("/v1/connections", 50).await), [own.as_str()]);
    assert_eq!(ids(bound.all("/v1/subscriptions", 50).await), [mine.as_str()]);
    assert!(bound.all(&format!("/v1/subscriptions?connectionId={other}"), 50).await.is_empty());
    let explained =
        bound.post("/v1/subscriptions/explain", json!({ "event": { "type": "a" } })).await.expect(200);
    assert_eq!(explained.body["items"].as_array().unwrap().len(), 1);

    let connection = format!("/v1/connections/{other}");
    problem(&bound.get(&connection).await, 404, "not-found");
    problem(&bound.patch(&connection, json!({ "name": "x" })).await, 404, "not-found");
    problem(&bound.delete(&connection).await, 404, "not-found");
    problem(
        &bound.put(&format!("{connection}/subscriptions"), json!({ "subscriptions": [] })).await,
        404,
        "not-found",
    );
    let subscription = format!("/v1/subscriptions/{theirs}");
    problem(&bound.get(&subscription).await, 404, "not-found");
    problem(&bound.patch(&subscription, json!({ "enabled": false })).await, 404, "not-found");
    problem(&bound.delete(&subscription).await, 404, "not-found");
    let foreign = bound.post("/v1/subscriptions", json!({ "connectionId": other, "eventType": "b" })).await;
    assert_eq!(pointers(&foreign), ["/connectionId"]);
    let new = json!({ "name": "third", "kind": "webhook", "url": URL });
    problem(&bound.post("/v1/connections", new).await, 403, "forbidden");

    // Its own it may change, and its events carry its identity.
    bound.patch(&format!("/v1/connections/{own}"), json!({ "timeoutMs": 2000 })).await.is(200);
    bound.patch(&format!("/v1/subscriptions/{mine}"), json!({ "publisher": own })).await.is(200);
    let event = json!({ "type": "a", "data": 1 });
    let accepted = bound.post("/v1/events", event.clone()).await.expect(202);
    assert_eq!(accepted.text("/source"), format!("/connections/{own}"));
    let stored = bound.get(&format!("/v1/events/{}", accepted.id())).await.expect(200);
    assert_eq!(stored.text("/publisher"), own);
    assert_eq!(stored.body["subscriptions"].as_array().unwrap().len(), 2);
    let unbound = tenant.api.post("/v1/events", event).await.expect(202);
    assert_eq!(unbound.text("/source"), format!("/organizations/{}", tenant.id));
    let stored = tenant.api.get(&format!("/v1/events/{}", unbound.id())).await.expect(200);
    assert_eq!(stored.body["subscriptions"], json!([theirs]), "the other one wants its publisher");

    // Its connection's end is its own.
    tenant.api.delete(&format!("/v1/connections/{own}")).await.is(204);
    problem(&bound.get("/v1/connections").await, 401, "unauthorized");
    problem(&bound.post("/v1/events", json!({ "type": "a", "data": 1 })).await, 401, "unauthorized");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_reaches_the_log() {
    let bus = Bus::start_with(|options| options.env("EVENT_BUS_TELEMETRY__FILTER", "debug")).await;
    let tenant = bus.tenant("acme").await;
    let key = bus.admin.post(&tenant.keys(), json!({ "name": "a", "scopes": ["read"] })).await.expect(201);
    let new = json!({
        "name": "hook", "kind": "webhook", "url": format!("{URL}?token=url-secret"),
        "headers": { "authorization": "Bearer header-secret" },
    });
    let created = tenant.api.post("/v1/connections", new).await.expect(201);
    let path = format!("/v1/connections/{}", created.id());
    let rotated = tenant.api.patch(&path, json!({ "secret": null })).await.expect(200);
    tenant.api.post("/v1/events", json!({ "type": "t", "data": "payload-secret" })).await.is(202);
    tenant.api.get("/v1/events?source=query-secret").await.is(200);
    let wrong =
        json!({ "name": "hook", "kind": "webhook", "url": "nope url-secret", "secret": "wrong-secret" });
    tenant.api.post("/v1/connections", wrong).await.is(422);
    let log = bus.stack.all_logs();
    assert!(log.contains("Request answered"), "{log}");
    let secrets = [
        key.text("/key"),
        created.text("/secret"),
        rotated.text("/secret"),
        bus.stack.admin_token(),
        "url-secret",
        "header-secret",
        "payload-secret",
        "query-secret",
        "wrong-secret",
    ];
    for secret in secrets {
        assert!(!log.contains(secret), "{secret} is in the log:\n{log}");
    }
    bus.stop().await;
}
