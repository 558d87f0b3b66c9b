//! Readiness: a set of named conditions. Liveness: every loop has turned recently.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// What the probes answer from. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<State>);

#[derive(Debug, Default)]
struct State {
    conditions: Mutex<BTreeMap<&'static str, Arc<AtomicBool>>>,
    heartbeats: Mutex<BTreeMap<String, Beat>>,
    stopping: AtomicBool,
}

#[derive(Debug)]
struct Beat {
    last: Arc<Mutex<Instant>>,
    limit: Duration,
}

/// One condition of readiness; false until set.
#[derive(Debug, Clone)]
pub struct Condition(Arc<AtomicBool>);

impl Condition {
    /// Says whether it holds now.
    pub fn set(&self, holds: bool) {
        self.0.store(holds, Ordering::Relaxed);
    }
}

/// One loop's sign of life.
#[derive(Debug, Clone)]
pub struct Heartbeat(Arc<Mutex<Instant>>);

impl Heartbeat {
    /// The loop has turned.
    pub fn beat(&self) {
        *lock(&self.0) = Instant::now();
    }
}

impl Health {
    /// Adds a condition of readiness.
    pub fn condition(&self, name: &'static str) -> Condition {
        Condition(lock(&self.0.conditions).entry(name).or_default().clone())
    }

    /// Adds a loop that turns at least once in `limit`, whatever the database and the broker do.
    pub fn heartbeat(&self, name: impl Into<String>, limit: Duration) -> Heartbeat {
        let last = Arc::new(Mutex::new(Instant::now()));
        lock(&self.0.heartbeats).insert(name.into(), Beat { last: last.clone(), limit });
        Heartbeat(last)
    }

    /// From now on not ready, so that no new work is sent here.
    pub(super) fn stopping(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
    }

    /// What is still missing; empty when ready.
    pub fn waiting(&self) -> Vec<&'static str> {
        let mut waiting: Vec<_> = lock(&self.0.conditions)
            .iter()
            .filter(|(_, holds)| !holds.load(Ordering::Relaxed))
            .map(|(name, _)| *name)
            .collect();
        if self.0.stopping.load(Ordering::Relaxed) {
            waiting.push("stopping");
        }
        waiting
    }

    /// The loops that have not turned within their limit; empty when alive.
    pub fn stuck(&self) -> Vec<String> {
        lock(&self.0.heartbeats)
            .iter()
            .filter(|(_, beat)| lock(&beat.last).elapsed() > beat.limit)
            .map(|(name, _)| name.clone())
            .collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_names_what_is_missing() {
        let health = Health::default();
        let (postgres, nats) = (health.condition("postgres"), health.condition("nats"));
        assert_eq!(health.waiting(), ["nats", "postgres"]);
        postgres.set(true);
        assert_eq!(health.waiting(), ["nats"]);
        nats.set(true);
        assert!(health.waiting().is_empty());
        health.stopping();
        assert_eq!(health.waiting(), ["stopping"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_stops_turning_is_named() {
        let health = Health::default();
        let beat = health.heartbeat("relay", Duration::from_secs(30));
        tokio::time::advance(Duration::from_secs(29)).await;
        beat.beat();
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(health.stuck().is_empty());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(health.stuck(), ["relay"]);
    }
}
