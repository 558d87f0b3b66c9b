//! A stack that is published to through the API, and a receiver that accounts for every delivery.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bus_core::{
    clock::{Clock as _, SystemClock},
    ids::uuid_floor,
};
use devkit::{
    poll,
    process::resident_memory,
    processes::Role,
    stack::{Backend, Stack, StackOptions},
};
use sqlx::PgPool;

use super::report::Figure;
use crate::bench::{
    cost::{self, RECEIVER, Reading, each},
    load::{self, Pace, Plan},
    receiver::{Receiver, Tally},
    scene::{settle, start, write_what_is_dirty},
};

/// The type of all events that are published.
pub(super) const EVENT: &str = "bench.one";
/// Events of one request, in large batches, and such requests under way at a time.
pub(super) const BATCH: usize = 500;
pub(super) const BATCHES: usize = 4;
/// How long a long queue may take to be made, or to be delivered.
const DEADLINE: Duration = Duration::from_secs(3_600);

/// What is published; each event is for one subscription.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub(super) keys: Arc<[String]>,
    pub(super) events: usize,
    /// Events of a request.
    pub(super) batch: usize,
    /// Requests under way at a time.
    pub(super) in_flight: usize,
}

/// What publishing took. There is none of a run that lost or failed anything.
#[derive(Debug)]
pub(super) struct Run {
    events: usize,
    /// From the first request until the last one was answered.
    pub(super) accepted: Duration,
    /// From the first request to the last delivery.
    pub(super) delivered: Duration,
    pub(super) cost: Cost,
}

impl Run {
    pub(super) fn accepted_per_s(&self) -> f64 {
        self.events as f64 / self.accepted.as_secs_f64()
    }

    pub(super) fn delivered_per_s(&self) -> f64 {
        self.events as f64 / self.delivered.as_secs_f64()
    }
}

/// Processor time by process, µs for each delivery.
#[derive(Debug, Clone)]
pub(super) struct Cost(Vec<(&'static str, f64)>);

impl Cost {
    pub(super) fn of(&self, process: &str) -> f64 {
        self.0.iter().filter(|(name, _)| *name == process).map(|(_, us)| us).sum()
    }

    /// Those that it is told of, without the receiver.
    fn processes(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| *name).filter(|name| *name != RECEIVER)
    }

    /// All of them together.
    pub(super) fn bus(&self) -> f64 {
        self.processes().map(|name| self.of(name)).sum()
    }
}

/// Which of the processes it is that costs so much.
pub(super) fn by_process(case: &str, costs: &[Cost]) -> Vec<Figure> {
    let processes = costs.first().into_iter().flat_map(Cost::processes);
    let figure = |process| {
        let us = costs.iter().map(|cost| cost.of(process)).collect();
        Figure::new(format!("{process}'s µs a delivery, {case}"), us)
    };
    processes.map(figure).collect()
}

/// What a drain of the queue was like between two of its deliveries.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) delivered_per_s: f64,
    pub(super) cost: Cost,
}

/// What so many deliveries have cost.
struct Reached {
    deliveries: usize,
    at: Instant,
    cost: Reading,
}

/// One stack, and the receiver of all its deliveries.
pub(super) struct Ground {
    pub(super) stack: Stack,
    pub(super) pool: PgPool,
    pub(super) receiver: Receiver,
}

impl Ground {
    pub(super) async fn set(bin_dir: PathBuf) -> Result<Self> {
        let stack = start(bin_dir, StackOptions::default()).await?;
        Ok(Self { pool: stack.owner_pool().await?, receiver: Receiver::start().await?, stack })
    }

    pub(super) async fn end(self) -> Result<()> {
        self.pool.close().await;
        self.stack.shutdown().await
    }

    /// Ends a binary, starts it again, and gives how long it took to be ready; 20 ms too much at most.
    pub(super) async fn restart(&mut self, role: Role) -> Result<Duration> {
        self.stop(role).await?;
        let begun = Instant::now();
        self.start(role).await?;
        Ok(begun.elapsed())
    }

    async fn stop(&mut self, role: Role) -> Result<()> {
        let process = self.stack.process(role, 0);
        process.sigterm()?;
        ensure!(process.wait_exit().await?.success(), "{} did not drain", role.binary());
        Ok(())
    }

    async fn start(&mut self, role: Role) -> Result<()> {
        let process = self.stack.process(role, 0);
        process.respawn()?;
        process.wait_ready().await.map(drop)
    }

