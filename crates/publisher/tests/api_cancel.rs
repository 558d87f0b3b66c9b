//! Cancellations by the publisher.

use crate::common::{Bus, Caller, Check as _, Tenant, ahead, deliveries::Published, problem};
use devkit::client::Reply;
use http::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

/// An organization with two connections that get every order.
struct Scene {
    bus: Bus,
    tenant: Tenant,
    pool: PgPool,
    connections: [String; 2],
    subscriptions: [String; 2],
}

impl Scene {
    async fn new() -> Self {
        let bus = Bus::start().await;
        let pool = bus.stack.owner_pool().await.unwrap();
        let tenant = bus.tenant("acme").await;
        let connections = [tenant.webhook("one").await, tenant.webhook("other").await];
        let subscriptions = [
            tenant.subscription(&connections[0], "order.*").await,
            tenant.subscription(&connections[1], "order.*").await,
        ];
        Self { bus, tenant, pool, connections, subscriptions }
    }

    /// Publishes by this caller; gives the deliveries to both connections.
    async fn publish(&self, by: &Caller, id: &str) -> [Published; 2] {
        let event = json!({ "type": "order.created", "source": "/shop", "id": id, "data": 1 });
        let uid = by.post("/v1/events", event).await.expect(202).text("/uid").to_owned();
        [0, 1].map(|n| Published::new(&self.tenant, &uid, &self.subscriptions[n], &self.connections[n]))
    }

    async fn queued(&self, of: &Published) -> bool {
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM delivery_queue WHERE delivery_id = $1)")
            .bind(of.key.id.0)
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    async fn state(&self, of: &Published) -> String {
        of.standing(&self.pool).await.unwrap().0
    }

    async fn end(self) {
        self.pool.close().await;
        self.bus.stop().await;
    }
}

async fn cancel(caller: &Caller, event: &str) -> Reply {
    let (event, query) =
        event.split_once('?').map_or((event, String::new()), |(id, query)| (id, format!("?{query}")));
    caller.send(Method::POST, &format!("/v1/events/{event}/cancel{query}"), None).await
}

