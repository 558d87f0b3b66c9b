//! Reading audit records, and the records of those who read payloads.

use crate::common::{
    Bus, Check as _, ahead,
    audit::{EVERYTHING, Watch, daily, key},
    problem,
};
use bus_core::{audit::Actor, pg};
use devkit::processes::Role;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn reading_payloads_is_recorded_where_the_configuration_says_so() {
    let bus =
        Bus::start_with(|options| options.role_env(Role::Publisher, "EVENT_BUS_AUDIT__PAYLOAD_ACCESS", true))
            .await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let (api, actor) = key(&bus, &tenant, EVERYTHING, None).await;
    let publish =
        async |event: Value| api.post("/v1/events", event).await.expect(202).text("/uid").to_owned();
    let event = publish(json!({ "type": "t", "data": 1 })).await;
    let other = publish(json!({ "type": "t", "data": 2 })).await;
    let waiting = publish(json!({ "type": "t", "deliverAt": ahead(&pool, 3_600).await })).await;
    let schedule = api.post("/v1/events", daily(3)).await.expect(201).id().to_owned();
    let mut watch = Watch::new(pool.clone()).await;

    for (path, kind, id, events) in [
        (format!("/v1/events/{event}"), "event", &event, None),
        (format!("/v1/events/{waiting}"), "event", &waiting, None),
        (format!("/v1/schedules/{schedule}"), "schedule", &schedule, None),
        ("/v1/events?include=event".into(), "organization", &tenant.id, Some(vec![&other, &event])),
        (
            "/v1/events?status=scheduled&include=event".into(),
            "organization",
            &tenant.id,
            Some(vec![&waiting]),
        ),
    ] {
        let reply = api.get(&path).await.expect(200);
        let record = watch.left("a read", &reply, actor, ("payload.read", kind, id)).await;
        assert_eq!(record.after, events.map(|events| json!({ "events": events })), "{path}");
    }
    // Answers to changes show a schedule's event, too.
    for (verb, expected) in
        [("pause", &["payload.read", "schedule.paused"][..]), ("pause", &["payload.read"][..])]
    {
        api.bare(&format!("/v1/schedules/{schedule}/{verb}")).await.is(200);
        let fresh = watch.fresh().await;
        assert_eq!(fresh.iter().map(|record| record.action.as_str()).collect::<Vec<_>>(), expected);
    }
    api.post("/v1/events", daily(3)).await.is(200);
    assert_eq!(watch.fresh().await.len(), 1, "it is shown as it was there");
    // Nothing of what events say.
    for path in
        ["/v1/events", "/v1/events?include=event&type=none", "/v1/schedules", "/v1/dead-letters", "/v1/audit"]
    {
        api.get(path).await.is(200);
    }
    problem(&api.get("/v1/events/none").await, 404, "not-found");
    watch.nothing_happened("reading what is no payload").await;

    // Without a record nobody reads.
    sqlx::query("REVOKE INSERT ON audit_records FROM bus_publisher").execute(&pool).await.unwrap();
    for path in
        [&*format!("/v1/events/{event}"), "/v1/events?include=event", &*format!("/v1/schedules/{schedule}")]
    {
        problem(&api.get(path).await, 503, "unavailable");
    }
    problem(&api.bare(&format!("/v1/schedules/{schedule}/pause")).await, 503, "unavailable");
    api.get("/v1/events").await.is(200);
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_payloads_is_not_recorded_otherwise() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let event =
        tenant.api.post("/v1/events", json!({ "type": "t" })).await.expect(202).text("/uid").to_owned();
    let mut watch = Watch::new(pool.clone()).await;
    tenant.api.get(&format!("/v1/events/{event}")).await.is(200);
    tenant.api.get("/v1/events?include=event").await.is(200);
    watch.nothing_happened("reads").await;
    pool.close().await;
    bus.stop().await;
}