    /// The memory that a binary has in use, bytes.
    pub(super) fn memory(&mut self, role: Role) -> Result<u64> {
        let id = self.stack.process(role, 0).id();
        resident_memory(id.with_context(|| format!("{} has ended", role.binary()))?.pid)
    }

    /// Publishes as fast as it is let, and waits until everything has come.
    pub(super) async fn publish(&mut self, load: &Load) -> Result<Run> {
        write_what_is_dirty(&mut self.stack).await?;
        let tally = self.receiver.expect(load.events, 1);
        let since = uuid_floor(SystemClock.now());
        let plan = self.plan(load, tally.first(), Pace::Closed)?;
        let work = load::prepare(plan, Arc::clone(&tally)).await?;

        let before = cost::read(&mut self.stack, Backend::Jetstream, self.receiver.thread())?;
        let publishing = async {
            let done = work.run().await?;
            Ok((done.begun, Instant::now()))
        };
        let ((begun, accepted), last) = tokio::try_join!(publishing, tally.complete())?;
        let after = cost::read(&mut self.stack, Backend::Jetstream, self.receiver.thread())?;

        settle(&self.stack, &self.pool, since, load.events).await?;
        Ok(Run {
            events: load.events,
            accepted: accepted.duration_since(begun),
            delivered: last.duration_since(begun),
            cost: Cost(each(cost::between(&before, &after), load.events)),
        })
    }

    /// Publishes while there is no worker, starts one, and gives what its deliveries were like between these of them.
    pub(super) async fn drain<const N: usize>(
        &mut self,
        load: &Load,
        stretches: [(usize, usize); N],
    ) -> Result<[Stretch; N]> {
        self.stop(Role::DeliveryWorker).await?;
        let tally = self.receiver.expect(load.events, 1);
        let since = uuid_floor(SystemClock.now());
        let plan = self.plan(load, tally.first(), Pace::Queueing)?;
        load::prepare(plan, Arc::clone(&tally)).await?.run().await?;
        poll("everything to be in the queue", DEADLINE, async || self.fanned_out().await).await?;
        // Or else it would begin by itself, and what publishing has left behind would count as a cost of delivering.
        sqlx::query("VACUUM (ANALYZE)").execute(&self.pool).await.context("vacuum what was published")?;
        write_what_is_dirty(&mut self.stack).await?;

        self.start(Role::DeliveryWorker).await?;
        let mut found = Vec::new();
        for (from, to) in stretches {
            let (before, after) = (self.reach(&tally, from).await?, self.reach(&tally, to).await?);
            let deliveries = after.deliveries.saturating_sub(before.deliveries).max(1);
            found.push(Stretch {
                delivered_per_s: deliveries as f64 / after.at.duration_since(before.at).as_secs_f64(),
                cost: Cost(each(cost::between(&before.cost, &after.cost), deliveries)),
            });
        }
        tally.complete().await?;
        settle(&self.stack, &self.pool, since, load.events).await?;
        found.try_into().ok().context("one for each of them")
    }

    /// Waits until so many deliveries have come.
    async fn reach(&mut self, tally: &Tally, deliveries: usize) -> Result<Reached> {
        poll("the next deliveries", DEADLINE, async || {
            let distinct = tally.distinct();
            if distinct >= deliveries { Ok(()) } else { Err(distinct) }
        })
        .await?;
        let cost = cost::read(&mut self.stack, Backend::Jetstream, self.receiver.thread())?;
        Ok(Reached { deliveries: tally.distinct(), at: Instant::now(), cost })
    }

    /// Whether nothing waits in the outbox.
    async fn fanned_out(&self) -> Result<(), String> {
        let left = sqlx::query_scalar("SELECT count(*) FROM outbox WHERE finished_at IS NULL");
        match left.fetch_one(&self.pool).await {
            Ok(0_i64) => Ok(()),
            Ok(left) => Err(format!("{left} requests are left")),
            Err(failed) => Err(failed.to_string()),
        }
    }

    fn plan(&mut self, load: &Load, first: u64, pace: Pace) -> Result<Plan> {
        let publisher = self.stack.publisher(0).addresses().http.as_ref();
        Ok(Plan {
            address: publisher.context("the publisher serves HTTP")?.parse()?,
            keys: Arc::clone(&load.keys),
            event_type: EVENT,
            first,
            events: load.events,
            batch: load.batch,
            in_flight: load.in_flight,
            pace,
        })
    }
}
