//! How much organizations may publish: what is refused and how, and that no other organization notices.

use std::time::Duration;

use crate::common::{Bus, Caller, Check as _, Tenant, pointers};
use devkit::{client::Reply, processes::Role, wait_until};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(30);

fn limits_of(tenant: &Tenant) -> String {
    format!("/v1/admin/organizations/{}/limits", tenant.id)
}

async fn publish(api: &Caller, n: usize) -> Reply {
    let events: Vec<Value> = (0..n).map(|n| json!({ "type": "t", "data": n })).collect();
    api.post("/v1/events", events.into()).await
}

/// The answer to a request that is not let through.
#[track_caller]
fn refused(reply: &Reply, policy: &str) -> u64 {
    assert_eq!(reply.status, 429, "{:#}", reply.body);
    assert_eq!(reply.headers["content-type"], "application/problem+json");
    assert_eq!(reply.body["type"], "https://iana.org/assignments/http-problem-types#quota-exceeded");
    assert_eq!(reply.body["violated-policies"], json!([policy]));
    reply.headers["retry-after"].to_str().unwrap().parse().unwrap()
}

fn header<'r>(reply: &'r Reply, name: &str) -> &'r str {
    reply.headers[name].to_str().unwrap()
}

/// Events in history; nothing of a refused request may be there.
async fn stored(bus: &Bus, tenant: &Tenant) -> i64 {
    let pool = bus.stack.owner_pool().await.unwrap();
    let count = sqlx::query_scalar("SELECT count(*) FROM events WHERE organization_id = $1::uuid")
        .bind(&tenant.id)
        .fetch_one(&pool)
        .await
        .unwrap();
    pool.close().await;
    count
}

