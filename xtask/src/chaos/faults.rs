//! What is broken, when and for how long; and how it is made whole again.

use std::{fmt, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use clap::ValueEnum;
use devkit::{
    poll,
    process::{Signal, describe_exit},
    processes::Role,
    proxy::Network,
    servers::connect_nats,
    stack::Stack,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

/// How long a stream may be missing, whatever else has just been broken.
const THERE_AGAIN: Duration = Duration::from_secs(60);

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Fault {
    /// SIGKILL of a binary, which is started again
    Kill,
    /// SIGSTOP of a binary, and later SIGCONT
    Stop,
    /// SIGTERM of a binary, which must drain, and is started again
    Restart,
    /// SIGKILL of nats-server, or of a node
    NatsKill,
    /// SIGTERM of nats-server, or of a node
    NatsRestart,
    /// SIGSTOP of nats-server, or of a node, and later SIGCONT
    NatsStop,
    /// SIGKILL of all processes of Postgres
    PostgresKill,
    /// An orderly stop of Postgres
    PostgresRestart,
    /// SIGSTOP of all processes of Postgres, and later SIGCONT
    PostgresStop,
    /// All connections to a server are reset
    Cut,
    /// A server is slow to reach
    Slow,
    /// A server takes no new connections
    Refuse,
    /// Nothing passes to a server and back
    Partition,
    /// A server has forgotten its connections, and the others do not know
    HalfOpen,
    /// The consumer of a lane is deleted
    Consumer,
    /// The stream of the deliveries is deleted, with all that it holds
    Stream,
    /// The stream of the deliveries takes no more
    Full,
}

impl Fault {
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// For how many seconds after its end, if at all, what was delivered may come again for it. A drain, and a server that
    /// is slow or full, repeat nothing.
    pub(super) fn aftermath_s(self) -> Option<i64> {
        match self {
            Self::Restart | Self::PostgresRestart | Self::Slow | Self::Refuse | Self::Full => None,
            // Publishers look from time to time whether the broker is another one, and then what is missing.
            Self::Stream => Some(90),
            _ => Some(15),
        }
    }

    /// Whether it is among those of a run that names none. A stream that is deleted takes with it what only it knew: how far
    /// a delivery had come is then pieced together from history, so the accounts of attempts are not exact.
    pub(super) fn is_usual(self) -> bool {
        self != Self::Stream
    }

    /// Whether there is something to break where the queue is a table.
    pub(super) fn works_without_nats(self) -> bool {
        !matches!(self, Self::NatsKill | Self::NatsRestart | Self::NatsStop | Self::Consumer | Self::Full)
    }

    /// The least and the most that it lasts, milliseconds.
    fn length_ms(self) -> (u64, u64) {
        match self {
            Self::Cut | Self::Consumer | Self::Stream => (0, 1),
            Self::Kill | Self::Restart => (100, 2_000),
            Self::Stop | Self::NatsStop | Self::PostgresStop => (500, 12_000),
            Self::NatsKill | Self::NatsRestart | Self::PostgresKill | Self::PostgresRestart => (100, 5_000),
            Self::Slow => (2_000, 8_000),
            Self::Refuse | Self::Full => (1_000, 6_000),
            Self::Partition | Self::HalfOpen => (1_000, 15_000),
        }
    }
}

/// A fault at its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) fault: Fault,
    /// The pause before it.
    pub(super) after: Duration,
    /// How long it lasts.
    pub(super) lasts: Duration,
    /// Chooses what it hits.
    pub(super) choice: usize,
}

/// The same faults for the same seed, without end. Each kind comes before any comes again, so that a short run has many.
pub(super) fn plan(seed: u64, faults: &[Fault]) -> impl Iterator<Item = Planned> {
    let mut random = StdRng::seed_from_u64(seed);
    let kinds = faults.to_vec();
    let mut left: Vec<Fault> = Vec::new();
    std::iter::from_fn(move || {
        if left.is_empty() {
            left.clone_from(&kinds);
        }
        let fault = *left.choose(&mut random)?;
        left.retain(|kind| *kind != fault);
        let (least, most) = fault.length_ms();
        Some(Planned {
            fault,
            after: Duration::from_millis(random.random_range(500..2_500)),
            lasts: Duration::from_millis(random.random_range(least..=most)),
            choice: random.random_range(0..1_000),
        })
    })
}

/// About how long a round is.
const ROUND: Duration = Duration::from_secs(90);
/// How long nothing is disturbed at least, once the aftermath of the last fault is over: longer than what two workers hold
/// comes again.
const UNDISTURBED: Duration = Duration::from_secs(13);

/// A run is made of rounds. Each begins with faults, and a third of it is quiet: the load goes on, nothing is broken, and
/// once the aftermath is over nothing is excused any more.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    count: u32,
    length: Duration,
    quiet: Duration,
}

