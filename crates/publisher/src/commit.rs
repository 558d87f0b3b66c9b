//! Group commit: whatever has gathered while the last transaction was under way shares the next one.
//!
//! A lone request waits for nobody, and under load the groups grow by themselves; no timer decides.

mod plan;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bus_core::{
    clock::Clock,
    delivery::Progress,
    fanout::{FanOut, FanOutStore},
    ids::{Ids, KeyId, OrganizationId, OutboxId},
    launcher::Ctx,
    matcher::Snapshot,
    notify::{DUE_IDLE, Hint, Notifier},
    pg::{self, StoreError, UniqueKey},
    snapshots::Snapshots,
    telemetry::Chain,
};
use metrics::{counter, histogram};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Mutex, mpsc};
use tracing::{error, warn};

use self::plan::{NewEvents, Plan};
use crate::{
    config::{PublishConfig, PublisherConfig},
    fanout::FanOuts,
    ingest::{Accepted, Job, PublishError, RETRY_AFTER},
    limits::Limits,
};

/// Requests are put together up to this many bytes of events.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

/// The most deliveries of a transaction. One that is larger would hold its locks for too long, and the fan-out
/// of a whole one is in memory.
const MAX_MATCHES: usize = 200_000;

/// From so many subscriptions on that are to be looked at, matching takes milliseconds and must not hold up
/// what else runs on its thread.
const MANY_CANDIDATES: usize = 5_000;

/// The server ends a statement after its own time limit. What takes so much longer has lost the server.
const BEYOND_STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// A transaction that the database broke off for another one's sake is tried this often in all.
const TRIES: u32 = 3;

/// What a committer works with.
#[derive(Debug, Clone)]
pub(crate) struct Committer {
    pub(crate) pool: PgPool,
    pub(crate) snapshots: Snapshots,
    pub(crate) fanouts: FanOuts,
    pub(crate) ids: Arc<dyn Ids>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) config: PublishConfig,
    /// Wakes the workers when deliveries are in the queue table.
    pub(crate) hints: Arc<dyn Notifier>,
    /// Where accepted events are counted.
    pub(crate) limits: Limits,
    pub(crate) store: FanOutStore,
}

/// Starts the committers. They end, after what was handed in, when the last
/// [`Ingest`](crate::ingest::Ingest) is gone.
pub(crate) fn start(ctx: &Ctx<PublisherConfig>, committer: Committer, jobs: mpsc::Receiver<Job>) {
    let jobs = Arc::new(Mutex::new(jobs));
    let limit = Duration::from_millis(ctx.common.postgres.statement_timeout_ms)
        .saturating_add(BEYOND_STATEMENT_TIMEOUT);
    for _ in 0..committer.config.committers {
        let (committer, jobs) = (committer.clone(), Arc::clone(&jobs));
        ctx.spawn("committer", async move {
            while let Some(group) = gather(&jobs, committer.config.max_group).await {
                committer.commit(group, limit).await;
            }
            Ok(())
        });
    }
}

/// The first request that comes and all that are waiting behind it, up to the limits.
async fn gather(jobs: &Mutex<mpsc::Receiver<Job>>, max_events: usize) -> Option<Vec<Job>> {
    let mut jobs = jobs.lock().await;
    let first = jobs.recv().await?;
    let (mut events, mut bytes) = (first.bodies.len(), first.bytes());
    let mut group = vec![first];
    while events < max_events && bytes < MAX_GROUP_BYTES {
        let Ok(job) = jobs.try_recv() else { break };
        events += job.bodies.len();
        bytes += job.bytes();
        group.push(job);
    }
    Some(group)
}

/// What became of a transaction.
enum Outcome {
    Committed(Committed),
    /// It was rolled back: the request at this place of the group alone makes too many deliveries.
    TooManyDeliveries(usize),
}

/// What one transaction did.
struct Committed {
    /// For each job of the group.
    answers: Vec<Result<Vec<Accepted>, PublishError>>,
    fan_out: Option<FanOut>,
}

impl Committer {
    async fn commit(&self, mut group: Vec<Job>, limit: Duration) {
        while !group.is_empty() {
            let (now, later) = next_transaction(group, |job| self.candidates(job));
            self.commit_distinct(now, limit).await;
            group = later;
        }
    }

