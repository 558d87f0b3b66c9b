//! Events that are due later, through the API. That they are published then is the scheduler's, and tested there.
use crate::common::{Bus, Caller, Check as _, ahead, pointers, problem};
use bus_core::{
    audit::By,
    ids::{Ids as _, SystemIds},
    pg::{self, CancelScheduled},
};
use devkit::{client::Reply, processes::Role};
use http::Method;
use jiff::{Timestamp, tz};
use serde_json::{Value, json};

const EVENTS: &str = "/v1/events";
const WAITING: &str = "/v1/events?status=scheduled";

async fn raw(api: &Caller, headers: &[(&str, &str)], body: String) -> Reply {
    let request = api.0.request(Method::POST, EVENTS).body(body);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    api.raw(Method::POST, EVENTS, request).await
}

/// An event with that id in every mode, due at that time; `name` is the member of plain JSON.
async fn in_every_mode(api: &Caller, id: &str, due: &str) -> Vec<Reply> {
    let cloud =
        |id: String| json!({ "specversion": "1.0", "id": id, "source": "/s", "type": "t", "deliverat": due });
    let plain = |id: String, name: &str| json!({ "type": "t", "source": "/s", "id": id, name: due });
    let binary_id = format!("{id}-6");
    let binary = [
        ("ce-specversion", "1.0"),
        ("ce-id", binary_id.as_str()),
        ("ce-source", "/s"),
        ("ce-type", "t"),
        ("ce-deliverat", due),
    ];
    let batch = [("content-type", "application/cloudevents-batch+json")];
    vec![
        api.post(EVENTS, plain(format!("{id}-1"), "deliverAt")).await,
        api.post(EVENTS, plain(format!("{id}-2"), "deliverat")).await,
        api.post(EVENTS, json!([{ "type": "t" }, plain(format!("{id}-3"), "deliverAt")])).await,
        raw(api, &[("content-type", "application/cloudevents+json")], cloud(format!("{id}-4")).to_string())
            .await,
        raw(api, &batch, json!([cloud(format!("{id}-5"))]).to_string()).await,
        raw(api, &binary, String::new()).await,
    ]
}

async fn count(pool: &sqlx::PgPool, table: &'static str, id: &str) -> i64 {
    let statement = format!("SELECT count(*) FROM {table} WHERE id LIKE $1 || '-%'");
    sqlx::query_scalar(sqlx::AssertSqlSafe(statement)).bind(id).fetch_one(pool).await.unwrap()
}

