//! An event on its whole way, over the real processes: from the HTTP request to the signed webhook.

use std::{collections::BTreeSet, time::Duration};

use bus_core::signature::{self, SigningSecret};
use devkit::{
    processes::Role,
    receiver::{Answer, Receiver, Script},
    stack::{Backend, Stack, StackOptions},
    wait_until,
};
use rstest::rstest;
use serde_json::{Value, json};
use system_tests::{Tenant, all_arrived, arrivals};

const DEADLINE: Duration = Duration::from_secs(30);

async fn started(backend: Backend) -> (Stack, Receiver, Tenant) {
    let mut stack = Stack::start(StackOptions::default().backend(backend)).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    (stack, receiver, tenant)
}

#[rstest]
#[tokio::test]
async fn an_event_reaches_exactly_its_subscribers(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (stack, receiver, tenant) = started(backend).await;
    let (orders, secret) = tenant.webhook("orders", &receiver.url("/orders")).await.unwrap();
    tenant.subscribe(&orders, "order.*").await.unwrap();
    let (large, _) = tenant.webhook("large", &receiver.url("/large")).await.unwrap();
    let wanted = json!({ "connectionId": large, "eventType": "order.>", "filter": "$[?@.total > 100]" });
    let wanted_too =
        json!({ "connectionId": large, "eventType": "order.>", "filter": "$.items[?@.price > 100]" });
    tenant.api.subscribe(&wanted).await.unwrap().expect(201);
    tenant.api.subscribe(&wanted_too).await.unwrap().expect(201);
    let published = tenant
        .api
        .publish(&json!({ "type": "order.created", "data": { "items": [{ "price": 250 }], "note": "żółć" } }))
        .await
        .unwrap()
        .expect(202);
    tenant
        .api
        .publish(&json!({ "type": "order.created", "data": { "items": [] } }))
        .await
        .unwrap()
        .expect(202);
    tenant.api.publish(&json!({ "type": "invoice.created", "data": null })).await.unwrap().expect(202);

    let requests = receiver.wait_for("/orders", 2).await;
    let first = requests.iter().find(|request| request.json()["id"] == published.id()).unwrap();
    assert_eq!(first.header("content-type"), "application/cloudevents+json; charset=utf-8");
    let event = first.json();
    assert_eq!(event["specversion"], "1.0");
    assert_eq!(event["type"], "order.created");
    assert_eq!(event["data"], json!({ "items": [{ "price": 250 }], "note": "żółć" }));
    signature::verify(
        &[SigningSecret::parse(&secret).unwrap()],
        &first.headers,
        &first.body,
        first.time,
        jiff::SignedDuration::from_mins(5),
    )
    .unwrap();

    assert_eq!(receiver.wait_for("/large", 1).await[0].json()["id"], published.id());
    // What does not match is known not to come once everything else is through.
    wait_until("an empty queue", DEADLINE, || async {
        let states = delivery_states(&tenant, published.id()).await;
        if states == ["delivered", "delivered"] { Ok(()) } else { Err(states) }
    })
    .await;
    assert_eq!((receiver.count("/orders"), receiver.count("/large")), (2, 1));
    stack.shutdown().await.unwrap();
}

/// Each delivery's status of an event, by the history.
async fn delivery_states(tenant: &Tenant, event: &str) -> Vec<String> {
    let reply = tenant.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
    let items = reply.body["items"].as_array().unwrap();
    items.iter().map(|item| item["status"].as_str().unwrap().to_owned()).collect()
}

