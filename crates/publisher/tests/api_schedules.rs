//! Schedules through the API. That their occurrences are published is the scheduler's, and tested there.
use crate::common::{Bus, Caller, Check as _, ahead, ideographs, pointers, problem};
use devkit::{client::Reply, processes::Role};
use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

const EVENTS: &str = "/v1/events";
const SCHEDULES: &str = "/v1/schedules";
const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

/// An event that recurs each hour at that minute, with other members besides.
fn hourly(minute: u8, other: Value) -> Value {
    let mut event = json!({ "type": "hour.began", "source": "/clock", "cron": format!("{minute} * * * *") });
    event.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
    event
}

fn path(schedule: &Reply) -> String {
    format!("{SCHEDULES}/{}", schedule.id())
}

fn next(schedule: &Reply) -> Vec<Timestamp> {
    let next = schedule.body["next"].as_array().unwrap();
    next.iter().map(|time| time.as_str().unwrap().parse().unwrap()).collect()
}

async fn raw(api: &Caller, method: Method, headers: &[(&str, &str)], body: &str) -> Reply {
    let request = api.0.request(method.clone(), EVENTS).body(body.to_owned());
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    api.raw(method, EVENTS, request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_with_cron_is_a_schedule_that_is_created_once() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let event = json!({
        "type": "day.began", "cron": " @daily ", "timezone": "europe/london", "subject": "s", "partner": "x",
        "data": { "n": 1 },
    });
    let created = api.post(EVENTS, event.clone()).await.expect(201);
    assert_eq!(created.headers["location"], path(&created));
    let source = format!("/organizations/{}", tenant.id);
    let expected = json!({
        "id": created.id(), "state": "active", "type": "day.began", "source": source, "cron": "0 0 * * *",
        "timezone": "Europe/London", "tzVersion": bus_core::schedule::tz_version(), "jitterMs": 0,
        "missed": "fire_once", "overlap": "allow", "next": created.body["next"],
        "event": {
            "specversion": "1.0", "id": "occurrence", "source": source, "type": "day.began", "subject": "s",
            "partner": "x", "data": { "n": 1 },
        },
        "createdAt": created.body["createdAt"], "updatedAt": created.body["createdAt"],
    });
    assert_eq!(created.body, expected);
    let ticks = next(&created);
    assert_eq!(ticks.len(), 5);
    assert!(ticks[0] > created.text("/createdAt").parse().unwrap());
    let london = jiff::tz::TimeZone::get("Europe/London").unwrap();
    for (tick, later) in ticks.iter().zip(&ticks[1..]) {
        let (tick, later) = (tick.to_zoned(london.clone()), later.to_zoned(london.clone()));
        assert_eq!(tick.time(), jiff::civil::Time::midnight());
        assert_eq!(tick.tomorrow().unwrap(), later);
    }
    assert_eq!(api.get(&path(&created)).await.expect(200).body, expected);

    // The same once more, with another payload and other rules: it stays as it is.
    let mut other = event.clone();
    other["data"] = json!(2);
    other["jitterMs"] = json!(1_000);
    assert_eq!(api.post(EVENTS, other.clone()).await.expect(200).body, expected);
    // PUT changes it, and nothing else does.
    let changed = api.put(EVENTS, other).await.expect(200);
    assert_eq!((changed.id(), &changed.body["jitterMs"]), (created.id(), &json!(1_000)));
    assert_eq!(changed.body["event"]["data"], 2);
    assert_eq!(changed.body["createdAt"], expected["createdAt"]);
    assert_ne!(changed.body["updatedAt"], expected["updatedAt"]);
    assert_eq!(changed.body["next"], expected["next"]);
    assert_eq!(api.get(&path(&created)).await.expect(200).body, changed.body);

    // Each of the four makes another one; what they are written like does not.
    let mut ids = vec![created.id().to_owned()];
    for (member, value) in [
        ("type", "day.ended"),
        ("source", "/clock"),
        ("cron", "0 1 * * *"),
        ("timezone", "UTC"),
        ("timezone", "Africa/Abidjan"),
    ] {
        let mut other = event.clone();
        other[member] = value.into();
        // PUT creates, too.
        let other = api.put(EVENTS, other).await.expect(201);
        assert_eq!(other.headers["location"], path(&other));
        ids.push(other.id().to_owned());
    }
    let mut same = event.clone();
    same["cron"] = "0  0 * * *".into();
    assert_eq!(api.post(EVENTS, same).await.expect(200).id(), created.id());

    let listed = api.all(SCHEDULES, 2).await;
    assert_eq!(listed.iter().map(|item| item["id"].as_str().unwrap()).collect::<Vec<_>>(), ids);
    let mut first = changed.body;
    first.as_object_mut().unwrap().remove("event");
    assert_eq!(listed[0], first, "without its event");
    let every = async |query: &str| api.all(&format!("{SCHEDULES}?{query}"), 50).await.len();
    assert_eq!(every("type=day.ended").await, 1);
    assert_eq!(every("state=active&type=day.began").await, 5);
    assert_eq!(every("state=paused").await, 0);
    assert_eq!(every("type=%00").await, 0);
    for query in ["state=over", "source=/clock", "limit=0"] {
        let refused = problem(&api.get(&format!("{SCHEDULES}?{query}")).await, 422, "invalid-fields");
        assert_eq!(refused["errors"][0]["parameter"], query.split('=').next().unwrap());
    }
    assert!(api.all(EVENTS, 50).await.is_empty(), "a schedule is no event");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_keeps_to_its_start_and_its_end() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let (start, end) = (ahead(&pool, 10 * 86_400).await, ahead(&pool, 10 * 86_400 + 7_300).await);
    let rules = json!({
        "startsAt": start, "endsAt": end, "missed": "catch_up", "catchUpLimit": 7, "overlap": "skip",
    });
    let schedule = api.post(EVENTS, hourly(0, rules.clone())).await.expect(201);
    for (member, value) in rules.as_object().unwrap() {
        assert_eq!(schedule.body[member], *value, "{member}");
    }
    let (start, end): (Timestamp, Timestamp) = (start.parse().unwrap(), end.parse().unwrap());
    let ticks = next(&schedule);
    assert!(matches!(ticks.len(), 2 | 3), "{ticks:?}");
    assert!(ticks.iter().all(|tick| (start..=end).contains(tick)));
    // The end is moved, and the limit belongs to its policy.
    let open = api.put(EVENTS, hourly(0, json!({ "startsAt": start.to_string() }))).await.expect(200);
    assert_eq!((next(&open).len(), open.body.get("endsAt")), (5, None));
    assert_eq!((next(&open)[0], open.body.get("catchUpLimit")), (ticks[0], None));
    // A change that would leave nothing changes nothing.
    let over = ahead(&pool, -60).await;
    assert_eq!(pointers(&api.put(EVENTS, hourly(0, json!({ "endsAt": over }))).await), ["/endsAt"]);
    assert_eq!(api.get(&path(&open)).await.expect(200).body, open.body);
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_recur_is_refused_with_the_reason() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let (over, soon, later) =
        (ahead(&pool, -60).await, ahead(&pool, 86_400).await, ahead(&pool, 86_460).await);
    let refusals = [
        (json!({ "cron": "* * * *" }), "/cron", "5 fields, or 6 with the seconds first"),
        (json!({ "cron": "61 * * * *" }), "/cron", "from 0 to 59"),
        (json!({ "cron": "@reboot" }), "/cron", "`@reboot` is refused"),
        (json!({ "cron": "" }), "/cron", "5 fields"),
        (json!({ "cron": "0 0 31 2 *" }), "/cron", "no day that exists"),
        (json!({ "cron": "* * * * * *" }), "/cron", "1 s apart, and at least 10 s"),
        (json!({ "cron": "*/9 0 12 1 1 *" }), "/cron", "9 s apart"),
        (json!({ "timezone": "Mars/Olympus" }), "/timezone", "IANA"),
        (json!({ "timezone": "+01:00" }), "/timezone", "no offset"),
        (json!({ "endsAt": over }), "/endsAt", "no occurrence"),
        (json!({ "cron": "0 0 29 2 *", "startsAt": soon, "endsAt": later }), "/endsAt", "no occurrence"),
        (json!({ "startsAt": later, "endsAt": soon }), "/endsAt", "before `startsAt`"),
        (json!({ "deliverAt": soon }), "/deliverAt", "either recurs"),
        (json!({ "id": "mine" }), "/id", "of its own"),
        (json!({ "time": soon }), "/time", "of its own"),
        (json!({ "scheduleid": "x" }), "/scheduleid", "of its own"),
        (json!({ "scheduledtime": "x" }), "/scheduledtime", "of its own"),
        (json!({ "jitterMs": 86_400_001 }), "/jitterMs", "between 0 and 86400000"),
        (json!({ "missed": "always" }), "/missed", "catch_up"),
        (json!({ "catchUpLimit": 5 }), "/catchUpLimit", "belongs to"),
        (json!({ "overlap": "queue" }), "/overlap", "allow"),
        (json!({ "type": "" }), "/type", "must not be empty"),
    ];
    for (members, pointer, reason) in refusals {
        for method in [Method::POST, Method::PUT] {
            let reply = api.send(method.clone(), EVENTS, Some(hourly(0, members.clone()))).await;
            assert_eq!(pointers(&reply), [pointer], "{method} {members}");
            assert!(reply.text("/detail").contains(reason), "{method} {members}: {:#}", reply.body);
        }
    }
    // Ten seconds are enough, and five fields begin with the minutes.
    api.post(EVENTS, hourly(0, json!({ "cron": "*/10 * * * * *" }))).await.is(201);
    api.post(EVENTS, hourly(0, json!({ "cron": "* * * * *" }))).await.is(201);

    // Only an event alone, in plain JSON, recurs.
    let cloud = json!({ "specversion": "1.0", "id": "1", "source": "/", "type": "t", "cron": "@daily" });
    for (media_type, body, pointer) in [
        ("application/json", json!([hourly(1, json!({}))]), "/0/cron"),
        ("application/cloudevents+json", cloud.clone(), "/cron"),
        ("application/cloudevents-batch+json", json!([cloud]), "/0/cron"),
    ] {
        for method in [Method::POST, Method::PUT] {
            let reply = raw(api, method, &[("content-type", media_type)], &body.to_string()).await;
            assert_eq!(pointers(&reply), [pointer]);
        }
    }
    let binary = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/"), ("ce-type", "t")];
    let refused = raw(api, Method::POST, &[&binary[..], &[("ce-cron", "@daily")]].concat(), "").await;
    assert_eq!(problem(&refused, 422, "invalid-fields")["errors"][0]["header"], "ce-cron");

    // What does not recur cannot be put.
    assert_eq!(pointers(&api.put(EVENTS, json!({ "type": "t" })).await), ["/cron"]);
    assert_eq!(pointers(&api.put(EVENTS, json!({ "type": "t", "deliverAt": soon })).await), ["/cron"]);
    assert_eq!(pointers(&api.put(EVENTS, json!([])).await), [""]);
    assert_eq!(pointers(&raw(api, Method::PUT, &binary, "").await), ["/cron"]);
    problem(&raw(api, Method::PUT, &[], "{").await, 400, "malformed-event");

    // The identity of a schedule makes repetition harmless; a second rule could contradict it.
    let body = hourly(1, json!({})).to_string();
    for method in [Method::POST, Method::PUT] {
        let keyed = [("content-type", "application/json"), ("idempotency-key", "\"one\"")];
        problem(&raw(api, method, &keyed, &body).await, 400, "invalid-idempotency-key");
    }
    assert_eq!(api.all(SCHEDULES, 50).await.len(), 2, "nothing else was stored");
    assert!(api.all(EVENTS, 50).await.is_empty());
    pool.close().await;
    bus.stop().await;
}

/// An occurrence has an id, a time and two attributes more than its template, and must still be an event.
#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_leaves_room_for_what_its_occurrences_have_besides() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    let with = |extensions: usize, minute: u8| {
        let attributes =
            (0..extensions).map(|n| (format!("x{n}"), json!(1))).collect::<serde_json::Map<_, _>>();
        hourly(minute, attributes.into())
    };
    let schedule = api.post(EVENTS, with(30, 0)).await.expect(201);
    api.bare(&format!("{}/trigger", path(&schedule))).await.is(202);
    let refused = api.post(EVENTS, with(31, 1)).await;
    assert_eq!(pointers(&refused), [""]);
    assert!(refused.text("/detail").contains("at most 32 extension attributes"), "{:#}", refused.body);

    let most = 1 << 20;
    let large = |bytes: usize| hourly(2, json!({ "data": "x".repeat(bytes) }));
    problem(&api.post(EVENTS, large(most - 250)).await, 413, "too-large");
    let schedule = api.post(EVENTS, large(most - 400)).await.expect(201);
    api.bare(&format!("{}/trigger", path(&schedule))).await.is(202);
    bus.stop().await;
}

