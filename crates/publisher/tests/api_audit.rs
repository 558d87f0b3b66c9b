//! Audit records: every change leaves one, and nothing else does.

use std::collections::BTreeSet;

use crate::common::{
    Bus, Caller, Check as _, Tenant, URL, ahead,
    audit::{EVERYTHING, Watch, daily, key},
    deliveries::Published,
    operations, pointers, problem,
};
use bus_core::{audit::Actor, pg};
use devkit::client::Reply;
use http::Method;
use serde_json::{Value, json};

/// Every operation that is no `GET`, tried so that it succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn every_change_leaves_one_record() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let mut watch = Watch::new(pool.clone()).await;

    let reply = bus.admin.post("/v1/admin/organizations", json!({ "name": "one" })).await.expect(201);
    let id = reply.id().to_owned();
    let record =
        watch.left("createOrganization", &reply, Actor::Admin, ("organization.created", "organization", &id));
    let record = record.await;
    assert_eq!(record.organization_id.map(|id| id.to_string()), Some(id.clone()));
    let none = json!({ "rate": null, "burst": null, "quota": null, "quotaPeriod": null });
    assert_eq!(record.after, Some(json!({ "id": id, "name": "one", "lane": null, "limits": none })));
    let path = format!("/v1/admin/organizations/{id}");
    let changed = ("organization.changed", "organization", id.as_str());
    let reply = bus.admin.put(&format!("{path}/lane"), json!({ "lane": "own" })).await.expect(200);
    let record = watch.left("setLane", &reply, Actor::Admin, changed).await;
    assert_eq!(record.before.unwrap()["lane"], Value::Null);
    assert_eq!(record.after.unwrap()["lane"], reply.body["lane"]);
    let limits = json!({ "rate": 5.0, "burst": 10, "quota": 1_000, "quotaPeriod": "day" });
    let reply = bus.admin.put(&format!("{path}/limits"), limits.clone()).await.expect(200);
    let record = watch.left("setLimits", &reply, Actor::Admin, changed).await;
    assert_eq!((&record.before.unwrap()["limits"], &record.after.unwrap()["limits"]), (&none, &limits));

    let tenant = bus.tenant("acme").await;
    let (api, actor) = key(&bus, &tenant, EVERYTHING, None).await;
    watch.fresh().await;
    keys(&mut watch, &bus, &tenant, &api, actor).await;
    let hook = connections(&mut watch, &api, actor).await;
    let subscription = subscriptions(&mut watch, &api, actor, &hook).await;
    schedules(&mut watch, &api, actor).await;
    deliveries(&mut watch, &tenant, &api, actor, (&hook, &subscription)).await;

    // Of a bound key the record names the connection, too.
    let (bound, bound_actor) = key(&bus, &tenant, &["subscribe"], Some(&hook)).await;
    watch.fresh().await;
    let path = format!("/v1/connections/{hook}");
    let reply = bound.patch(&path, json!({ "timeoutMs": 2_000 })).await.expect(200);
    watch.left("changeConnection", &reply, bound_actor, ("connection.changed", "connection", &hook)).await;

    // With what belongs to it; the key was revoked by this, too.
    let reply = api.delete(&path).await.expect(204);
    let record = watch.left("deleteConnection", &reply, actor, ("connection.deleted", "connection", &hook));
    let record = record.await;
    assert_eq!(
        record.after,
        Some(json!({ "subscriptionsDeleted": 2, "keysRevoked": 1, "schedulesCancelled": 0 }))
    );
    assert_eq!(record.before.unwrap()["name"], "hook");

    let changing = operations().into_iter().filter(|(method, ..)| method != Method::GET);
    let changing: BTreeSet<String> =
        changing.map(|(.., operation)| operation["operationId"].as_str().unwrap().to_owned()).collect();
    let tried: BTreeSet<String> = watch.tried.iter().map(ToString::to_string).collect();
    assert_eq!(tried, changing, "what can change something is in this test");
    pool.close().await;
    bus.stop().await;
}

