//! Dead letters: the list, and what can be done about one.

use crate::common::{Bus, Caller, Check as _, Tenant, deliveries::Published, pointers, problem};
use http::Method;
use serde_json::{Value, json};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

struct Scene {
    bus: Bus,
    tenant: Tenant,
    pool: sqlx::PgPool,
    /// Connection and subscription to everything, twice.
    to: [(String, String); 2],
}

impl Scene {
    async fn start() -> Self {
        let bus = Bus::start().await;
        let pool = bus.stack.owner_pool().await.unwrap();
        let tenant = bus.tenant("acme").await;
        let mut to = Vec::new();
        for name in ["one", "other"] {
            let connection = tenant.webhook(name).await;
            let subscription = tenant.subscription(&connection, ">").await;
            to.push((connection, subscription));
        }
        Self { bus, tenant, pool, to: to.try_into().unwrap() }
    }

    /// An event whose delivery to the first or the second connection is given up.
    async fn dead(&self, event_type: &str, to: usize, reason: &'static str) -> Published {
        let event = json!({ "type": event_type, "source": "/shop", "data": 1 });
        let uid = self.tenant.api.post("/v1/events", event).await.expect(202).text("/uid").to_owned();
        let (connection, subscription) = &self.to[to];
        let published = Published::new(&self.tenant, &uid, subscription, connection);
        published.bury(&self.pool, 20, reason).await;
        published
    }

    async fn end(self) {
        self.pool.close().await;
        self.bus.stop().await;
    }
}

