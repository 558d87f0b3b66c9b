//! A model-based test: random operations on a real worker over each queue and a real database, beside a
//! reference model of what must come of each delivery. The seed is printed; `MODEL_SEED` repeats a run, and
//! `MODEL_OPERATIONS` makes it longer.
#![allow(clippy::unwrap_used)]

mod operations;
mod reference;
mod world;

use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};

use self::{operations::Run, world::Kind};

/// Operations of a run, on each queue.
const OPERATIONS: usize = 5_000;

fn from_environment<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

async fn run(kind: Kind) {
    let seed = from_environment("MODEL_SEED").unwrap_or_else(|| rand::rng().next_u64());
    let operations = from_environment("MODEL_OPERATIONS").unwrap_or(OPERATIONS);
    // Shown when the test fails, and with --no-capture.
    println!("MODEL_SEED={seed} on {kind:?}, {operations} operations");
    let mut run = Run::new(kind, StdRng::seed_from_u64(seed)).await;
    for _ in 0..operations {
        run.step().await;
    }
    let counts = run.finish().await;
    println!("{counts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i4_i9_every_delivery_ends_as_the_model_says_on_jetstream() {
    run(Kind::JetStream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i4_i9_every_delivery_ends_as_the_model_says_on_postgres() {
    run(Kind::Postgres).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i4_i9_every_delivery_ends_as_the_model_says_in_memory() {
    run(Kind::Memory).await;
}
