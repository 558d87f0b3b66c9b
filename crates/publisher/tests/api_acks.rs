//! Acknowledgements by the subscriber.

use crate::common::{Bus, Caller, Check as _, Tenant, deliveries::Published, pointers, problem};
use http::Method;
use serde_json::json;

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

struct Scene {
    bus: Bus,
    tenant: Tenant,
    pool: sqlx::PgPool,
    connection: String,
    subscription: String,
    other: String,
    other_subscription: String,
}

/// Two connections that get every order.
async fn scene() -> Scene {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let (connection, other) = (tenant.webhook("one").await, tenant.webhook("other").await);
    let subscription = tenant.subscription(&connection, "order.*").await;
    let other_subscription = tenant.subscription(&other, "order.*").await;
    Scene { bus, tenant, pool, connection, subscription, other, other_subscription }
}

impl Scene {
    async fn publish(&self, id: &str) -> (Published, Published) {
        let event = json!({ "type": "order.created", "source": "/shop", "id": id, "data": 1 });
        let uid = self.tenant.api.post("/v1/events", event).await.expect(202).text("/uid").to_owned();
        (
            Published::new(&self.tenant, &uid, &self.subscription, &self.connection),
            Published::new(&self.tenant, &uid, &self.other_subscription, &self.other),
        )
    }

    async fn queued(&self, of: &Published) -> bool {
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM delivery_queue WHERE delivery_id = $1)")
            .bind(of.key.id.0)
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    async fn end(self) {
        self.pool.close().await;
        self.bus.stop().await;
    }
}

