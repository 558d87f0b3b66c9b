//! `cargo xtask chaos`: the whole bus under load, while everything that it stands on breaks; and a ledger outside of it
//! that says what was lost.
//!
//! No clock is stepped: a scheduler asks the database for the time, and the database the system, which a process cannot
//! change for another one. No disk is filled: that the stream of the deliveries takes no more stands for it.

mod account;
mod case;
mod disturbances;
mod faults;
mod judge;
mod ledger;
mod load;
mod memory;
mod report;
mod scene;

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum as _};
use devkit::{
    paths::target_dir,
    processes::Role,
    servers::Durability,
    stack::{Backend, ServerChoice, Stack, StackOptions},
};
use tokio::time::sleep;

use self::{
    faults::{Breaker, Fault, Planned, Rounds, Target},
    ledger::{Entry, Ledger, Phase},
    load::{Load, Publishers},
    scene::Scene,
};
use crate::{
    cargo::build_binaries,
    ui::{self, FAINT, STRONG, Step, paint},
};

/// How many of each binary.
const REPLICAS: usize = 2;
const LANES: usize = 4;
/// The fewest events, deliveries and undisturbed comparisons of each kind by which a run is judged at all.
const PROOF: usize = 20;
/// No exchange may take longer, so that what a dead worker held comes back soon.
const MAX_TIMEOUT_MS: u64 = 5_000;
const ACK_WAIT_MS: u64 = 10_500;

/// Endpoints that fail are left alone for moments only, so that what is hopeless is given up within the run.
const HURRY: [(&str, u32); 4] = [
    ("EVENT_BUS_WORKER__BREAKER__OPEN_MS", 200),
    ("EVENT_BUS_WORKER__BREAKER__OPEN_MAX_MS", 500),
    ("EVENT_BUS_WORKER__BREAKER__PROBES", 16),
    ("EVENT_BUS_WORKER__CONNECTION__BACKLOG_PER_S", 500),
];

/// Break everything in turn under load, and account for every event.
#[derive(Debug, Args)]
pub struct Chaos {
    /// The same number gives the same load and the same faults, as far as time allows
    #[arg(long)]
    seed: Option<u64>,
    /// How long, minutes
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Only these kinds of faults; all but `stream` if absent
    #[arg(long, value_enum, value_delimiter = ',')]
    faults: Vec<Fault>,
    /// NATS is a cluster of three nodes
    #[arg(long)]
    cluster: bool,
    /// The queue is a table, and there is no NATS
    #[arg(long, conflicts_with = "cluster")]
    postgres_only: bool,
    /// Requests in a second
    #[arg(long, default_value_t = 25)]
    rate: u32,
    /// The most memory that a process may use, MiB
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// Build nothing, and run the binaries in this folder
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Build with optimizations
    #[arg(long, conflicts_with = "bin_dir")]
    release: bool,
}

impl Chaos {
    /// The short run of the gate: a minute, always the same.
    pub(crate) fn short(bin_dir: PathBuf) -> Self {
        Self {
            seed: Some(1),
            minutes: 0.8,
            faults: Vec::new(),
            cluster: false,
            postgres_only: false,
            rate: 25,
            memory: 512,
            bin_dir: Some(bin_dir),
            release: false,
        }
    }

    pub(crate) async fn run(mut self) -> Result<()> {
        ensure!(self.minutes > 0.0 && self.minutes < 100_000.0, "--minutes must be more than 0");
        let bin_dir = match self.bin_dir.take() {
            Some(dir) => dir,
            None => build_binaries(self.release)?,
        };
        let seed = self.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
        let faults: Vec<Fault> = if self.faults.is_empty() {
            Fault::value_variants().iter().copied().filter(|fault| fault.is_usual()).collect()
        } else {
            std::mem::take(&mut self.faults)
        };
        let faults: Vec<Fault> =
            faults.into_iter().filter(|fault| !self.postgres_only || fault.works_without_nats()).collect();
        ensure!(!faults.is_empty(), "none of these faults can be made without NATS");
        ui::line(paint(STRONG, format!("\n  Chaos for {} min  (seed {seed})\n", self.minutes)));
        let step = Step::begin("Starting the servers, proxies before them, and two of each binary");
        let mut stack = Stack::start(self.stack(bin_dir)).await?;
        step.done();
        let ledger = Ledger::create(&target_dir().join("chaos").join(format!("seed-{seed}.jsonl")))?;
        let result = self.perform(&mut stack, seed, &faults, &ledger).await;
        let judgement = match result {
            Ok(judgement) => judgement,
            Err(error) => {
                let keep = ledger.path().with_extension("logs");
                let _ = std::fs::create_dir_all(&keep);
                let _ = std::fs::write(keep.join("all.log"), stack.all_logs());
                return Err(error.context(format!("seed {seed}; the logs are in {}", keep.display())));
            }
        };
        let lines = ledger.read()?;
        report::show(&judgement, &lines, seed);
        if let Some(first) = judgement.findings.first() {
            report::tell_story(first, &ledger, &stack.logs())?;
        }
        let findings = judgement.findings.len();
        ensure!(findings == 0, "{findings} findings: `cargo xtask chaos --seed {seed}` tries it again");
        stack.shutdown().await
    }

