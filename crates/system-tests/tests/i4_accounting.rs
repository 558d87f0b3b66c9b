//! Invariant I4 under the worst weather: Postgres and NATS are killed again and again under load, and
//! afterwards the books agree. Every accepted event is accounted for at every subscriber, history names
//! exactly the attempts that the subscribers saw, and no attempt is charged for what was not sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use devkit::{
    processes::Role,
    receiver::{Answer, Receiver, Script},
    servers::Durability,
    stack::{Backend, ServerChoice, Stack, StackOptions},
    wait_until,
};
use serde_json::Value;
use system_tests::{Load, QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant};

const PATHS: [&str; 3] = ["/steady", "/flaky", "/hopeless"];

/// How often each server is killed.
const KILLS: usize = 10;

/// Accepted events between one fault and the next.
const BETWEEN: usize = 15;

/// The longest way: what a frozen hold had comes again after `ack_wait`, and then still has its retries.
const SETTLED: Duration = Duration::from_secs(90);

/// One attempt, as history tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attempt {
    number: u64,
    outcome: String,
}

/// One delivery, as history tells it.
#[derive(Debug, Clone)]
struct Delivery {
    id: String,
    status: String,
    attempts: Vec<Attempt>,
}

/// Every delivery of an event.
async fn history(tenant: &Tenant, event: &str) -> Vec<Delivery> {
    let reply = tenant.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let attempt = |attempt: &Value| Attempt {
        number: attempt["attempt"].as_u64().unwrap(),
        outcome: text(&attempt["outcome"]),
    };
    reply.body["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| Delivery {
            id: text(&item["id"]),
            status: text(&item["status"]),
            attempts: item["attempts"].as_array().unwrap().iter().map(attempt).collect(),
        })
        .collect()
}

/// How often each delivery was received, by `webhook-id`.
fn received(receiver: &Receiver) -> BTreeMap<String, usize> {
    let mut seen = BTreeMap::new();
    for request in PATHS.iter().flat_map(|path| receiver.received(path)) {
        *seen.entry(request.header("webhook-id").to_owned()).or_insert(0) += 1;
    }
    seen
}

/// The numbers that were given to a delivery's attempts. Each but the first follows a failure that was recorded
/// under the number before it; one that occurs twice was attempted again because its end was not recorded.
fn honest_numbers(delivery: &Delivery) -> BTreeSet<u64> {
    let failed = |number| {
        delivery.attempts.iter().any(|attempt| attempt.number == number && attempt.outcome == "failed")
    };
    let numbers: BTreeSet<u64> = delivery.attempts.iter().map(|attempt| attempt.number).collect();
    for number in &numbers {
        assert!(*number == 1 || failed(number - 1), "charged for what did not fail: {delivery:?}");
    }
    numbers
}

#[tokio::test]
async fn i4_after_ten_kills_of_each_server_every_attempt_is_accounted_for() {
    let options = StackOptions::default()
        .backend(Backend::Jetstream)
        .servers(ServerChoice::Own(Durability::Full))
        .replicas(Role::DeliveryWorker, 2)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        // Waits of 1 s and 6 s: the second is parked.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__MAX_ATTEMPTS", 3)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 1_000)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__FACTOR", 6.5)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS)
        // The hopeless one is to be called again and again.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__ENABLED", false);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    // Every fourth attempt fails, so that some deliveries fail twice.
    let answers = (1..=20_000).map(|n| if n % 4 == 0 { Answer::status(500) } else { Answer::ok() });
    receiver.script("/flaky", Script::sequence(answers));
    receiver.script("/hopeless", Answer::status(503));
    for path in PATHS {
        tenant.receive(&receiver, path, "load.*").await.unwrap();
    }

    let load = Load::start(std::slice::from_ref(&tenant));
    for _ in 0..KILLS {
        load.more(BETWEEN).await;
        stack.nats().kill().await.unwrap();
        load.more(BETWEEN).await;
        stack.nats().restart().await.unwrap();
        load.more(BETWEEN).await;
        stack.postgres().kill().await.unwrap();
        stack.postgres().restart().await.unwrap();
    }
    load.more(BETWEEN).await;
    let accepted = load.finish().await;

    wait_until("an empty queue", SETTLED, || async {
        match stack.undelivered().await {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let seen = received(&receiver);
    let mut deliveries = Vec::new();
    for event in &accepted {
        // History lags behind the attempts.
        let of_event = wait_until("every attempt in history, and no other", SETTLED, || async {
            let of_event = history(&tenant, event).await;
            let complete = of_event.len() == PATHS.len()
                && of_event.iter().all(|delivery| {
                    ["delivered", "dead"].contains(&delivery.status.as_str())
                        && seen.get(&delivery.id) == Some(&delivery.attempts.len())
                });
            let counts: Vec<_> = of_event.iter().map(|delivery| seen.get(&delivery.id)).collect();
            if complete { Ok(of_event) } else { Err(format!("{event}: received {counts:?} of {of_event:?}")) }
        })
        .await;
        deliveries.extend(of_event);
    }

    let (mut repeated, mut dead) = (0, 0);
    let mut outcomes: BTreeMap<&str, usize> = BTreeMap::new();
    for delivery in &deliveries {
        repeated += delivery.attempts.len() - honest_numbers(delivery).len();
        dead += usize::from(delivery.status == "dead");
        for attempt in &delivery.attempts {
            *outcomes.entry(&attempt.outcome).or_default() += 1;
        }
    }
    assert!(dead >= accepted.len(), "whoever always fails gives up in the end");
    println!(
        "{KILLS} kills of each server: {} events, {} deliveries ({dead} dead), {} attempts {outcomes:?}, \
         {repeated} of them repeated",
        accepted.len(),
        deliveries.len(),
        seen.values().sum::<usize>(),
    );
    stack.shutdown().await.unwrap();
}
