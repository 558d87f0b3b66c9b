//! One stack, and what is run on it.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bus_core::{
    clock::{Clock as _, SystemClock},
    ids::uuid_floor,
};
use clap::ValueEnum;
use devkit::stack::{Backend, Stack, StackOptions};
use sqlx::PgPool;

use super::parts::Place;
use crate::bench::{
    cost::{self, LOAD, PARTS, each},
    load::{self, Pace, Plan},
    receiver::Receiver,
    scene::{Tenant, settle, start, write_what_is_dirty},
};

/// Events of one request, in batches.
const BATCH: usize = 500;
/// Requests with batches under way at a time.
const BATCHES: usize = 4;
/// Subscriptions that match an event of [`TEN`].
const FAN_OUT: usize = 10;

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
    keys: Arc<[String]>,
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
            keys: [tenant.key].into(),
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
        write_what_is_dirty(&mut self.stack).await?;
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
            _ => settle(&self.stack, &self.pool, since, tally.deliveries()).await?,
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
        write_what_is_dirty(&mut self.stack).await?;
        let tally = receiver.expect(events, 1);
        let since = uuid_floor(SystemClock.now());
        let plan = self.plan(Case::Single1, tally.first(), events, Pace::Every(period));
        let work = load::prepare(plan, Arc::clone(&tally)).await?;
        let (done, _) = tokio::try_join!(work.run(), tally.complete())?;
        settle(&self.stack, &self.pool, since, tally.deliveries()).await?;
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
            keys: Arc::clone(&self.keys),
            event_type: if case == Case::Batch10 { TEN } else { ONE },
            first,
            events,
            batch: if single { 1 } else { BATCH },
            in_flight: if single { self.in_flight } else { BATCHES },
            pace,
        }
    }
}
