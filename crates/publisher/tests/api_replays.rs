//! Replays through the API, worked off by a real scheduler.

use std::time::Duration;

use crate::common::{Bus, Caller, Check as _, Tenant, deliveries::Published, pointers, problem};
use devkit::{client::Reply, processes::Role, receiver::Receiver, wait_until};
use http::Method;
use serde_json::{Value, json};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";
const DEADLINE: Duration = Duration::from_secs(60);

async fn publish(tenant: &Tenant, event_type: &str, data: Value) -> String {
    let event = json!({ "type": event_type, "data": data });
    tenant.api.post("/v1/events", event).await.expect(202).text("/uid").to_owned()
}

async fn post(caller: &Caller, path: &str) -> Reply {
    caller.raw(Method::POST, path, caller.0.request(Method::POST, path)).await
}

/// The job when it has ended.
async fn ended(caller: &Caller, job: &Reply) -> Value {
    let path = format!("/v1/replays/{}", job.id());
    wait_until("the end of a replay", DEADLINE, || async {
        let body = caller.get(&path).await.expect(200).body;
        if body["finishedAt"].is_string() { Ok(body) } else { Err(body) }
    })
    .await
}

/// The whole way: what was delivered is delivered again, under the same id, and only what matches.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_and_the_past_of_a_subscription_are_delivered_again() {
    let receiver = Receiver::start().await.unwrap();
    let bus = Bus::start_with(|options| {
        options.replicas(Role::DeliveryWorker, 1).replicas(Role::CronScheduler, 2).role_env(
            Role::Publisher,
            "EVENT_BUS_SINK__ALLOW_CIDRS",
            r#"["127.0.0.0/8"]"#,
        )
    })
    .await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let new = json!({ "name": "hook", "kind": "webhook", "url": receiver.url("/hook") });
    let connection = api.post("/v1/connections", new).await.expect(201).id().to_owned();
    let large = json!({ "connectionId": connection, "eventType": "order.>", "filter": "$[?$.total > 100]" });
    let large = api.post("/v1/subscriptions", large).await.expect(201).id().to_owned();
    let before = publish(&tenant, "order.created", json!({ "total": 500 })).await;
    publish(&tenant, "order.created", json!({ "total": 5 })).await;
    publish(&tenant, "invoice.created", json!({ "total": 500 })).await;
    let first = receiver.wait_for("/hook", 1).await;
    let id = first[0].header("webhook-id").to_owned();
    let since = api.get(&format!("/v1/events/{before}")).await.expect(200).text("/receivedAt").to_owned();

    // One event, to all that match it now.
    let job = post(api, &format!("/v1/events/{before}/replay")).await.expect(202);
    let done = ended(api, &job).await;
    assert_eq!(done["progress"], json!({ "looked": 1, "replayed": 1, "skipped": 0 }), "{done:#}");
    let again = receiver.wait_for("/hook", 2).await;
    assert_eq!(again[1].header("webhook-id"), id, "the same delivery");
    assert_eq!(again[1].body, first[0].body);

    // Everything since the first: one of three matches.
    let path = format!("/v1/subscriptions/{large}/replay");
    let job = api.post(&path, json!({ "since": "2020-01-01T00:00:00Z" })).await.expect(202);
    let done = ended(api, &job).await;
    assert_eq!(done["progress"], json!({ "looked": 3, "replayed": 1, "skipped": 2 }), "{done:#}");
    assert_eq!((&done["state"], &done["kind"]), (&json!("done"), &json!("subscription")));
    assert!(done["position"].as_str().unwrap() >= since.as_str().get(..19).unwrap(), "{done:#}");
    assert_eq!(receiver.wait_for("/hook", 3).await[2].header("webhook-id"), id);
    wait_until("three attempts in history", DEADLINE, || async {
        let body = api.get(&format!("/v1/events/{before}/deliveries")).await.expect(200).body;
        let item = &body["items"][0];
        let attempts = item["attempts"].as_array().unwrap().len();
        if attempts == 3 && item["status"] == "delivered" { Ok(()) } else { Err(body) }
    })
    .await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_replayed_is_refused_with_the_reason() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let (connection, other) = (tenant.webhook("hook").await, tenant.webhook("other").await);
    let orders = tenant.subscription(&connection, "order.*").await;
    let filtered = json!({ "connectionId": other, "eventType": ">", "filter": "$.total" });
    let filtered = api.post("/v1/subscriptions", filtered).await.expect(201).id().to_owned();
    let shop = tenant.publisher("shop").await;
    let from_shop = json!({ "connectionId": connection, "eventType": ">", "publisher": shop });
    let from_shop = api.post("/v1/subscriptions", from_shop).await.expect(201).id().to_owned();
    let event = publish(&tenant, "invoice.created", json!({ "sum": 1 })).await;
    let path = format!("/v1/events/{event}/replay");
    let to = |subscription: &str| json!({ "subscriptionId": subscription });

    for (subscription, reason) in [
        (NOBODY, "no such subscription"),
        (&orders, "wants other types"),
        (&filtered, "filter selects nothing"),
        (&from_shop, "another publisher"),
    ] {
        let reply = api.post(&path, to(subscription)).await;
        assert_eq!(pointers(&reply), ["/subscriptionId"]);
        assert!(reply.text("/detail").contains(reason), "{:#}", reply.body);
    }
    let since = json!({ "since": "2020-01-01T00:00:00Z" });
    let all = format!("/v1/subscriptions/{orders}/replay");
    api.patch(&format!("/v1/connections/{connection}"), json!({ "enabled": false })).await.is(200);
    assert!(api.post(&path, to(&orders)).await.text("/detail").contains("disabled"));
    assert_eq!(pointers(&api.post(&all, since.clone()).await), [""]);
    api.patch(&format!("/v1/connections/{connection}"), json!({ "enabled": true })).await.is(200);

    for (body, pointer) in [
        (json!({}), ""),
        (json!({ "since": "2100-01-01T00:00:00Z" }), "/since"),
        (json!({ "since": "2020-01-02T00:00:00Z", "until": "2020-01-01T00:00:00Z" }), "/since"),
        (json!({ "since": "2020-01-01T00:00:00Z", "perSecond": 0 }), "/perSecond"),
        (json!({ "since": "2020-01-01T00:00:00Z", "from": 1 }), "/from"),
    ] {
        assert_eq!(pointers(&api.post(&all, body.clone()).await), [pointer], "{body}");
    }
    problem(&api.post(&format!("/v1/subscriptions/{NOBODY}/replay"), since.clone()).await, 404, "not-found");
    problem(&post(api, "/v1/events/none/replay").await, 404, "not-found");

    // A bound key: its own subscriptions only, and only the jobs about its connection.
    let bound = tenant.key(json!({ "scopes": ["subscribe"], "connectionId": other })).await;
    problem(&bound.post(&all, since.clone()).await, 404, "not-found");
    assert_eq!(pointers(&bound.post(&path, to(&orders)).await), ["/subscriptionId"]);
    let job = api.post(&all, since.clone()).await.expect(202);
    assert_eq!(job.body["connectionId"], json!(connection));
    problem(&bound.get(&format!("/v1/replays/{}", job.id())).await, 404, "not-found");
    problem(&post(&bound, &format!("/v1/replays/{}/cancel", job.id())).await, 404, "not-found");
    let own = post(&bound, &path).await.expect(202);
    assert_eq!(own.body["connectionId"], json!(other), "it is not delivered to others");
    assert_eq!(bound.all("/v1/replays", 1).await, [own.body]);
    assert_eq!(api.all("/v1/replays", 1).await.len(), 2);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_is_one_job_and_a_cancelled_one_ends() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let connection = tenant.webhook("hook").await;
    let subscription = tenant.subscription(&connection, ">").await;
    let path = format!("/v1/subscriptions/{subscription}/replay");
    let keyed = async |path: &str, key: &str, body: Value| {
        let request = api.0.request(Method::POST, path).header("idempotency-key", key).json(&body);
        api.raw(Method::POST, path, request).await
    };
    let body = json!({ "since": "2020-01-01T00:00:00Z" });
    let racers = (0..10).map(|_| keyed(&path, "\"one\"", body.clone()));
    let replies = futures::future::join_all(racers).await;
    let job = replies[0].id().to_owned();
    assert!(replies.iter().all(|reply| reply.status == 202 && reply.id() == job));
    let other = json!({ "since": "2021-01-01T00:00:00Z" });
    problem(&keyed(&path, "one", other).await, 422, "idempotency-key-reused");
    let elsewhere = keyed("/v1/dead-letters/replay", "one", json!({ "filter": {} })).await;
    problem(&elsewhere, 422, "idempotency-key-reused");
    problem(&keyed(&path, "\"", body.clone()).await, 400, "invalid-idempotency-key");
    assert_ne!(keyed(&path, "two", body.clone()).await.expect(202).id(), job);

    let cancel = format!("/v1/replays/{job}/cancel");
    let cancelled = post(api, &cancel).await.expect(200).body;
    assert_eq!(cancelled["state"], "cancelled");
    assert!(cancelled["finishedAt"].is_string());
    assert_eq!(post(api, &cancel).await.expect(200).body, cancelled, "it stays as it is");
    assert_eq!(api.get(&format!("/v1/replays/{job}")).await.expect(200).body, cancelled);
    assert_eq!(keyed(&path, "one", body.clone()).await.expect(202).body, cancelled);
    problem(&post(api, &format!("/v1/replays/{NOBODY}/cancel")).await, 404, "not-found");

    // Unfinished jobs have a bound.
    for _ in api.all("/v1/replays", 200).await.len()..101 {
        api.post(&path, body.clone()).await.is(202);
    }
    problem(&api.post(&path, body.clone()).await, 409, "limit-reached");
    keyed(&path, "two", body).await.is(202);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_replayed_and_discarded_by_the_scheduler() {
    let bus = Bus::start_with(|options| options.replicas(Role::CronScheduler, 1)).await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let connection = tenant.webhook("hook").await;
    let subscription = tenant.subscription(&connection, ">").await;
    let mut dead = Vec::new();
    for event_type in ["a", "a", "b", "b"] {
        let event = publish(&tenant, event_type, json!(1)).await;
        let published = Published::new(&tenant, &event, &subscription, &connection);
        published.bury(&pool, 20, "attempts_exhausted").await;
        dead.push(published);
    }
    let job = api.post("/v1/dead-letters/discard", json!({ "filter": { "type": "a" } })).await.expect(202);
    let done = ended(api, &job).await;
    assert_eq!(done["progress"], json!({ "looked": 4, "replayed": 2, "skipped": 2 }), "{done:#}");
    let job = api
        .post("/v1/dead-letters/replay", json!({ "ids": [dead[0].id(), dead[2].id(), NOBODY] }))
        .await
        .expect(202);
    let done = ended(api, &job).await;
    assert_eq!(done["progress"], json!({ "looked": 3, "replayed": 1, "skipped": 2 }), "{done:#}");
    // The scheduler returns what waits to the queue.
    wait_until("the return to the queue", DEADLINE, || async {
        let mut states = Vec::new();
        for one in &dead {
            states.push(one.standing(&pool).await.unwrap().0);
        }
        if states == ["cancelled", "cancelled", "queued", "dead"] { Ok(()) } else { Err(states) }
    })
    .await;
    pool.close().await;
    bus.stop().await;
}
