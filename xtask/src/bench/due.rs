//! Events that are all due in the same second, beside as many that are published at once.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use devkit::{poll, process::resident_memory, processes::Role};
use serde_json::json;

use super::scene::Scene;
use crate::ui::{self, STRONG, Step, paint};

/// Requests under way at a time.
const REQUESTS: usize = 4;
/// How long all of them may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(600);

/// How many.
#[derive(Debug, Args)]
pub(super) struct Due {
    /// Events that are due in one second
    #[arg(long, default_value_t = 100_000)]
    events: usize,
    /// Schedulers
    #[arg(long, default_value_t = 1)]
    replicas: usize,
}

impl Due {
    pub(super) async fn run(self, bin_dir: PathBuf) -> Result<()> {
        let mut scene = Scene::set(bin_dir, self.replicas).await?;
        let pool = scene.stack.owner_pool().await?;
        let count: f64 = u32::try_from(self.events)?.into();
        // The connection is read and the caches are warm before anything is measured.
        self.publish(&scene, 1_000, None).await?;
        arrived(&scene, 1_000).await?;

        let step = Step::begin(&format!("Publishing {} events for at once", self.events));
        let begun = Instant::now();
        self.publish(&scene, self.events, None).await?;
        let accepted = begun.elapsed();
        arrived(&scene, 1_000 + self.events).await?;
        let at_once = begun.elapsed();
        step.done();

        // Far enough ahead that all of them are stored by then.
        let ahead = accepted * 3 + Duration::from_secs(10);
        let step = Step::begin(&format!("Storing {} events that are due in one second", self.events));
        let due_at: String = sqlx::query_scalar(
            "SELECT to_char(date_trunc('second', now() AT TIME ZONE 'UTC') + make_interval(secs => $1),
                            'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')",
        )
        .bind(ahead.as_secs_f64())
        .fetch_one(&pool)
        .await?;
        self.publish(&scene, self.events, Some(&due_at)).await?;
        let left: f64 = sqlx::query_scalar("SELECT extract(epoch FROM $1::timestamptz - now())::float8")
            .bind(&due_at)
            .fetch_one(&pool)
            .await?;
        ensure!(left > 0.0, "storing took longer than expected");
        ensure!(scene.receiver.count("/bench") == 1_000 + self.events, "an event came early");
        step.done();

        let step = Step::begin("Waiting until they are due, published and delivered");
        let schedulers: Vec<u32> = (0..self.replicas)
            .filter_map(|index| scene.stack.process(Role::CronScheduler, index).id())
            .map(|id| id.pid)
            .collect();
        let before = memory(&schedulers);
        let peak = AtomicU64::new(before);
        let begun = Instant::now() + Duration::from_secs_f64(left);
        poll("every due event to be published", ARRIVAL, async || {
            peak.fetch_max(memory(&schedulers), Ordering::Relaxed);
            let waiting: i64 = sqlx::query_scalar("SELECT count(*) FROM scheduled_events")
                .fetch_one(&pool)
                .await
                .map_err(|error| error.to_string())?;
            if waiting == 0 { Ok(()) } else { Err(format!("{waiting} wait")) }
        })
        .await?;
        let published = Instant::now().saturating_duration_since(begun);
        arrived(&scene, 1_000 + self.events * 2).await?;
        let delivered = Instant::now().saturating_duration_since(begun);
        step.done();

        let stored: (i64, i64) =
            sqlx::query_as("SELECT count(*), count(DISTINCT id) FROM events WHERE type = 'bench.due'")
                .fetch_one(&pool)
                .await?;
        let rate = |time: Duration| count / time.as_secs_f64();
        ui::line(format!(
            "published at once: accepted {:.0}/s, delivered {:.0}/s",
            rate(accepted),
            rate(at_once)
        ));
        ui::line(format!(
            "due in one second: published {:.0}/s, delivered {:.0}/s; ratio of deliveries to those at once {:.2}",
            rate(published),
            rate(delivered),
            at_once.as_secs_f64() / delivered.as_secs_f64()
        ));
        ui::line(format!(
            "memory of the schedulers: {} MiB before, at most {} MiB while publishing",
            before / 1_048_576,
            peak.into_inner() / 1_048_576
        ));
        ui::line(paint(
            STRONG,
            format!(
                "due: events {}, published {}, distinct {}, requests {}",
                self.events,
                stored.0,
                stored.1,
                scene.receiver.count("/bench") - 1_000 - self.events
            ),
        ));
        pool.close().await;
        scene.stack.shutdown().await?;
        let all = i64::try_from(self.events)?;
        ensure!(stored == (all, all), "not every event was published once");
        Ok(())
    }

    async fn publish(&self, scene: &Scene, count: usize, due_at: Option<&str>) -> Result<()> {
        let event = |n: usize| match due_at {
            Some(at) => json!({ "type": "bench.due", "data": { "n": n }, "deliverAt": at }),
            None => json!({ "type": "bench.now", "data": { "n": n } }),
        };
        scene.tenant.publish_many(count, REQUESTS, event, async |_| Ok(())).await
    }
}

async fn arrived(scene: &Scene, count: usize) -> Result<()> {
    poll("every delivery to arrive", ARRIVAL, async || {
        let arrived = scene.receiver.count("/bench");
        if arrived >= count { Ok(()) } else { Err(format!("{arrived} of {count}")) }
    })
    .await
}

/// What these processes have in memory, bytes; nothing where the system does not say.
fn memory(processes: &[u32]) -> u64 {
    processes.iter().filter_map(|pid| resident_memory(*pid).ok()).sum()
}