async fn keys(watch: &mut Watch, bus: &Bus, tenant: &Tenant, api: &Caller, actor: Actor) {
    let new = json!({ "name": "ci", "scopes": ["read"], "expiresAt": "2999-01-01T00:00:00Z" });
    for (caller, by) in [(&bus.admin, Actor::Admin), (api, actor)] {
        let reply = caller.post(&tenant.keys(), new.clone()).await.expect(201);
        let id = reply.id().to_owned();
        let record = watch.left("createKey", &reply, by, ("key.created", "key", &id)).await;
        let after = record.after.unwrap();
        assert_eq!((&after["name"], &after["scopes"]), (&json!("ci"), &json!(["read"])));
        let reply = caller.delete(&format!("{}/{id}", tenant.keys())).await.expect(204);
        let record = watch.left("revokeKey", &reply, by, ("key.revoked", "key", &id)).await;
        assert_eq!(record.before.unwrap()["revokedAt"], Value::Null);
        assert!(record.after.unwrap()["revokedAt"].is_string());
    }
}

/// Gives a webhook.
async fn connections(watch: &mut Watch, api: &Caller, actor: Actor) -> String {
    let new = json!({ "name": "hook", "kind": "webhook", "url": URL });
    let reply = api.post("/v1/connections", new).await.expect(201);
    let id = reply.id().to_owned();
    watch.left("createConnection", &reply, actor, ("connection.created", "connection", &id)).await;
    let reply = api.patch(&format!("/v1/connections/{id}"), json!({ "enabled": false })).await.expect(200);
    let target = ("connection.changed", "connection", id.as_str());
    let record = watch.left("changeConnection", &reply, actor, target).await;
    assert_eq!(
        (&record.before.unwrap()["enabled"], &record.after.unwrap()["enabled"]),
        (&json!(true), &json!(false))
    );
    api.patch(&format!("/v1/connections/{id}"), json!({ "enabled": true })).await.is(200);
    watch.fresh().await;
    id
}

/// Gives a subscription to `t`.
async fn subscriptions(watch: &mut Watch, api: &Caller, actor: Actor, hook: &str) -> String {
    let new = json!({ "connectionId": hook, "eventType": "gone" });
    let reply = api.post("/v1/subscriptions", new).await.expect(201);
    let id = reply.id().to_owned();
    let target = ("subscription.created", "subscription", id.as_str());
    watch.left("createSubscription", &reply, actor, target).await;
    let path = format!("/v1/subscriptions/{id}");
    let reply = api.patch(&path, json!({ "filter": "$.a" })).await.expect(200);
    let target = ("subscription.changed", "subscription", id.as_str());
    watch.left("changeSubscription", &reply, actor, target).await;
    let reply = api.delete(&path).await.expect(204);
    let target = ("subscription.deleted", "subscription", id.as_str());
    let record = watch.left("deleteSubscription", &reply, actor, target).await;
    assert_eq!(record.before.unwrap()["filter"], "$.a");

    let set = json!({ "subscriptions": [{ "eventType": "t" }, { "eventType": "u" }] });
    let reply = api.put(&format!("/v1/connections/{hook}/subscriptions"), set).await.expect(200);
    let target = ("subscriptions.replaced", "connection", hook);
    let record = watch.left("syncSubscriptions", &reply, actor, target).await;
    assert_eq!(record.after, Some(json!({ "created": 2, "updated": 0, "deleted": 0, "unchanged": 0 })));

    api.post("/v1/subscriptions/explain", json!({ "event": { "type": "t", "data": 1 } })).await.is(200);
    watch.left_nothing("explainSubscriptions", "it changes nothing").await;
    reply.body["items"][0]["id"].as_str().unwrap().to_owned()
}