#[rstest]
#[tokio::test]
async fn i3_an_event_of_one_organization_is_invisible_to_another(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (mut stack, receiver, acme) = started(backend).await;
    let rival = Tenant::create(&mut stack, "rival").await.unwrap();
    acme.receive(&receiver, "/acme", ">").await.unwrap();
    rival.receive(&receiver, "/rival", ">").await.unwrap();
    let of_acme = acme.publish_number("shared.type", 1).await.unwrap();
    let of_rival = rival.publish_number("shared.type", 2).await.unwrap();
    receiver.wait_for("/acme", 1).await;
    receiver.wait_for("/rival", 1).await;
    assert_eq!(arrivals(&receiver, "/acme").keys().collect::<Vec<_>>(), [&of_acme]);
    assert_eq!(arrivals(&receiver, "/rival").keys().collect::<Vec<_>>(), [&of_rival]);
    let peek = rival.api.get(&format!("/v1/events/{of_acme}")).await.unwrap();
    assert_eq!(peek.status, 404);
    stack.shutdown().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn i9_every_attempt_has_the_same_id_and_a_signature_of_its_own(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (stack, receiver, tenant) = started(backend).await;
    receiver.script("/flaky", Script::fail_first(2, 500));
    let (connection, secret) = tenant.webhook("flaky", &receiver.url("/flaky")).await.unwrap();
    tenant.subscribe(&connection, "retry.me").await.unwrap();
    let event = tenant.publish_number("retry.me", 1).await.unwrap();
    let attempts = receiver.wait_for("/flaky", 3).await;
    let ids: BTreeSet<&str> = attempts.iter().map(|attempt| attempt.header("webhook-id")).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let secret = SigningSecret::parse(&secret).unwrap();
    for attempt in &attempts {
        let secrets = std::slice::from_ref(&secret);
        let tolerance = jiff::SignedDuration::from_mins(5);
        signature::verify(secrets, &attempt.headers, &attempt.body, attempt.time, tolerance).unwrap();
        assert_eq!(attempt.body, attempts[0].body);
    }
    wait_until("three attempts in history", DEADLINE, || async {
        let reply = tenant.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
        let attempts = reply.body["items"][0]["attempts"].as_array().cloned().unwrap_or_default();
        let outcomes: Vec<_> = attempts.iter().map(|attempt| attempt["outcome"].clone()).collect();
        if outcomes == ["failed", "failed", "delivered"] { Ok(()) } else { Err(reply.body) }
    })
    .await;
    stack.shutdown().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_long_retry_is_parked_and_comes_back_and_a_hopeless_one_is_dead_lettered(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let options = StackOptions::default()
        .backend(backend)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__MAX_ATTEMPTS", 2)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 5_500);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    receiver.script("/hopeless", Answer::status(503).body("go away"));
    tenant.receive(&receiver, "/hopeless", "lost.cause").await.unwrap();
    let event = tenant.publish_number("lost.cause", 1).await.unwrap();

    receiver.wait_for("/hopeless", 1).await;
    wait_until("the retry in the database", DEADLINE, || async {
        let states = delivery_states(&tenant, &event).await;
        if states == ["waiting"] { Ok(()) } else { Err(states) }
    })
    .await;
    receiver.wait_for("/hopeless", 2).await;
    let dead = wait_until("the dead letter", DEADLINE, || async {
        let reply = tenant.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
        if reply.body["items"][0]["status"] == "dead" { Ok(reply.body) } else { Err(reply.body) }
    })
    .await;
    assert_eq!(dead["items"][0]["reason"], "attempts_exhausted");
    let pool = stack.owner_pool().await.unwrap();
    let row: (i32, Option<i32>, Option<Vec<u8>>) =
        sqlx::query_as("SELECT attempts, last_status, last_body FROM delivery_states WHERE state = 'dead'")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(row, (2, Some(503), Some(b"go away".to_vec())));
    pool.close().await;
    stack.shutdown().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_repeated_publish_is_answered_alike_and_delivered_once(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (stack, receiver, tenant) = started(backend).await;
    tenant.receive(&receiver, "/once", "once.>").await.unwrap();
    let event =
        json!({ "specversion": "1.0", "id": "o-1", "source": "/shop", "type": "once.only", "data": 0 });
    // At the same time, so that they meet in one transaction or wait for each other's.
    let replies = futures::future::join_all((0..20).map(|_| tenant.api.publish_structured(&event))).await;
    let uids: BTreeSet<String> =
        replies.into_iter().map(|reply| reply.unwrap().expect(202).text("/uid").to_owned()).collect();
    assert_eq!(uids.len(), 1, "one event, however often it was published");
    let other_source = json!({ "specversion": "1.0", "id": "o-1", "source": "/other", "type": "once.only" });
    tenant.api.publish_structured(&other_source).await.unwrap().expect(202);
    let arrived: Vec<Value> =
        receiver.wait_for("/once", 2).await.iter().map(|request| request.json()).collect();
    let sources: BTreeSet<&str> = arrived.iter().map(|event| event["source"].as_str().unwrap()).collect();
    assert_eq!(sources, BTreeSet::from(["/shop", "/other"]));
    // The shop's event has `0` as its payload, the other has none.
    assert!(arrived.iter().all(|event| event.get("data").is_some() == (event["source"] == "/shop")));
    stack.shutdown().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_large_event_travels_by_reference_and_arrives_whole(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (stack, receiver, tenant) = started(backend).await;
    tenant.receive(&receiver, "/large", "large").await.unwrap();
    let text = "x".repeat(900_000);
    tenant.api.publish(&json!({ "type": "large", "data": text })).await.unwrap().expect(202);
    assert_eq!(receiver.wait_for("/large", 1).await[0].json()["data"], json!(text));
    let too_large =
        tenant.api.publish(&json!({ "type": "large", "data": "x".repeat(1_100_000) })).await.unwrap();
    assert_eq!(too_large.status, 413);
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_drain_under_load_loses_nothing() {
    let (mut stack, receiver, tenant) = started(Backend::Jetstream).await;
    receiver.script("/slow", Answer::ok().after(Duration::from_millis(200)));
    tenant.receive(&receiver, "/slow", "drain").await.unwrap();
    let mut accepted = BTreeSet::new();
    for n in 0..200 {
        accepted.insert(tenant.publish_number("drain", n).await.unwrap());
    }
    stack.spawn(Role::DeliveryWorker, &[]).unwrap();
    stack.worker(1).wait_ready().await.unwrap();
    stack.worker(0).sigterm().unwrap();
    let status = stack.worker(0).wait_exit().await.unwrap();
    assert!(status.success(), "{status}\n{}", stack.worker(0).log_text().unwrap());
    let repeats = all_arrived(&receiver, &["/slow"], &accepted).await;
    assert_eq!(repeats, 0, "a drain finishes what it has begun");
    stack.shutdown().await.unwrap();
}
