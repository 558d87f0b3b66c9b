//! What a bad neighbour costs the others, beside the same stack without him: endpoints that hang, and an organization that
//! floods its lane.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use devkit::{
    poll,
    receiver::{Answer, Receiver, Script},
    stack::{Stack, StackOptions},
};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::MissedTickBehavior};

use super::{
    scene::{Tenant, start},
    statistics::quantile,
};
use crate::ui::{self, STRONG, Step, paint};

/// Connections of the organization whose endpoints begin to hang.
const CONNECTIONS: usize = 10;
/// Events a second, each for one connection in turn.
const RATE: u32 = 200;
/// Requests of the flood under way at a time.
const REQUESTS: usize = 2;
/// The deadline of an attempt, milliseconds.
const TIMEOUT_MS: u64 = 5_000;
/// How long what was published for a victim may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(600);
/// A victim's p99 may be so many times what it is without a bad neighbour.
const FACTOR: f64 = 2.0;
/// A victim's p99 while another lane is flooded. The lanes are apart; the machine, the broker and the database are not.
const FLOODED: Duration = Duration::from_secs(1);

/// How long, and how many.
#[derive(Debug, Args)]
pub(super) struct Neighbours {
    /// Seconds of each phase
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// How often endpoints begin to hang, one and then five
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Events that one organization queues while another one sends one a second
    #[arg(long, default_value_t = 500_000)]
    flood: usize,
}

/// From the publish call to the receiver, by the clock of this process.
#[derive(Debug, Default)]
struct Latencies {
    /// When each event was published.
    begun: Vec<Instant>,
    /// What each took; the first time that it came.
    took: Vec<Option<Duration>>,
}

type Shared = Arc<Mutex<Latencies>>;

fn lock(latencies: &Shared) -> std::sync::MutexGuard<'_, Latencies> {
    latencies.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An answer of 200 that notes when it was asked for.
fn noting(latencies: &Shared) -> Script {
    let latencies = Arc::clone(latencies);
    Script::decided_by(move |request| {
        let event: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let n = event.pointer("/data/n").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let mut latencies = lock(&latencies);
        if let Some((n, begun)) = n.and_then(|n| Some((n, *latencies.begun.get(n)?)))
            && latencies.took[n].is_none()
        {
            latencies.took[n] = Some(request.at.saturating_duration_since(begun));
        }
        Answer::ok()
    })
}

/// An organization, and what its events take.
struct Timed {
    tenant: Tenant,
    latencies: Shared,
}

impl Timed {
    async fn create(stack: &mut Stack, name: &str) -> Result<Self> {
        Ok(Self { tenant: Tenant::create(stack, name).await?, latencies: Shared::default() })
    }

    /// A connection for events of this type, whose arrival is noted.
    async fn receive(&self, receiver: &Receiver, event_type: &str) -> Result<()> {
        let path = format!("/{event_type}");
        receiver.script(&path, noting(&self.latencies));
        let hook = json!({ "name": event_type, "kind": "webhook", "url": receiver.url(&path), "timeoutMs": TIMEOUT_MS });
        let hook = self.tenant.api.post("/v1/connections", &hook).await?.require(201)?;
        self.tenant.subscribe(hook.id(), event_type).await
    }

    /// Publishes at a steady rate, and gives the numbers of the events of each type.
    async fn publish(&self, types: &[String], per_second: u32, seconds: u32) -> Result<Vec<Vec<usize>>> {
        let mut numbers = vec![Vec::new(); types.len()];
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut requests = JoinSet::new();
        for (place, event_type) in (0..types.len()).zip(types).cycle().take((per_second * seconds) as usize) {
            ticks.tick().await;
            let n = {
                let mut latencies = lock(&self.latencies);
                latencies.begun.push(Instant::now());
                latencies.took.push(None);
                latencies.begun.len() - 1
            };
            numbers[place].push(n);
            let (api, event) = (self.tenant.api.clone(), json!({ "type": event_type, "data": { "n": n } }));
            requests.spawn(async move { api.publish(&event).await?.require(202).map(drop) });
            while let Some(done) = requests.try_join_next() {
                done??;
            }
        }
        while let Some(done) = requests.join_next().await {
            done??;
        }
        Ok(numbers)
    }

    /// What these events took, once all have arrived; in ascending order.
    async fn took(&self, numbers: &[Vec<usize>]) -> Result<Vec<Duration>> {
        poll("the events to arrive", ARRIVAL, async || {
            let latencies = lock(&self.latencies);
            let missing = numbers.iter().flatten().filter(|n| latencies.took[**n].is_none()).count();
            if missing == 0 { Ok(()) } else { Err(format!("{missing} are missing")) }
        })
        .await?;
        let latencies = lock(&self.latencies);
        let mut took: Vec<Duration> = numbers.iter().flatten().filter_map(|n| latencies.took[*n]).collect();
        took.sort_unstable();
        Ok(took)
    }
}

fn show(what: &str, took: &[Duration]) {
    let ms = |of_1_000| quantile(took, of_1_000).as_secs_f64() * 1e3;
    ui::line(format!(
        "{what}: {} deliveries, p50 {:.1} ms, p90 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
        took.len(),
        ms(500),
        ms(900),
        ms(990),
        ms(1_000)
    ));
}