async fn schedules(watch: &mut Watch, api: &Caller, actor: Actor) {
    let reply = api.post("/v1/events", daily(3)).await.expect(201);
    let id = reply.id().to_owned();
    let target = ("schedule.created", "schedule", id.as_str());
    let record = watch.left("publishEvents", &reply, actor, target).await;
    assert_eq!(record.after.unwrap()["cron"], "0 3 * * *");

    let mut other = daily(3);
    other["data"] = json!({ "n": 2 });
    let reply = api.put("/v1/events", other.clone()).await.expect(200);
    let target = ("schedule.changed", "schedule", id.as_str());
    let record = watch.left("putSchedule", &reply, actor, target).await;
    assert_eq!(record.after.unwrap()["alsoChanged"], json!(["/event"]), "the payload itself is not shown");
    other["overlap"] = "skip".into();
    let reply = api.put("/v1/events", other).await.expect(200);
    let record = watch.left("putSchedule", &reply, actor, target).await;
    let after = record.after.unwrap();
    assert_eq!((&after["overlap"], after.get("alsoChanged")), (&json!("skip"), None));

    for (operation, verb, action, before, after) in [
        ("pauseSchedule", "pause", "schedule.paused", "active", "paused"),
        ("resumeSchedule", "resume", "schedule.resumed", "paused", "active"),
        ("cancelSchedule", "cancel", "schedule.cancelled", "active", "cancelled"),
    ] {
        if verb == "cancel" {
            let reply = api.bare(&format!("/v1/schedules/{id}/trigger")).await.expect(202);
            let target = ("schedule.triggered", "schedule", id.as_str());
            let record = watch.left("triggerSchedule", &reply, actor, target).await;
            assert_eq!(record.after, Some(json!({ "eventUid": reply.text("/uid") })));
        }
        let reply = api.bare(&format!("/v1/schedules/{id}/{verb}")).await.expect(200);
        let record = watch.left(operation, &reply, actor, (action, "schedule", &id)).await;
        assert_eq!(record.before, Some(json!({ "state": before })));
        assert_eq!(record.after, Some(json!({ "state": after })));
    }
    // The general cancellation takes schedules, too.
    let id = api.post("/v1/events", daily(4)).await.expect(201).id().to_owned();
    watch.fresh().await;
    let reply = api.bare(&format!("/v1/events/{id}/cancel")).await.expect(200);
    watch.left("cancelEvent", &reply, actor, ("schedule.cancelled", "schedule", &id)).await;
}

