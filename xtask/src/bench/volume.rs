//! Many events in one run: all of them arrive, and neither memory nor the cost of a delivery grows with them.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use devkit::{
    poll,
    process::{processor_time, resident_memory},
    processes::Role,
    receiver::{Answer, Receiver, Script},
    stack::{Stack, StackOptions},
};
use serde_json::{Value, json};

use super::scene::{Tenant, start};
use crate::ui::{self, STRONG, Step, paint};

/// Requests under way at a time.
const REQUESTS: usize = 2;
/// Deliveries that may wait in the queue while more is published: the queue is not what is measured.
const AHEAD: usize = 100_000;
/// How long a tenth of the deliveries may take.
const DEADLINE: Duration = Duration::from_secs(3_600);

/// How many.
#[derive(Debug, Args)]
pub(super) struct Volume {
    /// Events that are published
    #[arg(long, default_value_t = 1_000_000)]
    events: usize,
    /// Subscriptions that each of them matches
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    subscriptions: u16,
}

/// What has arrived: one bit for each delivery.
#[derive(Debug)]
struct Arrived {
    seen: Vec<bool>,
    distinct: usize,
    repeated: usize,
}

type Shared = Arc<Mutex<Arrived>>;

/// What everything has cost so far.
#[derive(Debug)]
struct Reading {
    deliveries: usize,
    at: Instant,
    /// By process: its memory, bytes, and the processor time that it has taken.
    processes: Vec<(String, u64, Duration)>,
}

impl Volume {
    pub(super) async fn run(self, bin_dir: PathBuf) -> Result<()> {
        let mut stack = start(bin_dir, StackOptions::default()).await?;
        let receiver = Receiver::start().await?;
        let subscriptions = usize::from(self.subscriptions);
        let arrived = Arc::new(Mutex::new(Arrived {
            seen: vec![false; self.events * subscriptions],
            distinct: 0,
            repeated: 0,
        }));
        let tenant = self.set(&mut stack, &receiver, &arrived).await?;

        let total = self.events * subscriptions;
        ui::line(format!("Publishing {} events for {subscriptions} subscriptions each", self.events));
        let event = |n: usize| json!({ "type": "volume.event", "data": { "n": n, "text": "x".repeat(256) } });
        let room = async |before: usize| {
            poll("the deliveries to follow", DEADLINE, async || {
                let behind = (before * subscriptions).saturating_sub(lock(&arrived).distinct);
                if behind <= AHEAD { Ok(()) } else { Err(behind) }
            })
            .await
        };
        let publishing = tenant.publish_many(self.events, REQUESTS, event, room);
        let reading = async {
            let mut readings: Vec<Reading> = Vec::new();
            for tenth in 0..=10 {
                poll("the next tenth of the deliveries", DEADLINE, async || {
                    let distinct = lock(&arrived).distinct;
                    if distinct >= total * tenth / 10 { Ok(()) } else { Err(distinct) }
                })
                .await?;
                let reading = read(&mut stack, lock(&arrived).distinct)?;
                if let Some(before) = readings.last() {
                    show(before, &reading);
                }
                readings.push(reading);
            }
            Ok(readings)
        };
        let ((), readings) = tokio::try_join!(publishing, reading)?;

        let step = Step::begin("Waiting until history has every attempt");
        let pool = stack.owner_pool().await?;
        let events: i64 = sqlx::query_scalar("SELECT count(*) FROM events").fetch_one(&pool).await?;
        poll("history to have every attempt", DEADLINE, async || {
            let attempts: i64 = sqlx::query_scalar("SELECT count(*) FROM delivery_attempts")
                .fetch_one(&pool)
                .await
                .map_err(|error| error.to_string())?;
            if usize::try_from(attempts).is_ok_and(|attempts| attempts >= total) {
                Ok(())
            } else {
                Err(attempts.to_string())
            }
        })
        .await?;
        pool.close().await;
        step.done();
        let growth = growth(&readings);
        let (distinct, repeated) = {
            let arrived = lock(&arrived);
            (arrived.distinct, arrived.repeated)
        };
        ui::line(paint(
            STRONG,
            format!(
                "volume: events {events}, deliveries {distinct}, repeated {repeated}, lost {}; cost of a delivery in the last \
                 tenth ÷ in the second {growth:.2}",
                total - distinct
            ),
        ));
        stack.shutdown().await?;
        ensure!(usize::try_from(events)? == self.events, "not every event is stored once");
        Ok(())
    }

