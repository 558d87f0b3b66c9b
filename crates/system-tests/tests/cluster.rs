//! Invariant I1 while the broker loses nodes, streams and consumers, and while the network loses everything: nothing is
//! lost, no process has to be started anew, and the probes tell the truth.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use async_nats::jetstream;
use bus_core::{
    config::load_common,
    nats::Nats,
    streams::{Loss, apply, existing, plan},
};
use devkit::{
    processes::Role,
    proxy::Network,
    receiver::{Answer, Receiver},
    servers::{Durability, NatsCluster, Tools, connect_nats},
    stack::{ServerChoice, Stack, StackOptions},
    wait_until,
};
use jiff::Timestamp;
use system_tests::{ARRIVAL, Load, QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived};

const PATHS: [&str; 2] = ["/a", "/b"];
const DEADLINE: Duration = Duration::from_secs(60);

fn options() -> StackOptions {
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

/// A number from the environment, for a longer run than the gate's.
fn from_environment(name: &str, gate: usize) -> usize {
    std::env::var(name).map_or(gate, |text| text.parse().unwrap())
}

/// `BUS_TEST_LEADER_KILLS=10` for the long form.
#[tokio::test]
async fn i1_the_node_that_leads_is_killed_and_then_every_node_is_restarted_in_turn() {
    let (mut stack, receiver, tenant) =
        started(options().cluster().replicas(Role::DeliveryWorker, 2).replicas(Role::Publisher, 2)).await;
    let deliver = format!("{}_deliver", stack.prefix()).to_ascii_uppercase();
    let second = Tenant { api: tenant.api.at(stack.publisher(1).http_url()), ..tenant.clone() };
    let load = Load::start(&[tenant, second]);
    for _ in 0..from_environment("BUS_TEST_LEADER_KILLS", 3) {
        load.more(100).await;
        let cluster = stack.nats_cluster();
        let leader = wait_until("a node to lead the deliveries", DEADLINE, || async {
            cluster.leader(&deliver).await.map_err(|error| format!("{error:#}"))
        })
        .await;
        stack.nats_cluster().node(leader).kill().await.unwrap();
        load.more(100).await;
        stack.nats_cluster().restart(leader).await.unwrap();
    }
    for node in 0..stack.nats_cluster().nodes().len() {
        stack.nats_cluster().node(node).stop().await.unwrap();
        load.more(50).await;
        stack.nats_cluster().restart(node).await.unwrap();
    }
    load.more(100).await;
    let accepted = load.finish().await;
    let repeats = all_arrived(&receiver, &PATHS, &accepted).await;
    println!("{} events, {repeats} repeats", accepted.len());
    stack.shutdown().await.unwrap();
}

/// Publishes so many events that are all accepted.
async fn publish(tenant: &Tenant, n: usize) -> BTreeSet<String> {
    let mut accepted = BTreeSet::new();
    for n in 0..n {
        accepted.insert(tenant.publish_number("load.test", n).await.unwrap());
    }
    accepted
}

async fn processes_are_as_before(stack: &mut Stack, before: &[u32]) {
    let now: Vec<u32> = stack.processes().map(|process| process.id().unwrap().pid).collect();
    assert_eq!(now, before);
    for process in stack.processes() {
        process.wait_ready().await.unwrap();
    }
}

#[tokio::test]
async fn consumers_and_streams_that_are_deleted_underneath_come_back() {
    let (mut stack, receiver, tenant) = started(options()).await;
    let before: Vec<u32> = stack.processes().map(|process| process.id().unwrap().pid).collect();
    let context = jetstream::new(connect_nats(&stack.nats_url().unwrap()).await.unwrap());
    let name = |stream: &str| format!("{}_{stream}", stack.prefix()).to_ascii_uppercase();
    let (deliver, dead, audit) = (name("deliver"), name("dead"), name("audit"));
    all_arrived(&receiver, &PATHS, &publish(&tenant, 10).await).await;

    let stream = context.get_stream(&deliver).await.unwrap();
    for lane in 0..4 {
        stream.delete_consumer(&format!("lane-{lane}")).await.unwrap();
    }
    all_arrived(&receiver, &PATHS, &publish(&tenant, 10).await).await;

    for stream in [&deliver, &dead, &audit] {
        context.delete_stream(stream).await.unwrap();
    }
    // Accepted while there is no queue, and delivered when there is one again.
    let mut accepted = publish(&tenant, 10).await;
    wait_until("the streams to be there again", DEADLINE, || async {
        for stream in [&deliver, &dead, &audit] {
            context.get_stream(stream).await.map_err(|error| format!("{stream}: {error}"))?;
        }
        Ok::<_, String>(())
    })
    .await;
    accepted.append(&mut publish(&tenant, 10).await);
    all_arrived(&receiver, &PATHS, &accepted).await;
    receiver.script("/a", Answer::status(410));
    let given_up = tenant.publish_number("load.test", 0).await.unwrap();
    wait_until("the dead letter in its stream, and history", ARRIVAL, || async {
        let dead = context.get_stream(&dead).await.map_err(|error| error.to_string())?;
        if dead.cached_info().state.messages == 0 {
            return Err("no dead letter".to_owned());
        }
        let path = format!("/v1/events/{given_up}/deliveries");
        let deliveries = tenant.api.get(&path).await.map_err(|error| error.to_string())?;
        let items = deliveries.body["items"].as_array().cloned().unwrap_or_default();
        let tried = |status: &str| items.iter().any(|item| item["status"] == status);
        if tried("dead") && tried("delivered") { Ok(()) } else { Err(deliveries.body.to_string()) }
    })
    .await;
    let said = stack.all_logs();
    assert!(said.contains("The stream was gone with all that it held"), "somebody has said so");
    processes_are_as_before(&mut stack, &before).await;
    stack.shutdown().await.unwrap();
}

/// While an outage lasts: which processes must say that they are not ready, soon, and until its end. All of them are
/// alive throughout.
async fn outage(stack: &mut Stack, seconds: usize, not_ready: &[Role], missing: &str) {
    /// Two looks of the supervisor, with all that it waits for.
    const SOON: Duration = Duration::from_secs(25);
    let begun = Instant::now();
    let length = Duration::from_secs(seconds as u64).max(SOON + Duration::from_secs(5));
    while begun.elapsed() < length {
        for process in stack.processes() {
            let (role, late) = (process.role(), begun.elapsed() > SOON);
            let (alive, said) = process.admin_get("/healthz").await.unwrap();
            assert_eq!(alive, 200, "{role:?} after {:?}: {said}", begun.elapsed());
            let (ready, said) = process.admin_get("/readyz").await.unwrap();
            if not_ready.contains(&role) {
                assert!(!late || (ready == 503 && said.contains(missing)), "{role:?}: {ready} {said}");
            } else {
                assert_eq!(ready, 200, "{role:?}: {said}");
            }
        }
        // Between two looks of a probe.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// The broker has each stream where its placement says, and moves one that is to be elsewhere.
#[tokio::test]
async fn a_stream_is_where_its_placement_says() {
    let cluster = NatsCluster::private(&Tools::locate().unwrap()).await.unwrap();
    let url = cluster.url();
    let configured = async |all: &str| {
        let variables = [
            ("DATABASE_URL", "postgres://not.used/"),
            ("NATS_URL", &*url),
            ("EVENT_BUS_NATS__PLACEMENT", all),
            ("EVENT_BUS_STREAMS__API__PLACEMENT", r#"{cluster="bus", tags=["node:n2"]}"#),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let nats = Nats::connect(&load_common(None, variables).unwrap(), "test").await.unwrap();
        nats.wait_for_server().await.unwrap();
        nats
    };
    let planned =
        async |nats: &Nats| plan(&existing(nats, Timestamp::UNIX_EPOCH).await.unwrap(), &nats.streams);
    let applied = async |nats: &Nats| {
        let plan = planned(nats).await;
        apply(nats, &plan, Loss::Refused, Timestamp::UNIX_EPOCH).await.unwrap();
        assert!(planned(nats).await.changes.is_empty());
    };
    let is_on = async |stream: &str, node: usize| {
        wait_until("the stream to be there", DEADLINE, || async {
            match cluster.leader(stream).await {
                Ok(leader) if leader == node => Ok(()),
                other => Err(other.map_err(|error| format!("{error:#}"))),
            }
        })
        .await;
    };
    applied(&configured(r#"{tags=["node:n1"]}"#).await).await;
    is_on("BUS_DELIVER", 1).await;
    is_on("BUS_API", 2).await;

    let elsewhere = configured(r#"{tags=["node:n0"]}"#).await;
    let plan = planned(&elsewhere).await;
    let changed: BTreeSet<_> = plan.fields().map(|(_, field)| field.field).collect();
    assert_eq!(changed, BTreeSet::from(["placement"]));
    applied(&elsewhere).await;
    is_on("BUS_DELIVER", 0).await;
    is_on("BUS_API", 2).await;
}

/// `BUS_TEST_OUTAGE_S=180` for the long form.
#[tokio::test]
async fn a_partition_from_nats_is_told_and_survived() {
    let (mut stack, receiver, tenant) = started(options().proxied()).await;
    let before: Vec<u32> = stack.processes().map(|process| process.id().unwrap().pid).collect();
    all_arrived(&receiver, &PATHS, &publish(&tenant, 10).await).await;
    stack.proxies().nats[0].set(Network::BlackHole);
    let mut accepted = publish(&tenant, 10).await;
    let length = from_environment("BUS_TEST_OUTAGE_S", 0);
    outage(&mut stack, length, &[Role::DeliveryWorker, Role::CronScheduler, Role::Archiver], "nats").await;
    accepted.append(&mut publish(&tenant, 10).await);
    stack.proxies().nats[0].set(Network::Open);
    accepted.append(&mut publish(&tenant, 10).await);
    all_arrived(&receiver, &PATHS, &accepted).await;
    processes_are_as_before(&mut stack, &before).await;
    stack.shutdown().await.unwrap();
}

/// `BUS_TEST_OUTAGE_S=180` for the long form.
#[tokio::test]
async fn a_partition_from_postgres_is_told_and_survived() {
    let (mut stack, receiver, tenant) = started(options().proxied()).await;
    let before: Vec<u32> = stack.processes().map(|process| process.id().unwrap().pid).collect();
    all_arrived(&receiver, &PATHS, &publish(&tenant, 10).await).await;
    // Slow at first, so that everybody waits for an answer when none comes any more.
    stack.proxies().postgres.set(Network::Slow(Duration::from_millis(400)));
    publish(&tenant, 3).await;
    stack.proxies().postgres.set(Network::BlackHole);
    let asked = Instant::now();
    let event = serde_json::json!({ "type": "load.test" });
    let refused = tenant.api.publish(&event).await.unwrap().expect(503);
    assert!(refused.headers.contains_key("retry-after"), "{:?}", refused.headers);
    println!("refused after {:?}", asked.elapsed());
    let length = from_environment("BUS_TEST_OUTAGE_S", 0);
    outage(&mut stack, length, &Role::ALL, "postgres").await;
    stack.proxies().postgres.set(Network::Open);
    processes_are_as_before(&mut stack, &before).await;
    all_arrived(&receiver, &PATHS, &publish(&tenant, 10).await).await;
    stack.shutdown().await.unwrap();
}
