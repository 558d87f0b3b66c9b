//! Invariant I7: endpoints that hang, fail, or want to be called slowly are nobody else's trouble.

use std::{collections::BTreeSet, time::Duration};

use async_nats::jetstream::{self, consumer::PullConsumer};
use devkit::{
    process::Signal,
    processes::Role,
    receiver::{Answer, Received, Receiver, Script},
    servers::connect_nats,
    stack::{Stack, StackOptions},
    wait_until,
};
use futures::TryStreamExt as _;
use serde_json::{Value, json};
use system_tests::{ARRIVAL, Tenant};

/// Long enough that no attempt at an endpoint that hangs ends before the test is over with it.
const HANGS_MS: u64 = 30_000;

/// Publishes so many numbers, in requests of 100.
async fn publish(tenant: &Tenant, event_type: &str, n: usize) {
    let numbers: Vec<usize> = (0..n).collect();
    for chunk in numbers.chunks(100) {
        let events: Vec<Value> =
            chunk.iter().map(|n| json!({ "type": event_type, "data": { "n": n } })).collect();
        tenant.api.publish(&Value::from(events)).await.unwrap().expect(202);
    }
}

async fn count(stack: &Stack, statement: &'static str) -> i64 {
    let pool = stack.owner_pool().await.unwrap();
    let counted = sqlx::query_scalar(statement).fetch_one(&pool).await.unwrap();
    pool.close().await;
    counted
}

async fn states(stack: &Stack) -> i64 {
    count(stack, "SELECT count(*) FROM delivery_states").await
}

/// Unacknowledged deliveries of all lanes.
async fn unacknowledged(stack: &Stack) -> usize {
    let client = connect_nats(&stack.nats_url().unwrap()).await.unwrap();
    let name = format!("{}_DELIVER", stack.prefix().to_uppercase());
    let stream = jetstream::new(client).get_stream(&name).await.unwrap();
    let consumers: Vec<String> = stream.consumer_names().try_collect().await.unwrap();
    let mut sum = 0;
    for name in consumers {
        let mut consumer: PullConsumer = stream.get_consumer(&name).await.unwrap();
        sum += consumer.info().await.unwrap().num_ack_pending;
    }
    sum
}

/// Of ten endpoints in one lane so many hang. All that the others are to get arrives while not one attempt at those has
/// ended.
async fn hanging_endpoints_keep_nobody(hogs: usize) {
    const EACH: usize = 100;
    const SLOTS: usize = 128;
    let options = StackOptions::default().env("EVENT_BUS_LANES", 1).role_env(
        Role::DeliveryWorker,
        "EVENT_BUS_WORKER__IN_FLIGHT",
        SLOTS,
    );
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let path = |n: usize| format!("/{n}");
    for n in 0..10 {
        let event_type = if n < hogs { "hog" } else { "victim" };
        let connection = tenant.receive(&receiver, &path(n), event_type).await.unwrap();
        if n < hogs {
            receiver.script(&path(n), Answer::hang());
            let slow = json!({ "timeoutMs": HANGS_MS });
            tenant.api.patch(&format!("/v1/connections/{connection}"), &slow).await.unwrap().expect(200);
        }
    }
    publish(&tenant, "hog", EACH).await;
    receiver.wait_for("/0", 1).await;
    publish(&tenant, "victim", EACH).await;
    let hanging = || (0..hogs).map(|n| receiver.count(&path(n))).sum::<usize>();
    for n in hogs..10 {
        receiver.wait_for_within(&path(n), EACH, ARRIVAL).await;
    }
    // The victims' last answers may still be on their way.
    wait_until("nothing else under way, and not one attempt at those who hang ended", ARRIVAL, || async {
        let (open, hanging) = (receiver.in_flight(), hanging());
        if open == hanging { Ok(()) } else { Err(format!("{open} of {hanging}")) }
    })
    .await;
    // Each at most half of what was free when it came; a pack of one comes before those of the next.
    assert!(hanging() <= SLOTS - (SLOTS >> hogs), "{} of {SLOTS} slots", hanging());
    wait_until("the rest of what cannot be delivered is parked", ARRIVAL, || async {
        let (parked, held) = (states(&stack).await, unacknowledged(&stack).await);
        let rest = i64::try_from(hogs * EACH - hanging()).unwrap();
        if parked >= rest && held <= SLOTS { Ok(()) } else { Err(format!("{parked} of {rest}, {held} held")) }
    })
    .await;
    // The drain would wait for those who hang.
    stack.worker(0).sigkill().await.unwrap();
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i7_one_endpoint_that_hangs_keeps_nobody() {
    hanging_endpoints_keep_nobody(1).await;
}

#[tokio::test]
async fn i7_five_of_ten_endpoints_that_hang_keep_nobody() {
    hanging_endpoints_keep_nobody(5).await;
}

#[tokio::test]
async fn i7_a_healthy_connection_with_a_backlog_is_not_parked() {
    const EVENTS: usize = 2_000;
    // On a machine that is busy with other things the worker itself may be slow: few wait at a time, and for long.
    let options = StackOptions::default()
        .env("EVENT_BUS_LANES", 1)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__IN_FLIGHT", 64)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__CONNECTION__WAIT_MS", 1_000);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let connection = tenant.receive(&receiver, "/healthy", "healthy").await.unwrap();
    let few = json!({ "maxInFlight": 16 });
    tenant.api.patch(&format!("/v1/connections/{connection}"), &few).await.unwrap().expect(200);
    stack.worker(0).signal(Signal::STOP).unwrap();
    publish(&tenant, "healthy", EVENTS).await;
    stack.worker(0).signal(Signal::CONT).unwrap();
    receiver.wait_for_within("/healthy", EVENTS, ARRIVAL).await;
    assert_eq!(states(&stack).await, 0);
    assert!(receiver.peak_in_flight("/healthy") <= 16, "{}", receiver.peak_in_flight("/healthy"));
    stack.shutdown().await.unwrap();
}

