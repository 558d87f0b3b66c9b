//! What an answer brings about, over the real processes, on each backend; among it the failings of earlier
//! designs that only a whole bus can show.

use std::{collections::BTreeMap, time::Duration};

use devkit::{
    client::Reply,
    receiver::{Answer, Receiver, Script},
    stack::{Backend, Stack, StackOptions},
    wait_until,
};
use serde_json::{Value, json};
use system_tests::Tenant;

const DEADLINE: Duration = Duration::from_secs(60);

struct Bus {
    stack: Stack,
    receiver: Receiver,
    tenant: Tenant,
}

impl Bus {
    async fn start(backend: Backend) -> Self {
        let options = StackOptions::default()
            .backend(backend)
            .env("EVENT_BUS_WORKER__RETRY__BASE_MS", 50)
            .env("EVENT_BUS_WORKER__RETRY__CAP_MS", 50)
            .env("EVENT_BUS_WORKER__RETRY__MAX_ATTEMPTS", 3)
            .env("EVENT_BUS_WORKER__DEFER_MIN_MS", 100);
        let mut stack = Stack::start(options).await.unwrap();
        let receiver = Receiver::start().await.unwrap();
        let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
        Self { stack, receiver, tenant }
    }

    fn says(&self, path: &str, answers: &[Value]) {
        let answers: Vec<Answer> = answers.iter().map(|body| Answer::ok().body(body.to_string())).collect();
        let last = answers.last().unwrap().clone();
        self.receiver.script(path, Script::sequence(answers).then(last));
    }

    /// A webhook at this path; `more` goes into the request.
    async fn webhook(&self, path: &str, more: Value) -> String {
        let mut new = json!({ "name": path, "kind": "webhook", "url": self.receiver.url(path) });
        new.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.tenant.api.post("/v1/connections", &new).await.unwrap().expect(201).id().to_owned()
    }

    async fn subscribe(&self, connection: &str, event_type: &str, more: Value) -> String {
        let mut wanted = json!({ "connectionId": connection, "eventType": event_type });
        wanted.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.tenant.api.subscribe(&wanted).await.unwrap().expect(201).id().to_owned()
    }

    async fn publish(&self, event_type: &str, id: &str) {
        let event = json!({ "type": event_type, "id": id, "source": "/shop", "data": { "n": 1 } });
        self.tenant.api.publish(&event).await.unwrap().expect(202);
    }

    async fn deliveries(&self, event: &str) -> Vec<Value> {
        let reply = self.tenant.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
        reply.body["items"].as_array().unwrap().clone()
    }

    /// Waits until the only delivery of an event, or that to `subscription`, stands so, and gives it.
    async fn becomes(&self, event: &str, subscription: Option<&str>, status: &str) -> Value {
        wait_until(status, DEADLINE, || async {
            let all = self.deliveries(event).await;
            let found = all.into_iter().find(|one| subscription.is_none_or(|id| one["subscriptionId"] == id));
            match found {
                Some(one) if one["status"] == status => Ok(one),
                other => Err(other),
            }
        })
        .await
    }

    /// Waits until history has so many attempts of a delivery, and gives their outcomes.
    async fn outcomes(&self, event: &str, n: usize) -> Vec<(u64, String)> {
        wait_until("the attempts in history", DEADLINE, || async {
            let all = self.deliveries(event).await;
            let attempts: Vec<(u64, String)> = all[0]["attempts"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| (one["attempt"].as_u64().unwrap(), one["outcome"].as_str().unwrap().to_owned()))
                .collect();
            if attempts.len() >= n { Ok(attempts) } else { Err(attempts) }
        })
        .await
    }

    async fn ack(&self, event: &str, connection: &str) -> Reply {
        let path = format!("/v1/events/{event}/ack");
        self.tenant.api.post(&path, &json!({ "connectionId": connection })).await.unwrap()
    }

    async fn end(self) {
        self.stack.shutdown().await.unwrap();
    }
}

