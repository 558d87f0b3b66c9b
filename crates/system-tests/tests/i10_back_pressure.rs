//! Invariant I10 end to end: when what is behind the publishers stands still or is full, they say so before their memory
//! grows; and what they have accepted arrives once it goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use devkit::{
    client::Reply,
    process::{Signal, children_of},
    processes::Role,
    receiver::{Answer, Receiver},
    servers::Durability,
    stack::{ServerChoice, Stack, StackOptions},
    wait_until,
};
use serde_json::json;
use system_tests::{QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived};
use tokio::task::JoinSet;

const DEADLINE: Duration = Duration::from_secs(90);

/// What a publisher may take more than before: many times what it keeps by its configuration here, and far less than what
/// it is offered.
const MORE: u64 = 160 * 1024 * 1024;

/// The memory of a process, bytes (proc_pid_status(5)).
fn memory(stack: &mut Stack) -> u64 {
    let pid = stack.publisher(0).id().unwrap().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Publishes large events from many clients at once, whatever is answered.
struct Flood {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

#[derive(Default)]
struct Seen {
    accepted: BTreeSet<String>,
    /// How often each status was answered.
    statuses: BTreeMap<u16, usize>,
    /// The last parts of the types of problems.
    problems: BTreeSet<String>,
    /// Answers of 503 that do not say when to try again.
    without_retry_after: usize,
}

impl Seen {
    fn note(&mut self, reply: &Reply) {
        *self.statuses.entry(reply.status).or_insert(0) += 1;
        if reply.status == 202 {
            self.accepted.insert(reply.id().to_owned());
            return;
        }
        self.problems.insert(reply.text("/type").rsplit(':').next().unwrap().to_owned());
        if reply.status == 503 && !reply.headers.contains_key("retry-after") {
            self.without_retry_after += 1;
        }
    }
}

impl Flood {
    fn start(tenant: &Tenant, clients: usize, bytes: usize) -> Self {
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let mut tasks = JoinSet::new();
        let event = json!({ "type": "load.test", "data": "x".repeat(bytes) });
        for _ in 0..clients {
            let (api, event, seen, stop) =
                (tenant.api.clone(), event.clone(), Arc::clone(&seen), Arc::clone(&stop));
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // A client that gave up learns nothing.
                    let Ok(reply) = api.publish(&event).await else { continue };
                    seen.lock().unwrap().note(&reply);
                    if reply.status != 202 {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            });
        }
        Self { seen, stop, clients: tasks }
    }

    fn count(&self, status: u16) -> usize {
        self.seen.lock().unwrap().statuses.get(&status).copied().unwrap_or(0)
    }

    async fn more(&self, status: u16, n: usize) {
        let goal = self.count(status) + n;
        wait_until("more answers", DEADLINE, || async {
            let seen = self.seen.lock().unwrap();
            let count = seen.statuses.get(&status).copied().unwrap_or(0);
            if count >= goal { Ok(()) } else { Err((seen.statuses.clone(), seen.problems.clone())) }
        })
        .await;
    }

    async fn finish(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        assert!(seen.statuses.keys().all(|status| [202, 503].contains(status)), "{:?}", seen.statuses);
        assert_eq!(seen.without_retry_after, 0);
        seen
    }
}

fn options() -> StackOptions {
    StackOptions::default()
        .servers(ServerChoice::Own(Durability::Fast))
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        .role_env(Role::Publisher, "EVENT_BUS_PUBLISH__MAX_BODY_BYTES", 1_048_576)
        .role_env(Role::Publisher, "EVENT_BUS_PUBLISH__MAX_EVENT_BYTES", 1_048_576)
        .role_env(Role::Publisher, "EVENT_BUS_PUBLISH__MAX_WAITING_BYTES", 4_194_304)
}

async fn started(options: StackOptions) -> (Stack, Receiver, Tenant) {
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/all", "load.*").await.unwrap();
    (stack, receiver, tenant)
}

/// Postgres is many processes; one that is stopped holds its connection and answers nothing.
fn signal_postgres(stack: &mut Stack, signal: Signal) {
    let server = stack.postgres().id().unwrap();
    server.signal(signal).unwrap();
    for child in children_of(server.pid).unwrap() {
        child.signal(signal).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_a_database_that_is_frozen_makes_publishers_refuse_and_not_grow() {
    let options = options()
        .role_env(Role::Publisher, "EVENT_BUS_POSTGRES__ACQUIRE_TIMEOUT_MS", 1_000)
        .role_env(Role::Publisher, "EVENT_BUS_POSTGRES__STATEMENT_TIMEOUT_MS", 1_000);
    let (mut stack, receiver, tenant) = started(options).await;
    // 32 MB are offered at a time, and 400 MB while it is frozen.
    let flood = Flood::start(&tenant, 64, 500_000);
    flood.more(202, 50).await;
    let before = memory(&mut stack);
    signal_postgres(&mut stack, Signal::STOP);
    flood.more(503, 800).await;
    let frozen = memory(&mut stack);
    signal_postgres(&mut stack, Signal::CONT);
    flood.more(202, 20).await;
    let seen = flood.finish().await;
    assert!(frozen < before + MORE, "{before} bytes before, {frozen} while the database was frozen");
    all_arrived(&receiver, &["/all"], &seen.accepted).await;
    stack.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_a_delivery_stream_that_is_full_makes_publishers_refuse_and_not_grow() {
    let options = options().env("EVENT_BUS_STREAMS__DELIVER__MAX_BYTES", 2_097_152).role_env(
        Role::Publisher,
        "EVENT_BUS_PUBLISH__MAX_OUTBOX_EVENTS",
        100,
    );
    let (mut stack, receiver, tenant) = started(options).await;
    receiver.script("/all", Answer::ok().after(Duration::from_millis(1_500)));
    let flood = Flood::start(&tenant, 32, 50_000);
    let before = memory(&mut stack);
    flood.more(503, 200).await;
    assert!(flood.seen.lock().unwrap().problems.contains("backlog"));
    let full = memory(&mut stack);
    assert!(full < before + MORE, "{before} bytes before, {full} with a full stream");
    receiver.script("/all", Answer::ok());
    // What waits is fanned out, and there is room again.
    flood.more(202, 100).await;
    let seen = flood.finish().await;
    all_arrived(&receiver, &["/all"], &seen.accepted).await;
    stack.shutdown().await.unwrap();
}
