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
pub struct Health {
    state: Arc<State>,
    /// The role that it belongs to, in a process of several.
    role: Option<&'static str>,
}

#[derive(Debug, Default)]
struct State {
    conditions: Mutex<BTreeMap<String, Arc<AtomicBool>>>,
    heartbeats: Mutex<BTreeMap<String, Beat>>,
    stopping: AtomicBool,
}

#[derive(Debug)]
struct Beat {
    /// None once the loop has ended as it should.
    last: Arc<Mutex<Option<Instant>>>,
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
pub struct Heartbeat(Arc<Mutex<Option<Instant>>>);

impl Heartbeat {
    /// The loop has turned.
    pub fn beat(&self) {
        *lock(&self.0) = Some(Instant::now());
    }

    /// The loop has come to its end, as it should: nothing is expected of it any more.
    pub fn end(&self) {
        *lock(&self.0) = None;
    }
}

impl Health {
    /// The same process's, with names that begin with the role's.
    pub(super) fn of(&self, role: &'static str) -> Self {
        Self { state: Arc::clone(&self.state), role: Some(role) }
    }

    fn named(&self, name: &str) -> String {
        self.role.map_or_else(|| name.to_owned(), |role| format!("{role}: {name}"))
    }

    /// Adds a condition of readiness.
    pub fn condition(&self, name: &str) -> Condition {
        Condition(lock(&self.state.conditions).entry(self.named(name)).or_default().clone())
    }

    /// Adds a loop that turns at least once in `limit`, whatever the database and the broker do.
    pub fn heartbeat(&self, name: impl AsRef<str>, limit: Duration) -> Heartbeat {
        let last = Arc::new(Mutex::new(Some(Instant::now())));
        let beat = Beat { last: last.clone(), limit };
        lock(&self.state.heartbeats).insert(self.named(name.as_ref()), beat);
        Heartbeat(last)
    }

    /// From now on not ready, so that no new work is sent here.
    pub(super) fn stopping(&self) {
        self.state.stopping.store(true, Ordering::Relaxed);
    }

    /// What is still missing; empty when ready.
    pub fn waiting(&self) -> Vec<String> {
        let mut waiting: Vec<_> = lock(&self.state.conditions)
            .iter()
            .filter(|(_, holds)| !holds.load(Ordering::Relaxed))
            .map(|(name, _)| name.clone())
            .collect();
        if self.state.stopping.load(Ordering::Relaxed) {
            waiting.push("stopping".to_owned());
        }
        waiting
    }

    /// The loops that have not turned within their limit; empty when alive.
    pub fn stuck(&self) -> Vec<String> {
        lock(&self.state.heartbeats)
            .iter()
            .filter(|(_, beat)| lock(&beat.last).is_some_and(|last| last.elapsed() > beat.limit))
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

    #[test]
    fn roles_of_one_process_do_not_speak_for_each_other() {
        let health = Health::default();
        let (publisher, worker) = (health.of("publisher"), health.of("delivery-worker"));
        publisher.condition("postgres").set(true);
        let condition = worker.condition("postgres");
        assert_eq!(health.waiting(), ["delivery-worker: postgres"]);
        condition.set(true);
        assert!(health.waiting().is_empty());
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
        beat.end();
        assert!(health.stuck().is_empty(), "it is not to turn any more");
    }
}
