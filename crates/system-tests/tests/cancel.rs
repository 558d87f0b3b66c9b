//! No delivery starts once the cancellation of its event was answered, over the real processes, on each backend.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use devkit::{
    client::ApiClient,
    process::Signal,
    processes::Role,
    receiver::{Answer, Receiver},
    servers::Durability,
    stack::{Backend, ServerChoice, Stack, StackOptions},
    wait_until,
};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use system_tests::{QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived, arrivals};

const DEADLINE: Duration = Duration::from_secs(60);

struct Bus {
    stack: Stack,
    receiver: Receiver,
    tenant: Tenant,
    /// The tenant at another publisher, where there are two.
    elsewhere: ApiClient,
}

impl Bus {
    async fn start(backend: Backend) -> Self {
        let replicas = if backend == Backend::Memory { 1 } else { 2 };
        Self::with(
            StackOptions::default()
                .backend(backend)
                .replicas(Role::Publisher, replicas)
                .replicas(Role::DeliveryWorker, replicas),
        )
        .await
    }

    async fn with(options: StackOptions) -> Self {
        let publishers = options.replicas[&Role::Publisher];
        // Few slots, of which one connection takes half, so that what is published waits.
        let options = options
            .env("EVENT_BUS_LANES", 1)
            .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__IN_FLIGHT", 8)
            .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 50)
            .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__CAP_MS", 50);
        let mut stack = Stack::start(options).await.unwrap();
        let receiver = Receiver::start().await.unwrap();
        let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
        let key = json!({ "name": "publishes", "scopes": ["publish"] });
        let key = stack.admin(0).unwrap().create_key(&tenant.organization, &key).await.unwrap().expect(201);
        let elsewhere = stack.client(publishers - 1).unwrap().with_token(key.text("/key"));
        Self { stack, receiver, tenant, elsewhere }
    }

    /// Publishes so many events in one request, and gives their ids once they are in the queue.
    async fn publish(&self, event_type: &str, events: usize) -> Vec<String> {
        let events: Vec<Value> =
            (0..events).map(|n| json!({ "type": event_type, "data": { "n": n } })).collect();
        let reply = self.tenant.api.publish(&Value::from(events)).await.unwrap().expect(202);
        let pool = self.stack.owner_pool().await.unwrap();
        wait_until("the fan-out", DEADLINE, || async {
            let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox WHERE finished_at IS NULL")
                .fetch_one(&pool)
                .await
                .unwrap();
            if left == 0 { Ok(()) } else { Err(left) }
        })
        .await;
        pool.close().await;
        let items = reply.body["items"].as_array().unwrap();
        items.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Cancels an event, and gives when that was answered.
    async fn cancel(&self, event: &str) -> Instant {
        self.try_cancel(event).await.expect("it was not delivered before")
    }

    /// `None` for one that is known to be delivered.
    async fn try_cancel(&self, event: &str) -> Option<Instant> {
        let path = format!("/v1/events/{event}/cancel");
        let reply = self.elsewhere.post(&path, &Value::Null).await.unwrap().expect(200);
        let answered = Instant::now();
        (reply.body["cancelled"].as_array().unwrap().len() == 1).then_some(answered)
    }

    /// Cancels all of these, some side by side, and gives when each was answered. More at a time than a publisher has
    /// connections to the database would wait for those, and be told to come again.
    async fn cancel_all(&self, events: &[String]) -> BTreeMap<String, Instant> {
        let cancelled: Vec<_> = events
            .iter()
            .map(|event| async { Some((event.clone(), self.try_cancel(event).await?)) })
            .collect();
        stream::iter(cancelled).buffer_unordered(8).filter_map(std::future::ready).collect().await
    }

    /// Waits until all others have arrived and nothing is left, and gives the requests for a cancelled event that
    /// came after its cancellation was answered.
    async fn late(&self, path: &str, all: &[String], cancelled: &BTreeMap<String, Instant>) -> Vec<Duration> {
        let others: BTreeSet<String> =
            all.iter().filter(|event| !cancelled.contains_key(*event)).cloned().collect();
        all_arrived(&self.receiver, &[path], &others).await;
        self.is_empty().await;
        let requests = self.receiver.received(path);
        let late = requests.iter().filter_map(|request| {
            let answered = cancelled.get(request.json()["id"].as_str().unwrap())?;
            request.at.checked_duration_since(*answered).filter(|late| !late.is_zero())
        });
        late.collect()
    }

    async fn is_empty(&self) {
        wait_until("an empty queue", DEADLINE, || async {
            let left = self.stack.undelivered().await.unwrap();
            if left == 0 { Ok(()) } else { Err(left) }
        })
        .await;
    }

    async fn status(&self, event: &str) -> Value {
        let path = format!("/v1/events/{event}/deliveries");
        self.tenant.api.get(&path).await.unwrap().expect(200).body["items"][0].clone()
    }

    /// Waits until the only delivery of an event is as it should be.
    async fn becomes(&self, event: &str, wanted: impl Fn(&Value) -> bool) {
        wait_until("the delivery's state", DEADLINE, || async {
            let one = self.status(event).await;
            if wanted(&one) { Ok(()) } else { Err(one) }
        })
        .await;
    }

    async fn end(self) {
        self.stack.shutdown().await.unwrap();
    }
}

