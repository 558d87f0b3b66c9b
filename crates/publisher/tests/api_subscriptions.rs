//! Subscriptions, their sync, and the dry run of matching.

use crate::common::{Bus, Check as _, pointers, problem};
use serde_json::{Value, json};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_is_created_once() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (connection, publisher) = (tenant.webhook("hook").await, tenant.publisher("shop").await);
    let api = &tenant.api;
    let minimal = json!({ "connectionId": connection, "eventType": "order.created" });
    let created = api.post("/v1/subscriptions", minimal.clone()).await.expect(201);
    let path = format!("/v1/subscriptions/{}", created.id());
    assert_eq!(created.headers["location"], path.as_str());
    let expected = json!({
        "id": created.id(), "connectionId": connection, "eventType": "order.created", "publisher": null,
        "filter": null, "retryPolicy": null, "batch": null, "enabled": true,
        "createdAt": created.text("/createdAt"), "updatedAt": created.text("/updatedAt"),
    });
    assert_eq!(created.body, expected);
    // The same again is the same, and stays as it is.
    let mut again = minimal.clone();
    again["enabled"] = false.into();
    assert_eq!(api.post("/v1/subscriptions", again).await.expect(200).body, expected);
    assert_eq!(api.get(&path).await.expect(200).body, expected);

    // Each part of the identity makes another one.
    for (member, value) in [
        ("eventType", json!("order.*")),
        ("publisher", json!(publisher)),
        ("filter", json!("$[?@.total > 100]")),
        ("filter", json!("$[?@.total > 200]")),
    ] {
        let mut other = minimal.clone();
        other[member] = value;
        let id = api.post("/v1/subscriptions", other.clone()).await.expect(201).id().to_owned();
        assert_ne!(id, created.id());
        assert_eq!(api.post("/v1/subscriptions", other).await.expect(200).id(), id);
    }
    assert_eq!(api.all("/v1/subscriptions", 2).await.len(), 5);
    assert_eq!(api.all("/v1/subscriptions?eventType=order.created", 50).await.len(), 4);
    assert_eq!(api.all("/v1/subscriptions?eventType=order.*", 50).await.len(), 1);
    assert_eq!(api.all(&format!("/v1/subscriptions?connectionId={connection}"), 50).await.len(), 5);
    assert!(api.all(&format!("/v1/subscriptions?connectionId={publisher}"), 50).await.is_empty());

    api.delete(&path).await.is(204);
    problem(&api.delete(&path).await, 404, "not-found");
    problem(&api.get(&path).await, 404, "not-found");
    assert_ne!(api.post("/v1/subscriptions", minimal).await.expect(201).id(), created.id());
    bus.stop().await;
}

