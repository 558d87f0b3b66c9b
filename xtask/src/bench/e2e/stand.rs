//! One stack, and what is run on it.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bus_core::{
    clock::{Clock as _, SystemClock},
    ids::uuid_floor,
};
use clap::ValueEnum;
use devkit::{
    poll,
    stack::{Backend, Stack, StackOptions},
};
use sqlx::{Connection as _, PgConnection, PgPool};
use uuid::Uuid;

use super::{
    cost::{self, LOAD, PARTS, Reading},
    load::{self, Pace, Plan},
    parts::Place,
    receiver::{Receiver, Tally},
};
use crate::bench::scene::{Tenant, start};

/// Events of one request, in batches.
const BATCH: usize = 500;
/// Requests with batches under way at a time.
const BATCHES: usize = 4;
/// Subscriptions that match an event of [`TEN`].
const FAN_OUT: usize = 10;
/// How long history may take to have what was delivered.
const SETTLED: Duration = Duration::from_secs(300);

/// The type of events that one subscription matches.
const ONE: &str = "bench.one";
/// The type of events that ten subscriptions match.
const TEN: &str = "bench.ten";

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Case {
    /// Postgres, JetStream and HTTP without the bus
    Parts,
    /// Batches of events, each for one subscription
    #[value(name = "batch-1")]
    Batch1,
    /// Requests with one event, each for one subscription
    #[value(name = "single-1")]
    Single1,
    /// Batches of events, each for ten subscriptions
    #[value(name = "batch-10")]
    Batch10,
}

impl Case {
    /// As it is called on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Parts => PARTS,
            Self::Batch1 => "batch-1",
            Self::Single1 => "single-1",
            Self::Batch10 => "batch-10",
        }
    }

    fn fan_out(self) -> usize {
        if self == Self::Batch10 { FAN_OUT } else { 1 }
    }
}

/// What one run gave. There is none of a run that lost or failed anything.
#[derive(Debug)]
pub(super) struct Run {
    /// From the first request to the last delivery.
    pub(super) deliveries_per_s: f64,
    /// Processor time of each delivery by process, µs.
    pub(super) processor_us: Vec<(&'static str, f64)>,
    /// Deliveries that came again.
    pub(super) repeated: usize,
    /// Requests that were refused for now.
    pub(super) refused: usize,
}

/// A private stack with one organization.
pub(super) struct Stand {
    pub(super) backend: Backend,
    stack: Stack,
    pool: PgPool,
    key: String,
    publisher: SocketAddr,
    parts: Option<Place>,
    /// Requests with single events under way at a time.
    in_flight: usize,
}

impl Stand {
    pub(super) async fn set(
        bin_dir: PathBuf,
        backend: Backend,
        in_flight: usize,
        receiver: &Receiver,
    ) -> Result<Self> {
        let mut stack = start(bin_dir, StackOptions::default().backend(backend)).await?;
        let tenant = Tenant::create(&mut stack, "bench").await?;
        tenant.receive(&receiver.url(0), ONE).await?;
        for place in 0..FAN_OUT {
            tenant.receive(&receiver.url(place), TEN).await?;
        }
        let publisher = stack.publisher(0).addresses().http.clone().context("the publisher serves HTTP")?;
        let parts = stack.nats_url().map(|nats| Place {
            database: stack.owner_url().to_owned(),
            nats,
            receiver: receiver.url(0),
        });
        Ok(Self {
            backend,
            pool: stack.owner_pool().await?,
            key: tenant.key,
            publisher: publisher.parse()?,
            parts,
            stack,
            in_flight,
        })
    }

    /// Whether it has what the case needs.
    pub(super) fn can(&self, case: Case) -> bool {
        case != Case::Parts || self.parts.is_some()
    }

    /// One run, with `deliveries` of them.
    pub(super) async fn run(&mut self, case: Case, deliveries: usize, receiver: &Receiver) -> Result<Run> {
        let events = deliveries.div_ceil(case.fan_out());
        let failed = format!("there is no figure for {} ({})", case.name(), self.backend.name());
        self.measure(case, events, receiver).await.context(failed)
    }