/// From a queue that two slow workers take seconds to empty, while they do.
async fn nothing_starts_from_a_backlog(bus: Bus) {
    const EVENTS: usize = 200;
    bus.tenant.receive(&bus.receiver, "/slow", "order").await.unwrap();
    bus.receiver.script("/slow", Answer::ok().after(Duration::from_millis(250)));
    let events = bus.publish("order", EVENTS).await;
    bus.receiver.wait_for("/slow", 8).await;
    // Some are delivered, some are under way, most of them wait.
    let chosen: Vec<String> = events.iter().step_by(3).cloned().collect();
    let cancelled = bus.cancel_all(&chosen).await;
    assert_eq!(bus.late("/slow", &events, &cancelled).await, Vec::<Duration>::new());
    let arrived = arrivals(&bus.receiver, "/slow");
    let spared = cancelled.keys().filter(|event| !arrived.contains_key(*event)).count();
    assert!(spared > 0, "none was cancelled in time, so this says nothing");
    bus.end().await;
}

async fn nothing_starts_on_each_backend(backend: Backend) {
    nothing_starts_from_a_backlog(Bus::start(backend).await).await;
}

/// What fails after its cancellation is not tried again, and what waits for its retry has had its last attempt.
async fn what_is_in_flight_or_waits_is_not_retried(backend: Backend) {
    let bus = Bus::start(backend).await;
    let (connection, _) = bus.tenant.webhook("hook", &bus.receiver.url("/hook")).await.unwrap();
    let long =
        json!({ "connectionId": connection, "eventType": "long", "retryPolicy": { "delaysMs": [600_000] } });
    bus.tenant.api.subscribe(&long).await.unwrap().expect(201);
    bus.tenant.subscribe(&connection, "short").await.unwrap();

    bus.receiver.script("/hook", Answer::status(500));
    let waits = bus.publish("long", 2).await;
    for event in &waits {
        bus.becomes(event, |one| one["status"] == "waiting" && one.get("nextAttemptAt").is_some()).await;
    }
    bus.cancel(&waits[0]).await;

    bus.receiver.script("/hook", Answer::status(500).after(Duration::from_secs(2)));
    let in_flight = bus.publish("short", 1).await;
    wait_until("an attempt under way", DEADLINE, || async {
        let n = bus.receiver.in_flight();
        if n > 0 { Ok(()) } else { Err(n) }
    })
    .await;
    bus.cancel(&in_flight[0]).await;
    bus.becomes(&in_flight[0], |one| one["attempts"][0].is_object()).await;
    bus.receiver.script("/hook", Answer::ok());

    // The other one comes again, and with it whatever else waits.
    let pool = bus.stack.owner_pool().await.unwrap();
    sqlx::query("UPDATE delivery_states SET due_at = now() WHERE state = 'waiting'")
        .execute(&pool)
        .await
        .unwrap();
    pool.close().await;
    bus.becomes(&waits[1], |one| one["status"] == "delivered").await;
    bus.is_empty().await;
    let arrived = arrivals(&bus.receiver, "/hook");
    assert_eq!([&waits[0], &waits[1], &in_flight[0]].map(|event| arrived[event]), [1, 2, 1]);
    for event in [&waits[0], &in_flight[0]] {
        assert_eq!(bus.status(event).await["status"], "cancelled");
    }
    bus.end().await;
}

