//! Invariant I1: what a broker loses that was put into it comes back from the database.

use std::{collections::BTreeSet, path::Path, process::Stdio, time::Duration};

use async_nats::jetstream;
use devkit::{
    processes::{Role, bin_dir},
    receiver::{Answer, Receiver, Script},
    servers::{Durability, connect_nats},
    stack::{ServerChoice, Stack, StackOptions},
    wait_until,
};
use system_tests::{QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived};
use tokio::process::Command;

const DEADLINE: Duration = Duration::from_secs(60);

const PATHS: [&str; 2] = ["/a", "/b"];

async fn started(servers: ServerChoice) -> (Stack, Receiver, Tenant) {
    let options = StackOptions::default()
        .servers(servers)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        // A first retry waits in the queue.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 4_000)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    for path in PATHS {
        tenant.receive(&receiver, path, "load.*").await.unwrap();
    }
    (stack, receiver, tenant)
}

async fn publish(tenant: &Tenant, n: usize) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for n in 0..n {
        ids.insert(tenant.publish_number("load.test", n).await.unwrap());
    }
    ids
}

async fn stop_worker(stack: &mut Stack) {
    stack.worker(0).sigterm().unwrap();
    assert!(stack.worker(0).wait_exit().await.unwrap().success());
}

async fn start_worker(stack: &mut Stack) {
    stack.worker(0).respawn().unwrap();
    stack.worker(0).wait_ready().await.unwrap();
}

async fn in_queue(stack: &Stack, deliveries: u64) {
    wait_until("the deliveries to be in the queue", DEADLINE, || async {
        let queued = stack.undelivered().await.unwrap();
        if queued == deliveries { Ok(()) } else { Err(format!("{queued} of {deliveries}")) }
    })
    .await;
}

async fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().await.unwrap();
    assert!(copied.success());
}

#[tokio::test]
async fn i1_a_broker_that_is_put_back_to_an_earlier_copy_gets_back_what_it_lost() {
    let (mut stack, receiver, tenant) = started(ServerChoice::Own(Durability::Full)).await;
    let mut accepted = publish(&tenant, 40).await;
    all_arrived(&receiver, &PATHS, &accepted).await;

    // The copy has deliveries that are still to be made, and lacks those that come after it.
    stop_worker(&mut stack).await;
    accepted.extend(publish(&tenant, 40).await);
    in_queue(&stack, 80).await;
    stack.nats().stop().await.unwrap();
    let store = stack.nats().store();
    let kept = store.with_extension("copy");
    copy(&store, &kept).await;
    stack.nats().restart().await.unwrap();
    accepted.extend(publish(&tenant, 60).await);
    in_queue(&stack, 200).await;

    stack.nats().kill().await.unwrap();
    std::fs::remove_dir_all(&store).unwrap();
    copy(&kept, &store).await;
    stack.nats().restart().await.unwrap();
    start_worker(&mut stack).await;
    accepted.extend(publish(&tenant, 20).await);
    all_arrived(&receiver, &PATHS, &accepted).await;
    stack.shutdown().await.unwrap();
}

/// `cargo xtask reconcile`, with the deployment's configuration; what it says last.
async fn reconcile(stack: &Stack, arguments: &[&str]) -> String {
    let done = Command::new(bin_dir().unwrap().join("xtask"))
        .args(["reconcile", "--since", "1h"])
        .args(arguments)
        .env("DATABASE_URL", stack.owner_url())
        .env("NATS_URL", stack.nats_url().unwrap())
        .env("EVENT_BUS_PREFIX", stack.prefix())
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS.to_string())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let (said, complaint) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}{complaint}");
    said.lines().rfind(|line| line.contains("reconcile: ")).unwrap_or_else(|| panic!("{said}")).to_owned()
}

/// The numbers of the attempts of an event's only delivery, once there are so many.
async fn attempts(tenant: &Tenant, event: &str, count: usize) -> Vec<u64> {
    let path = format!("/v1/events/{event}/deliveries");
    wait_until("the attempts to be in history", DEADLINE, || async {
        let reply = tenant.api.get(&path).await.unwrap().expect(200);
        let attempts = reply.body["items"][0]["attempts"].as_array().cloned().unwrap_or_default();
        let numbers: Vec<u64> = attempts.iter().filter_map(|attempt| attempt["attempt"].as_u64()).collect();
        if numbers.len() == count { Ok(numbers) } else { Err(numbers.len()) }
    })
    .await
}

#[tokio::test]
async fn i1_what_was_purged_is_found_and_put_back_and_nothing_else() {
    let (mut stack, receiver, tenant) = started(ServerChoice::Shared).await;
    // One delivery waits in the database, two are dead, and many are through.
    let late = tenant.receive(&receiver, "/late", "late").await.unwrap();
    receiver.script("/late", Answer::status(503).header("Retry-After", "3600"));
    receiver.script("/dead", Answer::status(410));
    tenant.receive(&receiver, "/dead", "dead").await.unwrap();
    let delivered = publish(&tenant, 20).await;
    tenant.publish_number("late", 0).await.unwrap();
    tenant.publish_number("dead", 0).await.unwrap();
    all_arrived(&receiver, &PATHS, &delivered).await;
    // The one that waits is counted.
    in_queue(&stack, 1).await;
    // One has failed, and its next turn waits in the queue.
    tenant.receive(&receiver, "/retry", "retry").await.unwrap();
    receiver.script("/retry", Script::fail_first(1, 500));
    let retried = tenant.publish_number("retry", 0).await.unwrap();
    receiver.wait_for("/retry", 1).await;
    stop_worker(&mut stack).await;
    in_queue(&stack, 2).await;

    let lost = publish(&tenant, 30).await;
    in_queue(&stack, 62).await;
    let jetstream = jetstream::new(connect_nats(&stack.nats_url().unwrap()).await.unwrap());
    let name = format!("{}_DELIVER", stack.prefix().to_uppercase());
    jetstream.get_stream(&name).await.unwrap().purge().await.unwrap();
    let kept = publish(&tenant, 10).await;
    in_queue(&stack, 21).await;

    let rehearsal = reconcile(&stack, &["--dry-run"]).await;
    assert!(rehearsal.contains("deliveries 123, in the queue 20, lost 61, put back 0"), "{rehearsal}");
    let done = reconcile(&stack, &[]).await;
    assert!(done.contains("lost 61, put back 61"), "{done}");
    start_worker(&mut stack).await;
    let all = delivered.iter().chain(&lost).chain(&kept).cloned().collect();
    let repeats = all_arrived(&receiver, &PATHS, &all).await;
    assert_eq!(repeats, 0, "none was lost that is not said to be");
    assert_eq!(receiver.count("/late"), 1, "{late} waits until its time");
    receiver.wait_for("/retry", 2).await;
    assert_eq!(attempts(&tenant, &retried, 2).await, [1, 2], "what failed before is counted once");
    let again = reconcile(&stack, &[]).await;
    assert!(again.contains("lost 0, put back 0"), "{again}");
    stack.shutdown().await.unwrap();
}