impl Neighbours {
    pub(super) async fn run(self, bin_dir: PathBuf) -> Result<()> {
        let mut stack = start(bin_dir, StackOptions::default()).await?;
        let receiver = Receiver::start().await?;
        let (one, five) = self.hanging(&mut stack, &receiver).await?;
        let (quiet, flooded) = self.flood(&mut stack, &receiver).await?;
        ui::line(paint(
            STRONG,
            format!(
                "neighbours: p99 of the others ÷ without: 1 of 10 hangs {one:.2}, 5 of 10 hang {five:.2}; flood in another \
                 lane: p99 {:.0} ms, quiet {:.0} ms",
                flooded.as_secs_f64() * 1e3,
                quiet.as_secs_f64() * 1e3
            ),
        ));
        stack.shutdown().await?;
        ensure!(one <= FACTOR && five <= FACTOR, "a hanging endpoint slows the others down");
        ensure!(
            flooded <= FLOODED,
            "a flood in another lane slows the others down: {flooded:?}, not {FLOODED:?} at most"
        );
        Ok(())
    }

    /// One organization, one lane. All its endpoints answer, then one hangs; all answer again, then five hang; and so on in
    /// turn, since the speed of a machine changes within minutes.
    async fn hanging(&self, stack: &mut Stack, receiver: &Receiver) -> Result<(f64, f64)> {
        let tenant = Timed::create(stack, "neighbours").await?;
        let types: Vec<String> = (0..CONNECTIONS).map(|n| format!("n{n}")).collect();
        for event_type in &types {
            tenant.receive(receiver, event_type).await?;
        }
        let warm = tenant.publish(&types, RATE, 5).await?;
        tenant.took(&warm).await?;

        const PHASES: [(usize, &str); 3] =
            [(0, "without a bad neighbour"), (1, "beside one that hangs"), (5, "beside five that hang")];
        let mut all: [Vec<Duration>; PHASES.len()] = Default::default();
        for round in 1..=self.rounds {
            for phase in [0, 1, 0, 2] {
                let (hanging, _) = PHASES[phase];
                let step = Step::begin(&format!(
                    "Round {round}: {RATE} events a second for {CONNECTIONS} connections, {} s, {hanging} of them hang until \
                     their deadline",
                    self.seconds
                ));
                let bad = &types[CONNECTIONS - hanging..];
                for event_type in bad {
                    receiver.script(&format!("/{event_type}"), Answer::hang());
                }
                let numbers = tenant.publish(&types, RATE, self.seconds).await?;
                // Those who never hang are the same in each phase.
                all[phase].extend(tenant.took(&numbers[..CONNECTIONS / 2]).await?);
                for event_type in bad {
                    receiver.script(&format!("/{event_type}"), noting(&tenant.latencies));
                }
                // What has gathered is over before the next phase begins, and nothing of it is lost.
                tenant.took(&numbers).await?;
                step.done();
            }
        }
        let mut p99 = Vec::new();
        for ((_, what), took) in PHASES.iter().zip(&mut all) {
            took.sort_unstable();
            show(what, took);
            p99.push(quantile(took, 990).as_secs_f64());
        }
        Ok((p99[1] / p99[0], p99[2] / p99[0]))
    }

    /// Two organizations in two lanes, one of which floods its own.
    async fn flood(&self, stack: &mut Stack, receiver: &Receiver) -> Result<(Duration, Duration)> {
        let victim = Timed::create(stack, "victim").await?;
        let types = ["victim".to_owned()];
        victim.receive(receiver, "victim").await?;
        let flooder = Tenant::create(stack, "flooder").await?;
        flooder.receive(&receiver.url("/flood"), "flood").await?;
        let admin = stack.admin(0)?;
        let path = format!("/v1/admin/organizations/{}/lane", flooder.organization);
        admin.put(&path, &json!({ "lane": "own" })).await?.require(200)?;

        let step = Step::begin(&format!("One event a second without a flood, {} s", self.seconds));
        let numbers = victim.publish(&types, 1, self.seconds).await?;
        let quiet = victim.took(&numbers).await?;
        step.done();
        show("without a flood", &quiet);

        let step = Step::begin(&format!(
            "One event a second while another organization queues {} events",
            self.flood
        ));
        let events = self.flood;
        let flooding = tokio::spawn(async move {
            let event = |n: usize| json!({ "type": "flood", "data": { "n": n } });
            flooder.publish_many(events, REQUESTS, event, async |_| Ok(())).await
        });
        let mut all = Vec::new();
        let done = async {
            poll("the flood to be over", ARRIVAL, async || {
                let came = receiver.count("/flood");
                if came >= self.flood { Ok(()) } else { Err(came) }
            })
            .await
        };
        tokio::pin!(done);
        loop {
            let numbers = victim.publish(&types, 1, 5).await?;
            all.extend_from_slice(&numbers[0]);
            if futures::poll!(&mut done).is_ready() {
                break;
            }
        }
        flooding.await??;
        let flooded = victim.took(&[all]).await?;
        step.done();
        show("during the flood", &flooded);
        Ok((quantile(&quiet, 990), quantile(&flooded, 990)))
    }
}