/// At the pace that it had when they were parked, the last would come after five minutes.
#[tokio::test]
async fn i7_an_endpoint_that_was_slow_has_its_backlog_soon_after_it_is_quick_again() {
    const EVENTS: usize = 600;
    const SLOW: Duration = Duration::from_millis(1_500);
    let mut stack = Stack::start(StackOptions::default().env("EVENT_BUS_LANES", 1)).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let connection = tenant.receive(&receiver, "/slow", "slow").await.unwrap();
    let few = json!({ "maxInFlight": 2 });
    tenant.api.patch(&format!("/v1/connections/{connection}"), &few).await.unwrap().expect(200);
    receiver.script("/slow", Answer::ok().after(SLOW));
    // The pace is known when the others are parked.
    publish(&tenant, "slow", 2).await;
    wait_until("a pace", ARRIVAL, || async {
        let left = stack.undelivered().await.unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    publish(&tenant, "slow", EVENTS).await;
    wait_until("nearly all of them parked", ARRIVAL, || async {
        let parked = states(&stack).await;
        if parked >= 500 { Ok(()) } else { Err(parked) }
    })
    .await;
    receiver.script("/slow", Answer::ok());
    receiver.wait_for_within("/slow", 2 + EVENTS, ARRIVAL).await;
    assert!(receiver.peak_in_flight("/slow") <= 2, "{}", receiver.peak_in_flight("/slow"));
    stack.shutdown().await.unwrap();
}

/// A new address is tried at once, and not when those that wait for room at the old one are due.
#[tokio::test]
async fn i7_what_is_parked_for_a_connection_is_tried_when_it_is_changed() {
    const EVENTS: usize = 20;
    const LONG_MS: u64 = 600_000;
    let options = quick()
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__OPEN_MS", LONG_MS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__OPEN_MAX_MS", LONG_MS);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let connection = tenant.receive(&receiver, "/wrong", "moved").await.unwrap();
    receiver.script("/wrong", Answer::status(500));
    publish(&tenant, "moved", EVENTS).await;
    wait_until("an open circuit, and all of them parked", ARRIVAL, || async {
        let parked = count(
            &stack,
            "SELECT count(*) FROM delivery_states WHERE state = 'waiting' AND paced_turn = turn",
        )
        .await;
        if parked == i64::try_from(EVENTS).unwrap() { Ok(()) } else { Err(parked) }
    })
    .await;
    let moved = json!({ "url": receiver.url("/right") });
    tenant.api.patch(&format!("/v1/connections/{connection}"), &moved).await.unwrap().expect(200);
    receiver.wait_for_within("/right", EVENTS, ARRIVAL).await;
    stack.shutdown().await.unwrap();
}

/// The most that came within any so long a time.
fn densest(received: &[Received], window: Duration) -> usize {
    let from = |first: usize| {
        received[first..].iter().take_while(|one| one.at.duration_since(received[first].at) <= window).count()
    };
    (0..received.len()).map(from).max().unwrap()
}

#[tokio::test]
async fn i7_a_rate_limit_holds_for_all_workers_together() {
    const EVENTS: usize = 150;
    let mut stack = Stack::start(StackOptions::default().replicas(Role::DeliveryWorker, 2)).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let connection = tenant.receive(&receiver, "/limited", "limited").await.unwrap();
    let limited = json!({ "ratePerSecond": 10, "burst": 4 });
    tenant.api.patch(&format!("/v1/connections/{connection}"), &limited).await.unwrap().expect(200);
    for worker in 0..2 {
        let worker = &*stack.worker(worker);
        wait_until("workers that know of each other", ARRIVAL, || async {
            let peers = worker.metric("bus_peers").await.unwrap();
            if peers > 1.5 { Ok(()) } else { Err(peers) }
        })
        .await;
    }
    publish(&tenant, "limited", EVENTS).await;
    let received = receiver.wait_for_within("/limited", EVENTS, ARRIVAL).await;
    // Requests take a moment on their way, not always the same: hence the tenth more.
    let most = densest(&received, Duration::from_secs(4));
    assert!(most <= 4 * 11 + 4, "{most} in four seconds");
    stack.shutdown().await.unwrap();
}

/// A breaker that opens, and gives up, soon.
fn quick() -> StackOptions {
    StackOptions::default()
        .env("EVENT_BUS_LANES", 1)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__OPEN_MS", 500)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__OPEN_MAX_MS", 1_000)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__MAX_ATTEMPTS", 100)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 100)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__CAP_MS", 1_000)
}

