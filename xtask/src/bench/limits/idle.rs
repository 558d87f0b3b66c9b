//! Each binary with nothing to do, and how soon it is ready.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use devkit::{process::processor_time, processes::Role};
use tokio::time::sleep;

use super::{
    Limits,
    ground::Ground,
    report::{Bound, Figure},
};
use crate::ui::Step;

/// The most memory that a binary has in use, MiB.
const MOST_MEMORY: f64 = 25.0;
/// The most that it takes of a core, %.
const MOST_SHARE: f64 = 0.5;
/// The longest time from its start until it is ready, ms. The database is migrated.
const MOST_START: f64 = 1_000.0;

pub(super) async fn measure(limits: &Limits, bin_dir: PathBuf) -> Result<Vec<Figure>> {
    let mut ground = Ground::set(bin_dir).await?;
    let mut starts = Role::ALL.map(|role| (role, Vec::new()));
    let step = Step::begin("Starting each binary again");
    for _ in 0..limits.rounds {
        for (role, starts) in &mut starts {
            starts.push(ground.restart(*role).await?.as_secs_f64() * 1e3);
        }
    }
    step.done();

    let step = Step::begin("Doing nothing");
    let before = processor(&mut ground)?;
    let begun = Instant::now();
    // It is the time itself that is measured.
    sleep(Duration::from_secs(limits.idle_s.into())).await;
    let after = processor(&mut ground)?;
    let took = begun.elapsed();
    step.done();

    let mut figures = Vec::new();
    for role in Role::ALL {
        let memory = ground.memory(role)? as f64 / 1_048_576.0;
        figures.push(
            Figure::new(format!("{}: memory, MiB", role.binary()), vec![memory])
                .bound(Bound::AtMost(MOST_MEMORY)),
        );
    }
    for ((role, before), (_, after)) in before.into_iter().zip(after) {
        let share = after.saturating_sub(before).as_secs_f64() / took.as_secs_f64() * 100.0;
        figures.push(
            Figure::new(format!("{}: % of a core", role.binary()), vec![share])
                .bound(Bound::AtMost(MOST_SHARE)),
        );
    }
    for (role, starts) in starts {
        figures.push(
            Figure::new(format!("{}: ms until ready", role.binary()), starts)
                .bound(Bound::AtMost(MOST_START)),
        );
    }
    ground.end().await?;
    Ok(figures)
}

/// The processor time of each binary so far.
fn processor(ground: &mut Ground) -> Result<Vec<(Role, Duration)>> {
    let times = Role::ALL.into_iter().map(|role| {
        let id = ground.stack.process(role, 0).id();
        Ok((role, processor_time(id.with_context(|| format!("{} has ended", role.binary()))?.pid)?))
    });
    times.collect()
}