    /// How many subscriptions are to be looked at for the request, about.
    fn candidates(&self, job: &Job) -> usize {
        let types = job.publish.events.iter().map(|event| event.r#type.as_str());
        self.snapshots.candidates(job.publish.principal.organization, types)
    }

    /// Commits requests that share no key, together if possible.
    async fn commit_distinct(&self, group: Vec<Job>, limit: Duration) {
        match self.settle(group, limit).await {
            Ok(()) => {}
            // What the database refuses for one request must not fail the others.
            Err((group, failed)) if group.len() > 1 && !failed.is_unavailable() => {
                warn!(error = %Chain(&failed), requests = group.len(), "A group failed; each request is tried alone");
                for job in group {
                    if let Err((alone, failed)) = self.settle(vec![job], limit).await {
                        refuse(alone, failed);
                    }
                }
            }
            Err((group, failed)) => refuse(group, failed),
        }
    }

    /// Commits the group and answers, without those requests that make too many deliveries. Gives back what is
    /// unanswered if that fails.
    async fn settle(&self, mut group: Vec<Job>, limit: Duration) -> Result<(), (Vec<Job>, StoreError)> {
        while !group.is_empty() {
            match self.transact(&group, limit).await {
                Ok(Outcome::Committed(committed)) => {
                    self.answer(group, committed).await;
                    break;
                }
                Ok(Outcome::TooManyDeliveries(index)) => {
                    let refused = Err(PublishError::TooManyDeliveries { limit: MAX_MATCHES });
                    // A client that went away needs no answer.
                    let _ = group.remove(index).answer.send(refused);
                }
                Err(failed) => return Err((group, failed)),
            }
        }
        Ok(())
    }

    async fn answer(&self, group: Vec<Job>, committed: Committed) {
        for (job, answer) in group.into_iter().zip(committed.answers) {
            let accepted = answer.iter().flatten().filter(|accepted| !accepted.duplicate).count();
            self.limits.count(job.publish.principal.organization, accepted as u64);
            // A client that went away needs no answer; its events are stored all the same.
            let _ = job.answer.send(answer);
        }
        bus_core::fault::point("publisher.before-fan-out").await;
        if let Some(fan_out) = committed.fan_out {
            self.fanouts.submit(fan_out).await;
        }
    }

    async fn transact(&self, group: &[Job], limit: Duration) -> Result<Outcome, StoreError> {
        let mut tries = 1;
        loop {
            let mut connection = pg::acquire(&self.pool).await?;
            let result = within(limit, self.try_transact(&mut connection, group)).await;
            if matches!(result, Err(StoreError::TimedOut { .. })) {
                // Whatever it waits for, the next user of the connection would wait for it too.
                connection.close_on_drop();
            }
            match result {
                Err(failed) if failed.is_conflict() && tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    async fn try_transact(
        &self,
        connection: &mut PgConnection,
        group: &[Job],
    ) -> Result<Outcome, StoreError> {
        let mut transaction = pg::begin_on(connection).await?;
        let snapshots = self.snapshots(&mut transaction, group).await?;
        let mut plan = Plan::new(group, &snapshots);
        let window = self.config.dedup_window_s;
        let claims = plan.idempotency_claims();
        if !claims.is_empty() {
            let taken = pg::claim_keys(&mut transaction, &claims, window).await?;
            plan.settle_repeated_requests(&taken);
        }
        let claims = plan.event_claims();
        if !claims.is_empty() {
            let taken = pg::claim_keys(&mut transaction, &claims, window).await?;
            for (key, events) in plan.settle_repeated_events(&taken) {
                pg::amend_key(&mut transaction, &key, &events).await?;
            }
        }
        let repeated = plan.repeated();
        let first = if repeated.is_empty() {
            HashMap::new()
        } else {
            pg::read_identities(&mut transaction, &repeated).await?
        };
        // Due is the database's time; asking for it is worth a statement only if somebody says when.
        let now = if group.iter().any(|job| job.publish.deliver_at.iter().any(Option::is_some)) {
            pg::transaction_time(&mut transaction).await?
        } else {
            self.clock.now()
        };
        let candidates = group.iter().map(|job| self.candidates(job)).fold(0, usize::saturating_add);
        let matched = if candidates > MANY_CANDIDATES {
            tokio::task::block_in_place(|| plan.new_events(&snapshots, now, MAX_MATCHES))
        } else {
            plan.new_events(&snapshots, now, MAX_MATCHES)
        };
        let NewEvents { published, fan_out, scheduled } = match matched {
            Ok(new) => new,
            Err(index) => return Ok(Outcome::TooManyDeliveries(index)),
        };
        if !published.is_empty() {
            pg::insert_events(&mut transaction, &published).await?;
        }
        if !scheduled.is_empty() {
            pg::insert_scheduled(&mut transaction, &scheduled).await?;
        }
        let queued = self.store.is_queue() && fan_out.iter().any(|event| !event.targets.is_empty());
        let (outbox, progress) = (OutboxId(self.ids.next()), Progress::new(self.clock.now()));
        let fan_out = self.store.store(&mut transaction, outbox, progress, fan_out).await?;
        pg::commit(transaction).await?;
        if queued {
            self.hints.notify(Hint::Enqueued).await;
        }
        // Whoever waits for what is due looks at least once in this time.
        if scheduled.iter().any(|event| event.due_at <= now.saturating_add(DUE_IDLE).unwrap_or(now)) {
            self.hints.notify(Hint::Due).await;
        }
        counter!("bus_events_published").increment(published.len() as u64);
        counter!("bus_events_scheduled").increment(scheduled.len() as u64);
        let group = published.len() + scheduled.len();
        histogram!("bus_publish_group_events").record(u32::try_from(group).unwrap_or(u32::MAX));
        Ok(Outcome::Committed(Committed { answers: plan.answers(&first), fan_out }))
    }

    /// The organization's subscriptions for each valid key of the group, as new as this transaction.
    async fn snapshots(
        &self,
        transaction: &mut PgConnection,
        group: &[Job],
    ) -> Result<HashMap<KeyId, (OrganizationId, Arc<Snapshot>)>, StoreError> {
        let keys: HashSet<KeyId> = group.iter().map(|job| job.publish.principal.key).collect();
        let keys: Vec<KeyId> = keys.into_iter().collect();
        let versions = pg::read_versions(transaction, &keys).await?;
        let mut snapshots = HashMap::with_capacity(versions.len());
        for (key, (organization, version)) in versions {
            let snapshot = self.snapshots.at_least(transaction, organization, version).await?;
            snapshots.insert(key, (organization, snapshot));
        }
        Ok(snapshots)
    }
}

/// The requests of the next transaction, and those that wait for a later one: those that share a key with an
/// earlier one of the group, since they are to find what that one has committed; and those with which the
/// transaction might become too large.
fn next_transaction(group: Vec<Job>, candidates: impl Fn(&Job) -> usize) -> (Vec<Job>, Vec<Job>) {
    let mut seen = HashSet::new();
    let mut matches = Budget::default();
    group.into_iter().partition(|job| {
        let keys: HashSet<UniqueKey> = job.keys().collect();
        let takes = keys.is_disjoint(&seen) && matches.takes(candidates(job));
        if takes {
            seen.extend(keys);
        }
        takes
    })
}

/// What is left of a transaction's deliveries. The first request is always taken.
#[derive(Default)]
struct Budget(Option<usize>);

impl Budget {
    fn takes(&mut self, matches: usize) -> bool {
        let left = self.0.map_or(Some(MAX_MATCHES.saturating_sub(matches)), |left| left.checked_sub(matches));
        self.0 = left.or(self.0);
        left.is_some()
    }
}

/// The operation's result, or an error if it takes longer than `limit`. It is not known then whether it took
/// effect.
async fn within<T>(
    limit: Duration,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let timed_out = |_| StoreError::TimedOut { operation: "publish events" };
    tokio::time::timeout(limit, operation).await.map_err(timed_out)?
}

fn refuse(group: Vec<Job>, failed: StoreError) {
    error!(error = %Chain(&failed), requests = group.len(), "Events not published");
    let interrupted = matches!(failed, StoreError::TimedOut { .. });
    let failed = Arc::new(failed);
    for job in group {
        let refused = if interrupted {
            PublishError::Interrupted { retry_after: RETRY_AFTER }
        } else {
            PublishError::Store(Arc::clone(&failed))
        };
        // A client that went away needs no answer.
        let _ = job.answer.send(Err(refused));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_takes_the_first_request_and_then_what_fits() {
        let mut budget = Budget::default();
        let taken = [MAX_MATCHES - 10, 11, 10, 1, 0].map(|matches| budget.takes(matches));
        assert_eq!(taken, [true, false, true, false, true]);
        let mut budget = Budget::default();
        let taken = [MAX_MATCHES * 2, 1, 0].map(|matches| budget.takes(matches));
        assert_eq!(taken, [true, false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_database_that_does_not_answer_is_given_up() {
        let limit = Duration::from_secs(40);
        let failed = within(limit, std::future::pending::<Result<(), _>>()).await.expect_err("it never ends");
        assert!(matches!(failed, StoreError::TimedOut { .. }) && failed.is_unavailable());
        assert!(!failed.is_conflict(), "a repetition is the client's decision");
    }
}
