//! Publishing, deduplication, and reading what was published.

use crate::common::{Bus, Caller, Check as _, Tenant, pointers, problem};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use devkit::client::Reply;
use http::Method;
use serde_json::{Value, json};

const EVENTS: &str = "/v1/events";

async fn publish_raw(api: &Caller, headers: &[(&str, &str)], body: impl Into<reqwest::Body>) -> Reply {
    let request = api.0.request(Method::POST, EVENTS).body(body);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    api.raw(Method::POST, EVENTS, request).await
}

async fn structured(api: &Caller, event: &Value) -> Reply {
    publish_raw(api, &[("content-type", "application/cloudevents+json")], event.to_string()).await
}

/// The stored event's bytes, as they stand in the answer.
async fn stored_bytes(api: &Caller, id: &str) -> String {
    let text =
        api.0.request(Method::GET, &format!("{EVENTS}/{id}")).send().await.unwrap().text().await.unwrap();
    let start = text.find("\"event\":").unwrap() + "\"event\":".len();
    text[start..text.len() - 1].to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mode_is_read_and_answered() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;

    // Plain JSON: what is missing is filled in.
    let plain =
        api.post(EVENTS, json!({ "type": "order.created", "data": { "total": 1 } })).await.expect(202);
    let uid = plain.text("/uid").to_owned();
    assert_eq!(plain.id(), uid);
    assert_eq!(plain.text("/source"), format!("/organizations/{}", tenant.id));
    assert_eq!(plain.text("/type"), "order.created");
    assert!(plain.body["time"].is_string());
    assert_eq!(plain.body.get("duplicate"), None);
    let stored = api.get(&format!("{EVENTS}/{uid}")).await.expect(200);
    assert_eq!(stored.body["event"]["specversion"], "1.0");
    assert_eq!(stored.body["event"]["id"], uid.as_str());
    assert_eq!(stored.body["event"]["time"], plain.body["time"]);
    assert_eq!(stored.body["event"]["data"], json!({ "total": 1 }));
    assert_eq!(stored.body["subscriptions"], json!([]));

    let event = json!({
        "specversion": "1.0", "id": "e1", "source": "/shop", "type": "order.paid", "subject": "o/1",
        "time": "2026-01-02T03:04:05Z", "partner": "x", "data": [1],
    });
    let accepted = structured(api, &event).await.expect(202);
    let expected = json!({
        "id": "e1", "uid": accepted.text("/uid"), "source": "/shop", "type": "order.paid",
        "time": "2026-01-02T03:04:05Z",
    });
    assert_eq!(accepted.body, expected);
    let stored = api.get(&format!("{EVENTS}/e1")).await.expect(200);
    assert_eq!(stored.body["event"], event);
    assert_eq!(stored.body["subject"], "o/1");

    let binary = [
        ("ce-specversion", "1.0"),
        ("ce-id", "e2"),
        ("ce-source", "/shop"),
        ("ce-type", "photo.taken"),
        ("content-type", "image/png"),
    ];
    publish_raw(api, &binary, vec![0x89, 0x50, 0xff]).await.is(202);
    let stored = api.get(&format!("{EVENTS}/e2")).await.expect(200);
    assert_eq!(stored.body["event"]["data_base64"], STANDARD.encode([0x89, 0x50, 0xff]));
    assert_eq!(stored.body["event"]["datacontenttype"], "image/png");

    let batch = json!([
        { "specversion": "1.0", "id": "b1", "source": "/shop", "type": "a" },
        { "specversion": "1.0", "id": "b2", "source": "/shop", "type": "b" },
    ]);
    let media_type = [("content-type", "application/cloudevents-batch+json")];
    let accepted = publish_raw(api, &media_type, batch.to_string()).await.expect(202);
    assert_eq!(accepted.text("/items/0/id"), "b1");
    assert_eq!(accepted.text("/items/1/id"), "b2");
    assert_eq!(publish_raw(api, &media_type, "[]").await.expect(202).body, json!({ "items": [] }));
    let accepted =
        api.post(EVENTS, json!([{ "type": "a" }, { "type": "b", "data": null }])).await.expect(202);
    assert_eq!(accepted.body["items"].as_array().unwrap().len(), 2);
    assert_eq!(api.all(EVENTS, 3).await.len(), 7);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_are_kept_byte_for_byte() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let media_type = [("content-type", "application/json")];
    for data in
        ["0", "false", "\"\"", "null", "1.10", "123456789012345678901234567890", r#"{"b": 1,  "a":"\u0041"}"#]
    {
        let body = format!(r#"{{"type":"t","data":{data}}}"#);
        let accepted = publish_raw(&tenant.api, &media_type, body).await.expect(202);
        let stored = stored_bytes(&tenant.api, accepted.id()).await;
        assert!(stored.ends_with(&format!(r#""data":{data}}}"#)), "{stored}");
    }
    let accepted = tenant.api.post(EVENTS, json!({ "type": "t" })).await.expect(202);
    assert!(!stored_bytes(&tenant.api, accepted.id()).await.contains("\"data\""));
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_published_once_per_source_and_id() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let event = |source: &str, data: u8| json!({ "specversion": "1.0", "id": "e1", "source": source, "type": "t", "data": data });
    let first = structured(&tenant.api, &event("/a", 1)).await.expect(202);
    let again = structured(&tenant.api, &event("/a", 2)).await.expect(202);
    let mut expected = first.body.clone();
    expected["duplicate"] = true.into();
    assert_eq!(again.body, expected, "the first one's answer");
    let other = structured(&tenant.api, &event("/b", 3)).await.expect(202);
    assert_ne!(other.text("/uid"), first.text("/uid"));
    assert_eq!(tenant.api.all(EVENTS, 50).await.len(), 2);
    // Plain JSON with an id of its own is deduplicated under the key's source.
    let plain = json!({ "type": "t", "id": "mine", "data": 1 });
    tenant.api.post(EVENTS, plain.clone()).await.is(202);
    assert_eq!(tenant.api.post(EVENTS, plain).await.expect(202).body["duplicate"], true);
    // Without an id it is another event each time.
    for _ in 0..2 {
        let reply = tenant.api.post(EVENTS, json!({ "type": "t" })).await.expect(202);
        assert_eq!(reply.body.get("duplicate"), None);
    }
    bus.stop().await;
}

/// An index row has at most 2,704 bytes, and repetitive text would be compressed to fit.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_any_characters_may_be_as_long_as_it_may() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let source = crate::common::ideographs(1_024);
    let event = json!({ "specversion": "1.0", "id": "e1", "source": source, "type": "t" });
    let first = structured(&tenant.api, &event).await.expect(202);
    let again = structured(&tenant.api, &event).await.expect(202);
    assert_eq!(again.text("/uid"), first.text("/uid"));
    assert_eq!(again.body["duplicate"], true);
    // Where the source ends and the id begins makes a difference.
    for (source, id) in [("/a", "bc"), ("/ab", "c"), ("/a\u{fe}b", "c"), ("/a", "\u{fe}bc")] {
        let event = json!({ "specversion": "1.0", "id": id, "source": source, "type": "t" });
        let reply = structured(&tenant.api, &event).await.expect(202);
        assert_eq!(reply.body.get("duplicate"), None, "{source} {id}");
    }
    bus.stop().await;
}

/// I10: what one request sets going is bounded, and what is refused leaves no trace.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_makes_too_many_deliveries_is_refused_whole() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    tenant.webhook("hook").await;
    // 5,000 connections with two subscriptions each, all of which match.
    sqlx::query(
        "WITH receivers AS (
             INSERT INTO connections (id, organization_id, name, kind, url, secret)
             SELECT gen_random_uuid(), organization_id, 'copy ' || n, kind, url, secret
               FROM connections, generate_series(1, 5000) AS n
             RETURNING id, organization_id
         )
         INSERT INTO subscriptions (id, organization_id, connection_id, event_type)
         SELECT gen_random_uuid(), organization_id, id, pattern
           FROM receivers, unnest(ARRAY['many.>', '>']) AS pattern",
    )
    .execute(&pool)
    .await
    .unwrap();
    let batch = |events: usize| -> Value {
        (0..events).map(|n| json!({ "type": "many.one.two", "id": format!("e{n}") })).collect()
    };
    let refused = problem(&tenant.api.post(EVENTS, batch(21)).await, 413, "too-large");
    assert!(refused["detail"].as_str().unwrap().contains("split the batch"), "{refused:#}");
    assert!(tenant.api.all(EVENTS, 50).await.is_empty());
    // A part of it is as new as if nothing had been tried, and requests beside each other do not add up.
    let parts = (0..3).map(|n| {
        let api = tenant.api.clone();
        let part = json!({ "type": "many.one.two", "id": format!("e{n}") });
        async move { api.post(EVENTS, part).await.expect(202) }
    });
    for reply in futures::future::join_all(parts).await {
        assert_eq!(reply.body.get("duplicate"), None);
    }
    let queued: i64 =
        sqlx::query_scalar("SELECT count(*) FROM delivery_queue").fetch_one(&pool).await.unwrap();
    assert_eq!(queued, 3 * 10_000);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_publishes_once() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let plain = |key: &'static str| [("content-type", "application/json"), ("idempotency-key", key)];
    let body = r#"{"type":"t","data":1}"#;
    let first = publish_raw(&tenant.api, &plain("\"key 1\""), body).await.expect(202);
    let again = publish_raw(&tenant.api, &plain("\"key 1\""), body).await.expect(202);
    assert_eq!(again.text("/uid"), first.text("/uid"));
    assert_eq!(again.body["duplicate"], true);
    let mismatch = publish_raw(&tenant.api, &plain("\"key 1\""), r#"{"type":"t","data":2}"#).await;
    problem(&mismatch, 422, "idempotency-key-reused");
    // A key is its organization's.
    let theirs = publish_raw(&other.api, &plain("\"key 1\""), body).await.expect(202);
    assert_ne!(theirs.text("/uid"), first.text("/uid"));
    let bare = publish_raw(&tenant.api, &plain("key2"), r#"[{"type":"t"},{"type":"u"}]"#).await.expect(202);
    let quoted =
        publish_raw(&tenant.api, &plain("\"key2\""), r#"[{"type":"t"},{"type":"u"}]"#).await.expect(202);
    for item in ["/items/0/uid", "/items/1/uid"] {
        assert_eq!(quoted.text(item), bare.text(item));
    }
    assert_eq!(tenant.api.all(EVENTS, 50).await.len(), 3);
    for key in ["\"", "a b", "\"\"", "é"] {
        problem(&publish_raw(&tenant.api, &plain(key), body).await, 400, "invalid-idempotency-key");
    }
    let event = json!({ "specversion": "1.0", "id": "1", "source": "/a", "type": "t" }).to_string();
    let cloud = [("content-type", "application/cloudevents+json"), ("idempotency-key", "k")];
    problem(&publish_raw(&tenant.api, &cloud, event).await, 400, "invalid-idempotency-key");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_event_is_refused_whole() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let json_type = [("content-type", "application/json")];
    problem(&publish_raw(api, &json_type, "{").await, 400, "malformed-event");
    problem(&publish_raw(api, &json_type, "\"x\"").await, 400, "malformed-event");
    problem(&publish_raw(api, &[("content-type", "text/plain")], "x").await, 415, "unsupported-media-type");
    assert_eq!(pointers(&api.post(EVENTS, json!({ "data": 1 })).await), ["/type"]);
    assert_eq!(
        pointers(&api.post(EVENTS, json!({ "type": "t", "not an attribute": 1 })).await),
        ["/not an attribute"]
    );
    assert_eq!(pointers(&api.post(EVENTS, json!({ "type": "t", "subject": "a\0b" })).await), ["/subject"]);
    assert_eq!(pointers(&api.post(EVENTS, json!([{ "type": "t" }, { "type": "" }])).await), ["/1/type"]);
    assert_eq!(
        pointers(&api.post(EVENTS, json!([{ "type": "t" }, { "type": "t", "cron": "@daily" }])).await),
        ["/1/cron"]
    );
    let binary = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/a")];
    let refused = problem(&publish_raw(api, &binary, "").await, 422, "invalid-fields");
    assert_eq!(refused["errors"][0]["header"], "ce-type");
    let large = json!({ "type": "t", "data": "x".repeat(1024 * 1024) });
    problem(&api.post(EVENTS, large).await, 413, "too-large");
    let many: Vec<_> = (0..1_001).map(|_| json!({ "type": "t" })).collect();
    problem(&api.post(EVENTS, many.into()).await, 413, "too-large");
    problem(&publish_raw(api, &json_type, vec![b' '; 8 * 1024 * 1024 + 1]).await, 413, "too-large");
    assert!(api.all(EVENTS, 50).await.is_empty(), "nothing of it was published");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_found_by_either_id() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let event =
        |source: &str, id: &str| json!({ "specversion": "1.0", "id": id, "source": source, "type": "t" });
    let a = structured(api, &event("/a", "shared/1")).await.expect(202);
    let get = async |id: &str| api.get(&format!("{EVENTS}/{id}")).await;
    assert_eq!(get("shared%2F1").await.expect(200).text("/uid"), a.text("/uid"));
    let b = structured(api, &event("/b", "shared/1")).await.expect(202);
    let ambiguous = problem(&get("shared%2F1").await, 409, "ambiguous-event");
    assert_eq!(ambiguous["uids"], json!([b.text("/uid"), a.text("/uid")]));
    problem(&api.get(&format!("{EVENTS}/shared%2F1/deliveries")).await, 409, "ambiguous-event");
    assert_eq!(get("shared%2F1?source=/a").await.expect(200).text("/uid"), a.text("/uid"));
    assert_eq!(get(b.text("/uid")).await.expect(200).text("/source"), "/b");
    // A producer may use UUIDs, and one of them may be another event's uid: the uid wins without source.
    let uuid = "01890000-0000-7000-8000-000000000001";
    structured(api, &event("/a", uuid)).await.is(202);
    assert_eq!(get(uuid).await.expect(200).id(), uuid);
    structured(api, &event("/evil", a.text("/uid"))).await.is(202);
    assert_eq!(get(a.text("/uid")).await.expect(200).text("/source"), "/a");
    let other = get(&format!("{}?source=%2Fevil", a.text("/uid"))).await.expect(200);
    assert_eq!(other.text("/source"), "/evil");
    for nothing in ["none", "%00", "%ff", uuid.replace("01", "02").as_str(), "shared%2F1?source=%00"] {
        problem(&get(nothing).await, 404, "not-found");
    }
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deliveries_of_an_event_are_those_that_matched() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let subscription = tenant.subscription(&connection, "order.*").await;
    tenant.subscription(&connection, "payment.*").await;
    let accepted = tenant.api.post(EVENTS, json!({ "type": "order.created" })).await.expect(202);
    let stored = tenant.api.get(&format!("{EVENTS}/{}", accepted.id())).await.expect(200);
    assert_eq!(stored.body["subscriptions"], json!([subscription]));
    let deliveries = tenant.api.get(&format!("{EVENTS}/{}/deliveries", accepted.id())).await.expect(200);
    let items = deliveries.body["items"].as_array().unwrap();
    assert_eq!(items.len(), 1);
    assert_eq!(items[0]["subscriptionId"], subscription.as_str());
    assert_eq!(items[0]["connectionId"], connection.as_str());
    assert_eq!(items[0]["status"], "pending");
    assert_eq!(items[0]["attempts"], json!([]));
    problem(&tenant.api.get("/v1/events/none/deliveries").await, 404, "not-found");
    let unmatched = tenant.api.post(EVENTS, json!({ "type": "other" })).await.expect(202);
    let deliveries = tenant.api.get(&format!("{EVENTS}/{}/deliveries", unmatched.id())).await.expect(200);
    assert_eq!(deliveries.body["items"], json!([]));
    bus.stop().await;
}

fn uids(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["uid"].as_str().unwrap()).collect()
}

async fn publish_types(tenant: &Tenant, types: &[&str]) {
    for event_type in types {
        let id = format!("{event_type}-{}", types.len());
        let event = json!({ "specversion": "1.0", "id": id, "source": "/s", "type": event_type });
        structured(&tenant.api, &event).await.is(202);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_listed_newest_first_and_filtered() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let mut published = Vec::new();
    for n in 0..7 {
        let event = json!({ "type": format!("t.{}", n % 2), "source": format!("/s/{}", n % 3), "data": n });
        published.insert(0, api.post(EVENTS, event).await.expect(202).text("/uid").to_owned());
    }
    for limit in [1, 3, 7, 50] {
        assert_eq!(uids(&api.all(EVENTS, limit).await), published);
    }
    let every = async |query: &str| uids(&api.all(&format!("{EVENTS}?{query}"), 2).await).len();
    assert_eq!(every("type=t.1").await, 3);
    assert_eq!(every("type=t.*").await, 7);
    assert_eq!(every("type=t.*&source=/s/0").await, 3);
    assert_eq!(every("type=t.1&source=/s/0").await, 1);
    assert_eq!(every("source=/s/2").await, 2);
    assert_eq!(every("type=t").await, 0);
    assert_eq!(every("source=%00").await, 0);

    let all = api.all(&format!("{EVENTS}?include=event"), 50).await;
    assert_eq!(all[0]["event"]["data"], 6);
    assert_eq!(api.all(EVENTS, 50).await[0].get("event"), None);

    // A millisecond is the unit of the bounds: since is inclusive, until exclusive.
    let pool = bus.stack.owner_pool().await.unwrap();
    let at: i64 = sqlx::query_scalar(
        "SELECT ('x' || left(replace(uid::text, '-', ''), 12))::bit(48)::bigint FROM events WHERE uid = $1::uuid",
    )
    .bind(&published[3])
    .fetch_one(&pool)
    .await
    .unwrap();
    let moment = |milliseconds: i64| jiff::Timestamp::from_millisecond(milliseconds).unwrap();
    let since = api.all(&format!("{EVENTS}?since={}", moment(at)), 50).await;
    let until = api.all(&format!("{EVENTS}?until={}", moment(at)), 50).await;
    assert_eq!([uids(&since), uids(&until)].concat(), published);
    assert!(uids(&since).contains(&published[3].as_str()));
    let both = format!("{EVENTS}?since={}&until={}", moment(at), moment(at + 1));
    assert!(uids(&api.all(&both, 50).await).contains(&published[3].as_str()));

    for query in ["type=a..b", "type=", "since=yesterday", "until=1", "include=all"] {
        let refused = problem(&api.get(&format!("{EVENTS}?{query}")).await, 422, "invalid-fields");
        assert_eq!(refused["errors"][0]["parameter"], query.split('=').next().unwrap());
    }
    bus.stop().await;
}

/// The database's wildcards must mean what matching means.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_with_wildcards_selects_what_matching_selects() {
    use bus_core::pattern::TypePattern;
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let types = [
        "a", "a.b", "a.b.c", "a.", ".b", "a..c", "A.b", "axb", "a.b+", "a.b.+", "(a).b", "a.\\d", "a.é",
        "a.b$", "^a.b", "a.b|c", "a.[b]", "a.{2}", "a. b", "*.b", "a.>",
    ];
    publish_types(&tenant, &types).await;
    for pattern in [
        "a", "a.b", "*", ">", "a.*", "a.>", "*.b", "*.*", "a.*.c", "*.>", "(a).*", "*.b+", "*.\\d", "*.é",
        "a.b$", "^a.*", "*.b|c", "*.[b]", "*.{2}", "*. b", "a.b.>", "A.*",
    ] {
        let parsed = TypePattern::parse(pattern).unwrap();
        let mut expected: Vec<_> =
            types.into_iter().filter(|event_type| parsed.matches(event_type)).collect();
        expected.reverse();
        let query: String = url::form_urlencoded::byte_serialize(pattern.as_bytes()).collect();
        let listed = tenant.api.all(&format!("{EVENTS}?type={query}"), 4).await;
        let listed: Vec<_> = listed.iter().map(|item| item["type"].as_str().unwrap()).collect();
        assert_eq!(listed, expected, "{pattern}");
    }
    bus.stop().await;
}

/// Invariant I10: neither a long history nor large events make one request expensive.
#[tokio::test(flavor = "multi_thread")]
async fn one_request_reads_a_bounded_part_of_history() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let rare = tenant.api.post(EVENTS, json!({ "type": "rare.one", "source": "/rare" })).await.expect(202);
    let pool = bus.stack.owner_pool().await.unwrap();
    // 25,000 newer ones; the version and variant bits are where a UUIDv7 has them.
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, time, body)
         SELECT ('ffffffff-ffff-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, organization_id, n::text, '/common',
                'common.one', now(), '{}' FROM events, generate_series(1, 25000) AS n",
    )
    .execute(&pool)
    .await
    .unwrap();
    for query in ["type=rare.*", "source=/rare", "type=rare.>&source=/rare"] {
        let path = format!("{EVENTS}?{query}");
        let first = tenant.api.get(&path).await.expect(200);
        assert_eq!(first.body["items"], json!([]), "{query}");
        assert!(first.body["nextCursor"].is_string(), "{query}");
        assert_eq!(uids(&tenant.api.all(&path, 50).await), [rare.text("/uid")], "{query}");
    }
    // An exact type has an index.
    let exact = tenant.api.get(&format!("{EVENTS}?type=rare.one")).await.expect(200);
    assert_eq!(uids(exact.body["items"].as_array().unwrap()), [rare.text("/uid")]);

    let other = bus.tenant("large").await;
    for n in 0..20 {
        let event = json!({ "type": "t", "data": { "n": n, "blob": "x".repeat(1_000_000) } });
        other.api.post(EVENTS, event).await.is(202);
    }
    let first = other.api.get(&format!("{EVENTS}?include=event&limit=200")).await.expect(200);
    assert_eq!(first.body["items"].as_array().unwrap().len(), 9, "8 MiB, and the event that passes the mark");
    let all = other.api.all(&format!("{EVENTS}?include=event"), 200).await;
    let numbers: Vec<_> = all.iter().map(|item| item["event"]["data"]["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..20).rev().collect::<Vec<_>>());
    assert_eq!(
        other.api.get(&format!("{EVENTS}?limit=200")).await.body["items"].as_array().unwrap().len(),
        20
    );
    bus.stop().await;
}

/// Invariants I7 and I10: what others publish does not make an organization's own history slower. The
/// planner, which expects an organization's events to be spread evenly, must not be able to choose
/// otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn history_is_read_past_none_of_the_events_of_others() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    // A fifth of the older half is acme's, and nothing of the newer. The others are four, in turns.
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, time, body)
         SELECT ('ffffffff-ffff-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
                CASE WHEN n <= 60000 AND n % 5 = 0 THEN $1::uuid ELSE md5((n % 4)::text)::uuid END, n::text, '/s',
                't', now(), convert_to(to_jsonb(repeat('x', 300))::text, 'UTF8')
           FROM generate_series(1, 120000) AS n",
    )
    .bind(&tenant.id)
    .execute(&pool)
    .await
    .unwrap();
    sqlx::query("ANALYZE events").execute(&pool).await.unwrap();
    let blocks = async || -> i64 {
        sqlx::query_scalar(
            "SELECT coalesce(sum(shared_blks_hit + shared_blks_read), 0)::bigint
               FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid JOIN pg_roles r ON r.oid = s.userid
              WHERE d.datname = current_database() AND r.rolname = 'bus_publisher'",
        )
        .fetch_one(&pool)
        .await
        .unwrap()
    };
    let mut total = 0;
    for query in ["limit=50", "limit=50&type=t", "limit=50&source=/s", "limit=50&type=*&include=event"] {
        // A statement is planned anew until Postgres settles on a generic plan, after five times.
        for _ in 0..8 {
            let before = blocks().await;
            let page = tenant.api.get(&format!("{EVENTS}?{query}")).await.expect(200);
            assert_eq!(page.body["items"].as_array().unwrap().len(), 50);
            let read = blocks().await - before;
            assert!(read < 500, "{query} read {read} blocks");
            total += read;
        }
    }
    assert!(total > 0, "the statistics count");
    bus.stop().await;
}