async fn deliveries(
    watch: &mut Watch,
    tenant: &Tenant,
    api: &Caller,
    actor: Actor,
    (hook, subscription): (&str, &str),
) {
    let pool = watch.pool.clone();
    let publish = async || {
        let event = json!({ "type": "t", "data": { "a": 1 } });
        api.post("/v1/events", event).await.expect(202).text("/uid").to_owned()
    };
    let event = publish().await;
    watch.left_nothing("publishEvents", "published events are their own history").await;
    let reply = api.bare(&format!("/v1/events/{event}/cancel")).await.expect(200);
    let record = watch.left("cancelEvent", &reply, actor, ("event.cancelled", "event", &event)).await;
    assert_eq!(record.after, Some(json!({ "deliveriesCancelled": 1 })));

    let soon = json!({ "type": "t", "deliverAt": ahead(&pool, 3_600).await });
    let waiting = api.post("/v1/events", soon).await.expect(202).text("/uid").to_owned();
    watch.left_nothing("publishEvents", "events that are due later are listed until then").await;
    let reply = api.bare(&format!("/v1/events/{waiting}/cancel")).await.expect(200);
    watch.left("cancelEvent", &reply, actor, ("event.cancelled", "event", &waiting)).await;

    let acked = publish().await;
    api.post(&format!("/v1/events/{acked}/ack"), json!({ "connectionId": hook })).await.is(200);
    watch.left_nothing("ackEvent", "what becomes of deliveries is their own history").await;

    for (operation, method, verb, status, action) in [
        ("replayDeadLetter", Method::POST, "/replay", 202, "dead_letter.replayed"),
        ("discardDeadLetter", Method::DELETE, "", 204, "dead_letter.discarded"),
    ] {
        let dead = Published::new(tenant, &publish().await, subscription, hook);
        dead.bury(&pool, 20, "attempts_exhausted").await;
        let reply = api.send(method, &format!("/v1/dead-letters/{}{verb}", dead.id()), None).await;
        let reply = reply.expect(status);
        watch.left(operation, &reply, actor, (action, "dead_letter", &dead.id())).await;
    }

    let reply = api.bare(&format!("/v1/events/{event}/expunge")).await.expect(202);
    let target = ("erasure.created", "erasure", reply.id());
    let record = watch.left("expungeEvent", &reply, actor, target).await;
    assert_eq!(record.after, Some(json!({ "eventUid": event, "waiting": 0 })));
    api.bare(&format!("/v1/events/{event}/expunge")).await.is(202);
    watch.left_nothing("expungeEvent", "it is the same job").await;
    let reply = api.post("/v1/erasures", json!({})).await.expect(202);
    let target = ("erasure.created", "erasure", reply.id());
    let record = watch.left("createErasure", &reply, actor, target).await;
    assert_eq!(record.after, Some(json!({ "eventUid": null, "waiting": 0 })));

    let replayed = publish().await;
    let since = json!({ "since": "2020-01-01T00:00:00Z" });
    let letters = json!({ "filter": { "connectionId": hook }, "perSecond": 5 });
    let mut job = String::new();
    for (operation, path, body, kind) in [
        ("replayEvent", format!("/v1/events/{replayed}/replay"), json!({}), "event"),
        ("replaySubscription", format!("/v1/subscriptions/{subscription}/replay"), since, "subscription"),
        ("replayDeadLetters", "/v1/dead-letters/replay".into(), letters.clone(), "deadLetters"),
        ("discardDeadLetters", "/v1/dead-letters/discard".into(), letters, "discard"),
    ] {
        let reply = api.post(&path, body).await.expect(202);
        reply.id().clone_into(&mut job);
        let record = watch.left(operation, &reply, actor, ("replay.created", "replay", &job)).await;
        let selection = record.after.unwrap();
        assert_eq!(selection["kind"], kind);
        if operation == "discardDeadLetters" {
            assert_eq!(selection["filter"]["connectionId"], hook);
        }
    }
    let reply = api.bare(&format!("/v1/replays/{job}/cancel")).await.expect(200);
    watch.left("cancelReplay", &reply, actor, ("replay.cancelled", "replay", &job)).await;
}