impl Rounds {
    pub(super) fn of(run: Duration, faults: &[Fault]) -> Self {
        let aftermath = faults.iter().filter_map(|fault| fault.aftermath_s()).max().unwrap_or_default();
        let quiet = UNDISTURBED + Duration::from_secs(aftermath.unsigned_abs());
        let count = (run.as_secs() / ROUND.max(3 * quiet).as_secs()).max(1);
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let length = run / count;
        Self { count, length, quiet: quiet.max(length / 3) }
    }

    /// How long to wait at this time of the run until the fault begins: what is not over before its round is to be quiet
    /// begins the next one. None if there is none.
    pub(super) fn pause(&self, now: Duration, planned: &Planned) -> Option<Duration> {
        let takes = planned.after + planned.lasts;
        let faults = self.length.saturating_sub(self.quiet);
        (0..self.count).map(|round| self.length * round).find_map(|begins| {
            let from = begins.max(now);
            (from + takes <= begins + faults).then(|| from - now + planned.after)
        })
    }
}

/// What a fault hit.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    Process(Role, usize),
    Nats(usize),
    Postgres,
    Lane(usize),
    Stream,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(role, index) => write!(f, "{}-{index}", role.binary()),
            Self::Nats(node) => write!(f, "nats-{node}"),
            Self::Postgres => f.write_str("postgres"),
            Self::Lane(lane) => write!(f, "lane-{lane}"),
            Self::Stream => f.write_str("stream deliver"),
        }
    }
}

/// What can be broken.
#[derive(Debug)]
pub(super) struct Breaker {
    /// How many there are of each binary.
    pub(super) replicas: usize,
    /// How many nodes NATS has.
    pub(super) nodes: usize,
    pub(super) lanes: usize,
    /// What the stream of the deliveries may hold when it is whole.
    pub(super) room: Option<i64>,
}

impl Breaker {
    pub(super) fn target(&self, planned: &Planned) -> Target {
        let Planned { fault, choice, .. } = *planned;
        match fault {
            Fault::Kill | Fault::Stop | Fault::Restart => {
                Target::Process(Role::ALL[choice % Role::ALL.len()], choice / Role::ALL.len() % self.replicas)
            }
            Fault::NatsKill | Fault::NatsRestart | Fault::NatsStop => {
                Target::Nats(choice % self.nodes.max(1))
            }
            Fault::PostgresKill | Fault::PostgresRestart | Fault::PostgresStop => Target::Postgres,
            Fault::Cut | Fault::Slow | Fault::Refuse | Fault::Partition | Fault::HalfOpen => {
                match choice % (self.nodes + 1) {
                    0 => Target::Postgres,
                    node => Target::Nats(node - 1),
                }
            }
            Fault::Consumer => Target::Lane(choice % self.lanes),
            Fault::Stream | Fault::Full => Target::Stream,
        }
    }

    pub(super) async fn break_it(
        &mut self,
        stack: &mut Stack,
        planned: &Planned,
        target: Target,
    ) -> Result<()> {
        match (planned.fault, target) {
            (Fault::Kill, Target::Process(role, index)) => stack.process(role, index).sigkill().await?,
            (Fault::Stop, Target::Process(role, index)) => stack.process(role, index).signal(Signal::STOP)?,
            (Fault::Restart, Target::Process(role, index)) => {
                let process = stack.process(role, index);
                process.sigterm()?;
                let status = process.wait_exit().await?;
                ensure!(status.success(), "{target} did not drain, but ended with {}", describe_exit(status));
            }
            (Fault::NatsKill, Target::Nats(node)) => match self.nodes {
                1 => stack.nats().kill().await?,
                _ => stack.nats_cluster().node(node).kill().await?,
            },
            (Fault::NatsRestart, Target::Nats(node)) => match self.nodes {
                1 => stack.nats().stop().await?,
                _ => stack.nats_cluster().node(node).stop().await?,
            },
            (Fault::NatsStop, Target::Nats(node)) => self.signal_nats(stack, node, Signal::STOP)?,
            (Fault::PostgresKill, _) => stack.postgres().kill().await?,
            (Fault::PostgresRestart, _) => stack.postgres().stop().await?,
            (Fault::PostgresStop, _) => stack.postgres().pause()?,
            (Fault::Cut, target) => proxy(stack, target).cut(),
            (Fault::Slow, target) => {
                let delay = Duration::from_millis(u64::try_from(20 + planned.choice % 180)?);
                proxy(stack, target).set(Network::Slow(delay));
            }
            (Fault::Refuse, target) => {
                // Who has a connection would not notice.
                proxy(stack, target).set(Network::Refusing);
            }
            (Fault::Partition, target) => proxy(stack, target).set(Network::BlackHole),
            (Fault::HalfOpen, target) => proxy(stack, target).set(Network::HalfOpen),
            (Fault::Consumer, Target::Lane(lane)) => {
                let stream = deliveries(stack).await?;
                // It may not have been made yet, or not again since it was deleted.
                let _ = stream.delete_consumer(&format!("lane-{lane}")).await;
            }
            (Fault::Stream, _) => {
                let name = deliveries(stack).await?.cached_info().config.name.clone();
                context(stack)
                    .await?
                    .delete_stream(name)
                    .await
                    .context("delete the stream of the deliveries")?;
            }
            (Fault::Full, _) => {
                self.room = Some(resize(stack, 1).await?);
            }
            (fault, target) => anyhow::bail!("{fault:?} does not hit {target}"),
        }
        Ok(())
    }