    /// An organization with one connection and one subscription for each delivery of an event.
    async fn set(&self, stack: &mut Stack, receiver: &Receiver, arrived: &Shared) -> Result<Tenant> {
        let tenant = Tenant::create(stack, "volume").await?;
        let subscriptions = usize::from(self.subscriptions);
        for place in 0..subscriptions {
            let path = format!("/{place}");
            let arrived = Arc::clone(arrived);
            let note = move |body: &[u8]| {
                let event: Value = serde_json::from_slice(body).ok()?;
                let n = usize::try_from(event.pointer("/data/n")?.as_u64()?).ok()?;
                let mut arrived = lock(&arrived);
                let seen = arrived.seen.get_mut(n * subscriptions + place)?;
                let repeated = std::mem::replace(seen, true);
                arrived.repeated += usize::from(repeated);
                arrived.distinct += usize::from(!repeated);
                Some(())
            };
            let script = Script::decided_by(move |request| match note(&request.body) {
                Some(()) => Answer::ok(),
                None => Answer::status(500),
            });
            receiver.script(&path, script);
            tenant.receive(&receiver.url(&path), "volume.>").await?;
        }
        Ok(tenant)
    }
}

fn lock(arrived: &Shared) -> std::sync::MutexGuard<'_, Arrived> {
    arrived.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(stack: &mut Stack, deliveries: usize) -> Result<Reading> {
    let mut processes = Vec::new();
    for role in Role::ALL {
        let id = stack.process(role, 0).id().context("it has ended")?;
        processes.push((role.binary().to_owned(), id.pid));
    }
    processes.push(("nats-server".to_owned(), stack.nats().id().context("nats-server has ended")?.pid));
    processes.push(("postgres".to_owned(), stack.postgres().id().context("Postgres has ended")?.pid));
    let cost = processes.into_iter().map(|(name, pid)| {
        // Of Postgres the memory of its first process: most of that of the others is shared.
        Ok((name, resident_memory(pid)?, processor_time(pid)?))
    });
    Ok(Reading { deliveries, at: Instant::now(), processes: cost.collect::<Result<_>>()? })
}

/// Prints what went on between two readings.
fn show(before: &Reading, after: &Reading) {
    let deliveries = (after.deliveries - before.deliveries).max(1) as f64;
    let rate = deliveries / after.at.duration_since(before.at).as_secs_f64();
    let memory = after.processes.iter().map(|(name, memory, _)| format!("{name} {}", memory / 1_048_576));
    ui::line(format!(
        "{:>9} deliveries: {rate:>6.0}/s, {:>6.1} µs of processor time each; memory, MiB: {}",
        after.deliveries,
        cost(before, after),
        memory.collect::<Vec<_>>().join(", ")
    ));
}

/// How much more a delivery cost in the last tenth than in the second, when everything is warm.
fn growth(readings: &[Reading]) -> f64 {
    match (readings.get(1..3), readings.get(readings.len().saturating_sub(2)..)) {
        (Some([a, b]), Some([y, z])) => cost(y, z) / cost(a, b),
        _ => f64::NAN,
    }
}

/// Microseconds of processor time for each delivery between two readings, all processes together.
fn cost(before: &Reading, after: &Reading) -> f64 {
    let total =
        |reading: &Reading| reading.processes.iter().map(|(_, _, time)| time.as_secs_f64()).sum::<f64>();
    let deliveries = after.deliveries.saturating_sub(before.deliveries).max(1) as f64;
    (total(after) - total(before)) * 1e6 / deliveries
}