async fn an_answer_says_what_follows(backend: Backend) {
    let bus = Bus::start(backend).await;
    let hook = bus.webhook("/says", json!({ "finalStatuses": [422] })).await;
    bus.subscribe(&hook, "says.*", json!({})).await;

    // Three times later, then taken: no attempt is counted.
    bus.says(
        "/says",
        &[json!({ "retryAfter": 100 }), json!({ "retryAfter": 120, "success": false }), json!({})],
    );
    bus.publish("says.later", "later").await;
    bus.becomes("later", None, "delivered").await;
    let expected = [(1, "deferred"), (1, "deferred"), (1, "delivered")].map(|(n, what)| (n, what.to_owned()));
    assert_eq!(bus.outcomes("later", 3).await, expected);

    // Failures in a 2xx are failures; after three the delivery is dead, with what was said.
    bus.says("/says", &[json!({ "success": false, "error": "out of stock" })]);
    bus.publish("says.no", "no").await;
    let dead = bus.becomes("no", None, "dead").await;
    assert_eq!(dead["reason"], "attempts_exhausted");
    let expected = [(1, "failed"), (2, "failed"), (3, "dead")].map(|(n, what)| (n, what.to_owned()));
    assert_eq!(bus.outcomes("no", 3).await, expected);
    let letters = bus.tenant.api.get("/v1/dead-letters").await.unwrap().expect(200);
    let letter = &letters.body["items"][0];
    assert_eq!(letter["reason"], "attempts_exhausted");
    assert_eq!(letter["attempts"], 3);
    assert!(letter["last"]["error"].as_str().unwrap().contains("out of stock"), "{letter}");

    // Retry-After with 503 is a deferral, too.
    let busy = Answer::status(503).header("retry-after", "1");
    bus.receiver.script("/says", Script::sequence([busy]));
    bus.publish("says.busy", "busy").await;
    bus.becomes("busy", None, "delivered").await;
    let expected = [(1, "deferred"), (1, "delivered")].map(|(n, what)| (n, what.to_owned()));
    assert_eq!(bus.outcomes("busy", 2).await, expected);

    // A status that the connection calls final.
    bus.receiver.script("/says", Answer::status(422));
    bus.publish("says.final", "final").await;
    assert_eq!(bus.becomes("final", None, "dead").await["reason"], "final_status");

    // 410 disables the connection, and says why.
    bus.receiver.script("/says", Answer::status(410));
    bus.publish("says.gone", "gone").await;
    assert_eq!(bus.becomes("gone", None, "dead").await["reason"], "endpoint_gone");
    let connection = bus.tenant.api.get(&format!("/v1/connections/{hook}")).await.unwrap().expect(200);
    assert_eq!(connection.body["enabled"], false);
    assert!(connection.text("/disabledReason").contains("410"));
    assert_eq!(bus.outcomes("gone", 1).await, [(1, "dead".to_owned())]);

    // Repaired, enabled and replayed: everything that died comes, under the same webhook-id.
    let died = bus.receiver.received("/says").last().unwrap().header("webhook-id").to_owned();
    bus.receiver.script("/says", Answer::ok());
    let enabled = json!({ "enabled": true });
    bus.tenant.api.patch(&format!("/v1/connections/{hook}"), &enabled).await.unwrap().expect(200);
    let before = bus.receiver.count("/says");
    let all = json!({ "filter": {} });
    bus.tenant.api.post("/v1/dead-letters/replay", &all).await.unwrap().expect(202);
    for event in ["no", "final", "gone"] {
        bus.becomes(event, None, "delivered").await;
    }
    let again = bus.receiver.received("/says");
    assert_eq!(again.len(), before + 3);
    assert!(again[before..].iter().any(|request| request.header("webhook-id") == died));
    let left = bus.tenant.api.get("/v1/dead-letters").await.unwrap().expect(200);
    assert_eq!(left.body["items"], json!([]));
    bus.end().await;
}