/// What an answer says was cancelled, sorted.
#[track_caller]
fn cancelled(reply: &Reply) -> Vec<String> {
    assert_eq!(reply.status, 200, "{:#}", reply.body);
    let ids: &Vec<Value> = reply.body["cancelled"].as_array().unwrap();
    let mut ids: Vec<String> = ids.iter().map(|id| id.as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids
}

fn ids(of: &[Published]) -> Vec<String> {
    let mut ids: Vec<String> = of.iter().map(Published::id).collect();
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_closes_what_is_open_for_every_connection() {
    let scene = Scene::new().await;
    let api = &scene.tenant.api;

    // In the queue, never tried; by the uid, and again by the CloudEvents id.
    let all = scene.publish(api, "a").await;
    let (_, bystander) = (scene.publish(api, "other").await, scene.publish(api, "bystander").await);
    assert_eq!(cancelled(&cancel(api, &all[0].key.event.to_string()).await), ids(&all));
    assert_eq!(cancelled(&cancel(api, "a?source=/shop").await.expect(200)), ids(&all), "repeated");
    for one in &all {
        assert_eq!(scene.state(one).await, "cancelled");
        assert!(!scene.queued(one).await, "it left the queue");
    }
    assert!(scene.queued(&bystander[0]).await && bystander[0].standing(&scene.pool).await.is_none());
    let deliveries = api.get("/v1/events/a/deliveries").await.expect(200).body;
    assert!(deliveries["items"].as_array().unwrap().iter().all(|one| one["status"] == "cancelled"));

    // One waits, one is given up: that one stays dead.
    let [waits, died] = scene.publish(api, "b").await;
    waits.park(&scene.pool, 2).await;
    died.bury(&scene.pool, 3, "attempts_exhausted").await;
    assert_eq!(cancelled(&cancel(api, "b").await), [waits.id()]);
    assert_eq!((scene.state(&waits).await, scene.state(&died).await), ("cancelled".into(), "dead".into()));

    // What is acknowledged stays so, and there may be nothing left.
    let [mine, theirs] = scene.publish(api, "c").await;
    for connection in &scene.connections {
        api.post("/v1/events/c/ack", json!({ "connectionId": connection })).await.is(200);
    }
    assert!(cancelled(&cancel(api, "c").await).is_empty());
    assert_eq!((scene.state(&mine).await, scene.state(&theirs).await), ("acked".into(), "acked".into()));

    // Nobody wanted it.
    api.post("/v1/events", json!({ "type": "invoice.created", "source": "/shop", "id": "d" })).await.is(202);
    assert!(cancelled(&cancel(api, "d").await).is_empty());
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_is_for_good() {
    let scene = Scene::new().await;
    let api = &scene.tenant.api;
    let all = scene.publish(api, "a").await;
    cancel(api, "a").await.is(200);
    // A worker held one of them meanwhile, and comes now with a failure, and then with the last one.
    all[0].park(&scene.pool, 1).await;
    all[0].bury(&scene.pool, 20, "attempts_exhausted").await;
    // It is too late to acknowledge it.
    let body = json!({ "connectionId": scene.connections[1] });
    assert_eq!(api.post("/v1/events/a/ack", body).await.expect(200).body, json!({ "acked": [] }));
    for one in &all {
        assert_eq!(scene.state(one).await, "cancelled");
    }
    assert!(api.all("/v1/dead-letters", 50).await.is_empty());
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_cancel_what() {
    let scene = Scene::new().await;
    let api = &scene.tenant.api;
    scene.publish(api, "a").await;
    for scope in ["read", "subscribe"] {
        let key = scene.tenant.key(json!({ "scopes": [scope] })).await;
        problem(&cancel(&key, "a").await, 403, "forbidden");
    }
    problem(&cancel(api, "none").await, 404, "not-found");
    problem(&cancel(api, "01890000-0000-7000-8000-000000000000").await, 404, "not-found");

    // A bound key takes back what it published, and what others did is as unknown to it as what nobody did.
    let shop = scene.tenant.publisher("shop").await;
    let bound = scene.tenant.key(json!({ "scopes": ["publish"], "connectionId": shop })).await;
    let own = scene.publish(&bound, "own").await;
    let (foreign, unknown) = (cancel(&bound, "a").await, cancel(&bound, "none").await);
    problem(&foreign, 404, "not-found");
    assert_eq!(foreign.body["detail"], unknown.body["detail"]);
    let event = own[0].key.event.to_string();
    let other = scene.tenant.publisher("other shop").await;
    let other = scene.tenant.key(json!({ "scopes": ["publish"], "connectionId": other })).await;
    problem(&cancel(&other, &event).await, 404, "not-found");
    assert_eq!(own[0].standing(&scene.pool).await, None, "nothing happened to it");
    assert_eq!(cancelled(&cancel(&bound, &event).await), ids(&own));
    let admin = scene.tenant.key(json!({ "scopes": ["publish", "admin"], "connectionId": shop })).await;
    assert_eq!(cancelled(&cancel(&admin, "a").await).len(), 2, "an admin key is not restricted");

    // Two events with one id.
    scene.publish(api, "twice").await;
    let event = json!({ "type": "order.created", "source": "/other", "id": "twice" });
    api.post("/v1/events", event).await.is(202);
    problem(&cancel(api, "twice").await, 409, "ambiguous-event");
    cancel(api, "twice?source=/shop").await.is(200);
    scene.end().await;
}

/// What is not published yet is cancelled by the same request: a schedule, and an event that is due later.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_and_events_that_are_due_later_are_cancelled_too() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let stranger = bus.tenant("stranger").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let (shop, other) = (tenant.publisher("shop").await, tenant.publisher("other").await);
    let shops = tenant.key(json!({ "scopes": ["publish"], "connectionId": shop })).await;
    let others = tenant.key(json!({ "scopes": ["publish"], "connectionId": other })).await;
    let schedule = shops.post("/v1/events", json!({ "type": "t", "cron": "@daily" })).await.expect(201);
    let due = ahead(&pool, 600).await;
    let waiting =
        shops.post("/v1/events", json!({ "type": "t", "id": "w", "deliverAt": due })).await.expect(202);
    let published = shops.post("/v1/events", json!({ "type": "t", "id": "p" })).await.expect(202);
    for id in [schedule.id(), waiting.text("/uid"), "w", published.text("/uid")] {
        let path = format!("/v1/events/{id}/cancel");
        for foreign in [&stranger.api, &others] {
            problem(&foreign.bare(&path).await, 404, "not-found");
        }
    }
    assert_eq!(api.get(&format!("/v1/schedules/{}", schedule.id())).await.body["state"], "active");
    assert_eq!(api.get("/v1/events/w").await.body["status"], "scheduled");
    for _ in 0..2 {
        for id in [schedule.id(), "w", waiting.text("/uid"), published.text("/uid")] {
            shops.bare(&format!("/v1/events/{id}/cancel")).await.is(200);
        }
        assert_eq!(api.get(&format!("/v1/schedules/{}", schedule.id())).await.body["state"], "cancelled");
        assert_eq!(api.get("/v1/events/w").await.body["status"], "cancelled");
        assert_eq!(api.get("/v1/events/p").await.body["status"], "delivered");
    }
    problem(&api.bare("/v1/events/none/cancel").await, 404, "not-found");
    pool.close().await;
    bus.stop().await;
}
