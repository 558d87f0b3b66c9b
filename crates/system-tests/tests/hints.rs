//! Hints between the processes: that they save latency, and that nothing else depends on them.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use devkit::{
    receiver::Receiver,
    servers::{NatsServer, Tools},
    stack::{Backend, Stack, StackOptions},
    wait_until,
};
use serde_json::{Value, json};
use system_tests::{Tenant, all_arrived, arrivals};

const DEADLINE: Duration = Duration::from_secs(60);

/// A bus on Postgres with this strategy, and a nats-server that is not running.
async fn started(strategy: &str, poll_ms: u64) -> (Stack, NatsServer, Receiver, Tenant) {
    let tools = Tools::locate().unwrap();
    let mut nats = NatsServer::private(&tools).await.unwrap();
    nats.kill().await.unwrap();
    let options = StackOptions::default()
        .backend(Backend::Postgres)
        .env("NATS_URL", nats.url())
        .env("EVENT_BUS_NOTIFY__STRATEGY", strategy)
        .env("EVENT_BUS_NOTIFY__POLL_MS", poll_ms);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    (stack, nats, receiver, tenant)
}

/// Publishes one event after the other, each when the one before has arrived.
async fn one_by_one(tenant: &Tenant, receiver: &Receiver, path: &str, events: usize) -> Duration {
    let begun = Instant::now();
    for number in 0..events {
        let event = tenant.publish_number("hinted.event", number).await.unwrap();
        wait_until("the event", DEADLINE, || async {
            if arrivals(receiver, path).contains_key(&event) { Ok(()) } else { Err("not yet") }
        })
        .await;
    }
    begun.elapsed()
}

/// By themselves the workers look every two seconds when the interval is so long: what comes just after a look
/// waits for the next one, unless a hint wakes them.
#[tokio::test]
async fn a_nats_that_is_away_at_the_start_delays_nothing_where_postgres_carries_hints_too() {
    let (stack, mut nats, receiver, tenant) = started("auto", 60_000).await;
    tenant.receive(&receiver, "/hinted", ">").await.unwrap();
    let took = one_by_one(&tenant, &receiver, "/hinted", 10).await;
    assert!(took < Duration::from_secs(10), "ten events took {took:?}");
    let event = tenant.publish_number("hinted.event", 10).await.unwrap();
    tenant.api.post(&format!("/v1/events/{event}/cancel"), &Value::Null).await.unwrap().expect(200);
    nats.restart().await.unwrap();
    let took = one_by_one(&tenant, &receiver, "/hinted", 10).await;
    assert!(took < Duration::from_secs(10), "with NATS, ten events took {took:?}");
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn hints_over_nats_begin_when_it_comes_and_polling_does_until_then() {
    let (stack, mut nats, receiver, tenant) = started("nats", 60_000).await;
    tenant.receive(&receiver, "/hinted", ">").await.unwrap();
    one_by_one(&tenant, &receiver, "/hinted", 2).await;
    nats.restart().await.unwrap();
    wait_until("ten events in less than ten seconds", DEADLINE, || async {
        let took = one_by_one(&tenant, &receiver, "/hinted", 10).await;
        if took < Duration::from_secs(10) { Ok(()) } else { Err(took) }
    })
    .await;
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn without_hints_everything_arrives_and_changes_are_seen() {
    let (stack, _nats, receiver, tenant) = started("polling", 100).await;
    let connection = tenant.receive(&receiver, "/before", ">").await.unwrap();
    let mut accepted = BTreeSet::from([tenant.publish_number("polled.event", 1).await.unwrap()]);
    all_arrived(&receiver, &["/before"], &accepted).await;
    let patch = json!({ "url": receiver.url("/after") });
    tenant.api.patch(&format!("/v1/connections/{connection}"), &patch).await.unwrap().expect(200);
    accepted.clear();
    accepted.insert(tenant.publish_number("polled.event", 2).await.unwrap());
    all_arrived(&receiver, &["/after"], &accepted).await;
    stack.shutdown().await.unwrap();
}
