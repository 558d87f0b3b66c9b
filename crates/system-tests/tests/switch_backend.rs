//! A deployment changes its backend: what is pending, postponed or parked moves along, once each.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Stdio,
    time::Duration,
};

use devkit::{
    processes::{Role, bin_dir},
    receiver::{Answer, Receiver},
    stack::{Backend, Stack, StackOptions},
    wait_until,
};
use rstest::rstest;
use serde_json::Value;
use system_tests::{ARRIVAL, QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant};
use tokio::process::{Child, Command};

const DEADLINE: Duration = Duration::from_secs(60);

/// Deliveries of a message.
const PACK: u64 = 8;

const PATHS: [&str; 3] = ["/parked", "/postponed", "/pending"];

/// A stack with NATS and Postgres whose binaries have this backend.
async fn started(backend: Backend) -> (Stack, Receiver, Tenant) {
    let options = StackOptions::default()
        .env("EVENT_BUS_BACKEND", backend.name())
        .env("EVENT_BUS_NATS__PACK_DELIVERIES", PACK)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        // What fails is attempted again all the same: where it waits is what this is about.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__ENABLED", false)
        // On a machine that is busy with other things the worker is slow, not the endpoint.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__CONNECTION__WAIT_MS", 1_000)
        // A first retry waits in the queue, a second one is parked.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 4_000)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__FACTOR", 5.0);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    for path in PATHS {
        tenant.receive(&receiver, path, &path[1..]).await.unwrap();
    }
    (stack, receiver, tenant)
}

async fn stop(stack: &mut Stack, role: Role) {
    let process = stack.process(role, 0);
    process.sigterm().unwrap();
    assert!(process.wait_exit().await.unwrap().success());
}

async fn start(stack: &mut Stack, role: Role, backend: Backend) {
    let process = stack.process(role, 0);
    process.set_env("EVENT_BUS_BACKEND", Some(backend.name()));
    process.respawn().unwrap();
    process.wait_ready().await.unwrap();
}

/// `cargo xtask drain`, with the deployment's configuration.
fn drain(stack: &Stack, from: Backend, to: Backend) -> Child {
    Command::new(bin_dir().unwrap().join("xtask"))
        .args(["drain", "--from", from.name(), "--to", to.name()])
        .env("DATABASE_URL", stack.database_url(Role::DeliveryWorker).unwrap())
        .env("NATS_URL", stack.nats_url().unwrap())
        .env("EVENT_BUS_PREFIX", stack.prefix())
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn publish(tenant: &Tenant, event_type: &str, n: usize) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for n in 0..n {
        ids.insert(tenant.publish_number(event_type, n).await.unwrap());
    }
    ids
}

/// How often each delivery came.
fn arrived(receiver: &Receiver, path: &str) -> BTreeMap<String, usize> {
    let mut arrived = BTreeMap::new();
    for request in receiver.received(path) {
        *arrived.entry(request.header("webhook-id").to_owned()).or_insert(0) += 1;
    }
    arrived
}

/// The numbers and outcomes of an event's only delivery.
async fn attempts(tenant: &Tenant, event: &str) -> Vec<(u64, String)> {
    let reply = tenant.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
    let attempts = reply.body["items"][0]["attempts"].as_array().cloned().unwrap_or_default();
    let read = |attempt: &Value| {
        (attempt["attempt"].as_u64().unwrap(), attempt["outcome"].as_str().unwrap().to_owned())
    };
    attempts.iter().map(read).collect()
}

async fn states(stack: &Stack) -> BTreeMap<String, i64> {
    let pool = stack.owner_pool().await.unwrap();
    let states = sqlx::query_as("SELECT state, count(*) FROM delivery_states GROUP BY state");
    let states: Vec<(String, i64)> = states.fetch_all(&pool).await.unwrap();
    pool.close().await;
    states.into_iter().collect()
}