    fn stack(&self, bin_dir: PathBuf) -> StackOptions {
        let mut options = StackOptions::default()
            .servers(ServerChoice::Own(Durability::Full))
            .backend(if self.postgres_only { Backend::Postgres } else { Backend::Jetstream })
            .proxied()
            .env("EVENT_BUS_LANES", LANES)
            .env("EVENT_BUS_NATS__ACK_WAIT_MS", ACK_WAIT_MS)
            .env("EVENT_BUS_TELEMETRY__FILTER", "info,async_nats=warn,delivery_worker=debug")
            .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", MAX_TIMEOUT_MS)
            .role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MIN_INTERVAL_S", 1);
        for (name, value) in HURRY {
            options = options.role_env(Role::DeliveryWorker, name, value);
        }
        for role in Role::ALL {
            options = options.replicas(role, REPLICAS);
        }
        options.cluster = self.cluster;
        options.bin_dir = Some(bin_dir);
        options
    }

    /// Sets the scene, plays it, and judges it.
    async fn perform(
        &self,
        stack: &mut Stack,
        seed: u64,
        faults: &[Fault],
        ledger: &Ledger,
    ) -> Result<judge::Judgement> {
        let step = Step::begin("Opening organizations with endpoints good and bad");
        let scene = Scene::set(stack, ledger).await?;
        let length = Duration::from_secs_f64(self.minutes * 60.0);
        let schedules = load::schedules(&scene.tenants, length.as_secs().max(1), ledger).await?;
        step.done();

        let places: Vec<_> = (0..REPLICAS).map(|index| Some(stack.publisher(index).http_url())).collect();
        let publishers: Publishers = Arc::new(RwLock::new(places));
        let load = Load::start(seed, self.rate, scene.tenants.clone(), publishers.clone(), ledger.clone());
        let mut watch = memory::Watch::start(stack, ledger.clone());
        let run = Run { ledger, publishers: &publishers, begun: Instant::now() };
        let mut breaker = Breaker {
            replicas: REPLICAS,
            nodes: if self.postgres_only { 0 } else { stack.proxies().nats.len() },
            lanes: LANES,
            room: None,
        };
        let rounds = Rounds::of(length, faults);
        for (number, planned) in faults::plan(seed, faults).enumerate() {
            let Some(pause) = rounds.pause(run.begun.elapsed(), &planned) else { break };
            sleep(pause).await;
            run.fault(stack, &mut breaker, number, &planned).await?;
            watch.follow(stack);
        }
        sleep(length.saturating_sub(run.begun.elapsed())).await;

        let step = Step::begin("Everything is whole again; waiting for the rest");
        load.finish().await;
        let tenants: Vec<_> = {
            // Any publisher that is there; their ports have changed.
            let base = stack.publisher(0).http_url();
            scene.tenants.iter().map(|tenant| tenant.at(&base)).collect()
        };
        let schedules: Vec<_> = schedules
            .into_iter()
            .map(|(tenant, schedule)| (tenant.at(&stack.publisher(0).http_url()), schedule))
            .collect();
        let settled = account::settled(stack, &tenants, &schedules, faults.contains(&Fault::Stream)).await?;
        account::note(&tenants, &schedules, ledger).await?;
        watch.finish(ledger);
        step.done();
        if let Err(open) = settled {
            ledger.write(Entry::Restless { open });
        }
        for process in stack.processes() {
            ensure!(process.is_running()?, "{} has ended by itself", process.name());
        }
        let bounds = judge::Bounds { memory: self.memory << 20, proof: PROOF };
        Ok(judge::judge(&ledger.read()?, bounds))
    }
}

/// What every fault needs.
struct Run<'a> {
    ledger: &'a Ledger,
    publishers: &'a Publishers,
    begun: Instant,
}

impl Run<'_> {
    /// Breaks something, and makes it whole again.
    async fn fault(
        &self,
        stack: &mut Stack,
        breaker: &mut Breaker,
        number: usize,
        planned: &Planned,
    ) -> Result<()> {
        for process in stack.processes() {
            ensure!(
                process.is_running()?,
                "{} has ended by itself:\n{}",
                process.name(),
                process.log_text()?
            );
        }
        let target = breaker.target(planned);
        let what = format!("{} of {target}", planned.fault.name());
        ui::line(paint(
            FAINT,
            format!("  {:>9}  {what}, {}", ui::elapsed(self.begun.elapsed()), ui::elapsed(planned.lasts)),
        ));
        self.note(number, planned.fault, target, Phase::Begins);
        self.publisher(target, None);
        breaker.break_it(stack, planned, target).await.with_context(|| what.clone())?;
        sleep(planned.lasts).await;
        breaker.heal(stack, planned.fault, target).await.with_context(|| format!("the end of {what}"))?;
        if let Target::Process(Role::Publisher, index) = target {
            self.publisher(target, Some(stack.publisher(index).http_url()));
        }
        self.note(number, planned.fault, target, Phase::Over);
        Ok(())
    }

    fn note(&self, number: usize, fault: Fault, target: Target, phase: Phase) {
        let (kind, target, aftermath_s) = (fault.name(), target.to_string(), fault.aftermath_s());
        self.ledger.write(Entry::Fault { number, kind, target, phase, aftermath_s });
    }

    /// Tells the load where a publisher is.
    fn publisher(&self, target: Target, place: Option<String>) {
        if let Target::Process(Role::Publisher, index) = target {
            self.publishers.write().unwrap_or_else(PoisonError::into_inner)[index] = place;
        }
    }
}