/// The workers stand still while everything is cancelled: what they are handed meanwhile reaches them before the
/// hints do.
async fn a_worker_that_stood_still_begins_with_what_it_missed(backend: Backend) {
    let mut bus = Bus::start(backend).await;
    bus.tenant.receive(&bus.receiver, "/all", "order").await.unwrap();
    let first = bus.publish("order", 20).await;
    all_arrived(&bus.receiver, &["/all"], &first.into_iter().collect()).await;
    for round in 0..5 {
        for worker in 0..2 {
            bus.stack.worker(worker).signal(Signal::STOP).unwrap();
        }
        let events = bus.publish("order", 20).await;
        let (cancelled, others) = events.split_at(15);
        let cancelled = bus.cancel_all(cancelled).await;
        for worker in 0..2 {
            bus.stack.worker(worker).signal(Signal::CONT).unwrap();
        }
        assert_eq!(bus.late("/all", &events, &cancelled).await, Vec::<Duration>::new(), "round {round}");
        let arrived = arrivals(&bus.receiver, "/all");
        assert!(others.iter().all(|event| arrived[event] == 1));
    }
    bus.end().await;
}

/// The hints are lost with the broker's connections; the messages are not.
#[tokio::test]
async fn hints_that_were_lost_are_made_up_for() {
    let options = StackOptions::default()
        .servers(ServerChoice::Own(Durability::Fast))
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS);
    let mut bus = Bus::with(options).await;
    bus.tenant.receive(&bus.receiver, "/all", "order").await.unwrap();
    let first = bus.publish("order", 20).await;
    all_arrived(&bus.receiver, &["/all"], &first.into_iter().collect()).await;
    bus.stack.worker(0).signal(Signal::STOP).unwrap();
    let events = bus.publish("order", 20).await;

    // Nobody can be told. It is recorded, and the answer says what is certain.
    bus.stack.nats().kill().await.unwrap();
    let path = format!("/v1/events/{}/cancel", events[0]);
    let refused = bus.elsewhere.post(&path, &Value::Null).await.unwrap().expect(503);
    assert_eq!(refused.body["type"], "urn:event-bus:problem:unconfirmed");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(bus.status(&events[0]).await["status"], "cancelled");

    bus.stack.nats().restart().await.unwrap();
    wait_until("the publisher to be connected again", DEADLINE, || async {
        let reply = bus.elsewhere.post(&path, &Value::Null).await.unwrap();
        if reply.status == 200 { Ok(()) } else { Err(reply.body) }
    })
    .await;
    let cancelled = bus.cancel_all(&events[..15]).await;
    bus.stack.worker(0).signal(Signal::CONT).unwrap();
    assert_eq!(bus.late("/all", &events, &cancelled).await, Vec::<Duration>::new());
    bus.end().await;
}

/// Where no hints are, the database is asked.
#[tokio::test]
async fn without_hints_nothing_starts_either() {
    for backend in [Backend::Jetstream, Backend::Postgres] {
        let options = StackOptions::default()
            .backend(backend)
            .env("EVENT_BUS_NOTIFY__STRATEGY", "polling")
            .env("EVENT_BUS_NOTIFY__POLL_MS", 100);
        nothing_starts_from_a_backlog(Bus::with(options).await).await;
    }
}

macro_rules! on_every_backend {
    ($($case:ident: $($module:ident $backend:ident),+;)*) => {
        $(mod $case {
            $(#[tokio::test] async fn $module() { super::$case(super::Backend::$backend).await })+
        })*
    };
}

on_every_backend! {
    nothing_starts_on_each_backend: jetstream Jetstream, postgres Postgres, memory Memory;
    what_is_in_flight_or_waits_is_not_retried: jetstream Jetstream, postgres Postgres, memory Memory;
    // The process of every role cannot be asked while it stands still.
    a_worker_that_stood_still_begins_with_what_it_missed: jetstream Jetstream, postgres Postgres;
}
