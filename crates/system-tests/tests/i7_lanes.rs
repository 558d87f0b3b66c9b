//! Invariant I7: a hot organization gets a lane of its own while everything runs. Its neighbours have their lane back,
//! nothing is lost, and no attempt is counted for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_nats::jetstream;
use bus_core::ids::OrganizationId;
use devkit::{
    processes::Role,
    receiver::{Answer, Receiver},
    servers::connect_nats,
    stack::{Backend, Stack, StackOptions},
    wait_until,
};
use futures::TryStreamExt as _;
use rstest::rstest;
use serde_json::{Value, json};
use system_tests::{ARRIVAL, Load, QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived, arrivals};

const LANES: u16 = 2;
/// What is queued when the organization is moved.
const QUEUED: usize = 400;
const DEADLINE: Duration = Duration::from_secs(60);

async fn started(backend: Backend, workers: usize) -> (Stack, Receiver) {
    let options = StackOptions::default()
        .backend(backend)
        .replicas(Role::DeliveryWorker, workers)
        .env("EVENT_BUS_LANES", LANES)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__IN_FLIGHT", 8);
    (Stack::start(options).await.unwrap(), Receiver::start().await.unwrap())
}

fn shared_lane(tenant: &Tenant) -> u16 {
    tenant.organization.parse::<OrganizationId>().unwrap().lane(LANES)
}

/// An organization in that lane.
async fn neighbour(stack: &mut Stack, lane: u16) -> Tenant {
    for n in 0.. {
        let tenant = Tenant::create(stack, &format!("neighbour {n}")).await.unwrap();
        if shared_lane(&tenant) == lane {
            return tenant;
        }
    }
    unreachable!("every other organization has it")
}

async fn publish_many(tenant: &Tenant, event_type: &str, n: usize) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for from in (0..n).step_by(500) {
        let events: Vec<Value> =
            (from..n.min(from + 500)).map(|n| json!({ "type": event_type, "data": { "n": n } })).collect();
        let reply = tenant.api.publish(&Value::from(events)).await.unwrap().expect(202);
        let items = reply.body["items"].as_array().unwrap();
        ids.extend(items.iter().map(|item| item["id"].as_str().unwrap().to_owned()));
    }
    ids
}

/// How many deliveries of the organization are in each lane.
async fn by_lane(stack: &Stack, tenant: &Tenant) -> BTreeMap<u16, usize> {
    let mut lanes = BTreeMap::new();
    if let Some(url) = stack.nats_url() {
        let client = connect_nats(&url).await.unwrap();
        let mut streams = jetstream::new(client.clone()).streams();
        let filter = format!("{}.deliver.*.{}.>", stack.prefix(), tenant.organization);
        while let Some(stream) = streams.try_next().await.unwrap() {
            if !stream.config.subjects.iter().any(|s| s.starts_with(&format!("{}.deliver.", stack.prefix())))
            {
                continue;
            }
            let stream = jetstream::new(client.clone()).get_stream(&stream.config.name).await.unwrap();
            let mut subjects = stream.info_with_subjects(&filter).await.unwrap();
            while let Some((subject, messages)) = subjects.try_next().await.unwrap() {
                let lane: u16 = subject.split('.').nth(2).unwrap().parse().unwrap();
                *lanes.entry(lane).or_insert(0) += messages;
            }
        }
    } else {
        let pool = stack.owner_pool().await.unwrap();
        let rows: Vec<(i16, i64)> = sqlx::query_as(
            "SELECT lane, count(*) FROM delivery_queue WHERE organization_id = $1::uuid GROUP BY lane",
        )
        .bind(&tenant.organization)
        .fetch_all(&pool)
        .await
        .unwrap();
        for (lane, n) in rows {
            lanes.insert(u16::try_from(lane).unwrap(), usize::try_from(n).unwrap());
        }
        pool.close().await;
    }
    lanes
}

async fn set_lane(stack: &mut Stack, tenant: &Tenant, lane: Value) -> Option<u16> {
    let path = format!("/v1/admin/organizations/{}/lane", tenant.organization);
    let admin = stack.admin(0).unwrap();
    let body = json!({ "lane": lane });
    let reply = wait_until("the lane to be set", ARRIVAL, || async {
        let reply = admin.put(&path, &body).await.unwrap();
        // The database broke it off for another transaction's sake, or has no connection free: to be asked again.
        if reply.status == 503 { Err(reply.body) } else { Ok(reply.expect(200)) }
    })
    .await;
    reply.body["lane"].as_u64().map(|lane| lane.try_into().unwrap())
}