async fn ids(caller: &Caller, query: &str, limit: u32) -> Vec<String> {
    let items = caller.all(&format!("/v1/dead-letters{query}"), limit).await;
    items.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

async fn post(caller: &Caller, path: &str) -> devkit::client::Reply {
    caller.raw(Method::POST, path, caller.0.request(Method::POST, path)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_by_what_people_look_for() {
    let scene = Scene::start().await;
    let api = &scene.tenant.api;
    let a = scene.dead("order.created", 0, "attempts_exhausted").await;
    let b = scene.dead("order.paid", 1, "attempts_exhausted").await;
    let c = scene.dead("invoice.created", 0, "expired").await;
    let (first, second) = (&scene.to[0], &scene.to[1]);

    let shown = api.get(&format!("/v1/dead-letters/{}", a.id())).await.expect(200).body;
    assert_eq!(
        shown,
        json!({
            "id": a.id(),
            "event": { "uid": a.key.event, "id": a.key.event, "source": "/shop", "type": "order.created" },
            "subscriptionId": first.1, "connectionId": first.0, "reason": "attempts_exhausted", "attempts": 20,
            "diedAt": shown["diedAt"],
            "last": {
                "status": 500, "body": "no \u{fffd} thanks", "error": "answered 500",
                "at": "2026-01-01T00:00:01.5Z", "durationMs": 250,
            },
        })
    );
    let all = [c.id(), b.id(), a.id()];
    for limit in [1, 2, 50] {
        assert_eq!(ids(api, "", limit).await, all, "the latest first");
    }
    assert_eq!(api.get("/v1/dead-letters").await.expect(200).body["items"][2], shown);
    let died_at = |id: &Published| {
        let path = format!("/v1/dead-letters/{}", id.id());
        async move { api.get(&path).await.expect(200).text("/diedAt").to_owned() }
    };
    let (at_b, at_c) = (died_at(&b).await, died_at(&c).await);
    for (query, expected) in [
        (format!("?connectionId={}", first.0), vec![c.id(), a.id()]),
        (format!("?subscriptionId={}", second.1), vec![b.id()]),
        (format!("?connectionId={}&subscriptionId={}", first.0, second.1), vec![]),
        ("?type=order.created".to_owned(), vec![a.id()]),
        ("?type=order.*".to_owned(), vec![b.id(), a.id()]),
        ("?type=>".to_owned(), all.to_vec()),
        ("?reason=expired".to_owned(), vec![c.id()]),
        ("?reason=expired&type=order.*".to_owned(), vec![]),
        (format!("?since={at_b}"), vec![c.id(), b.id()]),
        (format!("?since={at_b}&until={at_c}"), vec![b.id()]),
        (format!("?connectionId={NOBODY}"), vec![]),
    ] {
        for limit in [1, 50] {
            assert_eq!(ids(api, &query, limit).await, expected, "{query}");
        }
    }
    for bad in ["type=a..b", "limit=0", "cursor=AAAA", "since=yesterday", "reason=%00", "state=dead"] {
        problem(&api.get(&format!("/v1/dead-letters?{bad}")).await, 422, "invalid-fields");
    }

    // A key of one connection sees only that one's.
    let bound = scene.tenant.key(json!({ "scopes": ["subscribe"], "connectionId": second.0 })).await;
    assert_eq!(ids(&bound, "", 50).await, [b.id()]);
    assert!(ids(&bound, &format!("?connectionId={}", first.0), 50).await.is_empty());
    problem(&bound.get(&format!("/v1/dead-letters/{}", a.id())).await, 404, "not-found");
    problem(&bound.delete(&format!("/v1/dead-letters/{}", a.id())).await, 404, "not-found");
    problem(&post(&bound, &format!("/v1/dead-letters/{}/replay", a.id())).await, 404, "not-found");
    let reader = scene.tenant.key(json!({ "scopes": ["read"] })).await;
    assert_eq!(ids(&reader, "", 50).await, all);
    problem(&reader.delete(&format!("/v1/dead-letters/{}", a.id())).await, 403, "forbidden");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_replayed_with_a_new_lifetime() {
    let scene = Scene::start().await;
    let api = &scene.tenant.api;
    let dead = scene.dead("order.created", 0, "attempts_exhausted").await;
    let path = format!("/v1/dead-letters/{}/replay", dead.id());
    post(api, &path).await.is(202);
    let (state, turn, attempts, due, fresh, version): (String, i64, i32, bool, bool, i64) = sqlx::query_as(
        "SELECT state, turn, attempts, due_at <= now(), since > now() - interval '1 minute', connection_version
         FROM delivery_states WHERE delivery_id = $1",
    )
    .bind(dead.key.id.0)
    .fetch_one(&scene.pool)
    .await
    .unwrap();
    assert_eq!((state.as_str(), attempts, due, fresh, version), ("waiting", 0, true, true, 1));
    assert!(turn > 1_000_000_000_000, "{turn}: later than every turn before");
    problem(&post(api, &path).await, 404, "not-found");
    problem(&api.get(&format!("/v1/dead-letters/{}", dead.id())).await, 404, "not-found");
    let delivery = &api.get(&format!("/v1/events/{}/deliveries", dead.key.event)).await.expect(200).body;
    let of = |id: &str| delivery["items"].as_array().unwrap().iter().find(|item| item["id"] == id).cloned();
    assert_eq!(of(&dead.id()).unwrap()["status"], "waiting");

    // The worker of the old turn gives it up once more: too late.
    dead.bury(&scene.pool, 21, "attempts_exhausted").await;
    assert_eq!(dead.standing(&scene.pool).await, Some(("waiting".to_owned(), turn)));
    // It dies again in its new turn, and is replayed again: a later turn still.
    dead.bury(&scene.pool, turn + 3, "expired").await;
    post(api, &path).await.is(202);
    assert!(dead.standing(&scene.pool).await.unwrap().1 > turn + 3);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discarded_dead_letter_is_gone_for_good() {
    let scene = Scene::start().await;
    let api = &scene.tenant.api;
    let dead = scene.dead("order.created", 0, "attempts_exhausted").await;
    let path = format!("/v1/dead-letters/{}", dead.id());
    api.delete(&path).await.is(204);
    problem(&api.delete(&path).await, 404, "not-found");
    problem(&api.get(&path).await, 404, "not-found");
    problem(&post(api, &format!("{path}/replay")).await, 404, "not-found");
    assert!(ids(api, "", 50).await.is_empty());
    // Neither a late result nor a replay nor an ack changes it.
    dead.bury(&scene.pool, 99, "attempts_exhausted").await;
    dead.park(&scene.pool, 99).await;
    let ack = json!({ "connectionId": scene.to[0].0 });
    let acked = api.post(&format!("/v1/events/{}/ack", dead.key.event), ack).await.expect(200);
    assert_eq!(acked.body, json!({ "acked": [] }));
    assert_eq!(dead.standing(&scene.pool).await, Some(("cancelled".to_owned(), 20)));
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_are_named_or_filtered_and_never_all_by_mistake() {
    let scene = Scene::start().await;
    let api = &scene.tenant.api;
    for path in ["/v1/dead-letters/replay", "/v1/dead-letters/discard"] {
        let too_many: Vec<_> = (0..1_001).map(uuid::Uuid::from_u128).collect();
        for (body, pointer) in [
            (json!({}), ""),
            (json!({ "ids": [NOBODY], "filter": {} }), ""),
            (json!({ "ids": [] }), "/ids"),
            (json!({ "ids": too_many }), "/ids"),
            (json!({ "ids": ["x"] }), "/ids/0"),
            (json!({ "filter": { "type": "a..b" } }), "/filter/type"),
            (json!({ "filter": { "reason": "\u{0}" } }), "/filter/reason"),
            (json!({ "filter": { "state": "dead" } }), "/filter/state"),
            (json!({ "filter": {}, "perSecond": 0 }), "/perSecond"),
            (json!({ "filter": {}, "perSecond": 10_001 }), "/perSecond"),
        ] {
            assert_eq!(pointers(&api.post(path, body.clone()).await), [pointer], "{body}");
        }
        assert_eq!(pointers(&post(api, path).await), [""], "no body at all");
        let reader = scene.tenant.key(json!({ "scopes": ["read"] })).await;
        problem(&reader.post(path, json!({ "filter": {} })).await, 403, "forbidden");
    }
    assert!(api.all("/v1/replays", 50).await.is_empty());
    let job = api.post("/v1/dead-letters/discard", json!({ "filter": {} })).await.expect(202);
    assert_eq!(job.headers["location"], format!("/v1/replays/{}", job.id()).as_str());
    let expected = json!({
        "id": job.id(), "kind": "discard", "state": "pending", "perSecond": 500,
        "progress": { "looked": 0, "replayed": 0, "skipped": 0 }, "createdAt": job.text("/createdAt"),
    });
    assert_eq!(job.body, expected);
    let named: Value = json!({ "ids": [NOBODY], "perSecond": 10_000 });
    assert_eq!(api.post("/v1/dead-letters/replay", named).await.expect(202).body["kind"], "deadLetters");
    scene.end().await;
}