    async fn measure(&mut self, case: Case, events: usize, receiver: &Receiver) -> Result<Run> {
        self.write_what_is_dirty().await?;
        let tally = receiver.expect(events, case.fan_out());
        let since = uuid_floor(SystemClock.now());
        let work = match (case, &self.parts) {
            (Case::Parts, parts) => {
                let parts = parts.as_ref().context("there is no NATS")?;
                parts.prepare(Arc::clone(&tally)).await?
            }
            _ => {
                load::prepare(self.plan(case, tally.first(), events, Pace::Closed), Arc::clone(&tally))
                    .await?
            }
        };

        let before = cost::read(&mut self.stack, self.backend, receiver.thread())?;
        let (done, last) = tokio::try_join!(work.run(), tally.complete())?;
        let after = cost::read(&mut self.stack, self.backend, receiver.thread())?;

        match (case, &self.parts) {
            (Case::Parts, Some(parts)) => parts.clear(events).await?,
            _ => self.settle(since, &tally).await?,
        }
        let mut processor = cost::between(&before, &after);
        processor.push((if case == Case::Parts { PARTS } else { LOAD }, done.processor));
        Ok(Run {
            deliveries_per_s: tally.deliveries() as f64 / last.duration_since(done.begun).as_secs_f64(),
            processor_us: each(processor, tally.deliveries()),
            repeated: tally.repeated(),
            refused: done.value,
        })
    }

    /// Publishes single events at a fixed rate, and gives in ascending order how long after the moment that each was due it
    /// was received.
    pub(super) async fn latencies(
        &mut self,
        period: Duration,
        events: usize,
        receiver: &Receiver,
    ) -> Result<Vec<Duration>> {
        self.write_what_is_dirty().await?;
        let tally = receiver.expect(events, 1);
        let since = uuid_floor(SystemClock.now());
        let plan = self.plan(Case::Single1, tally.first(), events, Pace::Every(period));
        let work = load::prepare(plan, Arc::clone(&tally)).await?;
        let (done, _) = tokio::try_join!(work.run(), tally.complete())?;
        self.settle(since, &tally).await?;
        let due = std::iter::successors(Some(done.begun), |due: &Instant| Some(*due + period));
        let took =
            tally.arrivals().flatten().zip(due).map(|(arrival, due)| arrival.saturating_duration_since(due));
        let mut took: Vec<Duration> = took.collect();
        took.sort_unstable();
        Ok(took)
    }

    pub(super) async fn end(self) -> Result<()> {
        self.pool.close().await;
        self.stack.shutdown().await
    }

    fn plan(&self, case: Case, first: u64, events: usize, pace: Pace) -> Plan {
        let single = case == Case::Single1;
        Plan {
            address: self.publisher,
            key: self.key.clone(),
            event_type: if case == Case::Batch10 { TEN } else { ONE },
            first,
            events,
            batch: if single { 1 } else { BATCH },
            in_flight: if single { self.in_flight } else { BATCHES },
            pace,
        }
    }

    /// So that no run pays for what one before it has written.
    async fn write_what_is_dirty(&mut self) -> Result<()> {
        let mut superuser = PgConnection::connect(&self.stack.postgres().superuser_url("postgres")).await?;
        sqlx::query("CHECKPOINT").execute(&mut superuser).await.context("write what is dirty")?;
        superuser.close().await?;
        Ok(())
    }

    /// Waits until history has every delivery since then, and makes sure that none of them failed.
    async fn settle(&self, since: Uuid, tally: &Tally) -> Result<()> {
        let wanted = i64::try_from(tally.deliveries())?;
        let other = poll("history to have every delivery", SETTLED, async || {
            let attempts: Result<(i64, i64), _> = sqlx::query_as(
                "SELECT count(*) FILTER (WHERE outcome = 'delivered'), count(*) FILTER (WHERE outcome <> 'delivered')
                 FROM delivery_attempts WHERE event_uid >= $1",
            )
            .bind(since)
            .fetch_one(&self.pool)
            .await;
            match attempts {
                Ok((delivered, other)) if delivered >= wanted => Ok(other),
                Ok((delivered, _)) => Err(format!("{delivered} of {wanted}")),
                Err(failed) => Err(failed.to_string()),
            }
        })
        .await?;
        ensure!(other == 0, "{other} attempts did not deliver");
        poll("the queue to be empty", SETTLED, async || match self.stack.undelivered().await {
            Ok(0) => Ok(()),
            Ok(left) => Err(format!("{left} are left")),
            Err(failed) => Err(format!("{failed:#}")),
        })
        .await?;
        let dead: i64 = sqlx::query_scalar("SELECT count(*) FROM delivery_states WHERE state = 'dead'")
            .fetch_one(&self.pool)
            .await?;
        ensure!(dead == 0, "{dead} deliveries are dead");
        Ok(())
    }
}

fn each(reading: Reading, deliveries: usize) -> Vec<(&'static str, f64)> {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / deliveries as f64;
    reading.into_iter().map(|(name, time)| (name, each(time))).collect()
}
