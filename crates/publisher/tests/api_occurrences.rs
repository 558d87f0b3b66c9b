//! What became of the occurrences of schedules, through the API.
use crate::common::{Bus, Tenant, problem};
use devkit::client::Reply;
use serde_json::{Value, json};

const EVENTS: &str = "/v1/events";

/// An event that recurs each hour at that minute.
fn hourly(minute: u8) -> Value {
    json!({ "type": "hour.began", "source": "/clock", "cron": format!("{minute} * * * *") })
}

fn path(schedule: &Reply) -> String {
    format!("/v1/schedules/{}", schedule.id())
}

/// Stores what a scheduler would: a run of skipped ticks, one that was published late, one by hand.
async fn note(pool: &sqlx::PgPool, tenant: &Tenant, schedule: &Reply) {
    sqlx::query(
        "INSERT INTO occurrences (uid, schedule_id, organization_id, state, reason, manual, tick, last_tick, ticks, at)
         SELECT ('0' || lpad(to_hex((extract(epoch FROM tick) * 1000)::bigint), 11, '0') || '70008000000000000000')::uuid,
                $1::uuid, $2::uuid, CASE WHEN reason IS NULL THEN 'fired' ELSE 'skipped' END, reason, manual, tick,
                last_tick, ticks, at
         FROM (VALUES
             ('paused', false, '2026-01-01T00:00Z'::timestamptz, '2026-01-01T05:00Z'::timestamptz, 6,
              '2026-01-01T05:00:01Z'::timestamptz),
             (NULL, false, '2026-01-01T06:00Z', '2026-01-01T06:00Z', 1, '2026-01-01T06:00:01.25Z'),
             (NULL, true, '2026-01-01T06:30Z', '2026-01-01T06:30Z', 1, '2026-01-01T06:30Z'),
             ('overlap', false, '2026-01-01T07:00Z', '2026-01-01T07:00Z', 1, '2026-01-01T07:00Z')
         ) AS o (reason, manual, tick, last_tick, ticks, at)",
    )
    .bind(schedule.id())
    .bind(&tenant.id)
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_occurrences_of_a_schedule_are_listed_latest_first() {
    let bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    let (api, pool) = (&tenant.api, bus.stack.owner_pool().await.unwrap());
    let schedule = api.post(EVENTS, hourly(0)).await.expect(201);
    let other = api.post(EVENTS, hourly(1)).await.expect(201);
    note(&pool, &tenant, &schedule).await;
    let list = format!("{}/occurrences", path(&schedule));
    let all = api.all(&list, 50).await;
    let uid = |n: usize| all[n]["eventUid"].as_str().unwrap();
    let expected = json!([
        { "state": "skipped", "reason": "overlap", "tick": "2026-01-01T07:00:00Z",
          "lastTick": "2026-01-01T07:00:00Z", "ticks": 1, "at": "2026-01-01T07:00:00Z", "manual": false },
        { "state": "fired", "tick": "2026-01-01T06:30:00Z", "lastTick": "2026-01-01T06:30:00Z", "ticks": 1,
          "at": "2026-01-01T06:30:00Z", "latenessMs": 0, "eventUid": uid(1), "manual": true },
        { "state": "fired", "tick": "2026-01-01T06:00:00Z", "lastTick": "2026-01-01T06:00:00Z", "ticks": 1,
          "at": "2026-01-01T06:00:01.25Z", "latenessMs": 1_250, "eventUid": uid(2), "manual": false },
        { "state": "skipped", "reason": "paused", "tick": "2026-01-01T00:00:00Z",
          "lastTick": "2026-01-01T05:00:00Z", "ticks": 6, "at": "2026-01-01T05:00:01Z", "manual": false },
    ]);
    assert_eq!(Value::from(all.clone()), expected);
    for limit in 1..=3 {
        assert_eq!(api.all(&list, limit).await, all);
    }
    let some = async |query: &str| api.all(&format!("{list}?{query}"), 2).await;
    assert_eq!(some("state=fired").await, all[1..3]);
    assert_eq!(some("state=skipped").await, [all[0].clone(), all[3].clone()]);
    assert_eq!(some("since=2026-01-01T06:00:00Z&until=2026-01-01T07:00:00Z").await, all[1..3]);
    assert_eq!(some("until=2026-01-01T06:00:00Z").await, all[3..]);
    assert_eq!(some("since=2026-01-01T07:00:00.001Z").await, all[..0]);
    assert!(api.all(&format!("{}/occurrences", path(&other)), 50).await.is_empty());
    for query in ["state=missed", "since=today", "reason=paused"] {
        let refused = problem(&api.get(&format!("{list}?{query}")).await, 422, "invalid-fields");
        assert_eq!(refused["errors"][0]["parameter"], query.split('=').next().unwrap());
    }
    pool.close().await;
    bus.stop().await;
}