/// Many clients that start at once all subscribe; exactly one subscription must come of it.
#[tokio::test(flavor = "multi_thread")]
async fn identical_subscriptions_that_race_are_one() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let racers = (0..20).map(|_| {
        let (api, connection) = (tenant.api.clone(), connection.clone());
        tokio::spawn(async move {
            let new = json!({ "connectionId": connection, "eventType": "a", "filter": "$.x" });
            let reply = api.post("/v1/subscriptions", new).await;
            (reply.status, reply.id().to_owned())
        })
    });
    let answers: Vec<_> = futures::future::try_join_all(racers).await.unwrap();
    assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 1);
    assert_eq!(answers.iter().filter(|(status, _)| *status == 200).count(), 19);
    assert!(answers.iter().all(|(_, id)| *id == answers[0].1));
    assert_eq!(tenant.api.all("/v1/subscriptions", 50).await.len(), 1);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_pointed_at() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let (connection, publisher) = (tenant.webhook("hook").await, tenant.publisher("shop").await);
    let (theirs, their_publisher) = (other.webhook("hook").await, other.publisher("shop").await);
    let create = async |more: Value| {
        let mut new = json!({ "connectionId": connection, "eventType": "a" });
        new.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        tenant.api.post("/v1/subscriptions", new).await
    };
    for event_type in ["", "a..b", "a.>.b", "a*", ">a", &"a".repeat(256)] {
        assert_eq!(
            pointers(&create(json!({ "eventType": event_type })).await),
            ["/eventType"],
            "{event_type}"
        );
    }
    let refused = create(json!({ "filter": "$.a[?@.b ==]" })).await;
    assert_eq!(pointers(&refused), ["/filter"]);
    assert_eq!(refused.body["errors"][0]["position"], 12, "{:#}", refused.body);
    assert_eq!(pointers(&create(json!({ "filter": "" })).await), ["/filter"]);
    assert_eq!(pointers(&create(json!({ "filter": "x", "eventType": "" })).await), ["/eventType", "/filter"]);
    assert_eq!(pointers(&create(json!({ "connectionId": "x" })).await), ["/connectionId"]);
    assert_eq!(pointers(&create(json!({ "connectionId": publisher })).await), ["/connectionId"]);

    // I3: what another organization has is answered like what nobody has.
    let nobody = create(json!({ "connectionId": NOBODY })).await;
    assert_eq!(pointers(&nobody), ["/connectionId"]);
    assert_eq!(create(json!({ "connectionId": theirs })).await.body["errors"], nobody.body["errors"]);
    let nobody = create(json!({ "publisher": NOBODY })).await;
    assert_eq!(pointers(&nobody), ["/publisher"]);
    assert_eq!(create(json!({ "publisher": their_publisher })).await.body["errors"], nobody.body["errors"]);

    let path = format!("/v1/subscriptions/{}", tenant.subscription(&connection, "a").await);
    tenant.subscription(&connection, "b").await;
    let patch = async |patch: Value| tenant.api.patch(&path, patch).await;
    assert_eq!(pointers(&patch(json!({ "eventType": null })).await), ["/eventType"]);
    assert_eq!(
        pointers(&patch(json!({ "eventType": "a*", "filter": "x" })).await),
        ["/eventType", "/filter"]
    );
    assert_eq!(pointers(&patch(json!({ "connectionId": connection })).await), ["/connectionId"]);
    assert_eq!(pointers(&patch(json!({ "publisher": their_publisher })).await), ["/publisher"]);
    problem(&patch(json!({ "eventType": "b" })).await, 409, "subscription-exists");
    let changed =
        patch(json!({ "eventType": "c.>", "publisher": publisher, "filter": "$.x", "enabled": false }));
    let changed = changed.await.expect(200);
    assert_eq!(changed.body["eventType"], "c.>");
    assert_eq!(changed.body["publisher"], publisher.as_str());
    assert_eq!(changed.body["filter"], "$.x");
    let cleared = patch(json!({ "publisher": null, "filter": null, "enabled": null })).await.expect(200);
    assert_eq!(cleared.body["publisher"], Value::Null);
    assert_eq!(cleared.body["filter"], Value::Null);
    assert_eq!(cleared.body["enabled"], true);
    assert_eq!(tenant.api.get(&path).await.expect(200).body, cleared.body);

    // A publisher that is gone does not stand in the way of other changes.
    patch(json!({ "publisher": publisher })).await.is(200);
    tenant.api.delete(&format!("/v1/connections/{publisher}")).await.is(204);
    patch(json!({ "enabled": false })).await.is(200);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_makes_the_set_what_it_says() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let (connection, publisher) = (tenant.webhook("hook").await, tenant.publisher("shop").await);
    let bystander = tenant.subscription(&tenant.webhook("bystander").await, "a").await;
    let path = format!("/v1/connections/{connection}/subscriptions");
    let sync =
        async |subscriptions: Value| tenant.api.put(&path, json!({ "subscriptions": subscriptions })).await;
    let counts = |reply: &devkit::client::Reply| {
        ["created", "updated", "deleted", "unchanged"].map(|name| reply.body[name].as_u64().unwrap())
    };
    let kept = tenant.subscription(&connection, "kept").await;
    let switched = tenant.subscription(&connection, "switched").await;
    tenant.subscription(&connection, "gone").await;

    let wanted = json!([
        { "eventType": "kept" },
        { "eventType": "switched", "enabled": false },
        { "eventType": "new", "publisher": publisher, "filter": "$.x" },
        { "eventType": "new", "publisher": publisher },
    ]);
    let synced = sync(wanted.clone()).await.expect(200);
    assert_eq!(counts(&synced), [2, 1, 1, 1]);
    let items = synced.body["items"].as_array().unwrap();
    assert_eq!(items.len(), 4);
    assert_eq!(items[0]["id"], kept.as_str());
    assert_eq!((&items[1]["id"], &items[1]["enabled"]), (&json!(switched), &json!(false)));
    assert_eq!(tenant.api.all(&format!("/v1/subscriptions?connectionId={connection}"), 50).await, *items);
    assert_eq!(
        counts(&sync(wanted.clone()).await.expect(200)),
        [0, 0, 0, 4],
        "the same again changes nothing"
    );

    // Nothing changes unless all of it can.
    let twice = sync(
        json!([{ "eventType": "x", "filter": "$.a" }, { "eventType": "y" }, { "eventType": "x", "filter": "$.a" }]),
    );
    assert_eq!(pointers(&twice.await), ["/subscriptions/2"]);
    let wrong =
        sync(json!([{ "eventType": "x" }, { "eventType": "" }, { "eventType": "z", "filter": "$[" }]));
    assert_eq!(pointers(&wrong.await), ["/subscriptions/1/eventType", "/subscriptions/2/filter"]);
    let foreign = other.publisher("shop").await;
    let theirs = sync(json!([{ "eventType": "x" }, { "eventType": "y", "publisher": foreign }])).await;
    assert_eq!(pointers(&theirs), ["/subscriptions/1/publisher"]);
    let nobody = sync(json!([{ "eventType": "x" }, { "eventType": "y", "publisher": NOBODY }])).await;
    assert_eq!(nobody.body["errors"], theirs.body["errors"]);
    let many: Vec<_> = (0..1_001).map(|n| json!({ "eventType": format!("t{n}") })).collect();
    assert_eq!(pointers(&sync(many.into()).await), ["/subscriptions"]);
    assert_eq!(counts(&sync(wanted).await.expect(200)), [0, 0, 0, 4]);

    let most: Vec<_> = (0..1_000).map(|n| json!({ "eventType": format!("t{n}"), "filter": "$.x" })).collect();
    assert_eq!(counts(&sync(most.into()).await.expect(200)), [1_000, 0, 4, 0]);
    assert_eq!(counts(&sync(json!([])).await.expect(200)), [0, 0, 1_000, 0]);
    tenant.api.get(&format!("/v1/subscriptions/{bystander}")).await.is(200);
    let nowhere = format!("/v1/connections/{NOBODY}/subscriptions");
    problem(&tenant.api.put(&nowhere, json!({ "subscriptions": [] })).await, 404, "not-found");
    let to_publisher = format!("/v1/connections/{publisher}/subscriptions");
    assert_eq!(pointers(&tenant.api.put(&to_publisher, json!({ "subscriptions": [] })).await), [""]);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_organization_has_a_limit_of_subscriptions() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    sqlx::query(
        "INSERT INTO subscriptions (id, organization_id, connection_id, event_type)
         SELECT gen_random_uuid(), organization_id, id, 'filler.' || n FROM connections, generate_series(1, 9999) AS n",
    )
    .execute(&pool)
    .await
    .unwrap();
    tenant.subscription(&connection, "last").await;
    let one_more = json!({ "connectionId": connection, "eventType": "one more" });
    problem(&tenant.api.post("/v1/subscriptions", one_more).await, 409, "limit-reached");
    // What is there already is found all the same.
    let last = json!({ "connectionId": connection, "eventType": "last" });
    tenant.api.post("/v1/subscriptions", last).await.is(200);
    let other = tenant.webhook("other").await;
    let set = json!({ "subscriptions": [{ "eventType": "a" }] });
    let sync = tenant.api.put(&format!("/v1/connections/{other}/subscriptions"), set).await;
    problem(&sync, 409, "limit-reached");
    let explained = tenant
        .api
        .post("/v1/subscriptions/explain", json!({ "event": { "type": "last" } }))
        .await
        .expect(200);
    assert_eq!(explained.body["items"].as_array().unwrap().len(), 10_000);
    bus.stop().await;
}