/// What tells schedules apart may be longer together than an index row may be, and repetitive text would be
/// compressed to fit.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_are_told_apart_by_all_of_what_identifies_them() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;
    // Four bytes each.
    let wide: String = (0..1_024).map(|n| char::from_u32(0x2_0000 + n * 7_919 % 40_000).unwrap()).collect();
    assert_eq!(wide.len(), 4_096);
    let long = hourly(0, json!({ "source": wide, "type": ideographs(255) }));
    let first = api.post(EVENTS, long.clone()).await.expect(201);
    assert_eq!(api.post(EVENTS, long).await.expect(200).id(), first.id());
    assert_eq!(first.text("/source"), wide);
    for (source, event_type) in [("/a", "bc"), ("/ab", "c"), ("/", "abc")] {
        let event = hourly(0, json!({ "source": source, "type": event_type }));
        api.post(EVENTS, event.clone()).await.is(201);
        api.post(EVENTS, event).await.is(200);
    }
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_create_the_same_at_once_one_does() {
    let mut bus = Bus::start_with(|options| options.replicas(Role::Publisher, 2)).await;
    let tenant = bus.tenant("acme").await;
    let other = bus.stack.publisher(1).http_url();
    let callers = [tenant.api.clone(), Caller(tenant.api.0.at(other))];
    for minute in 0..10 {
        let racers = (0..12).map(|n: u8| {
            let method = if n < 4 { Method::PUT } else { Method::POST };
            let event = hourly(minute, json!({ "data": n }));
            callers[usize::from(n % 2)].send(method, EVENTS, Some(event))
        });
        let replies = futures::future::join_all(racers).await;
        assert!(replies.iter().all(|reply| reply.id() == replies[0].id()));
        let created = replies.iter().filter(|reply| reply.status == 201).count();
        let found = replies.iter().filter(|reply| reply.status == 200).count();
        assert_eq!((created, found), (1, 11));
    }
    assert_eq!(tenant.api.all(SCHEDULES, 50).await.len(), 10);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_organization_has_so_many_schedules_at_most() {
    let bus = Bus::start_with(|options| {
        let key = "EVENT_BUS_SCHEDULES__MAX_PER_ORGANIZATION";
        options.role_env(Role::Publisher, key, 2).role_env(
            Role::Publisher,
            "EVENT_BUS_SCHEDULES__MIN_INTERVAL_S",
            1,
        )
    })
    .await;
    let (tenant, other) = (bus.tenant("acme").await, bus.tenant("other").await);
    let api = &tenant.api;
    let first = api.post(EVENTS, hourly(0, json!({}))).await.expect(201);
    api.post(EVENTS, hourly(0, json!({ "cron": "* * * * * *" }))).await.is(201);
    for method in [Method::POST, Method::PUT] {
        let refused = api.send(method, EVENTS, Some(hourly(2, json!({})))).await;
        problem(&refused, 409, "limit-reached");
        assert!(refused.text("/detail").contains("at most 2 schedules"), "{:#}", refused.body);
    }
    // Those that are there can be changed, those that are over do not count, and neither do those of others.
    api.put(EVENTS, hourly(0, json!({ "data": 1 }))).await.is(200);
    other.api.post(EVENTS, hourly(0, json!({}))).await.is(201);
    api.bare(&format!("{}/cancel", path(&first))).await.is(200);
    api.post(EVENTS, hourly(2, json!({}))).await.is(201);
    bus.stop().await;
}

async fn act(api: &Caller, schedule: &Reply, action: &str) -> Reply {
    api.bare(&format!("{}/{action}", path(schedule))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_is_paused_resumed_and_cancelled() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let schedule = api.post(EVENTS, hourly(0, json!({ "data": 1 }))).await.expect(201);
    for (action, state) in [("pause", "paused"), ("resume", "active"), ("pause", "paused")] {
        let turned = act(api, &schedule, action).await.expect(200);
        assert_eq!(turned.body["state"], state);
        assert_eq!(turned.body["next"], schedule.body["next"]);
        assert_eq!(act(api, &schedule, action).await.expect(200).body, turned.body, "once more");
        assert_eq!(api.get(&path(&schedule)).await.expect(200).body, turned.body);
    }
    // Found, and changed, it stays paused.
    assert_eq!(api.post(EVENTS, hourly(0, json!({}))).await.expect(200).body["state"], "paused");
    assert_eq!(api.put(EVENTS, hourly(0, json!({}))).await.expect(200).body["state"], "paused");

    let cancelled = act(api, &schedule, "cancel").await.expect(200);
    assert_eq!((&cancelled.body["state"], next(&cancelled)), (&json!("cancelled"), vec![]));
    assert_eq!(act(api, &schedule, "cancel").await.expect(200).body, cancelled.body, "once more");
    for action in ["pause", "resume", "trigger"] {
        let refused = problem(&act(api, &schedule, action).await, 409, "schedule-over");
        assert!(refused["detail"].as_str().unwrap().contains("cancelled"), "{refused:#}");
    }
    assert_eq!(api.get(&path(&schedule)).await.expect(200).body, cancelled.body);
    // It can be created anew, and is another one.
    let anew = api.post(EVENTS, hourly(0, json!({}))).await.expect(201);
    assert_ne!(anew.id(), schedule.id());
    assert_eq!(api.all(&format!("{SCHEDULES}?state=cancelled"), 50).await.len(), 1);

    // One that has no more occurrences.
    sqlx::query("UPDATE schedules SET state = 'ended', next_tick = NULL, due_at = NULL WHERE id = $1::uuid")
        .bind(anew.id())
        .execute(&pool)
        .await
        .unwrap();
    for action in ["pause", "resume", "trigger"] {
        problem(&act(api, &anew, action).await, 409, "schedule-over");
    }
    let ended = act(api, &anew, "cancel").await.expect(200);
    assert_eq!((&ended.body["state"], next(&ended)), (&json!("ended"), vec![]));
    for nothing in [NOBODY, "none"] {
        for action in ["pause", "resume", "trigger", "cancel"] {
            problem(&api.bare(&format!("{SCHEDULES}/{nothing}/{action}")).await, 404, "not-found");
        }
        problem(&api.get(&format!("{SCHEDULES}/{nothing}")).await, 404, "not-found");
        problem(&api.get(&format!("{SCHEDULES}/{nothing}/occurrences")).await, 404, "not-found");
    }
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_is_triggered_by_hand() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let event = hourly(0, json!({ "data": { "n": 1 }, "partner": "x" }));
    let schedule = api.post(EVENTS, event).await.expect(201);
    let mut uids = Vec::new();
    for action in ["pause", "resume"] {
        act(api, &schedule, action).await.is(200);
        let before = ahead(&pool, -1).await;
        let triggered = act(api, &schedule, "trigger").await.expect(202);
        let uid = triggered.text("/uid").to_owned();
        assert_eq!(triggered.headers["location"], format!("{EVENTS}/{uid}"));
        // No scheduler runs here that would publish it.
        let waiting = api.get(&format!("{EVENTS}/{uid}")).await.expect(200);
        assert_eq!(waiting.body["status"], "scheduled");
        assert_eq!(waiting.body["deliverAt"], triggered.body["time"]);
        let time: Timestamp = triggered.text("/time").parse().unwrap();
        assert!(before.parse::<Timestamp>().unwrap() < time);
        let expected = json!({
            "specversion": "1.0", "id": uid, "source": "/clock", "type": "hour.began",
            "time": triggered.body["time"], "partner": "x", "scheduleid": schedule.id(), "data": { "n": 1 },
        });
        assert_eq!(waiting.body["event"], expected);
        let answered = json!({
            "id": uid, "uid": uid, "source": "/clock", "type": "hour.began", "time": triggered.body["time"],
        });
        assert_eq!(triggered.body, answered);
        uids.push(uid);
    }
    assert_ne!(uids[0], uids[1]);
    let rows: Vec<(String, String, bool)> = sqlx::query_as(
        "SELECT uid::text, schedule_id::text, due_at <= now() FROM scheduled_events ORDER BY uid",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let expected: Vec<_> = uids.into_iter().map(|uid| (uid, schedule.id().to_owned(), true)).collect();
    assert_eq!(rows, expected, "they are due, and the scheduler knows whose they are");
    let after = api.get(&path(&schedule)).await.expect(200);
    assert_eq!(after.body["next"], schedule.body["next"], "the occurrences to come stay");
    pool.close().await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_do_what_their_scopes_and_connections_say() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (shop, other) = (tenant.publisher("shop").await, tenant.publisher("other").await);
    let key = async |scopes: &[&str], connection: Option<&str>| {
        tenant.key(json!({ "scopes": scopes, "connectionId": connection })).await
    };
    let (reads, publishes) = (key(&["read", "subscribe"], None).await, key(&["publish"], None).await);
    let schedule = publishes.post(EVENTS, hourly(0, json!({}))).await.expect(201);
    for method in [Method::POST, Method::PUT] {
        problem(&reads.send(method, EVENTS, Some(hourly(1, json!({})))).await, 403, "forbidden");
    }
    for action in ["pause", "resume", "trigger", "cancel"] {
        problem(&act(&reads, &schedule, action).await, 403, "forbidden");
    }
    for path in [SCHEDULES.to_owned(), path(&schedule), format!("{}/occurrences", path(&schedule))] {
        problem(&publishes.get(&path).await, 403, "forbidden");
        reads.get(&path).await.is(200);
    }

    // A bound key publishes as its connection, and sees and changes what that one publishes.
    let shops = key(&["publish", "read"], Some(&shop)).await;
    let others = key(&["publish", "read"], Some(&other)).await;
    let own = shops.post(EVENTS, json!({ "type": "t", "cron": "@daily" })).await.expect(201);
    assert_eq!((own.text("/publisher"), own.text("/source")), (&*shop, &*format!("/connections/{shop}")));
    let theirs = others.post(EVENTS, json!({ "type": "t", "cron": "@daily" })).await.expect(201);
    for foreign in [&schedule, &theirs] {
        problem(&shops.get(&path(foreign)).await, 404, "not-found");
        problem(&shops.get(&format!("{}/occurrences", path(foreign))).await, 404, "not-found");
        for action in ["pause", "resume", "trigger", "cancel"] {
            problem(&act(&shops, foreign, action).await, 404, "not-found");
        }
        let same = json!({ "type": foreign.text("/type"), "source": foreign.text("/source"),
            "cron": foreign.text("/cron") });
        for method in [Method::POST, Method::PUT] {
            let refused = shops.send(method, EVENTS, Some(same.clone())).await;
            problem(&refused, 409, "schedule-taken");
            assert!(!refused.body.to_string().contains(foreign.id()));
        }
    }
    let listed = shops.all(SCHEDULES, 50).await;
    assert_eq!(listed.iter().map(|item| &item["id"]).collect::<Vec<_>>(), [own.id()]);
    assert_eq!(tenant.api.all(SCHEDULES, 50).await.len(), 3);
    for action in ["pause", "resume", "trigger", "cancel"] {
        let status = if action == "trigger" { 202 } else { 200 };
        act(&shops, &own, action).await.is(status);
    }
    // An unbound one may change what a connection publishes, and publishes it itself from then on: subscriptions by
    // publisher get nothing in a connection's name that its own keys have not said.
    assert_eq!(theirs.text("/publisher"), other);
    let put = json!({ "type": "t", "source": theirs.text("/source"), "cron": "@daily", "data": 1 });
    let changed = tenant.api.put(EVENTS, put).await.expect(200);
    assert_eq!((changed.id(), changed.body.get("publisher")), (theirs.id(), None));
    problem(&others.get(&path(&theirs)).await, 404, "not-found");
    bus.stop().await;
}

/// A key that was found lately serves to publish, because that transaction looks again; this one does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_creates_nothing() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let key = tenant.key(json!({ "name": "leaked", "scopes": ["publish"] })).await;
    key.post(EVENTS, json!({ "type": "t" })).await.is(202);
    key.post(EVENTS, hourly(0, json!({}))).await.is(201);
    let keys = bus.admin.all(&tenant.keys(), 50).await;
    let leaked = keys.iter().find(|key| key["name"] == "leaked").unwrap();
    bus.admin.delete(&format!("{}/{}", tenant.keys(), leaked["id"].as_str().unwrap())).await.is(204);
    for method in [Method::POST, Method::PUT] {
        problem(&key.send(method, EVENTS, Some(hourly(1, json!({})))).await, 401, "unauthorized");
    }
    assert_eq!(tenant.api.all(SCHEDULES, 50).await.len(), 1);
    bus.stop().await;
}

/// Nobody can speak for a connection that is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_connection_has_no_schedules_any_more() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let shop = tenant.publisher("shop").await;
    let key = tenant.key(json!({ "scopes": ["publish"], "connectionId": shop })).await;
    let theirs = key.post(EVENTS, hourly(0, json!({}))).await.expect(201);
    let other = tenant.api.post(EVENTS, hourly(1, json!({}))).await.expect(201);
    tenant.api.delete(&format!("/v1/connections/{shop}")).await.is(204);
    assert_eq!(tenant.api.get(&path(&theirs)).await.body["state"], "cancelled");
    assert_eq!(tenant.api.get(&path(&other)).await.body["state"], "active");
    bus.stop().await;
}
