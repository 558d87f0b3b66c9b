//! What connections and subscriptions say about how deliveries are made.

use crate::common::{Bus, Check as _, Tenant, URL, pointers};
use bus_core::{
    ids::{ConnectionId, OrganizationId},
    notify::{Hint, Notifier as _, PostgresNotifier},
    pg,
};
use devkit::client::Reply;
use futures::StreamExt as _;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_says_which_statuses_are_final() {
    let bus = Bus::start().await;
    let api = bus.tenant("acme").await.api;
    let create = async |statuses: Value| {
        let new = json!({ "name": "hook", "kind": "webhook", "url": URL, "finalStatuses": statuses });
        api.post("/v1/connections", new).await
    };
    let many: Vec<_> = (400..451).collect();
    for (statuses, pointer) in [
        (json!([404, 299]), "/finalStatuses/1"),
        (json!([200]), "/finalStatuses/0"),
        (json!([600]), "/finalStatuses/0"),
        (json!([-1]), "/finalStatuses/0"),
        (json!([70_000]), "/finalStatuses/0"),
        (json!(["404"]), "/finalStatuses/0"),
        (json!([404, 500, 404]), "/finalStatuses/2"),
        (json!(many), "/finalStatuses"),
        (json!(404), "/finalStatuses"),
    ] {
        assert_eq!(pointers(&create(statuses.clone()).await), [pointer], "{statuses}");
    }
    let created = create(json!([599, 300, 422])).await.expect(201);
    assert_eq!(created.body["finalStatuses"], json!([300, 422, 599]));
    let path = format!("/v1/connections/{}", created.id());
    let shown = async || api.get(&path).await.expect(200).body["finalStatuses"].clone();
    assert_eq!(shown().await, json!([300, 422, 599]));
    api.patch(&path, json!({ "timeoutMs": 2_000 })).await.is(200);
    assert_eq!(shown().await, json!([300, 422, 599]), "absent stays");
    let wrong = api.patch(&path, json!({ "finalStatuses": [400, 400] })).await;
    assert_eq!(pointers(&wrong), ["/finalStatuses/1"]);
    api.patch(&path, json!({ "finalStatuses": many[1..] })).await.is(200);
    assert_eq!(shown().await, json!(many[1..]));
    let cleared = api.patch(&path, json!({ "finalStatuses": null })).await.expect(200);
    assert_eq!(cleared.body["finalStatuses"], json!([]));
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_has_rules_which_are_merged_and_cleared() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let retry = json!({ "maxAttempts": 5, "baseMs": 200, "factor": 1.5, "capMs": 60_000, "jitter": 0.0 });
    let batch = json!({ "maxEvents": 100, "maxWaitMs": 5_000 });
    let new = json!({ "connectionId": connection, "eventType": "a", "retryPolicy": retry, "batch": batch });
    let created = tenant.api.post("/v1/subscriptions", new).await.expect(201);
    assert_eq!((&created.body["retryPolicy"], &created.body["batch"]), (&retry, &batch));
    let path = format!("/v1/subscriptions/{}", created.id());
    assert_eq!(tenant.api.get(&path).await.expect(200).body, created.body);
    assert_eq!(tenant.api.all("/v1/subscriptions", 50).await, std::slice::from_ref(&created.body));

    // They are no part of what makes it unique.
    let other =
        json!({ "connectionId": connection, "eventType": "a", "batch": { "maxEvents": 2, "maxWaitMs": 0 } });
    assert_eq!(tenant.api.post("/v1/subscriptions", other).await.expect(200).body, created.body);

    // RFC 7396: members of members are merged, too.
    let patch = async |patch: Value| tenant.api.patch(&path, patch).await;
    let merged =
        patch(json!({ "retryPolicy": { "maxAttempts": 7, "jitter": null }, "batch": { "maxEvents": 2 } }));
    let merged = merged.await.expect(200);
    assert_eq!(
        merged.body["retryPolicy"],
        json!({ "maxAttempts": 7, "baseMs": 200, "factor": 1.5, "capMs": 60_000 })
    );
    assert_eq!(merged.body["batch"], json!({ "maxEvents": 2, "maxWaitMs": 5_000 }));
    assert_eq!(
        pointers(&patch(json!({ "retryPolicy": { "delaysMs": [1] } })).await),
        ["/retryPolicy/delaysMs"]
    );
    let cleared = patch(json!({ "retryPolicy": null, "batch": null })).await.expect(200);
    assert_eq!((&cleared.body["retryPolicy"], &cleared.body["batch"]), (&Value::Null, &Value::Null));
    let delays = json!({ "delaysMs": [0, 200, 86_400_000], "jitter": 1.0 });
    let changed = patch(json!({ "retryPolicy": delays })).await.expect(200);
    assert_eq!(changed.body["retryPolicy"], delays);
    assert_eq!(pointers(&patch(json!({ "batch": { "maxEvents": 2 } })).await), ["/batch/maxWaitMs"]);
    let whole = patch(json!({ "batch": { "maxEvents": 1, "maxWaitMs": 0 } })).await.expect(200);
    assert_eq!(whole.body["batch"], json!({ "maxEvents": 1, "maxWaitMs": 0 }));
    assert_eq!(pointers(&patch(json!({ "batch": { "maxEvents": null } })).await), ["/batch/maxEvents"]);
    assert_eq!(tenant.api.get(&path).await.expect(200).body, whole.body);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_cannot_be_used_are_pointed_at() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let subscription = format!("/v1/subscriptions/{}", tenant.subscription(&connection, "there").await);
    for (member, value, pointer) in [
        ("retryPolicy", json!({ "maxAttempts": 0 }), "/retryPolicy/maxAttempts"),
        ("retryPolicy", json!({ "maxAttempts": 101 }), "/retryPolicy/maxAttempts"),
        ("retryPolicy", json!({ "maxAttempts": 1.5 }), "/retryPolicy/maxAttempts"),
        ("retryPolicy", json!({ "baseMs": 86_400_001 }), "/retryPolicy/baseMs"),
        ("retryPolicy", json!({ "baseMs": -1 }), "/retryPolicy/baseMs"),
        ("retryPolicy", json!({ "factor": 0.5 }), "/retryPolicy/factor"),
        ("retryPolicy", json!({ "factor": "2" }), "/retryPolicy/factor"),
        ("retryPolicy", json!({ "capMs": 0 }), "/retryPolicy/capMs"),
        ("retryPolicy", json!({ "jitter": 1.1 }), "/retryPolicy/jitter"),
        ("retryPolicy", json!({ "delaysMs": [] }), "/retryPolicy/delaysMs"),
        ("retryPolicy", json!({ "delaysMs": vec![1; 101] }), "/retryPolicy/delaysMs"),
        ("retryPolicy", json!({ "delaysMs": [1], "factor": 2 }), "/retryPolicy/delaysMs"),
        ("retryPolicy", json!({ "delaysMs": [1, "2"] }), "/retryPolicy/delaysMs/1"),
        ("retryPolicy", json!({ "max_attempts": 1 }), "/retryPolicy/max_attempts"),
        ("retryPolicy", json!(3), "/retryPolicy"),
        ("batch", json!({ "maxEvents": 0, "maxWaitMs": 0 }), "/batch/maxEvents"),
        ("batch", json!({ "maxEvents": 101, "maxWaitMs": 0 }), "/batch/maxEvents"),
        ("batch", json!({ "maxEvents": 70_000, "maxWaitMs": 0 }), "/batch/maxEvents"),
        ("batch", json!({ "maxEvents": 1, "maxWaitMs": 5_001 }), "/batch/maxWaitMs"),
        ("batch", json!({ "maxEvents": 1, "maxWaitMs": 0, "x": 0 }), "/batch/x"),
    ] {
        let mut new = json!({ "eventType": "a" });
        new[member] = value.clone();
        let set = format!("/v1/connections/{connection}/subscriptions");
        let synced = tenant.api.put(&set, json!({ "subscriptions": [new] })).await;
        assert_eq!(pointers(&synced), [format!("/subscriptions/0{pointer}")], "{value}");
        new["connectionId"] = json!(connection);
        assert_eq!(pointers(&tenant.api.post("/v1/subscriptions", new).await), [pointer], "{value}");
        let mut patch = json!({});
        patch[member] = value.clone();
        assert_eq!(pointers(&tenant.api.patch(&subscription, patch).await), [pointer], "{value}");
    }
    // All of them at once.
    let wrong = json!({
        "connectionId": connection, "eventType": "", "filter": "x", "retryPolicy": { "factor": 0 },
        "batch": { "maxEvents": 0, "maxWaitMs": 0 },
    });
    assert_eq!(
        pointers(&tenant.api.post("/v1/subscriptions", wrong).await),
        ["/eventType", "/filter", "/retryPolicy/factor", "/batch/maxEvents"]
    );
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_sets_and_clears_rules() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let set = format!("/v1/connections/{connection}/subscriptions");
    let sync = async |subscriptions: Value| {
        let reply = tenant.api.put(&set, json!({ "subscriptions": subscriptions })).await.expect(200);
        ["created", "updated", "deleted", "unchanged"].map(|name| reply.body[name].as_u64().unwrap())
    };
    let rules = async || -> Vec<(Value, Value)> {
        let shown = tenant.api.all(&format!("/v1/subscriptions?connectionId={connection}"), 50).await;
        shown.iter().map(|item| (item["retryPolicy"].clone(), item["batch"].clone())).collect()
    };
    let (retry, batch) = (json!({ "delaysMs": [200, 5_000] }), json!({ "maxEvents": 10, "maxWaitMs": 100 }));
    let wanted = json!([
        { "eventType": "a", "retryPolicy": retry },
        { "eventType": "b", "batch": batch },
        { "eventType": "c" },
    ]);
    assert_eq!(sync(wanted.clone()).await, [3, 0, 0, 0]);
    let before = vec![(retry.clone(), Value::Null), (Value::Null, batch.clone()), (Value::Null, Value::Null)];
    assert_eq!(rules().await, before);
    assert_eq!(sync(wanted).await, [0, 0, 0, 3], "the same again changes nothing");
    let other = json!([
        { "eventType": "a", "retryPolicy": retry, "enabled": false },
        { "eventType": "b" },
        { "eventType": "c", "retryPolicy": retry, "batch": batch },
    ]);
    assert_eq!(sync(other).await, [0, 3, 0, 0]);
    let after = vec![(retry.clone(), Value::Null), (Value::Null, Value::Null), (retry, batch)];
    assert_eq!(rules().await, after);
    bus.stop().await;
}