/// The numbers of the attempts that history has of these events, which must all be delivered.
async fn attempts(tenant: &Tenant, events: impl Iterator<Item = &String>) -> BTreeSet<u64> {
    let mut numbers = BTreeSet::new();
    for event in events {
        let path = format!("/v1/events/{event}/deliveries");
        wait_until("history", ARRIVAL, || async {
            let reply = tenant.api.get(&path).await.unwrap().expect(200);
            let items = reply.body["items"].as_array().unwrap().clone();
            let delivered = items.iter().all(|item| item["status"] == "delivered") && !items.is_empty();
            if delivered { Ok(()) } else { Err(items) }
        })
        .await;
        let reply = tenant.api.get(&path).await.unwrap().expect(200);
        for attempt in reply.body["items"][0]["attempts"].as_array().unwrap() {
            numbers.insert(attempt["attempt"].as_u64().unwrap());
        }
    }
    numbers
}

#[rstest]
#[case::jetstream(Backend::Jetstream, 2)]
#[case::postgres(Backend::Postgres, 2)]
#[case::memory(Backend::Memory, 1)]
#[tokio::test]
async fn i7_a_hot_organization_leaves_its_neighbours_their_lane(
    #[case] backend: Backend,
    #[case] workers: usize,
) {
    let (mut stack, receiver) = started(backend, workers).await;
    let hot = Tenant::create(&mut stack, "hot").await.unwrap();
    let lane = shared_lane(&hot);
    let neighbour = neighbour(&mut stack, lane).await;
    hot.receive(&receiver, "/hot", "load.*").await.unwrap();
    neighbour.receive(&receiver, "/neighbour", "order.*").await.unwrap();
    receiver.script("/hot", Answer::ok().after(Duration::from_millis(250)));
    let queued = publish_many(&hot, "load.first", QUEUED).await;
    let load = Load::start(std::slice::from_ref(&hot));
    load.more(20).await;

    let own = set_lane(&mut stack, &hot, json!("own")).await.unwrap();
    assert!(own >= LANES, "{own}");
    assert_eq!(set_lane(&mut stack, &hot, json!("own")).await, Some(own), "it has one");
    let waited = publish_many(&neighbour, "order.created", 50).await;
    all_arrived(&receiver, &["/neighbour"], &waited).await;
    assert!(receiver.count("/hot") < QUEUED, "the backlog was not what the neighbour waited for");
    load.more(20).await;
    if backend != Backend::Memory {
        // Whoever shares the lane has it for itself: not even what is published meanwhile passes through it.
        wait_until("a lane without the hot organization", DEADLINE, || async {
            let lanes = by_lane(&stack, &hot).await;
            if lanes.contains_key(&lane) { Err(lanes) } else { Ok(()) }
        })
        .await;
        assert!(by_lane(&stack, &hot).await.contains_key(&own), "it waits in its own");
    }

    // And back again, with what is left.
    assert_eq!(set_lane(&mut stack, &hot, Value::Null).await, None);
    load.more(20).await;
    receiver.script("/hot", Answer::ok());
    let mut accepted = load.finish().await;
    accepted.extend(queued.iter().cloned());
    let repeats = all_arrived(&receiver, &["/hot"], &accepted).await;
    assert_eq!(repeats, 0, "a move is no second delivery");
    assert_eq!(attempts(&hot, queued.iter().take(5).chain(queued.iter().rev().take(5))).await, [1].into());
    wait_until("an empty queue", DEADLINE, || async {
        let left = stack.undelivered().await.unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    stack.shutdown().await.unwrap();
}

#[rstest]
#[case::jetstream(Backend::Jetstream)]
#[case::postgres(Backend::Postgres)]
#[tokio::test]
async fn i7_a_worker_that_is_killed_during_a_move_loses_nothing(#[case] backend: Backend) {
    let (mut stack, receiver) = started(backend, 2).await;
    let hot = Tenant::create(&mut stack, "hot").await.unwrap();
    hot.receive(&receiver, "/hot", "load.*").await.unwrap();
    receiver.script("/hot", Answer::ok().after(Duration::from_millis(250)));
    let queued = publish_many(&hot, "load.first", QUEUED).await;
    let load = Load::start(std::slice::from_ref(&hot));
    for lane in [json!("own"), Value::Null, json!("own")] {
        set_lane(&mut stack, &hot, lane).await;
        load.more(20).await;
        stack.worker(0).sigkill().await.unwrap();
        stack.worker(0).respawn().unwrap();
        stack.worker(0).wait_ready().await.unwrap();
    }
    receiver.script("/hot", Answer::ok());
    let mut accepted = load.finish().await;
    accepted.extend(queued);
    all_arrived(&receiver, &["/hot"], &accepted).await;
    let arrived = arrivals(&receiver, "/hot");
    assert!(arrived.keys().all(|id| accepted.contains(id)), "nobody invents events");
    // At most what was in the killed worker's hands, each time.
    let repeats: usize = arrived.values().map(|n| n - 1).sum();
    assert!(repeats <= 3 * 2 * 8, "{repeats} repeats");
    stack.shutdown().await.unwrap();
}