/// An index row has at most 2,704 bytes, and repetitive text would be compressed to fit.
#[tokio::test(flavor = "multi_thread")]
async fn a_filter_of_any_characters_may_be_as_long_as_it_may() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let connection = tenant.webhook("hook").await;
    let filter = format!("$['{}']", crate::common::ideographs(1_019));
    let new = json!({ "connectionId": connection, "eventType": "a", "filter": filter });
    let created = tenant.api.post("/v1/subscriptions", new.clone()).await.expect(201);
    assert_eq!(created.body["filter"], filter.as_str());
    assert_eq!(tenant.api.post("/v1/subscriptions", new).await.expect(200).id(), created.id());
    bus.stop().await;
}

/// I10: a tenant's filters are in every publisher's memory.
#[tokio::test(flavor = "multi_thread")]
async fn an_organization_has_a_limit_of_memory_for_filters() {
    const LIMIT: i64 = 64 * 1024 * 1024;
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let connection = tenant.webhook("hook").await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let stored = async |id: &str| -> i64 {
        sqlx::query_scalar("SELECT filter_bytes::bigint FROM subscriptions WHERE id = $1::uuid")
            .bind(id)
            .fetch_one(&pool)
            .await
            .unwrap()
    };
    let bytes = |filter: &str| -> i64 {
        let filter: bus_core::filter::PayloadFilter = filter.parse().unwrap();
        filter.memory_bytes().try_into().unwrap()
    };
    let (small, large) = ("$.x", r#"$[?match(@.x, "[a-z]{1,40}")]"#);
    assert!(bytes(large) > bytes(small));
    let create =
        async |tenant: &crate::common::Tenant, connection: &str, event_type: &str, filter: Option<&str>| {
            let new = json!({ "connectionId": connection, "eventType": event_type, "filter": filter });
            tenant.api.post("/v1/subscriptions", new).await
        };
    let first = create(&tenant, &connection, "first", Some(large)).await.expect(201).id().to_owned();
    assert_eq!(stored(&first).await, bytes(large));
    let path = format!("/v1/subscriptions/{first}");
    tenant.api.patch(&path, json!({ "filter": small })).await.is(200);
    assert_eq!(stored(&first).await, bytes(small));
    let set = format!("/v1/connections/{connection}/subscriptions");
    let sync =
        async |subscriptions: Value| tenant.api.put(&set, json!({ "subscriptions": subscriptions })).await;
    let synced =
        sync(json!([{ "eventType": "synced", "filter": large }, { "eventType": "a" }])).await.expect(200);
    assert_eq!(stored(synced.text("/items/0/id")).await, bytes(large));
    assert_eq!(stored(synced.text("/items/1/id")).await, 0);

    // As if that one were so large that the small filter just fits.
    let id = synced.text("/items/0/id").to_owned();
    sqlx::query("UPDATE subscriptions SET filter_bytes = $2 WHERE id = $1::uuid")
        .bind(&id)
        .bind(i32::try_from(LIMIT - bytes(small)).unwrap())
        .execute(&pool)
        .await
        .unwrap();
    let refused = problem(&create(&tenant, &connection, "b", Some(large)).await, 409, "limit-reached");
    assert!(refused["detail"].as_str().unwrap().contains("regular expressions"), "{refused:#}");
    let fits = create(&tenant, &connection, "b", Some(small)).await.expect(201).id().to_owned();
    let path = format!("/v1/subscriptions/{fits}");
    problem(&tenant.api.patch(&path, json!({ "filter": large })).await, 409, "limit-reached");
    assert_eq!(tenant.api.get(&path).await.expect(200).body["filter"], small, "nothing changed");
    problem(&create(&tenant, &connection, "c", Some(small)).await, 409, "limit-reached");
    create(&tenant, &connection, "c", None).await.is(201);
    tenant.api.patch(&path, json!({ "enabled": false })).await.is(200);
    let kept = json!({ "eventType": "synced", "filter": large });
    let wanted = |filter: &str| json!([kept, { "eventType": "d", "filter": filter }]);
    problem(&sync(wanted(large)).await, 409, "limit-reached");
    sync(wanted(small)).await.is(200);
    // What is deleted does not count, nor does what others have.
    create(&other, &other.webhook("hook").await, "a", Some(large)).await.is(201);
    tenant.api.delete(&format!("/v1/subscriptions/{id}")).await.is(204);
    create(&tenant, &connection, "e", Some(large)).await.is(201);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_which_match_and_why_the_others_do_not() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let (connection, publisher) = (tenant.webhook("hook").await, tenant.publisher("shop").await);
    let their_publisher = other.publisher("shop").await;
    other.subscription(&other.webhook("hook").await, ">").await;
    let create = async |more: Value| {
        let mut new = json!({ "connectionId": connection, "eventType": "order.*" });
        new.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        tenant.api.post("/v1/subscriptions", new).await.expect(201).id().to_owned()
    };
    let plain = create(json!({})).await;
    let disabled = create(json!({ "enabled": false, "eventType": ">" })).await;
    let typed = create(json!({ "eventType": "payment.*" })).await;
    let published = create(json!({ "publisher": publisher })).await;
    let filtered = create(json!({ "filter": "$[?@.total > 100]" })).await;
    let explain = async |body: Value| tenant.api.post("/v1/subscriptions/explain", body).await;
    let reasons = async |body: Value| {
        let reply = explain(body).await.expect(200);
        let items = reply.body["items"].as_array().unwrap().clone();
        assert!(items.iter().all(|item| item["connectionId"] == connection.as_str()));
        assert!(items.iter().all(|item| item["matches"] == item.get("reason").is_none()));
        let reason = |id: &String| {
            let item = items.iter().find(|item| item["subscriptionId"] == id.as_str()).unwrap();
            item["reason"].as_str().unwrap_or("matches").to_owned()
        };
        assert_eq!(items.len(), 5);
        [&plain, &disabled, &typed, &published, &filtered].map(reason)
    };
    let event = json!({ "type": "order.created", "data": { "first": { "total": 99 } } });
    assert_eq!(
        reasons(json!({ "event": event })).await,
        ["matches", "disabled", "type", "publisher", "filter"]
    );
    let event = json!({
        "specversion": "1.0", "id": "1", "source": "/shop", "type": "order.created",
        "data": [{ "total": 101 }],
    });
    let by = json!({ "event": event, "publisher": publisher });
    assert_eq!(reasons(by).await, ["matches", "disabled", "type", "matches", "matches"]);
    let event = json!({ "type": "order.created", "datacontenttype": "text/plain", "data_base64": "eA==" });
    let no_json = reasons(json!({ "event": event })).await;
    assert_eq!(no_json, ["matches", "disabled", "type", "publisher", "payload-not-json"]);

    assert_eq!(pointers(&explain(json!({ "event": { "type": "" } })).await), ["/event/type"]);
    assert_eq!(pointers(&explain(json!({ "event": [] })).await), ["/event"]);
    assert_eq!(pointers(&explain(json!({})).await), [""]);
    let nobody = explain(json!({ "event": { "type": "a" }, "publisher": NOBODY })).await;
    assert_eq!(pointers(&nobody), ["/publisher"]);
    let theirs = explain(json!({ "event": { "type": "a" }, "publisher": their_publisher })).await;
    assert_eq!(theirs.body["errors"], nobody.body["errors"]);
    assert!(tenant.api.all("/v1/events", 50).await.is_empty(), "nothing is published");
    bus.stop().await;
}