/// A worker that has an older version reads the connection again, and is told to.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_rules_counts_up_the_connections_version_and_is_told() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let hints = PostgresNotifier::new(pool.clone(), bus.stack.prefix(), CancellationToken::new());
    let mut told = hints.listen();
    // Each `Missed` may be the moment from which hints arrive.
    while let Some(hint) = told.next().await {
        match hint {
            Hint::Missed => hints.notify(Hint::Due).await,
            Hint::Due => break,
            _ => {}
        }
    }
    let mut told = told.filter(|hint| std::future::ready(matches!(hint, Hint::ConnectionChanged(_))));
    let id: ConnectionId = connection.parse().unwrap();
    let set = format!("/v1/connections/{connection}/subscriptions");
    let mut expected = 1;
    let mut subscription = String::new();
    let batch = json!({ "maxEvents": 2, "maxWaitMs": 0 });
    let new = |event_type: &str, batch: &Value| json!({ "connectionId": connection, "eventType": event_type, "batch": batch });
    for (step, changes_rules) in [
        ("create without", false),
        ("create with", true),
        ("create it again", false),
        ("enable", false),
        ("set", true),
        ("clear", true),
        ("sync others", true),
        ("sync the same", false),
        ("sync new ones without", false),
        ("delete", false),
    ] {
        let path = format!("/v1/subscriptions/{subscription}");
        let reply = match step {
            "create without" => tenant.api.post("/v1/subscriptions", new("a", &Value::Null)).await,
            "create with" | "create it again" => tenant.api.post("/v1/subscriptions", new("b", &batch)).await,
            "enable" => tenant.api.patch(&path, json!({ "enabled": false })).await,
            "set" => tenant.api.patch(&path, json!({ "retryPolicy": { "maxAttempts": 1 } })).await,
            "clear" => tenant.api.patch(&path, json!({ "retryPolicy": null, "batch": null })).await,
            "sync others" | "sync the same" => {
                let wanted = json!([{ "eventType": "a" }, { "eventType": "b", "batch": batch }]);
                tenant.api.put(&set, json!({ "subscriptions": wanted })).await
            }
            "sync new ones without" => {
                let wanted = json!([{ "eventType": "b", "batch": batch }, { "eventType": "c" }]);
                tenant.api.put(&set, json!({ "subscriptions": wanted })).await
            }
            _ => tenant.api.delete(&path).await,
        };
        assert!(reply.status < 300, "{step}: {:#}", reply.body);
        if step.starts_with("create") {
            reply.id().clone_into(&mut subscription);
        }
        expected += i64::from(changes_rules);
        assert_eq!(version(&pool, &tenant, id).await, expected, "{step}");
        if changes_rules {
            assert_eq!(told.next().await, Some(Hint::ConnectionChanged(id)), "{step}");
        }
    }
    drop(told);
    bus.stop().await;
}

