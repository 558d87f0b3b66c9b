//! Schedules that tick every second for minutes, while one scheduler after the other is killed.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use devkit::{poll, processes::Role};
use serde_json::json;
use sqlx::PgPool;
use tokio::{task::JoinSet, time::sleep_until};

use super::scene::Scene;
use crate::ui::{self, STRONG, Step, paint};

/// Requests under way at a time.
const REQUESTS: usize = 16;
/// How long after the last tick its event may still come.
const AFTERWARDS: Duration = Duration::from_secs(120);

/// How many schedules, and for how long.
#[derive(Debug, Args)]
pub(super) struct Clock {
    /// Schedules that tick every second
    #[arg(long, default_value_t = 1_000)]
    schedules: usize,
    /// For how long they tick
    #[arg(long, default_value_t = 300)]
    seconds: u32,
    /// Schedulers
    #[arg(long, default_value_t = 3)]
    replicas: usize,
    /// One of them is killed so often, seconds; 0 for never
    #[arg(long, default_value_t = 20)]
    kill_every: u32,
}

/// What is in the database in the end.
#[derive(Debug, sqlx::FromRow)]
struct Account {
    fired: i64,
    skipped: i64,
    events: i64,
    delivered: i64,
    /// Fired ticks beyond one for each schedule and second.
    doubled: i64,
}

impl Clock {
    pub(super) async fn run(self, bin_dir: PathBuf) -> Result<()> {
        let mut scene = Scene::set(bin_dir, self.replicas).await?;
        let pool = scene.stack.owner_pool().await?;
        let step = Step::begin(&format!("Creating {} schedules", self.schedules));
        // A minute ahead, so that all of them exist by the first tick.
        let (start, end): (String, String) = sqlx::query_as(
            "SELECT to_char(s, 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
                    to_char(s + make_interval(secs => $1), 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')
             FROM (SELECT date_trunc('second', now() AT TIME ZONE 'UTC') + make_interval(secs => $2) AS s) AS times",
        )
        .bind(f64::from(self.seconds.saturating_sub(1)))
        .bind(10.0 + self.schedules as f64 / 100.0)
        .fetch_one(&pool)
        .await?;
        self.create(&scene, &start, &end).await?;
        step.done();

        let expected = i64::try_from(self.schedules)? * i64::from(self.seconds);
        let begun: f64 = sqlx::query_scalar("SELECT extract(epoch FROM $1::timestamptz - now())::float8")
            .bind(&start)
            .fetch_one(&pool)
            .await?;
        ensure!(begun > 0.0, "creating the schedules took longer than expected: use fewer");
        let begun = Instant::now() + Duration::from_secs_f64(begun);
        let step =
            Step::begin(&format!("{} ticks, a scheduler killed every {} s", expected, self.kill_every));
        let kills = self.kill(&mut scene, begun).await?;
        step.done();

        let step = Step::begin("Waiting for the last deliveries");
        poll("every tick to be accounted for and delivered", AFTERWARDS, async || {
            let account = account(&pool).await.map_err(|error| error.to_string())?;
            let settled = account.fired + account.skipped == expected && account.delivered == account.events;
            if settled { Ok(()) } else { Err(format!("{account:?} of {expected}")) }
        })
        .await?;
        step.done();

        let account = account(&pool).await?;
        let missing = expected - account.fired - account.skipped;
        ui::line(format!(
            "lateness of ticks: {}",
            percentiles(
                &pool,
                "SELECT extract(epoch FROM at - tick)::float8 * 1000 AS late FROM occurrences"
            )
            .await?
        ));
        ui::line(format!(
            "from the nominal time to the first attempt: {}",
            percentiles(
                &pool,
                "SELECT extract(epoch FROM min(a.at) - min(o.tick))::float8 * 1000 AS late
                 FROM occurrences o JOIN delivery_attempts a ON a.event_uid = o.uid GROUP BY o.uid"
            )
            .await?
        ));
        let Account { fired, skipped, events, delivered, doubled } = account;
        ui::line(paint(
            STRONG,
            format!(
                "clock: ticks {expected}, fired {fired}, skipped {skipped}, doubled {doubled}, missing {missing}, events \
                 {events}, delivered {delivered}, requests {}, schedulers killed {kills}",
                scene.receiver.count("/bench")
            ),
        ));
        pool.close().await;
        scene.stack.shutdown().await?;
        ensure!(
            doubled == 0 && missing == 0 && skipped == 0 && events == fired,
            "not every tick was fired once"
        );
        Ok(())
    }

    async fn create(&self, scene: &Scene, start: &str, end: &str) -> Result<()> {
        let mut requests = JoinSet::new();
        for n in 0..self.schedules {
            let event = json!({
                "type": "bench.tick", "source": format!("/schedules/{n}"), "data": { "n": n },
                "cron": "* * * * * *", "startsAt": start, "endsAt": end, "missed": "catch_up", "catchUpLimit": 1_000,
            });
            let api = scene.tenant.api.clone();
            requests.spawn(async move { api.publish(&event).await?.require(201).map(drop) });
            while requests.len() >= REQUESTS {
                requests.join_next().await.context("there is one")???;
            }
        }
        while let Some(created) = requests.join_next().await {
            created??;
        }
        Ok(())
    }

    /// Kills one scheduler after the other until the last tick; how many.
    async fn kill(&self, scene: &mut Scene, begun: Instant) -> Result<usize> {
        let end = begun + Duration::from_secs(self.seconds.into());
        let every = Duration::from_secs(self.kill_every.into());
        let mut kills = 0;
        let mut next = begun + every;
        while self.kill_every > 0 && next < end {
            sleep_until(next.into()).await;
            let scheduler = scene.stack.process(Role::CronScheduler, kills % self.replicas);
            scheduler.sigkill().await?;
            scheduler.respawn()?;
            kills += 1;
            next += every;
        }
        sleep_until(end.into()).await;
        Ok(kills)
    }
}

async fn account(pool: &PgPool) -> Result<Account> {
    Ok(sqlx::query_as(
        "SELECT (SELECT count(*) FROM occurrences WHERE state = 'fired') AS fired,
                (SELECT coalesce(sum(ticks), 0)::int8 FROM occurrences WHERE state = 'skipped') AS skipped,
                (SELECT count(*) FROM events) AS events,
                (SELECT count(DISTINCT delivery_id) FROM delivery_attempts WHERE outcome = 'delivered') AS delivered,
                (SELECT count(*) - count(DISTINCT (schedule_id, tick)) FROM occurrences) AS doubled",
    )
    .fetch_one(pool)
    .await?)
}

/// Of a query that gives a column `late`, milliseconds.
async fn percentiles(pool: &PgPool, late: &'static str) -> Result<String> {
    let statement = format!(
        "SELECT percentile_disc(ARRAY[0.5, 0.9, 0.99, 0.999, 1]) WITHIN GROUP (ORDER BY late) FROM ({late}) AS l"
    );
    let found: Vec<f64> = sqlx::query_scalar(sqlx::AssertSqlSafe(statement)).fetch_one(pool).await?;
    let named = ["p50", "p90", "p99", "p99.9", "max"].into_iter().zip(found);
    Ok(named.map(|(name, late)| format!("{name} {late:.0} ms")).collect::<Vec<_>>().join(", "))
}
