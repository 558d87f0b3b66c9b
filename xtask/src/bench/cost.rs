//! Processor time, by process; of this one's by thread.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use devkit::{
    process::processor_time,
    processes::Role,
    stack::{Backend, Stack},
};

/// Those whose time is told, in the order in which they are shown.
pub(super) const NAMES: [&str; 9] = [
    "publisher",
    "delivery-worker",
    "archiver",
    "cron-scheduler",
    "nats-server",
    "postgres",
    RECEIVER,
    LOAD,
    PARTS,
];
/// The thread of the receiver.
pub(super) const RECEIVER: &str = "receiver";
/// The thread that publishes.
pub(super) const LOAD: &str = "load";
/// The thread that does all of it without the bus.
pub(super) const PARTS: &str = "parts";

/// The unit of times in `/proc`.
const TICK_MS: u64 = 10;

/// A thread of this process.
#[derive(Debug)]
pub(super) struct Thread {
    /// What the system says of it.
    stat: PathBuf,
}

impl Thread {
    /// The one that asks.
    pub(super) fn current() -> Result<Self> {
        let own =
            fs::read_link("/proc/thread-self").context("only Linux says how much time a thread took")?;
        Ok(Self { stat: PathBuf::from("/proc").join(own).join("stat") })
    }

    /// The time that processors have given to it so far, in steps of 10 ms.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(&self.stat).context("the thread has ended")?;
        // proc_pid_stat(5): the fields count from the bracket that closes the name; utime and stime are 11 and 12.
        let ticks = stat.rsplit_once(')').and_then(|(_, fields)| {
            fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().ok()).sum()
        });
        let ticks: u64 = ticks.with_context(|| format!("read {}", self.stat.display()))?;
        Ok(Duration::from_millis(ticks * TICK_MS))
    }
}

/// What each has cost so far.
pub(super) type Reading = Vec<(&'static str, Duration)>;

/// What the processes of a stack and the thread of the receiver have cost so far.
pub(super) fn read(stack: &mut Stack, backend: Backend, receiver: &Thread) -> Result<Reading> {
    let mut pids = Vec::new();
    for role in Role::ALL {
        pids.push((role.binary(), stack.process(role, 0).id()));
    }
    if backend == Backend::Jetstream {
        pids.push(("nats-server", stack.nats().id()));
    }
    pids.push(("postgres", stack.postgres().id()));
    let mut reading = vec![(RECEIVER, receiver.processor_time()?)];
    for (name, id) in pids {
        let id = id.with_context(|| format!("{name} has ended"))?;
        reading.push((name, processor_time(id.pid)?));
    }
    Ok(reading)
}

/// From one reading to a later one.
pub(super) fn between(before: &Reading, after: &Reading) -> Reading {
    before
        .iter()
        .zip(after)
        .map(|((name, before), (_, after))| (*name, after.saturating_sub(*before)))
        .collect()
}

/// The time of each of so many things, µs.
pub(super) fn each(reading: Reading, things: usize) -> Vec<(&'static str, f64)> {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / things as f64;
    reading.into_iter().map(|(name, time)| (name, each(time))).collect()
}