async fn version(pool: &PgPool, tenant: &Tenant, id: ConnectionId) -> i64 {
    let organization: OrganizationId = tenant.id.parse().unwrap();
    pg::connection(pool, organization, id).await.unwrap().unwrap().version
}

#[tokio::test(flavor = "multi_thread")]
async fn why_the_bus_disabled_a_connection_is_shown_until_it_is_enabled_again() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    tenant.subscription(&connection, "a").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let id: ConnectionId = connection.parse().unwrap();
    let path = format!("/v1/connections/{connection}");
    let reason = "the endpoint answered 410";
    let organization = tenant.id.parse().unwrap();
    assert!(pg::disable_connection(&pool, organization, id, 1, reason).await.unwrap());
    let disabled = tenant.api.get(&path).await.expect(200);
    let shows = |reply: &Reply, enabled: bool, reason: Option<&str>| {
        assert_eq!(reply.body["enabled"], enabled);
        assert_eq!(reply.body.get("disabledReason").and_then(Value::as_str), reason);
    };
    shows(&disabled, false, Some(reason));
    assert_ne!(disabled.body["updatedAt"], disabled.body["createdAt"]);
    // I2: what is published from now on is not matched.
    let matched = async || {
        let event = tenant.api.post("/v1/events", json!({ "type": "a" })).await.expect(202);
        let path = format!("/v1/events/{}/deliveries", event.text("/uid"));
        tenant.api.get(&path).await.expect(200).body["items"].as_array().unwrap().len()
    };
    assert_eq!(matched().await, 0);

    let named = tenant.api.patch(&path, json!({ "name": "still gone" })).await.expect(200);
    shows(&named, false, Some(reason));
    let off = tenant.api.patch(&path, json!({ "enabled": false })).await.expect(200);
    shows(&off, false, Some(reason));
    shows(&tenant.api.patch(&path, json!({ "enabled": true })).await.expect(200), true, None);
    assert_eq!(matched().await, 1);
    tenant.api.patch(&path, json!({ "enabled": false })).await.is(200);
    shows(&tenant.api.get(&path).await.expect(200), false, None);
    bus.stop().await;
}