/// A retry policy of its own, a batch, and two subscriptions of one connection: each delivery has its own
/// outcome, found by the event's id.
async fn results_are_mapped_to_their_deliveries(backend: Backend) {
    let bus = Bus::start(backend).await;
    let hook = bus.webhook("/batch", json!({})).await;
    let batch =
        json!({ "batch": { "maxEvents": 4, "maxWaitMs": 3000 }, "retryPolicy": { "delaysMs": [10] } });
    let batched = bus.subscribe(&hook, "b.*", batch).await;
    let single = bus.subscribe(&hook, "b.>", json!({ "retryPolicy": { "maxAttempts": 1 } })).await;
    // For both subscriptions alike: e-2 fails, e-3 is asked for later, the rest is fine.
    let results = json!({ "e-2": { "success": false, "error": "broken" }, "e-3": { "retryAfter": 100 } });
    bus.receiver
        .script("/batch", Answer::ok().body(json!({ "success": true, "results": results }).to_string()));
    let events: Vec<Value> = (1..=4)
        .map(|n| json!({ "specversion": "1.0", "type": "b.x", "id": format!("e-{n}"), "source": "/shop" }))
        .collect();
    bus.tenant.api.publish_batch(&events).await.unwrap().expect(202);
    for event in ["e-1", "e-4"] {
        bus.becomes(event, Some(&batched), "delivered").await;
        bus.becomes(event, Some(&single), "delivered").await;
    }
    // One delay is two attempts; one attempt is one.
    for (subscription, attempts) in [(&batched, 2), (&single, 1)] {
        let dead = bus.becomes("e-2", Some(subscription), "dead").await;
        assert_eq!(dead["reason"], "attempts_exhausted");
        let path = format!("/v1/dead-letters/{}", dead["id"].as_str().unwrap());
        let letter = bus.tenant.api.get(&path).await.unwrap().expect(200);
        assert_eq!(letter.body["attempts"], attempts);
    }
    bus.receiver.script("/batch", Answer::ok());
    bus.becomes("e-3", Some(&batched), "delivered").await;
    bus.becomes("e-3", Some(&single), "delivered").await;
    let first: Vec<_> = bus
        .receiver
        .received("/batch")
        .into_iter()
        .filter(|request| request.header("content-type").starts_with("application/cloudevents-batch+json"))
        .collect();
    let ids: Vec<Vec<String>> = first
        .iter()
        .map(|request| {
            let body = request.json();
            body.as_array().unwrap().iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect()
        })
        .collect();
    let mut largest = ids.iter().max_by_key(|ids| ids.len()).unwrap().clone();
    largest.sort();
    assert_eq!(largest, ["e-1", "e-2", "e-3", "e-4"], "{ids:?}");
    bus.end().await;
}

