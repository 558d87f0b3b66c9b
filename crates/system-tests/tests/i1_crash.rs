//! Invariant I1: whatever dies, every event that was answered 202 reaches every subscriber that matched.

use std::{collections::BTreeSet, time::Duration};

use devkit::{
    processes::Role,
    receiver::{Answer, Receiver},
    servers::Durability,
    stack::{Backend, ServerChoice, Stack, StackOptions},
};
use system_tests::{Load, QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived};

const PATHS: [&str; 2] = ["/a", "/b"];

fn durable() -> StackOptions {
    StackOptions::default()
        .servers(ServerChoice::Own(Durability::Full))
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS)
}

async fn started(options: StackOptions) -> (Stack, Receiver, Tenant) {
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    for path in PATHS {
        tenant.receive(&receiver, path, "load.*").await.unwrap();
    }
    (stack, receiver, tenant)
}

#[tokio::test]
async fn i1_a_publisher_that_dies_between_commit_and_fan_out() {
    let (mut stack, receiver, tenant) = started(durable()).await;
    let fault = [("BUS_FAULT_POINT", "publisher.before-fan-out")];
    let second = stack.spawn(Role::Publisher, &fault).unwrap();
    stack.publisher(second).wait_ready().await.unwrap();
    let doomed = Tenant { api: tenant.api.at(stack.publisher(second).http_url()), ..tenant.clone() };
    // Each committer stops after its first commit, so this is as many as it accepts.
    let mut accepted = BTreeSet::new();
    for n in 0..4 {
        accepted.insert(doomed.publish_number("load.test", n).await.unwrap());
    }
    let log = stack.publisher(second).log_text().unwrap();
    let stops = log.matches("Stopped at a fault point").count();
    assert_eq!(
        stops, 4,
        "the publisher must be built with --features publisher/fault-points, as `cargo xtask test` does"
    );
    assert_eq!(receiver.total(), 0, "nothing was fanned out");
    stack.publisher(second).sigkill().await.unwrap();
    let repeats = all_arrived(&receiver, &PATHS, &accepted).await;
    assert_eq!(repeats, 0);
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i1_a_publisher_that_is_killed_under_load() {
    let (mut stack, receiver, tenant) = started(durable().replicas(Role::Publisher, 2)).await;
    let second = Tenant { api: tenant.api.at(stack.publisher(1).http_url()), ..tenant.clone() };
    let load = Load::start(&[tenant, second]);
    for _ in 0..3 {
        load.more(100).await;
        stack.publisher(1).sigkill().await.unwrap();
        load.more(50).await;
        stack.publisher(1).respawn().unwrap();
        stack.publisher(1).wait_ready().await.unwrap();
    }
    let accepted = load.finish().await;
    all_arrived(&receiver, &PATHS, &accepted).await;
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i1_a_worker_that_is_killed_with_deliveries_in_flight() {
    let (mut stack, receiver, tenant) = started(durable().replicas(Role::DeliveryWorker, 2)).await;
    for path in PATHS {
        receiver.script(path, Answer::ok().after(Duration::from_millis(50)));
    }
    let load = Load::start(std::slice::from_ref(&tenant));
    for _ in 0..3 {
        load.more(100).await;
        stack.worker(0).sigkill().await.unwrap();
        stack.worker(0).respawn().unwrap();
        stack.worker(0).wait_ready().await.unwrap();
    }
    let accepted = load.finish().await;
    let repeats = all_arrived(&receiver, &PATHS, &accepted).await;
    // At most what one worker held at each kill.
    assert!(repeats <= 3 * 256, "{repeats} repeats");
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i1_a_nats_server_that_is_killed_under_load() {
    let (mut stack, receiver, tenant) = started(durable()).await;
    let load = Load::start(std::slice::from_ref(&tenant));
    for _ in 0..3 {
        load.more(100).await;
        stack.nats().kill().await.unwrap();
        // The broker is away, and events are accepted all the same: they wait in the outbox.
        load.more(50).await;
        stack.nats().restart().await.unwrap();
    }
    load.more(100).await;
    let accepted = load.finish().await;
    all_arrived(&receiver, &PATHS, &accepted).await;
    stack.shutdown().await.unwrap();
}

async fn postgres_is_killed(backend: Backend) {
    let (mut stack, receiver, tenant) = started(durable().backend(backend)).await;
    let load = Load::start(std::slice::from_ref(&tenant));
    for _ in 0..3 {
        load.more(100).await;
        stack.postgres().kill().await.unwrap();
        stack.postgres().restart().await.unwrap();
    }
    load.more(100).await;
    let accepted = load.finish().await;
    all_arrived(&receiver, &PATHS, &accepted).await;
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i1_a_postgres_that_is_killed_under_load() {
    postgres_is_killed(Backend::Jetstream).await;
}

#[tokio::test]
async fn i1_a_postgres_that_is_killed_under_load_and_holds_the_queue() {
    postgres_is_killed(Backend::Postgres).await;
}