async fn open_circuits(stack: &mut Stack) -> f64 {
    stack.worker(0).metric("bus_breaker_open").await.unwrap()
}

async fn view(tenant: &Tenant, connection: &str) -> Value {
    tenant.api.get(&format!("/v1/connections/{connection}")).await.unwrap().expect(200).body
}

#[tokio::test]
async fn i7_an_endpoint_that_fails_is_left_alone_and_all_arrives_when_it_works_again() {
    const EVENTS: usize = 100;
    let mut stack = Stack::start(quick()).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let connection = tenant.receive(&receiver, "/failing", "failing").await.unwrap();
    receiver.script("/failing", Answer::status(500));
    publish(&tenant, "failing", EVENTS).await;
    wait_until("a connection that fails", ARRIVAL, || async {
        let shown = view(&tenant, &connection).await;
        if shown["failingSince"].is_string() { Ok(()) } else { Err(shown) }
    })
    .await;
    assert!(open_circuits(&mut stack).await > 0.5);
    receiver.script("/failing", Answer::ok());
    wait_until("all that was to arrive", ARRIVAL, || async {
        let left = stack.undelivered().await.unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    wait_until("a connection that works", ARRIVAL, || async {
        let shown = view(&tenant, &connection).await;
        if shown.get("failingSince").is_none() { Ok(()) } else { Err(shown) }
    })
    .await;
    assert!(open_circuits(&mut stack).await < 0.5);
    let dead = count(&stack, "SELECT count(*) FROM delivery_states WHERE state = 'dead'").await;
    assert_eq!(dead, 0);
    let arrived: BTreeSet<String> =
        receiver.received("/failing").iter().map(|request| request.header("webhook-id").to_owned()).collect();
    assert_eq!(arrived.len(), EVENTS);
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i7_an_endpoint_that_fails_for_too_long_is_disabled_with_an_event_and_can_be_enabled_again() {
    const EVENTS: usize = 40;
    let options = quick().role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__DISABLE_AFTER_S", 1);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/operators", "eventbus.connection.*").await.unwrap();
    let connection = tenant.receive(&receiver, "/failing", "failing").await.unwrap();
    receiver.script("/failing", Answer::reset());
    publish(&tenant, "failing", EVENTS).await;
    let told = receiver.wait_for_within("/operators", 1, ARRIVAL).await[0].json();
    let shown = view(&tenant, &connection).await;
    assert_eq!(shown["enabled"], false);
    assert_eq!(told["type"], "eventbus.connection.disabled");
    assert_eq!(told["source"], format!("/connections/{connection}"));
    assert_eq!(told["data"]["connectionId"], connection.as_str());
    assert_eq!(told["data"]["name"], shown["name"]);
    assert_eq!(told["data"]["reason"], shown["disabledReason"]);
    assert!(told["data"]["reason"].as_str().unwrap().starts_with("failing since 20"), "{told}");
    assert!(told["data"]["failingSince"].is_string(), "{told}");
    wait_until("dead letters in place of all of them", ARRIVAL, || async {
        let statement =
            "SELECT count(*) FROM delivery_states WHERE state = 'dead' AND reason = 'connection_disabled'";
        let dead = count(&stack, statement).await;
        if dead == i64::try_from(EVENTS).unwrap() { Ok(()) } else { Err(dead) }
    })
    .await;

    receiver.script("/failing", Script::default());
    let before = receiver.count("/failing");
    let enabled = json!({ "enabled": true });
    let shown =
        tenant.api.patch(&format!("/v1/connections/{connection}"), &enabled).await.unwrap().expect(200);
    assert!(shown.body.get("failingSince").is_none() && shown.body.get("disabledReason").is_none());
    let told = receiver.wait_for_within("/operators", 2, ARRIVAL).await[1].json();
    assert_eq!(told["type"], "eventbus.connection.enabled");
    let all = json!({ "filter": { "connectionId": connection } });
    tenant.api.post("/v1/dead-letters/replay", &all).await.unwrap().expect(202);
    receiver.wait_for_within("/failing", before + EVENTS, ARRIVAL).await;
    stack.shutdown().await.unwrap();
}