/// What the API shows of a thing, without what a record leaves out.
fn shown(reply: &Reply) -> Value {
    let mut body = reply.body.clone();
    for member in ["createdAt", "updatedAt", "secret"] {
        body.as_object_mut().unwrap().remove(member);
    }
    if let Some(url) = body["url"].as_str() {
        // What comes behind the host may be a credential.
        body["url"] = url.split('/').take(3).chain(["***"]).collect::<Vec<_>>().join("/").into();
    }
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_has_the_thing_before_and_after_as_the_api_shows_it() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (admin, _) = key(&bus, &tenant, EVERYTHING, None).await;
    let change = async |path: &str, patch: Value| {
        let before = shown(&admin.get(path).await.expect(200));
        let after = shown(&admin.patch(path, patch).await.expect(200));
        let id = path.rsplit('/').next().unwrap();
        let list = admin.get(&format!("/v1/audit?targetId={id}&limit=1")).await.expect(200);
        let record = list.body["items"][0].clone();
        assert_eq!(record["before"], before);
        (after, record["after"].clone())
    };

    let publisher = tenant.publisher("shop").await;
    let hook = tenant.webhook("hook").await;
    let path = format!("/v1/connections/{hook}");
    let all = json!({
        "name": "renamed", "url": "https://other.example/hook", "timeoutMs": 1_000, "contentMode": "binary",
        "headers": { "x-plain": "seen", "x-token": "unseen" }, "finalStatuses": [451], "enabled": false,
    });
    let (shown, after) = change(&path, all).await;
    assert_eq!(after, shown);
    assert_eq!(after["headers"], json!({ "x-plain": "seen", "x-token": "***" }));

    // What is hidden is named where it changes, and nothing else is.
    let hidden = json!({ "headers": { "x-token": "new", "x-plain": "new" }, "secret": null });
    let (_, after) = change(&path, hidden).await;
    assert_eq!(after["alsoChanged"], json!(["/secret", "/headers/x-token"]));
    assert!(after["previousSecretUntil"].is_string());
    assert_eq!(after["headers"], json!({ "x-plain": "new", "x-token": "***" }));
    admin.patch(&path, json!({ "url": "https://other.example/hook?token=a" })).await.is(200);
    let new_token = json!({ "url": "https://other.example/hook?token=b" });
    admin.patch(&path, new_token).await.is(200);
    let list = admin.get(&format!("/v1/audit?targetId={hook}&limit=1")).await.expect(200);
    let after = &list.body["items"][0]["after"];
    assert_eq!(after["url"], "https://other.example/***?***");
    assert_eq!(after["alsoChanged"], json!(["/url"]));

    let subscription = tenant.subscription(&hook, "a.*").await;
    let all = json!({
        "eventType": "b.>", "publisher": publisher, "filter": "$.a", "enabled": false,
        "retryPolicy": { "delaysMs": [200] }, "batch": { "maxEvents": 5, "maxWaitMs": 10 },
    });
    let (shown, after) = change(&format!("/v1/subscriptions/{subscription}"), all).await;
    assert_eq!(after, shown);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_record_holds_a_secret() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let mut secrets = vec![bus.stack.admin_token().to_owned()];
    let created =
        bus.admin.post(&tenant.keys(), json!({ "name": "ci", "scopes": EVERYTHING })).await.expect(201);
    let key = created.text("/key").to_owned();
    let api = Caller(bus.admin.0.with_token(&key));
    secrets.push(key);
    let hash: String = sqlx::query_scalar("SELECT encode(hash, 'hex') FROM api_keys WHERE id = $1::uuid")
        .bind(created.id())
        .fetch_one(&pool)
        .await
        .unwrap();
    secrets.push(hash);

    let own = "whsec_c2l4dGVlbiBieXRlcyBhbmQgYSBmZXcgbW9yZQ==";
    let new = json!({
        "name": "hook", "kind": "webhook", "url": format!("{URL}?apikey=in-the-query"), "secret": own,
        "headers": { "authorization": "Bearer in-a-header", "x-api-key": "in-another" },
    });
    let reply = api.post("/v1/connections", new).await.expect(201);
    let path = format!("/v1/connections/{}", reply.id());
    secrets.push(own.to_owned());
    let rotated = api.patch(&path, json!({ "secret": null })).await.expect(200);
    secrets.push(rotated.text("/secret").to_owned());
    let patch = json!({ "headers": { "authorization": "Basic in-a-later-one" }, "url": format!("{URL}?in-a-later-query") });
    api.patch(&path, patch).await.is(200);
    let mut event = daily(3);
    event["data"] = "in-the-payload".into();
    let schedule = api.post("/v1/events", event.clone()).await.expect(201).id().to_owned();
    event["data"] = "in-a-later-payload".into();
    api.put("/v1/events", event).await.is(200);
    api.bare(&format!("/v1/schedules/{schedule}/trigger")).await.is(202);
    let uid = api.post("/v1/events", json!({ "type": "t", "data": "in-an-event" })).await.expect(202);
    api.bare(&format!("/v1/events/{}/replay", uid.text("/uid"))).await.is(202);
    api.delete(&path).await.is(204);
    bus.admin.delete(&format!("{}/{}", tenant.keys(), created.id())).await.is(204);

    let hidden = ["in-the-query", "in-a-header", "in-another", "in-a-later", "in-the-payload", "in-an-event"];
    secrets.extend(hidden.map(str::to_owned));
    let rows: Vec<String> =
        sqlx::query_scalar("SELECT t::text FROM audit_records t").fetch_all(&pool).await.unwrap();
    assert!(rows.len() >= 11, "{rows:#?}");
    assert!(rows.iter().any(|row| row.contains("x-api-key")), "what is not secret is there: {rows:#?}");
    for secret in secrets {
        let bare = secret.strip_prefix("whsec_").or_else(|| secret.strip_prefix("ebk_")).unwrap_or(&secret);
        for row in &rows {
            assert!(!row.contains(bare), "{secret} in {row}");
        }
    }
    pool.close().await;
    bus.stop().await;
}