/// Without a body, as a subscriber's own key may.
async fn bare(caller: &Caller, path: &str) -> devkit::client::Reply {
    let request = caller.0.request(Method::POST, path);
    caller.raw(Method::POST, path, request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ack_closes_what_is_open_for_that_connection_and_nothing_else() {
    let scene = scene().await;
    let bound = scene.tenant.key(json!({ "scopes": ["subscribe"], "connectionId": scene.connection })).await;

    // In the queue, never tried.
    let (mine, theirs) = scene.publish("a").await;
    assert!(scene.queued(&mine).await && scene.queued(&theirs).await);
    let path = format!("/v1/events/{}/ack", mine.key.event);
    let acked = json!({ "acked": [mine.id()] });
    assert_eq!(bare(&bound, &path).await.expect(200).body, acked);
    assert_eq!(bare(&bound, &path).await.expect(200).body, acked, "repeated");
    assert!(!scene.queued(&mine).await, "it left the queue");
    assert!(scene.queued(&theirs).await, "the other connection still gets it");
    assert_eq!(mine.standing(&scene.pool).await.unwrap().0, "acked");
    assert_eq!(theirs.standing(&scene.pool).await, None);
    let path = format!("/v1/events/{}/deliveries", mine.key.event);
    let deliveries = scene.tenant.api.get(&path).await.expect(200).body;
    let items = deliveries["items"].as_array().unwrap();
    let statuses: Vec<_> = items.iter().map(|item| item["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["acked", "pending"]);

    // Parked, by an unbound key that names the connection, and by the CloudEvents id.
    let (mine, theirs) = scene.publish("b").await;
    mine.park(&scene.pool, 2).await;
    theirs.park(&scene.pool, 2).await;
    let body = json!({ "connectionId": scene.connection });
    let reply = scene.tenant.api.post("/v1/events/b/ack?source=/shop", body).await;
    assert_eq!(reply.expect(200).body, json!({ "acked": [mine.id()] }));
    assert_eq!(mine.standing(&scene.pool).await.unwrap().0, "acked");
    assert_eq!(theirs.standing(&scene.pool).await.unwrap().0, "waiting");

    // Dead: there is nothing open, and it stays dead.
    let (mine, _) = scene.publish("c").await;
    mine.bury(&scene.pool, 3, "attempts_exhausted").await;
    let path = format!("/v1/events/{}/ack", mine.key.event);
    assert_eq!(bare(&bound, &path).await.expect(200).body, json!({ "acked": [] }));
    assert_eq!(mine.standing(&scene.pool).await.unwrap().0, "dead");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_result_does_not_overwrite_an_ack() {
    let scene = scene().await;
    let bound = scene.tenant.key(json!({ "scopes": ["subscribe"], "connectionId": scene.connection })).await;
    let (mine, _) = scene.publish("a").await;
    bare(&bound, "/v1/events/a/ack").await.is(200);
    // A worker held it meanwhile, and comes now with a failure, and then with the last one.
    mine.park(&scene.pool, 1).await;
    assert_eq!(mine.standing(&scene.pool).await.unwrap().0, "acked");
    mine.bury(&scene.pool, 20, "attempts_exhausted").await;
    assert_eq!(mine.standing(&scene.pool).await.unwrap().0, "acked");
    assert!(scene.tenant.api.all("/v1/dead-letters", 50).await.is_empty());

    // All at once, many times: whoever comes first, the ack has the last word.
    for n in 0..20 {
        let (mine, _) = scene.publish(&format!("race-{n}")).await;
        let path = format!("/v1/events/race-{n}/ack");
        let (reply, ()) = tokio::join!(bare(&bound, &path), mine.park(&scene.pool, 1));
        assert_eq!(reply.expect(200).body, json!({ "acked": [mine.id()] }));
        assert_eq!(mine.standing(&scene.pool).await.unwrap().0, "acked");
    }
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_acknowledge_what() {
    let scene = scene().await;
    let (mine, _) = scene.publish("a").await;
    let path = format!("/v1/events/{}/ack", mine.key.event);
    let api = &scene.tenant.api;
    // An unbound key must name the connection.
    assert_eq!(pointers(&bare(api, &path).await), ["/connectionId"]);
    assert_eq!(pointers(&api.post(&path, json!({ "connectionId": NOBODY })).await), ["/connectionId"]);
    assert_eq!(pointers(&api.post(&path, json!({ "connection": NOBODY })).await), ["/connection"]);
    // A bound one speaks for its own, and cannot tell another one from none.
    let bound = scene.tenant.key(json!({ "scopes": ["subscribe"], "connectionId": scene.connection })).await;
    let foreign = bound.post(&path, json!({ "connectionId": scene.other })).await;
    assert_eq!(pointers(&foreign), ["/connectionId"]);
    let unknown = bound.post(&path, json!({ "connectionId": NOBODY })).await;
    assert_eq!(foreign.body["errors"], unknown.body["errors"]);
    bound.post(&path, json!({ "connectionId": scene.connection })).await.is(200);
    // Reading is not enough.
    let reader = scene.tenant.key(json!({ "scopes": ["read"], "connectionId": scene.connection })).await;
    problem(&bare(&reader, &path).await, 403, "forbidden");

    problem(&bare(&bound, "/v1/events/none/ack").await, 404, "not-found");
    // An event that was not for this connection.
    let event = json!({ "type": "invoice.created", "data": 1 });
    let uid = api.post("/v1/events", event).await.expect(202).text("/uid").to_owned();
    problem(&bare(&bound, &format!("/v1/events/{uid}/ack")).await, 404, "not-found");
    // Two events with one id.
    scene.publish("twice").await;
    let event = json!({ "type": "order.created", "source": "/other", "id": "twice" });
    api.post("/v1/events", event).await.is(202);
    problem(&bare(&bound, "/v1/events/twice/ack").await, 409, "ambiguous-event");
    bare(&bound, "/v1/events/twice/ack?source=/shop").await.is(200);
    // A body needs its type.
    let request = bound.0.request(Method::POST, &path).body("{}");
    problem(&bound.raw(Method::POST, &path, request).await, 415, "unsupported-media-type");
    scene.end().await;
}
