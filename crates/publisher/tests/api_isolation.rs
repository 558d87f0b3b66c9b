//! Invariant I3: whatever the operation, the key of another organization sees nothing and changes
//! nothing.

use std::{collections::BTreeMap, time::Duration};

use crate::common::{Bus, Caller, Check as _, Tenant, deliveries::Published, operations, pointers, problem};
use devkit::wait_until;
use http::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

/// What another organization has.
struct Victim {
    tenant: Tenant,
    connection: String,
    publisher: String,
    subscription: String,
    key: String,
    event: String,
    dead_letter: String,
    replay: String,
    erasure: String,
    schedule: String,
    waiting: String,
}

/// What a stranger must get.
enum Expected {
    /// As if it did not exist.
    NotFound,
    /// Only the administrator may do this at all.
    Forbidden,
    /// A list of the stranger's own, which is empty.
    EmptyList,
    /// As if the id in the body did not exist.
    NoSuchId(&'static str),
    /// It works, among the stranger's own things.
    Own(u16),
}

use Expected::{EmptyList, Forbidden, NoSuchId, NotFound, Own};

/// The table: what a stranger tries, for every operation of the document.
fn attack(operation: &str, victim: &Victim) -> Option<Vec<(String, Option<Value>, Expected)>> {
    let Victim { tenant, connection, publisher, subscription, key, event, dead_letter, replay, .. } = victim;
    let Victim { schedule, waiting, erasure, .. } = victim;
    let organizations = "/v1/admin/organizations";
    let organization = format!("{organizations}/{}", tenant.id);
    let path = |collection: &str, id: &str| format!("/v1/{collection}/{id}");
    let subscribe =
        |to: &str, by: Option<&str>| json!({ "connectionId": to, "eventType": ">", "publisher": by });
    Some(match operation {
        "getOpenapi" => vec![("/openapi.json".into(), None, Own(200))],
        "createOrganization" => vec![(organizations.into(), Some(json!({ "name": "x" })), Forbidden)],
        "listOrganizations" => vec![(organizations.into(), None, Forbidden)],
        "listAllAudit" => vec![("/v1/admin/audit".into(), None, Forbidden)],
        "listAudit" => vec![
            ("/v1/audit".into(), None, Own(200)),
            (format!("/v1/audit?targetId={connection}"), None, EmptyList),
            (format!("/v1/audit?targetKind=connection&targetId={connection}"), None, EmptyList),
            (format!("/v1/audit?organizationId={}", tenant.id), None, EmptyList),
            (format!("/v1/audit?keyId={key}"), None, EmptyList),
        ],
        "getOrganization" => vec![(organization, None, NotFound)],
        "setLimits" => vec![(format!("{organization}/limits"), Some(json!({})), Forbidden)],
        "getUsage" => vec![(format!("{organization}/usage"), None, NotFound)],
        "setLane" => vec![(format!("{organization}/lane"), Some(json!({ "lane": "own" })), Forbidden)],
        "createKey" => {
            let new = json!({ "name": "x", "scopes": ["read"] });
            vec![(format!("{organization}/keys"), Some(new), NotFound)]
        }
        "listKeys" => vec![(format!("{organization}/keys"), None, NotFound)],
        "revokeKey" => vec![(format!("{organization}/keys/{key}"), None, NotFound)],
        "createConnection" => {
            // The same name is no conflict, and says nothing about the other's.
            vec![("/v1/connections".into(), Some(json!({ "name": "shop", "kind": "publisher" })), Own(201))]
        }
        "listConnections" => vec![
            ("/v1/connections".into(), None, EmptyList),
            (format!("/v1/connections?cursor={}", "A".repeat(22)), None, EmptyList),
        ],
        "getConnection" => vec![(path("connections", connection), None, NotFound)],
        "changeConnection" => {
            vec![(
                path("connections", connection),
                Some(json!({ "enabled": false, "secret": null })),
                NotFound,
            )]
        }
        "deleteConnection" => vec![(path("connections", connection), None, NotFound)],
        "syncSubscriptions" => {
            let path = format!("/v1/connections/{connection}/subscriptions");
            vec![(path, Some(json!({ "subscriptions": [] })), NotFound)]
        }
        "createSubscription" => vec![
            ("/v1/subscriptions".into(), Some(subscribe(connection, None)), NoSuchId("/connectionId")),
            (
                "/v1/subscriptions".into(),
                Some(subscribe(connection, Some(publisher))),
                NoSuchId("/connectionId"),
            ),
        ],
        "listSubscriptions" => vec![
            ("/v1/subscriptions".into(), None, EmptyList),
            (format!("/v1/subscriptions?connectionId={connection}"), None, EmptyList),
        ],
        "getSubscription" => vec![(path("subscriptions", subscription), None, NotFound)],
        "changeSubscription" => {
            vec![(path("subscriptions", subscription), Some(json!({ "enabled": false })), NotFound)]
        }
        "deleteSubscription" => vec![(path("subscriptions", subscription), None, NotFound)],
        "explainSubscriptions" => {
            let sample = json!({ "type": "order.created", "data": { "total": 500 } });
            vec![
                ("/v1/subscriptions/explain".into(), Some(json!({ "event": sample })), EmptyList),
                (
                    "/v1/subscriptions/explain".into(),
                    Some(json!({ "event": sample, "publisher": publisher })),
                    NoSuchId("/publisher"),
                ),
            ]
        }
        "publishEvents" => {
            // The victim's own (source, id): neither a duplicate nor a match.
            let event = json!({ "type": "order.created", "source": "/victim", "id": "secret-id", "data": 1 });
            // The victim's own schedule: a new one.
            vec![
                ("/v1/events".into(), Some(event), Own(202)),
                ("/v1/events".into(), Some(daily(0)), Own(201)),
            ]
        }
        "listEvents" => vec![
            ("/v1/events".into(), None, EmptyList),
            ("/v1/events?type=order.created&source=/victim&include=event".into(), None, EmptyList),
            ("/v1/events?status=scheduled&include=event".into(), None, EmptyList),
        ],
        "putSchedule" => vec![("/v1/events".into(), Some(daily(1)), Own(201))],
        "listSchedules" => vec![
            ("/v1/schedules".into(), None, EmptyList),
            ("/v1/schedules?state=active&type=day.began".into(), None, EmptyList),
        ],
        "getSchedule" => vec![(path("schedules", schedule), None, NotFound)],
        "listOccurrences" => vec![(format!("/v1/schedules/{schedule}/occurrences"), None, NotFound)],
        "pauseSchedule" => vec![(format!("/v1/schedules/{schedule}/pause"), None, NotFound)],
        "resumeSchedule" => vec![(format!("/v1/schedules/{schedule}/resume"), None, NotFound)],
        "triggerSchedule" => vec![(format!("/v1/schedules/{schedule}/trigger"), None, NotFound)],
        "cancelSchedule" => vec![(format!("/v1/schedules/{schedule}/cancel"), None, NotFound)],
        "getEvent" => vec![
            (path("events", event), None, NotFound),
            (path("events", "secret-id"), None, NotFound),
            (path("events", "secret-id?source=/victim"), None, NotFound),
            (path("events", waiting), None, NotFound),
            (path("events", "secret-later"), None, NotFound),
        ],
        "listDeliveries" => vec![
            (format!("/v1/events/{event}/deliveries"), None, NotFound),
            ("/v1/events/secret-id/deliveries".into(), None, NotFound),
            (format!("/v1/events/{waiting}/deliveries"), None, NotFound),
        ],
        // By now the stranger has published an event with the same id.
        "ackEvent" => {
            let body = json!({ "connectionId": connection });
            vec![
                (format!("/v1/events/{event}/ack"), Some(body.clone()), NotFound),
                (format!("/v1/events/{waiting}/ack"), Some(body.clone()), NotFound),
                ("/v1/events/secret-id/ack".into(), Some(body), NoSuchId("/connectionId")),
            ]
        }
        "cancelEvent" => vec![
            (format!("/v1/events/{event}/cancel"), None, NotFound),
            // The stranger's own of the same id, for which nobody waits.
            ("/v1/events/secret-id/cancel".into(), None, Own(200)),
        ],
        "replayEvent" => {
            let body = json!({ "subscriptionId": subscription });
            vec![
                (format!("/v1/events/{event}/replay"), Some(json!({})), NotFound),
                (format!("/v1/events/{waiting}/replay"), Some(json!({})), NotFound),
                ("/v1/events/secret-id/replay".into(), Some(body), NoSuchId("/subscriptionId")),
                ("/v1/events/secret-id/replay".into(), Some(json!({})), Own(202)),
            ]
        }
        "replaySubscription" => {
            let body = json!({ "since": "2020-01-01T00:00:00Z" });
            vec![(format!("/v1/subscriptions/{subscription}/replay"), Some(body), NotFound)]
        }
        "listDeadLetters" => vec![
            ("/v1/dead-letters".into(), None, EmptyList),
            (format!("/v1/dead-letters?connectionId={connection}&type=order.created"), None, EmptyList),
            (format!("/v1/dead-letters?subscriptionId={subscription}"), None, EmptyList),
        ],
        "getDeadLetter" | "discardDeadLetter" => vec![(path("dead-letters", dead_letter), None, NotFound)],
        "replayDeadLetter" => vec![(format!("/v1/dead-letters/{dead_letter}/replay"), None, NotFound)],
        // What such a job does is tested with the scheduler.
        "replayDeadLetters" | "discardDeadLetters" => {
            let path =
                format!("/v1/dead-letters/{}", if operation.starts_with('r') { "replay" } else { "discard" });
            let filter = json!({ "filter": { "connectionId": connection } });
            vec![
                (path.clone(), Some(json!({ "ids": [dead_letter] })), Own(202)),
                (path, Some(filter), Own(202)),
            ]
        }
        "expungeEvent" => vec![
            (format!("/v1/events/{event}/expunge"), None, NotFound),
            (format!("/v1/events/{waiting}/expunge"), None, NotFound),
            ("/v1/events/secret-id/expunge?source=/elsewhere".into(), None, NotFound),
        ],
        // What such a job does, also one that names a foreign event, is tested with the archiver.
        "createErasure" => vec![("/v1/erasures".into(), Some(json!({})), Own(202))],
        "listErasures" => vec![("/v1/erasures".into(), None, EmptyList)],
        "getErasure" => vec![(path("erasures", erasure), None, NotFound)],
        "listReplays" => vec![("/v1/replays".into(), None, EmptyList)],
        "getReplay" => vec![(path("replays", replay), None, NotFound)],
        "cancelReplay" => vec![(format!("/v1/replays/{replay}/cancel"), None, NotFound)],
        _ => return None,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn i3_a_foreign_key_sees_nothing_and_changes_nothing() {
    let bus = Bus::start().await;
    let pool = bus.stack.owner_pool().await.unwrap();
    let victim = furnish(&bus, &pool).await;
    let stranger_tenant = bus.tenant("stranger").await;
    // The most that an organization can have, and what an ordinary one has.
    let admin = stranger_tenant.key(json!({ "scopes": ["publish", "subscribe", "read", "admin"] })).await;
    // What was published is counted about a second later.
    wait_until("the victim's events to be counted", Duration::from_secs(30), || async {
        let (counted, published): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT coalesce(sum(events), 0)::int8 FROM organization_usage WHERE organization_id = $1::uuid),
                    (SELECT count(*) FROM events WHERE organization_id = $1::uuid)
                    + (SELECT count(*) FROM scheduled_events WHERE organization_id = $1::uuid)",
        )
        .bind(&victim.tenant.id)
        .fetch_one(&pool)
        .await
        .unwrap();
        if counted == published { Ok(()) } else { Err(format!("{counted} of {published}")) }
    })
    .await;
    let before = fingerprint(&pool, &victim.tenant.id).await;
    assert!(before.len() >= 6, "every table with an organization_id: {before:?}");

    // What the stranger makes comes last, so that the lists before it are empty.
    let mut operations = operations();
    operations.sort_by_key(|(method, ..)| match *method {
        Method::GET => 0,
        Method::POST => 2,
        _ => 1,
    });
    for stranger in [&admin, &stranger_tenant.api] {
        for (method, template, operation) in &operations {
            let id = operation["operationId"].as_str().unwrap();
            let tries = attack(id, &victim)
                .unwrap_or_else(|| panic!("{method} {template} ({id}) is not in the table of this test"));
            for (path, body, expected) in tries {
                try_one(stranger, method, &path, body, expected, &victim).await;
            }
        }
        undo(stranger, &pool, &stranger_tenant.id).await;
    }
    assert_eq!(fingerprint(&pool, &victim.tenant.id).await, before, "nothing of the victim's changed");
    let subscriptions: Vec<Vec<uuid::Uuid>> =
        sqlx::query_scalar("SELECT subscriptions FROM events WHERE organization_id = $1::uuid")
            .bind(&stranger_tenant.id)
            .fetch_all(&pool)
            .await
            .unwrap();
    assert!(subscriptions.iter().all(Vec::is_empty), "no foreign subscription matches");
    bus.stop().await;
}

async fn try_one(
    stranger: &Caller,
    method: &Method,
    path: &str,
    body: Option<Value>,
    expected: Expected,
    victim: &Victim,
) {
    let reply = stranger.send(method.clone(), path, body).await;
    let at = format!("{method} {path}: {} {:#}", reply.status, reply.body);
    // An ordinary key may not even ask.
    let not_admin = stranger.get("/v1/admin/organizations/none").await.status == 403;
    match expected {
        NotFound if not_admin && path.starts_with("/v1/admin/") => {
            problem(&reply, 403, "forbidden");
        }
        _ if not_admin && ["/v1/audit", "/v1/erasures"].iter().any(|of| path.starts_with(of)) => {
            problem(&reply, 403, "forbidden");
        }
        _ if not_admin && path.contains("/expunge") => {
            problem(&reply, 403, "forbidden");
        }
        NotFound => {
            problem(&reply, 404, "not-found");
        }
        Forbidden => {
            problem(&reply, 403, "forbidden");
        }
        EmptyList => {
            assert_eq!(reply.status, 200, "{at}");
            assert_eq!(reply.body, json!({ "items": [] }), "{at}");
        }
        NoSuchId(pointer) => assert_eq!(pointers(&reply), [pointer], "{at}"),
        Own(status) => {
            assert_eq!(reply.status, status, "{at}");
            assert_eq!(reply.body.get("duplicate"), None, "{at}");
        }
    }
    let text = reply.body.to_string();
    for id in [
        &victim.connection,
        &victim.publisher,
        &victim.subscription,
        &victim.key,
        &victim.event,
        &victim.dead_letter,
        &victim.replay,
        &victim.erasure,
        &victim.schedule,
        &victim.waiting,
        &victim.tenant.id,
    ] {
        assert!(!text.contains(id.as_str()), "{at}");
    }
}

/// Gives the victim one of everything.
async fn furnish(bus: &Bus, pool: &PgPool) -> Victim {
    let tenant = bus.tenant("victim").await;
    let (connection, publisher) = (tenant.webhook("hook").await, tenant.publisher("shop").await);
    let subscription = tenant.subscription(&connection, "order.*").await;
    let event =
        json!({ "type": "order.created", "source": "/victim", "id": "secret-id", "data": { "total": 500 } });
    let event = tenant.api.post("/v1/events", event).await.expect(202).text("/uid").to_owned();
    let key = bus.admin.all(&tenant.keys(), 1).await[0]["id"].as_str().unwrap().to_owned();
    let dead = Published::new(&tenant, &event, &subscription, &connection);
    dead.bury(pool, 20, "attempts_exhausted").await;
    let all = json!({ "filter": {} });
    let replay = tenant.api.post("/v1/dead-letters/replay", all).await.expect(202).id().to_owned();
    let dead_letter = dead.id();
    let schedule = tenant.api.post("/v1/events", daily(0)).await.expect(201).id().to_owned();
    let admin = tenant.key(json!({ "scopes": ["admin"] })).await;
    let erasure = json!({ "eventUid": "01890000-0000-7000-8000-000000000001" });
    let erasure = admin.post("/v1/erasures", erasure).await.expect(202).id().to_owned();
    let soon = crate::common::ahead(pool, 3_600).await;
    let later = json!({ "type": "order.created", "id": "secret-later", "deliverAt": soon });
    let waiting = tenant.api.post("/v1/events", later).await.expect(202).text("/uid").to_owned();
    Victim {
        tenant,
        connection,
        publisher,
        subscription,
        key,
        event,
        dead_letter,
        replay,
        erasure,
        schedule,
        waiting,
    }
}

/// An event that recurs each day at that hour.
fn daily(hour: u8) -> Value {
    json!({ "type": "day.began", "source": "/victim", "cron": format!("0 {hour} * * *") })
}

/// Removes what the stranger made, for the next round.
async fn undo(stranger: &Caller, pool: &PgPool, organization: &str) {
    for connection in stranger.all("/v1/connections", 50).await {
        stranger.delete(&format!("/v1/connections/{}", connection["id"].as_str().unwrap())).await.is(204);
    }
    for table in ["events", "event_keys", "replays", "erasures", "schedules"] {
        let statement = format!("DELETE FROM {table} WHERE organization_id = $1::uuid");
        sqlx::query(sqlx::AssertSqlSafe(statement)).bind(organization).execute(pool).await.unwrap();
    }
}

/// A hash of everything that an organization has, table by table, and of the organization itself. The
/// tables are taken from the catalogue, so that a new one is covered at once.
async fn fingerprint(pool: &PgPool, organization: &str) -> BTreeMap<String, String> {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
          WHERE a.attname = 'organization_id' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
            AND c.relnamespace = 'public'::regnamespace",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    let mut hashes = BTreeMap::new();
    let owned = tables.into_iter().map(|table| (table, "organization_id"));
    for (table, column) in owned.chain([("organizations".to_owned(), "id")]) {
        let statement = format!(
            "SELECT md5(coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '')) FROM {table} t WHERE {column} = $1::uuid"
        );
        let hash = sqlx::query_scalar(sqlx::AssertSqlSafe(statement))
            .bind(organization)
            .fetch_one(pool)
            .await
            .unwrap();
        hashes.insert(table, hash);
    }
    hashes
}
