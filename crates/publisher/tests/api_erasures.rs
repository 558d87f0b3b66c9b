//! Erasures through the API, worked off by a real archiver.

use std::time::Duration;

use crate::common::{Bus, Caller, Check as _, Tenant, ahead, deliveries::Published, problem};
use devkit::{client::Reply, processes::Role, wait_until};
use serde_json::{Value, json};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";
const DEADLINE: Duration = Duration::from_secs(60);

async fn publish(tenant: &Tenant, data: Value) -> String {
    let event = json!({ "type": "t", "data": data });
    tenant.api.post("/v1/events", event).await.expect(202).text("/uid").to_owned()
}

/// A key that may do everything.
async fn everything(tenant: &Tenant) -> Caller {
    tenant.key(json!({ "scopes": ["publish", "subscribe", "read", "admin"] })).await
}

/// The job when it is done.
async fn done(caller: &Caller, job: &Reply) -> Value {
    let path = format!("/v1/erasures/{}", job.id());
    wait_until("the end of an erasure", DEADLINE, || async {
        let body = caller.get(&path).await.expect(200).body;
        if body["state"] == "done" { Ok(body) } else { Err(body) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_is_one_job_for_whom_may_ask() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let (tenant, stranger) = (bus.tenant("acme").await, bus.tenant("stranger").await);
    let admin = everything(&tenant).await;
    let event = publish(&tenant, json!(1)).await;
    let expunge = format!("/v1/events/{event}/expunge");
    for path in [expunge.as_str(), "/v1/erasures"] {
        problem(&tenant.api.post(path, json!({})).await, 403, "forbidden");
    }
    problem(&everything(&stranger).await.bare(&expunge).await, 404, "not-found");
    problem(&admin.bare(&format!("/v1/events/{NOBODY}/expunge")).await, 404, "not-found");

    let job = admin.bare(&expunge).await.expect(202);
    assert_eq!(job.headers["location"], format!("/v1/erasures/{}", job.id()));
    assert_eq!((&job.body["eventUid"], &job.body["state"]), (&json!(event), &json!("pending")));
    assert_eq!(admin.bare(&expunge).await.expect(202).body, job.body, "an open one is the answer");
    let named = admin.post("/v1/erasures", json!({ "eventUid": event })).await.expect(202);
    assert_eq!(named.body, job.body);
    assert_eq!(admin.get(&format!("/v1/erasures/{}", job.id())).await.expect(200).body, job.body);

    let later = json!({ "type": "t", "deliverAt": ahead(&pool, 3_600).await });
    let waiting = tenant.api.post("/v1/events", later).await.expect(202).text("/uid").to_owned();
    let refused = admin.bare(&format!("/v1/events/{waiting}/expunge")).await;
    assert!(problem(&refused, 409, "not-published")["detail"].as_str().unwrap().contains("cancel it first"));
    let all = admin.post("/v1/erasures", json!({})).await.expect(202);
    assert_eq!((&all.body["waiting"], all.body.get("eventUid")), (&json!(1), None), "it is left, and named");
    tenant.api.bare(&format!("/v1/events/{waiting}/cancel")).await.is(200);
    admin.bare(&format!("/v1/events/{waiting}/expunge")).await.is(202);

    let listed = admin.all("/v1/erasures", 1).await;
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[..2], [job.body, all.body]);
    problem(&admin.get(&format!("/v1/erasures/{NOBODY}")).await, 404, "not-found");
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erased_event_is_shown_without_its_payload_and_is_delivered_no_more() {
    let bus = Bus::start_with(|options| {
        options.replicas(Role::Archiver, 1).replicas(Role::CronScheduler, 1).replicas(Role::DeliveryWorker, 1)
    })
    .await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let (tenant, stranger) = (bus.tenant("acme").await, bus.tenant("stranger").await);
    let (admin, foreign) = (everything(&tenant).await, everything(&stranger).await);
    let connection = tenant.webhook("hook").await;
    // The subscription comes after the events, so that they are not delivered to anybody.
    let erased = publish(&tenant, json!({ "n": 1 })).await;
    let kept = publish(&tenant, json!({ "n": 2 })).await;
    let subscription = tenant.subscription(&connection, "t").await;
    let dead = Published::new(&tenant, &erased, &subscription, &connection);
    dead.bury(&pool, 20, "attempts_exhausted").await;
    Published::new(&tenant, &kept, &subscription, &connection).bury(&pool, 20, "attempts_exhausted").await;

    // Somebody else's job about it empties nothing.
    let job = foreign.post("/v1/erasures", json!({ "eventUid": erased })).await.expect(202);
    let nothing = json!({ "events": 0, "answers": 0, "deadLetters": 0, "archived": 0 });
    assert_eq!(done(&foreign, &job).await["emptied"], nothing);
    let path = format!("/v1/events/{erased}");
    assert_eq!(admin.get(&path).await.expect(200).body["event"]["data"], json!({ "n": 1 }));

    let job = admin.bare(&format!("{path}/expunge")).await.expect(202);
    let finished = done(&admin, &job).await;
    let emptied = json!({ "events": 1, "answers": 1, "deadLetters": 0, "archived": 0 });
    assert_eq!(finished["emptied"], emptied);
    assert!(finished["finishedAt"].is_string());
    let shown = admin.get(&path).await.expect(200).body;
    assert!(shown["expungedAt"].is_string() && shown.get("event").is_none(), "{shown:#}");
    let listed = admin.all("/v1/events?include=event", 50).await;
    let bodies: Vec<(bool, bool)> =
        listed.iter().map(|item| (item["event"].is_object(), item["expungedAt"].is_string())).collect();
    assert_eq!(bodies, [(true, false), (false, true)]);
    let letter = admin.get(&format!("/v1/dead-letters/{}", dead.id())).await.expect(200).body;
    assert_eq!((&letter["last"]["status"], letter["last"].get("body")), (&json!(500), None), "{letter:#}");
    let records = admin.all(&format!("/v1/audit?targetId={}", job.id()), 50).await;
    let actions: Vec<&Value> = records.iter().map(|record| &record["action"]).collect();
    assert_eq!(actions, ["erasure.done", "erasure.created"]);
    assert_eq!(records[0]["after"]["events"], 1);

    // Nothing brings it back.
    problem(&admin.bare(&format!("{path}/replay")).await, 409, "expunged");
    let to = json!({ "subscriptionId": subscription });
    problem(&admin.post(&format!("{path}/replay"), to).await, 409, "expunged");
    problem(&admin.bare(&format!("/v1/dead-letters/{}/replay", dead.id())).await, 409, "expunged");
    let since = json!({ "since": "2020-01-01T00:00:00Z" });
    for (path, body) in [
        ("/v1/dead-letters/replay".to_owned(), json!({ "ids": [dead.id()] })),
        (format!("/v1/subscriptions/{subscription}/replay"), since),
    ] {
        let job = admin.post(&path, body).await.expect(202);
        let path = format!("/v1/replays/{}", job.id());
        let ended = wait_until("the end of a replay", DEADLINE, || async {
            let body = admin.get(&path).await.expect(200).body;
            if body["finishedAt"].is_string() { Ok(body) } else { Err(body) }
        })
        .await;
        assert_eq!(ended["progress"]["skipped"], 1, "it is passed over: {ended:#}");
    }
    // One that waits for its next try is given up with the reason.
    sqlx::query(
        "UPDATE delivery_states SET state = 'waiting', due_at = now(), reason = 'http_500' WHERE delivery_id = $1",
    )
    .bind(dead.key.id.0)
    .execute(&pool)
    .await
    .unwrap();
    let path = format!("/v1/dead-letters/{}", dead.id());
    wait_until("it is given up", DEADLINE, || async {
        let body = admin.get(&path).await.body;
        if body["reason"] == "expunged" { Ok(()) } else { Err(body) }
    })
    .await;
    pool.close().await;
    bus.stop().await;
}