/// Filters are evaluated, for what is published and for what is replayed; falsy payloads arrive as they are.
async fn filters_are_applied_and_falsy_payloads_arrive(backend: Backend) {
    let bus = Bus::start(backend).await;
    let hook = bus.webhook("/filtered", json!({})).await;
    let filtered = bus.subscribe(&hook, "f.x", json!({ "filter": "$[?@.total > 100]" })).await;
    let all = bus.webhook("/all", json!({})).await;
    bus.subscribe(&all, "f.x", json!({})).await;
    let payloads =
        [json!(0), json!(false), json!(""), json!(null), json!([{ "total": 5 }]), json!([{ "total": 500 }])];
    for (n, data) in payloads.iter().enumerate() {
        let event = json!({ "type": "f.x", "id": format!("f-{n}"), "source": "/shop", "data": data });
        bus.tenant.api.publish(&event).await.unwrap().expect(202);
    }
    let arrived: BTreeMap<String, Value> = bus
        .receiver
        .wait_for("/all", payloads.len())
        .await
        .iter()
        .map(|request| (request.json()["id"].as_str().unwrap().to_owned(), request.json()["data"].clone()))
        .collect();
    for (n, data) in payloads.iter().enumerate() {
        assert_eq!(arrived.get(&format!("f-{n}")), Some(data));
    }
    bus.becomes("f-5", Some(&filtered), "delivered").await;
    let since = json!({ "since": "2026-01-01T00:00:00Z" });
    let path = format!("/v1/subscriptions/{filtered}/replay");
    let job = bus.tenant.api.post(&path, &since).await.unwrap().expect(202);
    let path = format!("/v1/replays/{}", job.id());
    wait_until("the replay's end", DEADLINE, || async {
        let job = bus.tenant.api.get(&path).await.unwrap().expect(200);
        if job.body["state"] == "done" { Ok(()) } else { Err(job.body) }
    })
    .await;
    let got: Vec<String> = bus
        .receiver
        .wait_for("/filtered", 2)
        .await
        .iter()
        .map(|request| request.json()["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(got, ["f-5", "f-5"], "published, and replayed");
    bus.end().await;
}

/// An acknowledgement ends what waits in the database, what waits in the queue, and what is in flight; the
/// connection next to it goes on.
async fn an_acknowledgement_ends_every_open_delivery(backend: Backend) {
    let bus = Bus::start(backend).await;
    let parked = bus.webhook("/parked", json!({})).await;
    bus.subscribe(&parked, "a.*", json!({ "retryPolicy": { "delaysMs": [6_000] } })).await;
    let next = bus.webhook("/next", json!({})).await;
    bus.subscribe(&next, "a.*", json!({})).await;
    bus.receiver.script("/parked", Answer::status(500));
    bus.publish("a.x", "a-1").await;
    bus.receiver.wait_for("/parked", 1).await;
    let waits = |one: &Value| one["connectionId"] == parked.as_str() && one["status"] == "waiting";
    wait_until("the parked delivery", DEADLINE, || async {
        let all = bus.deliveries("a-1").await;
        if all.iter().any(|one| waits(one) && one.get("nextAttemptAt").is_some()) { Ok(()) } else { Err(all) }
    })
    .await;
    let acked = bus.ack("a-1", &parked).await.expect(200);
    assert_eq!(acked.body["acked"].as_array().unwrap().len(), 1);
    assert_eq!(bus.ack("a-1", &parked).await.expect(200).body, acked.body, "repeated, the same");
    let states: BTreeMap<String, String> = bus
        .deliveries("a-1")
        .await
        .iter()
        .map(|one| (one["connectionId"].to_string(), one["status"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(states[&json!(parked).to_string()], "acked");
    bus.receiver.wait_for("/next", 1).await;

    // In flight: the attempt is under way when the acknowledgement comes, and fails afterwards.
    bus.receiver.script("/parked", Answer::status(500).after(Duration::from_secs(2)));
    bus.publish("a.x", "a-2").await;
    wait_until("an attempt under way", DEADLINE, || async {
        let n = bus.receiver.in_flight();
        if n > 0 { Ok(()) } else { Err(n) }
    })
    .await;
    bus.ack("a-2", &parked).await.expect(200);
    bus.receiver.wait_for("/parked", 2).await;
    wait_until("the attempt in history", DEADLINE, || async {
        let all = bus.deliveries("a-2").await;
        let tried = |one: &Value| one["connectionId"] == parked.as_str() && one["attempts"][0].is_object();
        if all.iter().any(tried) { Ok(()) } else { Err(all) }
    })
    .await;
    let all = bus.deliveries("a-2").await;
    let one = all.iter().find(|one| one["connectionId"] == parked.as_str()).unwrap();
    assert_eq!(one["status"], "acked", "the late failure changed nothing");
    // What was published later and is not acknowledged has its retry, so theirs would have come before.
    bus.receiver.script("/parked", Answer::status(500));
    bus.publish("a.x", "a-3").await;
    let of = |event: &str| {
        bus.receiver.received("/parked").iter().filter(|request| request.json()["id"] == event).count()
    };
    wait_until("the retry of another event", DEADLINE, || async {
        if of("a-3") == 2 { Ok(()) } else { Err(of("a-3")) }
    })
    .await;
    assert_eq!((of("a-1"), of("a-2")), (1, 1), "nothing was tried after its acknowledgement");
    bus.end().await;
}

macro_rules! on_every_backend {
    ($($case:ident),* $(,)?) => {
        mod jetstream {
            $(#[tokio::test] async fn $case() { super::$case(super::Backend::Jetstream).await })*
        }
        mod postgres {
            $(#[tokio::test] async fn $case() { super::$case(super::Backend::Postgres).await })*
        }
        mod memory {
            $(#[tokio::test] async fn $case() { super::$case(super::Backend::Memory).await })*
        }
    };
}

on_every_backend! {
    an_answer_says_what_follows,
    results_are_mapped_to_their_deliveries,
    filters_are_applied_and_falsy_payloads_arrive,
    an_acknowledgement_ends_every_open_delivery,
}