/// What is refused, and what changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_nothing_leaves_no_record() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let (hook, _) = (tenant.webhook("hook").await, tenant.publisher("shop").await);
    let subscription = tenant.subscription(&hook, "t").await;
    let schedule = api.post("/v1/events", daily(3)).await.expect(201).id().to_owned();
    let event = api.post("/v1/events", json!({ "type": "t" })).await.expect(202).text("/uid").to_owned();
    let cancel = format!("/v1/events/{event}/cancel");
    api.bare(&cancel).await.is(200);
    api.bare(&format!("/v1/schedules/{schedule}/pause")).await.is(200);
    let soon = json!({ "type": "t", "deliverAt": ahead(&pool, 3_600).await });
    let waiting = api.post("/v1/events", soon).await.expect(202).text("/uid").to_owned();
    let cancel_waiting = format!("/v1/events/{waiting}/cancel");
    api.bare(&cancel_waiting).await.is(200);
    let job = async || {
        let request =
            api.0.request(Method::POST, "/v1/dead-letters/replay").header("idempotency-key", "\"k\"");
        let request = request.json(&json!({ "filter": {} }));
        api.raw(Method::POST, "/v1/dead-letters/replay", request).await.expect(202).id().to_owned()
    };
    let replay = job().await;
    api.bare(&format!("/v1/replays/{replay}/cancel")).await.is(200);
    let revoked =
        bus.admin.post(&tenant.keys(), json!({ "name": "x", "scopes": ["read"] })).await.expect(201);
    let revoked = format!("{}/{}", tenant.keys(), revoked.id());
    bus.admin.delete(&revoked).await.is(204);
    let mut watch = Watch::new(pool.clone()).await;

    // Refused.
    let (connection, of_hook) = ("/v1/connections", format!("/v1/connections/{hook}"));
    let taken = json!({ "name": "shop", "kind": "publisher" });
    problem(&api.post(connection, taken).await, 409, "name-taken");
    problem(&api.patch(&of_hook, json!({ "name": "shop" })).await, 409, "name-taken");
    assert_eq!(pointers(&api.patch(&of_hook, json!({ "timeoutMs": 1 })).await), ["/timeoutMs"]);
    let organization = json!({ "name": "acme" });
    problem(&bus.admin.post("/v1/admin/organizations", organization).await, 409, "name-taken");
    problem(&api.post(&tenant.keys(), json!({ "name": "x", "scopes": ["read"] })).await, 403, "forbidden");
    problem(&api.delete(&format!("/v1/dead-letters/{hook}")).await, 404, "not-found");
    problem(&api.delete(&format!("/v1/subscriptions/{hook}")).await, 404, "not-found");
    problem(&api.delete(&format!("/v1/connections/{subscription}")).await, 404, "not-found");
    let past = json!({ "type": "x", "cron": "0 0 * * *", "endsAt": "2020-01-01T00:00:00Z" });
    assert_eq!(pointers(&api.post("/v1/events", past).await), ["/endsAt"]);
    watch.nothing_happened("what was refused").await;

    // As it is already.
    api.patch(&of_hook, json!({ "enabled": true, "name": "hook" })).await.is(200);
    api.patch(&format!("/v1/subscriptions/{subscription}"), json!({ "enabled": true })).await.is(200);
    api.post("/v1/subscriptions", json!({ "connectionId": hook, "eventType": "t" })).await.is(200);
    let same = json!({ "subscriptions": [{ "eventType": "t" }] });
    api.put(&format!("/v1/connections/{hook}/subscriptions"), same).await.is(200);
    api.post("/v1/events", daily(3)).await.is(200);
    api.put("/v1/events", daily(3)).await.is(200);
    api.bare(&format!("/v1/schedules/{schedule}/pause")).await.is(200);
    api.bare(&cancel).await.is(200);
    api.bare(&cancel_waiting).await.is(200);
    assert_eq!(job().await, replay);
    api.bare(&format!("/v1/replays/{replay}/cancel")).await.is(200);
    bus.admin.delete(&revoked).await.is(204);
    watch.nothing_happened("what was so before").await;
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_and_its_record_are_one_transaction() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let hook = tenant.webhook("hook").await;
    let path = format!("/v1/connections/{hook}");
    let mut watch = Watch::new(pool.clone()).await;

    // The change fails at its commit, when its record is written.
    for statement in [
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
        "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON connections DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION refuse()",
    ] {
        sqlx::query(statement).execute(&pool).await.unwrap();
    }
    problem(&tenant.api.patch(&path, json!({ "enabled": false })).await, 500, "internal");
    problem(&tenant.api.delete(&path).await, 500, "internal");
    watch.nothing_happened("a change that was rolled back").await;
    sqlx::query("DROP TRIGGER refuse ON connections").execute(&pool).await.unwrap();

    // The record cannot be written.
    sqlx::query("REVOKE INSERT ON audit_records FROM bus_publisher").execute(&pool).await.unwrap();
    let new = json!({ "name": "other", "kind": "publisher" });
    problem(&tenant.api.post("/v1/connections", new).await, 500, "internal");
    problem(&tenant.api.patch(&path, json!({ "enabled": false })).await, 500, "internal");
    problem(&tenant.api.delete(&path).await, 500, "internal");
    problem(&tenant.api.post("/v1/events", daily(3)).await, 500, "internal");
    problem(&bus.admin.post("/v1/admin/organizations", json!({ "name": "other" })).await, 500, "internal");
    let listed = tenant.api.all("/v1/connections", 50).await;
    assert_eq!(listed.len(), 1, "{listed:#?}");
    assert_eq!(listed[0]["enabled"], true);
    assert_eq!(tenant.api.all("/v1/schedules", 50).await.len(), 0);
    assert_eq!(bus.admin.all("/v1/admin/organizations", 50).await.len(), 1);
    watch.nothing_happened("changes without a record").await;
    // Publishing needs none.
    tenant.api.post("/v1/events", json!({ "type": "t" })).await.is(202);

    sqlx::query("GRANT INSERT ON audit_records TO bus_publisher").execute(&pool).await.unwrap();
    let reply = tenant.api.patch(&path, json!({ "enabled": false })).await.expect(200);
    assert_eq!(reply.body["enabled"], false);
    assert_eq!(watch.fresh().await.len(), 1);
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_bus_does_by_itself_is_recorded() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let tenant = bus.tenant("acme").await;
    let hook = tenant.webhook("hook").await;
    let mut watch = Watch::new(pool.clone()).await;
    let (organization, id) = (tenant.id.parse().unwrap(), hook.parse().unwrap());
    assert!(!pg::disable_connection(&pool, organization, id, 7, "answered 410").await.unwrap());
    watch.nothing_happened("another version").await;
    let before = pg::transaction_time(&mut pool.acquire().await.unwrap()).await.unwrap();
    assert!(pg::disable_connection(&pool, organization, id, 1, "answered 410").await.unwrap());
    assert!(!pg::disable_connection(&pool, organization, id, 1, "answered 410").await.unwrap());
    let fresh = watch.fresh().await;
    let [record] = fresh.as_slice() else { panic!("{fresh:#?}") };
    assert_eq!((record.actor, record.action.as_str()), (Actor::System, "connection.disabled"));
    assert_eq!((record.target.kind.as_str(), &record.target.id), ("connection", &hook));
    assert_eq!(record.organization_id, Some(organization));
    assert_eq!(record.after, Some(json!({ "enabled": false, "disabledReason": "answered 410" })));
    // Its id is a UUIDv7 of its time, like those that processes make.
    assert_eq!((record.id.0.get_version_num(), record.id.0.get_variant()), (7, uuid::Variant::RFC4122));
    assert!(record.at >= before);
    let millis = record.id.0.as_u128() >> 80;
    assert_eq!(millis, u128::try_from(record.at.as_millisecond()).unwrap());
    pool.close().await;
    bus.stop().await;
}