fn ids(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["id"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_waits_or_is_published_at_once_in_every_mode() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let connection = tenant.webhook("hook").await;
    tenant.subscription(&connection, "t").await;
    let soon: Timestamp = ahead(&pool, 3_600).await.parse().unwrap();
    let offset = soon.to_zoned(tz::TimeZone::fixed(tz::offset(5))).strftime("%Y-%m-%dT%H:%M:%S%.3f+05:00");
    for reply in in_every_mode(api, "later", &offset.to_string()).await {
        reply.is(202);
    }
    for reply in in_every_mode(api, "past", &ahead(&pool, -3_600).await).await {
        reply.is(202);
    }
    assert_eq!(
        (count(&pool, "events", "later").await, count(&pool, "scheduled_events", "later").await),
        (0, 6)
    );
    assert_eq!(
        (count(&pool, "events", "past").await, count(&pool, "scheduled_events", "past").await),
        (6, 0)
    );
    let deliveries: i64 =
        sqlx::query_scalar("SELECT count(*) FROM delivery_queue").fetch_one(&pool).await.unwrap();
    assert_eq!(deliveries, 6 + 2, "those that are published, and the first of each plain batch");

    for n in 1..=6 {
        let found = api.get(&format!("{EVENTS}/later-{n}")).await.expect(200);
        assert_eq!(found.body["status"], "scheduled");
        assert_eq!(found.text("/deliverAt").parse::<Timestamp>().unwrap(), soon);
        assert_eq!(found.body["subscriptions"], json!([]), "they are those that match then");
        assert_eq!(found.body["event"]["deliverat"], offset.to_string(), "as it was written");
        let uid = found.text("/uid").to_owned();
        assert_eq!(uid.parse::<bus_core::ids::EventUid>().unwrap().received_at(), Some(soon));
        assert_eq!(api.get(&format!("{EVENTS}/{uid}")).await.expect(200).body, found.body);
        let deliveries = api.get(&format!("{EVENTS}/{uid}/deliveries")).await.expect(200);
        assert_eq!(deliveries.body["items"], json!([]));
        problem(&api.bare(&format!("{EVENTS}/{uid}/replay")).await, 409, "not-published");
        let ack = json!({ "connectionId": connection });
        problem(&api.post(&format!("{EVENTS}/{uid}/ack"), ack).await, 404, "not-found");

        let past = api.get(&format!("{EVENTS}/past-{n}")).await.expect(200);
        assert_eq!((&past.body["status"], past.body.get("deliverAt")), (&json!("pending"), None));
    }
    assert_eq!(api.all(EVENTS, 50).await.len(), 8, "what waits is no history yet");
    assert_eq!(api.all(&format!("{EVENTS}?status=published"), 50).await.len(), 8);
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_too_far_ahead_is_refused_where_it_stands() {
    let bus = Bus::start_with(|options| {
        options.role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MAX_AHEAD_DAYS", 2)
    })
    .await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let replies = in_every_mode(api, "far", &ahead(&pool, 2 * 86_400 + 60).await).await;
    let places = ["/deliverAt", "/deliverat", "/1/deliverAt", "/deliverat", "/0/deliverat"];
    for (reply, place) in replies.iter().zip(places) {
        assert_eq!(pointers(reply), [place]);
        assert!(reply.text("/detail").contains("publish it later"), "{:#}", reply.body);
    }
    let binary = problem(&replies[5], 422, "invalid-fields");
    assert_eq!(binary["errors"][0]["header"], "ce-deliverat");
    for reply in in_every_mode(api, "near", &ahead(&pool, 2 * 86_400 - 60).await).await {
        reply.is(202);
    }
    for bad in ["tomorrow", "2027-01-01", "2027-01-01T00:00:00", "1798761600"] {
        assert_eq!(
            pointers(&api.post(EVENTS, json!({ "type": "t", "deliverAt": bad })).await),
            ["/deliverAt"]
        );
    }
    assert_eq!(pointers(&api.post(EVENTS, json!({ "type": "t", "deliverAt": 1 })).await), ["/deliverAt"]);
    assert_eq!(api.all(WAITING, 50).await.len(), 6);
    assert_eq!(api.all(EVENTS, 50).await.len(), 1, "a batch is refused as a whole");
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_waits_once() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let event = json!({ "type": "t", "id": "one", "deliverAt": ahead(&pool, 600).await });
    let first = api.post(EVENTS, event.clone()).await.expect(202);
    let mut expected = first.body.clone();
    expected["duplicate"] = true.into();
    assert_eq!(api.post(EVENTS, event.clone()).await.expect(202).body, expected);
    // Another time makes no other event.
    let moved = json!({ "type": "t", "id": "one", "deliverAt": ahead(&pool, 1_200).await });
    assert_eq!(api.post(EVENTS, moved).await.expect(202).body, expected);
    assert_eq!(api.post(EVENTS, json!({ "type": "t", "id": "one" })).await.expect(202).body, expected);

    let batch = json!([{ "type": "t" }, { "type": "t", "deliverAt": ahead(&pool, 600).await }]).to_string();
    let keyed = [("content-type", "application/json"), ("idempotency-key", "\"k\"")];
    let first = raw(api, &keyed, batch.clone()).await.expect(202);
    let again = raw(api, &keyed, batch).await.expect(202);
    for item in ["/items/0/uid", "/items/1/uid"] {
        assert_eq!(again.text(item), first.text(item));
    }
    assert_eq!(again.body["items"][1]["duplicate"], true);
    assert_eq!((api.all(WAITING, 50).await.len(), api.all(EVENTS, 50).await.len()), (2, 1));

    // One that was cancelled stays so, and is known by its id all the same.
    let organization = tenant.id.parse().unwrap();
    let uid = expected["uid"].as_str().unwrap();
    for _ in 0..2 {
        let cancelled =
            pg::cancel_scheduled(&pool, organization, uid.parse().unwrap(), &By::system(SystemIds.next()))
                .await
                .unwrap();
        assert_eq!(cancelled, CancelScheduled::Cancelled);
    }
    assert_eq!(api.get(&format!("{EVENTS}/{uid}")).await.expect(200).body["status"], "cancelled");
    assert_eq!(api.post(EVENTS, event).await.expect(202).body, expected);
    problem(&api.bare(&format!("{EVENTS}/{uid}/replay")).await, 409, "not-published");
    assert_eq!(api.all(WAITING, 50).await[0]["status"], "cancelled");
    let stranger = bus.tenant("stranger").await.id.parse().unwrap();
    let foreign = pg::cancel_scheduled(&pool, stranger, uid.parse().unwrap(), &By::system(SystemIds.next()))
        .await
        .unwrap();
    assert_eq!(foreign, CancelScheduled::NotThere);
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_listed_in_the_order_in_which_it_is_due() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    // 5 does not divide 7: due in another order than published.
    for n in 0..7 {
        let (place, due) = (n * 5 % 7, ahead(&pool, 600 + n * 5 % 7 * 60).await);
        let event =
            json!({ "type": "t", "id": place.to_string(), "deliverAt": due, "data": "x".repeat(1_000_000) });
        // Within one request each has its own size, not their sum.
        api.post(EVENTS, event).await.is(202);
    }
    let order = ["0", "1", "2", "3", "4", "5", "6"];
    for limit in [1, 3, 7, 50] {
        assert_eq!(ids(&api.all(WAITING, limit).await), order);
    }
    assert_eq!(api.all(WAITING, 50).await[0].get("event"), None);
    for n in 7..20 {
        let due = ahead(&pool, 6_000 + n * 60).await;
        let event =
            json!({ "type": "t", "id": n.to_string(), "deliverAt": due, "data": "x".repeat(1_000_000) });
        api.post(EVENTS, event).await.is(202);
    }
    let whole = format!("{WAITING}&include=event");
    let first = api.get(&format!("{whole}&limit=200")).await.expect(200);
    assert_eq!(first.body["items"].as_array().unwrap().len(), 9, "8 MiB, and the event that passes the mark");
    assert!(first.body["nextCursor"].is_string());
    let all = api.all(&whole, 200).await;
    let expected: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    assert_eq!(ids(&all), expected);
    assert!(all.iter().all(|item| item["event"]["data"].as_str().unwrap().len() == 1_000_000));
    assert_eq!(api.all(&whole, 4).await, all);

    for (query, parameter) in [
        ("type=t", "type"),
        ("source=/s", "source"),
        ("since=2026-01-01T00:00:00Z", "since"),
        ("until=2026-01-01T00:00:00Z", "until"),
        ("include=all", "include"),
    ] {
        let refused = problem(&api.get(&format!("{WAITING}&{query}")).await, 422, "invalid-fields");
        assert_eq!(refused["errors"][0]["parameter"], parameter);
    }
    problem(&api.get(&format!("{EVENTS}?status=cancelled")).await, 422, "invalid-fields");
    pool.close().await;
    bus.stop().await;
}