/// Begins shortly after midnight if that would come in the middle: with the day, every quota begins anew.
async fn within_a_day(bus: &Bus) {
    let pool = bus.stack.owner_pool().await.unwrap();
    wait_until("a day that is as long as a test", Duration::from_secs(200), || async {
        let left: f64 = sqlx::query_scalar(
            "SELECT extract(epoch FROM date_trunc('day', t.now) + interval '1 day' - t.now)::float8
             FROM (SELECT now() AT TIME ZONE 'UTC' AS now) AS t",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        if left > 150.0 { Ok(()) } else { Err(left) }
    })
    .await;
    pool.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i7_a_rate_is_one_organizations_alone() {
    let bus = Bus::start().await;
    let (limited, other) = (bus.tenant("limited").await, bus.tenant("other").await);
    let free = publish(&other.api, 1).await.expect(202);
    assert!(!free.headers.contains_key("ratelimit") && !free.headers.contains_key("ratelimit-policy"));

    // Slow enough that nothing comes back in the time of a test.
    let limits = json!({ "rate": 0.001, "burst": 10 });
    let view = bus.admin.put(&limits_of(&limited), limits.clone()).await.expect(200);
    assert_eq!(view.body["limits"], limits);
    let first = publish(&limited.api, 4).await.expect(202);
    assert_eq!(header(&first, "ratelimit-policy"), r#""rate";q=10;w=10000;qu="events""#);
    assert_eq!(header(&first, "ratelimit"), r#""rate";r=6;t=4000"#);
    let reply = publish(&limited.api, 7).await;
    let wait = refused(&reply, "rate");
    assert!((990..=1_000).contains(&wait), "{wait}");
    assert!(header(&reply, "ratelimit").starts_with(r#""rate";r=6;t="#), "a refusal costs nothing");
    publish(&limited.api, 6).await.is(202);
    refused(&publish(&limited.api, 1).await, "rate");
    assert_eq!(stored(&bus, &limited).await, 10, "nothing of a refused request");
    for _ in 0..20 {
        publish(&other.api, 10).await.is(202);
    }

    // A change is seen by those who are refused.
    bus.admin.put(&limits_of(&limited), json!({ "rate": 0, "burst": 0 })).await.is(200);
    wait_until("no limit", DEADLINE, || async {
        let reply = publish(&limited.api, 100).await;
        if reply.status == 202 { Ok(()) } else { Err(reply.status) }
    })
    .await;
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i7_what_is_larger_than_the_burst_is_paid_off() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    bus.admin.put(&limits_of(&tenant), json!({ "rate": 0.01, "burst": 5 })).await.is(200);
    publish(&tenant.api, 20).await.is(202);
    let wait = refused(&publish(&tenant.api, 1).await, "rate");
    assert!((1_590..=1_600).contains(&wait), "15 in debt, and one more: {wait}");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i7_a_quota_is_kept_by_all_publishers_together() {
    let mut bus = Bus::start_with(|options| options.replicas(Role::Publisher, 2)).await;
    within_a_day(&bus).await;
    let tenant = bus.tenant("acme").await;
    let second = Caller(tenant.api.0.at(bus.stack.publisher(1).http_url()));
    let limits = json!({ "quota": 100, "quotaPeriod": "month" });
    bus.admin.put(&limits_of(&tenant), limits).await.is(200);
    let reply = publish(&tenant.api, 60).await.expect(202);
    assert!(
        header(&reply, "ratelimit-policy").starts_with(r#""quota";q=100;w=2"#),
        "a month is 2.4 to 2.7 million s"
    );
    // A repetition is no further use.
    let named = json!({ "type": "t", "source": "/s", "id": "1" });
    tenant.api.post("/v1/events", named.clone()).await.is(202);
    for _ in 0..5 {
        assert_eq!(tenant.api.post("/v1/events", named.clone()).await.expect(202).body["duplicate"], true);
    }
    // What is due later counts when it is published.
    let later = json!({ "type": "t", "deliverAt": "2027-06-01T00:00:00Z" });
    tenant.api.post("/v1/events", later).await.is(202);
    let usage = format!("/v1/admin/organizations/{}/usage", tenant.id);
    wait_until("what the first one counted", DEADLINE, || async {
        let body = bus.admin.get(&usage).await.expect(200).body;
        if body["thisMonth"] == 62 && body["today"] == 62 { Ok(()) } else { Err(body) }
    })
    .await;
    let days = bus.admin.get(&usage).await.expect(200).body["days"].clone();
    assert_eq!(days.as_array().map(Vec::len), Some(1));
    assert_eq!(days[0]["events"], 62);
    // The second one has never counted for it. It learns from a repetition, which uses nothing, however slow the database is.
    wait_until("the second one to know", DEADLINE, || async {
        let reply = second.post("/v1/events", named.clone()).await.expect(202);
        let left = header(&reply, "ratelimit").to_owned();
        if left.contains(r#""quota";r=38"#) { Ok(()) } else { Err(left) }
    })
    .await;
    let wait = refused(&publish(&second, 39).await, "quota");
    assert!(wait > 0);
    publish(&second, 38).await.is(202);
    wait_until("what the second one counted", DEADLINE, || async {
        let reply = publish(&tenant.api, 1).await;
        if reply.status == 429 { Ok(()) } else { Err(reply.status) }
    })
    .await;
    let other = bus.tenant("other").await;
    publish(&other.api, 200).await.is(202);
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn configured_limits_are_for_those_without_their_own_and_the_last_counts_are_kept() {
    let bus = Bus::start_with(|options| {
        options
            .role_env(Role::Publisher, "EVENT_BUS_PUBLISH__LIMITS__QUOTA", 5)
            .role_env(Role::Publisher, "EVENT_BUS_PUBLISH__LIMITS__RATE", 0.001)
            .role_env(Role::Publisher, "EVENT_BUS_PUBLISH__LIMITS__BURST", 8)
    });
    let mut bus = bus.await;
    within_a_day(&bus).await;
    let (poor, rich) = (bus.tenant("poor").await, bus.tenant("rich").await);
    let own = json!({ "rate": 0, "burst": 0, "quota": 0, "quotaPeriod": "day" });
    bus.admin.put(&limits_of(&rich), own).await.is(200);
    publish(&rich.api, 50).await.is(202);
    let reply = publish(&poor.api, 5).await.expect(202);
    assert_eq!(header(&reply, "ratelimit").split(", ").count(), 2);
    refused(&publish(&poor.api, 1).await, "quota");
    assert_eq!(pointers(&bus.admin.put(&limits_of(&poor), json!({ "rate": 1 })).await), ["/burst"]);
    // What was counted last is written before the end.
    publish(&rich.api, 7).await.is(202);
    let publisher = bus.stack.publisher(0);
    publisher.sigterm().unwrap();
    assert!(publisher.wait_exit().await.unwrap().success());
    let pool = bus.stack.owner_pool().await.unwrap();
    let events: i64 = sqlx::query_scalar(
        "SELECT sum(events)::int8 FROM organization_usage WHERE organization_id = $1::uuid",
    )
    .bind(&rich.id)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(events, 57);
    pool.close().await;
    bus.stop().await;
}