    /// Makes whole what [`break_it`](Self::break_it) broke; what was started anew is ready.
    pub(super) async fn heal(&mut self, stack: &mut Stack, fault: Fault, target: Target) -> Result<()> {
        match (fault, target) {
            (Fault::Kill | Fault::Restart, Target::Process(role, index)) => {
                stack.process(role, index).respawn()?;
                stack.process(role, index).wait_ready().await?;
            }
            (Fault::Stop, Target::Process(role, index)) => stack.process(role, index).signal(Signal::CONT)?,
            (Fault::NatsKill | Fault::NatsRestart, Target::Nats(node)) => match self.nodes {
                1 => stack.nats().restart().await?,
                _ => stack.nats_cluster().restart(node).await?,
            },
            (Fault::NatsStop, Target::Nats(node)) => self.signal_nats(stack, node, Signal::CONT)?,
            (Fault::PostgresKill | Fault::PostgresRestart, _) => stack.postgres().restart().await?,
            (Fault::PostgresStop, _) => stack.postgres().resume()?,
            (Fault::Slow | Fault::Refuse | Fault::Partition | Fault::HalfOpen, target) => {
                proxy(stack, target).set(Network::Open);
            }
            (Fault::Full, _) => {
                let room = self.room.take().context("the stream was not made small")?;
                resize(stack, room).await?;
            }
            _ => {}
        }
        Ok(())
    }

    fn signal_nats(&self, stack: &mut Stack, node: usize, signal: Signal) -> Result<()> {
        match self.nodes {
            1 => stack.nats().signal(signal),
            _ => stack.nats_cluster().node(node).signal(signal),
        }
    }
}

fn proxy(stack: &Stack, target: Target) -> &devkit::proxy::Proxy {
    let proxies = stack.proxies();
    match target {
        Target::Nats(node) => &proxies.nats[node],
        _ => &proxies.postgres,
    }
}

async fn context(stack: &Stack) -> Result<jetstream::Context> {
    let url = stack.nats_url().context("this stack has no NATS")?;
    Ok(jetstream::new(connect_nats(&url).await?))
}

/// The stream of the deliveries; a moment after it was deleted it is there again.
async fn deliveries(stack: &Stack) -> Result<jetstream::stream::Stream> {
    let name = format!("{}_deliver", stack.prefix()).to_ascii_uppercase();
    let context = context(stack).await?;
    poll("the stream of the deliveries", THERE_AGAIN, || async { context.get_stream(&name).await }).await
}

/// Sets how much the stream of the deliveries may hold, and gives what it could hold before.
async fn resize(stack: &Stack, bytes: i64) -> Result<i64> {
    let config = deliveries(stack).await?.cached_info().config.clone();
    let before = config.max_bytes;
    let resized = jetstream::stream::Config { max_bytes: bytes, ..config };
    let resized = context(stack).await?.update_stream(resized).await;
    resized.context("change the stream of the deliveries")?;
    Ok(before)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_same_seed_breaks_the_same_things_and_every_kind_has_its_turn() {
        let all = Fault::value_variants();
        let drawn = |seed| plan(seed, all).take(2 * all.len()).collect::<Vec<_>>();
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
        let mut kinds: Vec<Fault> = drawn(7).iter().take(all.len()).map(|planned| planned.fault).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, all);
    }

    #[test]
    fn a_third_of_a_long_run_is_quiet_and_each_quiet_time_outlasts_the_aftermath() {
        let usual: Vec<Fault> =
            Fault::value_variants().iter().copied().filter(|fault| fault.is_usual()).collect();
        for (run, faults) in
            [(48, &usual[..]), (300, &usual), (1_200, &usual), (1_200, Fault::value_variants())]
        {
            let run = Duration::from_secs(run);
            let rounds = Rounds::of(run, faults);
            let aftermath = faults.iter().filter_map(|fault| fault.aftermath_s()).max().unwrap();
            let mut over = Duration::ZERO;
            let (mut broken, mut quiet) = (0, Vec::new());
            for planned in plan(1, faults) {
                let Some(pause) = rounds.pause(over, &planned) else { break };
                if pause > planned.after {
                    quiet.push(pause);
                }
                over += pause + planned.lasts;
                broken += 1;
            }
            quiet.push(run - over);
            let least = Duration::from_secs(aftermath.unsigned_abs()) + UNDISTURBED;
            assert!(quiet.iter().all(|time| *time >= least), "{quiet:?} in {run:?}");
            assert!(run < Duration::from_secs(90) || quiet.iter().sum::<Duration>() * 3 >= run, "{quiet:?}");
            assert!(broken >= 3, "{broken} in {run:?}");
        }
    }
}
