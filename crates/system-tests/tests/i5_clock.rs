//! Invariant I5, over the real processes: nothing comes before its time, and each tick once or skipped with a reason.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use devkit::{
    processes::Role,
    receiver::Receiver,
    servers::Durability,
    stack::{Backend, ServerChoice, Stack, StackOptions},
    wait_until,
};
use jiff::{SignedDuration, Timestamp, tz};
use rstest::rstest;
use serde_json::{Value, json};
use sqlx::PgPool;
use system_tests::Tenant;

const DEADLINE: Duration = Duration::from_secs(60);

fn every_second(options: StackOptions) -> StackOptions {
    options.role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MIN_INTERVAL_S", 1)
}

async fn started(options: StackOptions) -> (Stack, Receiver, Tenant, PgPool) {
    let mut stack = Stack::start(every_second(options)).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    let pool = stack.owner_pool().await.unwrap();
    (stack, receiver, tenant, pool)
}

/// The database's clock decides, so the test asks it too.
async fn database_time(pool: &PgPool) -> Timestamp {
    let now: String =
        sqlx::query_scalar("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
            .fetch_one(pool)
            .await
            .unwrap();
    now.parse().unwrap()
}

#[rstest]
#[tokio::test]
async fn i5_a_future_dated_event_arrives_when_it_is_due_and_not_before(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (stack, receiver, tenant, pool) = started(StackOptions::default().backend(backend)).await;
    tenant.receive(&receiver, "/all", "trial.*").await.unwrap();
    let now = database_time(&pool).await;
    let due = now + SignedDuration::from_millis(3_500);
    let local =
        due.to_zoned(tz::TimeZone::fixed(tz::offset(5))).strftime("%Y-%m-%dT%H:%M:%S%.6f%:z").to_string();
    let past = (now - SignedDuration::from_hours(1)).to_string();
    let later = json!({ "type": "trial.ends", "id": "later", "source": "/t", "deliverAt": local });
    let accepted = tenant.api.publish(&later).await.unwrap().expect(202);
    let batch = json!([
        { "type": "trial.ends", "id": "later-too", "source": "/t", "deliverAt": due.to_string() },
        { "type": "trial.ends", "id": "over", "source": "/t", "deliverAt": past },
    ]);
    tenant.api.publish(&batch).await.unwrap().expect(202);
    let structured = json!({
        "specversion": "1.0", "id": "structured", "source": "/t", "type": "trial.ends", "deliverat": due.to_string(),
    });
    tenant.api.publish_structured(&structured).await.unwrap().expect(202);
    tenant
        .api
        .publish_binary(&{
            let mut binary = structured;
            binary["id"] = json!("binary");
            binary
        })
        .await
        .unwrap()
        .expect(202);
    let much_later =
        json!({ "type": "trial.ends", "deliverAt": (now + SignedDuration::from_hours(1)).to_string() });
    let waits = tenant.api.publish(&much_later).await.unwrap().expect(202);
    let waiting = tenant.api.get(&format!("/v1/events/{}", waits.text("/uid"))).await.unwrap().expect(200);
    assert_eq!(waiting.text("/status"), "scheduled");

    let arrived = receiver.wait_for_within("/all", 5, DEADLINE).await;
    let mut times = BTreeMap::new();
    for request in &arrived {
        let event = request.json();
        let id = event["id"].as_str().unwrap().to_owned();
        if id != "over" {
            assert!(request.time >= due, "{id} came {:?} too early", due.duration_since(request.time));
            assert!(event["deliverat"].is_string(), "{event}");
        }
        times.insert(id, request.time);
    }
    let ids: Vec<&str> = times.keys().map(String::as_str).collect();
    assert_eq!(ids, ["binary", "later", "later-too", "over", "structured"]);
    let published =
        tenant.api.get(&format!("/v1/events/{}", accepted.text("/uid"))).await.unwrap().expect(200);
    assert_ne!(published.text("/status"), "scheduled");
    pool.close().await;
    stack.shutdown().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn i5_a_schedule_ticks_until_it_is_cancelled(
    #[values(Backend::Jetstream, Backend::Postgres, Backend::Memory)] backend: Backend,
) {
    let (stack, receiver, tenant, pool) = started(StackOptions::default().backend(backend)).await;
    let schedule =
        |kind: &str| json!({ "type": kind, "source": "/s", "data": { "a": 1 }, "cron": "* * * * * *" });
    let created = tenant.api.publish(&schedule("report.due")).await.unwrap().expect(201);
    // There was no subscription when it was published.
    tenant.receive(&receiver, "/reports", "report.*").await.unwrap();
    let again = tenant.api.publish(&schedule("report.due")).await.unwrap().expect(200);
    assert_eq!(created.id(), again.id());
    assert_eq!(created.body["next"].as_array().unwrap().len(), 5);

    for request in receiver.wait_for_within("/reports", 3, DEADLINE).await {
        let event = request.json();
        assert_eq!(event["scheduleid"], created.id());
        assert_eq!(event["time"], event["scheduledtime"]);
        assert_eq!(event["data"], json!({ "a": 1 }));
        let tick: Timestamp = event["scheduledtime"].as_str().unwrap().parse().unwrap();
        assert!(request.time >= tick, "{event} came early");
    }
    let ticks: Vec<i64> = sqlx::query_scalar(
        "SELECT extract(epoch FROM tick)::int8 FROM occurrences WHERE schedule_id = $1::uuid ORDER BY tick",
    )
    .bind(created.id().to_owned())
    .fetch_all(&pool)
    .await
    .unwrap();
    assert!(ticks.len() >= 3 && ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");

    // Another one tells how time goes by.
    let witness = tenant.api.publish(&schedule("witness.tick")).await.unwrap().expect(201);
    let path = format!("/v1/schedules/{}/cancel", created.id());
    let cancelled = tenant.api.post(&path, &Value::Null).await.unwrap().expect(200);
    assert_eq!(cancelled.text("/state"), "cancelled");
    let fired = async |schedule: &str| -> i64 {
        sqlx::query_scalar(
            "SELECT count(*) FROM occurrences WHERE schedule_id = $1::uuid AND state = 'fired'",
        )
        .bind(schedule.to_owned())
        .fetch_one(&pool)
        .await
        .unwrap()
    };
    let before = fired(created.id()).await;
    wait_until("three ticks of the witness", DEADLINE, async || {
        let ticks = fired(witness.id()).await;
        if ticks >= 3 { Ok(()) } else { Err(ticks) }
    })
    .await;
    assert_eq!(fired(created.id()).await, before, "nothing is fired after the answer to the cancellation");
    pool.close().await;
    stack.shutdown().await.unwrap();
}

/// Ticks of a schedule with what became of them.
#[derive(sqlx::FromRow)]
struct Row {
    schedule: String,
    state: String,
    tick: i64,
    ticks: i64,
}

/// The real-time check in small; `cargo xtask bench clock` is the large one.
#[tokio::test]
async fn i5_schedulers_that_are_killed_in_turn_fire_every_tick_once() {
    const SCHEDULES: i64 = 25;
    const SECONDS: i64 = 14;
    let options =
        StackOptions::default().servers(ServerChoice::Own(Durability::Full)).replicas(Role::CronScheduler, 3);
    let (mut stack, receiver, tenant, pool) = started(options).await;
    tenant.receive(&receiver, "/ticks", "tick.*").await.unwrap();
    let end = Timestamp::from_second(database_time(&pool).await.as_second() + 5 + SECONDS).unwrap();
    // Each begins with the tick that its answer names first.
    let mut next: BTreeMap<String, i64> = BTreeMap::new();
    for n in 0..SCHEDULES {
        let schedule = json!({
            "type": "tick.second", "source": format!("/{n}"), "cron": "* * * * * *", "missed": "catch_up",
            "endsAt": end.to_string(),
        });
        let created = tenant.api.publish(&schedule).await.unwrap().expect(201);
        let first: Timestamp = created.text("/next/0").parse().unwrap();
        next.insert(created.id().to_owned(), first.as_second());
    }
    let accounted = async || -> i64 {
        sqlx::query_scalar("SELECT coalesce(sum(ticks), 0)::int8 FROM occurrences")
            .fetch_one(&pool)
            .await
            .unwrap()
    };
    let expected: i64 = next.values().map(|first| end.as_second() - first + 1).sum();
    for victim in 0..5 {
        // However long the start of the last victim took: there is more to come.
        let goal = (accounted().await + SCHEDULES).min(expected);
        wait_until("further ticks", DEADLINE, async || {
            let seen = accounted().await;
            if seen >= goal { Ok(()) } else { Err(seen) }
        })
        .await;
        let scheduler = stack.process(Role::CronScheduler, usize::try_from(victim % 3).unwrap());
        scheduler.sigkill().await.unwrap();
        scheduler.respawn().unwrap();
    }
    wait_until("the end of every schedule", DEADLINE, async || {
        let open: i64 = sqlx::query_scalar("SELECT count(*) FROM schedules WHERE state <> 'ended'")
            .fetch_one(&pool)
            .await
            .unwrap();
        if open == 0 { Ok(()) } else { Err(open) }
    })
    .await;

    let rows: Vec<Row> = sqlx::query_as(
        "SELECT schedule_id::text AS schedule, state, extract(epoch FROM tick)::int8 AS tick, ticks
         FROM occurrences ORDER BY schedule_id, tick",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    for row in rows {
        let tick = next.get_mut(&row.schedule).unwrap();
        // All are late by less than a minute, so that none is skipped.
        assert_eq!((row.state.as_str(), row.tick, row.ticks), ("fired", *tick, 1));
        *tick += 1;
    }
    assert!(next.values().all(|tick| *tick == end.as_second() + 1), "{next:?}");

    // Every fired tick arrives, whoever died before its fan-out.
    let expected = usize::try_from(expected).unwrap();
    wait_until("every occurrence to arrive", system_tests::ARRIVAL, async || {
        let distinct = system_tests::arrivals(&receiver, "/ticks").len();
        if distinct == expected { Ok(()) } else { Err(distinct) }
    })
    .await;
    pool.close().await;
    stack.shutdown().await.unwrap();
}

/// It sleeps until something is due: what it asks while nothing is, Postgres has counted.
#[tokio::test]
async fn an_idle_scheduler_asks_one_question_in_the_safety_interval() {
    const INTERVAL: Duration = Duration::from_secs(5);
    // pg_stat_statements counts a whole server, so this one must have no other tenant.
    let (stack, _, tenant, pool) =
        started(StackOptions::default().servers(ServerChoice::Own(Durability::Fast))).await;
    // Something is planned, and far away.
    let yearly = json!({ "type": "year.begins", "cron": "@yearly" });
    tenant.api.publish(&yearly).await.unwrap().expect(201);
    sqlx::query("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").execute(&pool).await.unwrap();
    let asked = async || -> BTreeMap<String, i64> {
        let statements: Vec<(String, i64)> = sqlx::query_as(
            "SELECT s.query, sum(s.calls)::int8 FROM pg_stat_statements s JOIN pg_roles r ON r.oid = s.userid
             WHERE r.rolname = 'bus_scheduler' GROUP BY s.query",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        statements.into_iter().collect()
    };
    // What it asks at its start is over when it has looked at the new schedule, and once more.
    let agenda = |statements: &BTreeMap<String, i64>| -> i64 {
        statements.iter().filter(|(query, _)| query.contains("AS ticks")).map(|(_, calls)| *calls).sum()
    };
    let looked = async |more: i64| {
        let goal = agenda(&asked().await) + more;
        wait_until("further questions", DEADLINE, || async {
            let calls = agenda(&asked().await);
            if calls >= goal { Ok(()) } else { Err(calls) }
        })
        .await;
    };
    looked(2).await;
    let (before, begun) = (asked().await, Instant::now());
    looked(3).await;
    let (after, passed) = (asked().await, begun.elapsed());
    let grown: BTreeMap<&String, i64> = after
        .iter()
        .map(|(query, calls)| (query, calls - before.get(query).unwrap_or(&0)))
        .filter(|(_, calls)| *calls > 0)
        .collect();
    assert_eq!(grown.len(), 1, "one question, whatever there may be: {grown:#?}");
    // One may have been due as the counting began.
    let intervals = i64::try_from(passed.as_millis() / INTERVAL.as_millis()).unwrap();
    assert!(grown.values().all(|calls| *calls <= intervals + 1), "{grown:#?} in {passed:?}");
    pool.close().await;
    stack.shutdown().await.unwrap();
}