#[rstest]
#[case::to_jetstream(Backend::Postgres, Backend::Jetstream)]
#[case::to_postgres(Backend::Jetstream, Backend::Postgres)]
#[tokio::test]
async fn what_is_pending_moves_along_once(#[case] from: Backend, #[case] to: Backend) {
    let (mut stack, receiver, tenant) = started(from).await;
    receiver.script("/parked", Answer::status(500));
    receiver.script("/postponed", Answer::status(500));

    let parked = publish(&tenant, "parked", 20).await;
    wait_until("parked retries", DEADLINE, || async {
        let states = states(&stack).await;
        if states.get("waiting") == Some(&20) { Ok(()) } else { Err(states) }
    })
    .await;
    let postponed = publish(&tenant, "postponed", 20).await;
    receiver.wait_for("/postponed", 20).await;
    // The order that docs/operations.md gives. At once, before the retries are due.
    stop(&mut stack, Role::DeliveryWorker).await;
    stop(&mut stack, Role::CronScheduler).await;
    for event in parked.iter().chain(&postponed) {
        let made = if parked.contains(event) { 2 } else { 1 };
        wait_until("the attempts in history", DEADLINE, || async {
            let attempts = attempts(&tenant, event).await;
            if attempts.len() == made { Ok(()) } else { Err(attempts) }
        })
        .await;
    }

    let pending = publish(&tenant, "pending", 300).await;
    stop(&mut stack, Role::Publisher).await;
    start(&mut stack, Role::Publisher, to).await;
    let tenant = Tenant { api: tenant.api.at(stack.publisher(0).http_url()), ..tenant };
    let during = publish(&tenant, "pending", 20).await;
    for path in ["/parked", "/postponed"] {
        receiver.script(path, Answer::ok());
    }
    let drained = drain(&stack, from, to).wait_with_output().await.unwrap();
    let said = String::from_utf8_lossy(&drained.stdout).into_owned();
    assert!(drained.status.success(), "{said}\n{}", String::from_utf8_lossy(&drained.stderr));
    assert!(said.contains("320 deliveries were moved"), "{said}");
    assert_eq!(receiver.count("/pending"), 0);
    stop(&mut stack, Role::Archiver).await;
    for role in [Role::Archiver, Role::CronScheduler, Role::DeliveryWorker] {
        start(&mut stack, role, to).await;
    }

    let expected = [("/parked", 20, 3), ("/postponed", 20, 2), ("/pending", 320, 1)];
    for (path, deliveries, times) in expected {
        receiver.wait_for_within(path, deliveries * times, DEADLINE).await;
    }
    wait_until("an empty queue", DEADLINE, || async {
        let left = stack.undelivered().await.unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    for (path, deliveries, times) in expected {
        let arrived = arrived(&receiver, path);
        assert_eq!(arrived.len(), deliveries, "{path}");
        assert!(arrived.values().all(|n| *n == times), "{path}: {arrived:?}");
    }
    assert_eq!((pending.len(), during.len()), (300, 20));
    // What was tried before the change counts after it.
    let (first, last) = (parked.first().unwrap(), parked.last().unwrap());
    for event in [first, last] {
        let history = wait_until("three attempts in history", DEADLINE, || async {
            let attempts = attempts(&tenant, event).await;
            if attempts.len() == 3 { Ok(attempts) } else { Err(attempts) }
        })
        .await;
        let outcomes = [(1, "failed"), (2, "failed"), (3, "delivered")];
        assert_eq!(history, outcomes.map(|(number, outcome)| (number, outcome.to_owned())));
    }
    stack.shutdown().await.unwrap();
}

#[rstest]
#[case::to_jetstream(Backend::Postgres, Backend::Jetstream)]
#[case::to_postgres(Backend::Jetstream, Backend::Postgres)]
#[tokio::test]
async fn a_drain_that_is_killed_is_repeated_and_one_is_drained_back(
    #[case] from: Backend,
    #[case] to: Backend,
) {
    let (mut stack, receiver, tenant) = started(from).await;
    stop(&mut stack, Role::DeliveryWorker).await;
    let event = serde_json::json!({ "specversion": "1.0", "source": "/test", "type": "pending" });
    for batch in 0..5 {
        let events: Vec<Value> = (0..1_000)
            .map(|n| {
                let mut event = event.clone();
                event["id"] = format!("{batch}-{n}").into();
                event
            })
            .collect();
        tenant.api.publish_batch(&events).await.unwrap().expect(202);
    }
    let pool = stack.owner_pool().await.unwrap();
    // What is new is packed; what was moved is alone.
    let fanned_out = if from == Backend::Jetstream { 5_000 / PACK } else { 5_000 };
    wait_until("the fan-out", DEADLINE, || async {
        let left = stack.undelivered().await.unwrap();
        if left == fanned_out { Ok(()) } else { Err(left) }
    })
    .await;

    // A scheduler is left running: it would take, so the drain refuses.
    let refused = drain(&stack, from, to).wait_with_output().await.unwrap();
    assert!(!refused.status.success());
    let reason = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(reason.contains("cron-scheduler"), "{reason}");
    stop(&mut stack, Role::CronScheduler).await;

    let in_table = async || -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM delivery_queue").fetch_one(&pool).await.unwrap()
    };
    let mut interrupted = drain(&stack, from, to);
    wait_until("the drain to be under way", DEADLINE, || async {
        let rows = in_table().await;
        if (400..4_800).contains(&rows) { Ok(()) } else { Err(rows) }
    })
    .await;
    interrupted.kill().await.unwrap();
    let rows = in_table().await;
    assert!(rows > 0 && rows < 5_000, "killed in the middle: {rows} in the table");

    // To its end; then back, and there again: what returns soon is not taken for a repetition.
    for (from, to) in [(from, to), (to, from), (from, to)] {
        let drained = drain(&stack, from, to).wait_with_output().await.unwrap();
        assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
        assert_eq!(stack.undelivered().await.unwrap(), 5_000, "none is lost, none is doubled");
    }
    // A few may be parked for want of room.
    start(&mut stack, Role::CronScheduler, to).await;
    start(&mut stack, Role::DeliveryWorker, to).await;
    receiver.wait_for_within("/pending", 5_000, ARRIVAL).await;
    wait_until("an empty queue", ARRIVAL, || async {
        let left = stack.undelivered().await.unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    let arrived = arrived(&receiver, "/pending");
    assert_eq!((arrived.len(), receiver.count("/pending")), (5_000, 5_000));
    pool.close().await;
    stack.shutdown().await.unwrap();
}