fn ids(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["id"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_listed_newest_first_and_by_what_is_asked_for() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let (admin, actor) = key(&bus, &tenant, EVERYTHING, None).await;
    let Actor::Key { key_id, .. } = actor else { unreachable!("it is a key's") };
    let hook = tenant.webhook("hook").await;
    let path = format!("/v1/connections/{hook}");
    for timeout in 1..=5 {
        admin.patch(&path, json!({ "timeoutMs": timeout * 1_000 })).await.is(200);
    }
    let subscription = tenant.subscription(&hook, "t").await;

    let all = admin.all("/v1/audit", 200).await;
    let actions: Vec<&str> = all.iter().map(|item| item["action"].as_str().unwrap()).collect();
    let mut expected = vec!["subscription.created"];
    expected.extend(["connection.changed"; 5]);
    expected.extend(["connection.created", "key.created", "key.created", "organization.created"]);
    assert_eq!(actions, expected);
    for limit in [1, 3, 10] {
        assert_eq!(admin.all("/v1/audit", limit).await, all);
    }
    // A record is given whole, and by the name of whoever made it.
    assert_eq!(all[1]["actor"], json!({ "kind": "key", "keyId": key_id, "connectionId": null }));
    assert_eq!(all[1]["target"], json!({ "kind": "connection", "id": hook }));
    assert_eq!(all[1]["organizationId"], tenant.id);
    assert_eq!(all[9]["actor"], json!({ "kind": "admin" }));

    let at = |index: usize| all[index]["at"].as_str().unwrap();
    for (query, expected) in [
        (format!("targetKind=connection&targetId={hook}"), &all[1..7]),
        (format!("targetId={subscription}"), &all[..1]),
        ("targetKind=key".into(), &all[7..9]),
        ("action=connection.changed".into(), &all[1..6]),
        (format!("keyId={key_id}"), &all[1..6]),
        (format!("keyId={key_id}&action=connection.created"), &[]),
        (format!("since={}", at(3)), &all[..4]),
        (format!("until={}", at(3)), &all[4..]),
        (format!("since={}&until={}&action=connection.changed", at(5), at(2)), &all[3..6]),
        (format!("organizationId={}", tenant.id), &all[..]),
        ("targetId=%00".into(), &[]),
    ] {
        for limit in [1, 200] {
            let found = admin.all(&format!("/v1/audit?{query}"), limit).await;
            assert_eq!(ids(&found), ids(expected), "{query}");
        }
    }
    for (query, parameter) in [
        ("action=connection.broken", "action"),
        ("targetKind=thing", "targetKind"),
        ("keyId=me", "keyId"),
        ("since=today", "since"),
        ("limit=0", "limit"),
        ("colour=red", "colour"),
    ] {
        let refused = problem(&admin.get(&format!("/v1/audit?{query}")).await, 422, "invalid-fields");
        assert_eq!(refused["errors"][0]["parameter"], parameter);
    }
    pool.close().await;
    bus.stop().await;
}

/// A list that is searched ends after a bounded number of records, and says where it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn i10_a_search_looks_at_a_bounded_number_of_records() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let (admin, _) = key(&bus, &tenant, EVERYTHING, None).await;
    sqlx::query(
        "INSERT INTO audit_records (id, organization_id, actor, action, target_kind, target_id)
         SELECT (lpad(to_hex(floor(extract(epoch FROM now()) * 1000)::bigint + 1000), 12, '0') || '70008000'
                 || lpad(to_hex(n), 12, '0'))::uuid, $1::uuid, 'system', 'connection.disabled', 'connection', n::text
         FROM generate_series(1, $2) AS n",
    )
    .bind(&tenant.id)
    .bind(i32::try_from(pg::audit::AUDIT_SCAN).unwrap() + 5)
    .execute(&pool)
    .await
    .unwrap();
    let first = admin.get("/v1/audit?action=key.created").await.expect(200);
    assert_eq!(first.body["items"], json!([]));
    assert!(first.body["nextCursor"].is_string(), "there is more to look at");
    assert_eq!(admin.all("/v1/audit?action=key.created", 50).await.len(), 2);
    let named = admin.get("/v1/audit?targetKind=connection&targetId=1").await.expect(200);
    assert_eq!((named.body["items"].as_array().unwrap().len(), named.body.get("nextCursor")), (1, None));
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i3_each_sees_the_records_of_its_own_organization() {
    let bus = Bus::start().await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let hook = tenant.webhook("hook").await;
    let (admin, _) = key(&bus, &tenant, EVERYTHING, None).await;
    let (stranger, _) = key(&bus, &other, EVERYTHING, None).await;
    let (bound, _) = key(&bus, &tenant, &["subscribe", "publish", "read"], Some(&hook)).await;

    let own = admin.all("/v1/audit", 50).await;
    assert_eq!(own.len(), 5);
    assert!(own.iter().all(|record| record["organizationId"] == tenant.id));
    let theirs = stranger.all("/v1/audit", 50).await;
    assert!(!theirs.is_empty() && theirs.iter().all(|record| record["organizationId"] == other.id));
    for query in [format!("targetId={hook}"), format!("organizationId={}", tenant.id)] {
        let found = stranger.get(&format!("/v1/audit?{query}")).await.expect(200);
        assert_eq!(found.body, json!({ "items": [] }));
    }
    for caller in [&bound, &tenant.api] {
        problem(&caller.get("/v1/audit").await, 403, "forbidden");
    }

    // The administrator sees all, those of organizations' keys included; a key does not.
    let everyone = bus.admin.all("/v1/admin/audit", 3).await;
    assert_eq!(everyone.len(), own.len() + theirs.len());
    let of_one = bus.admin.all(&format!("/v1/admin/audit?organizationId={}", tenant.id), 50).await;
    assert_eq!(of_one, own);
    problem(&admin.get("/v1/admin/audit").await, 403, "forbidden");
    problem(&bus.admin.get("/v1/audit").await, 403, "forbidden");
    bus.stop().await;
}
