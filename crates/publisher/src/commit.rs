//! Group commit: whatever has gathered while the last transaction was under way shares the next one.
//!
//! A lone request waits for nobody, and under load the groups grow by themselves; no timer decides.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bus_core::{
    ids::{EventUid, Ids, KeyId, OrganizationId, OutboxId},
    matcher::{Snapshot, Subject},
    pg::{self, Claim, Identity, NewEvent, StoreError, Taken, UniqueKey},
    telemetry::Chain,
};
use metrics::{counter, histogram};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Mutex, mpsc};
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use crate::{
    config::PublishConfig,
    fanout::{FanOut, FanOutEvent, FanOuts, Target},
    ingest::{Accepted, Job, PublishError},
    snapshots::Snapshots,
};

/// Requests are put together up to this many bytes of events.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

/// Rows of one statement that fills the queue of the Postgres backend.
const MAX_QUEUED: usize = 5_000;

/// A transaction that the database broke off for another one's sake is tried this often in all.
const TRIES: u32 = 3;

/// What a committer works with.
#[derive(Debug, Clone)]
pub(crate) struct Committer {
    pub(crate) pool: PgPool,
    pub(crate) snapshots: Snapshots,
    pub(crate) fanouts: FanOuts,
    pub(crate) ids: Arc<dyn Ids>,
    pub(crate) config: PublishConfig,
    /// Prefix and lanes, if the queue is a table of the same database: the deliveries then go in with
    /// the events, and there is nothing left to fan out.
    pub(crate) queue_in_database: Option<(String, u16)>,
}

/// Starts the committers. They end, after what was handed in, when the last
/// [`Ingest`](crate::ingest::Ingest) is gone.
pub(crate) fn start(tasks: &TaskTracker, committer: Committer, jobs: mpsc::Receiver<Job>) {
    let jobs = Arc::new(Mutex::new(jobs));
    for _ in 0..committer.config.committers {
        let (committer, jobs) = (committer.clone(), Arc::clone(&jobs));
        tasks.spawn(async move {
            while let Some(group) = gather(&jobs, committer.config.max_group).await {
                committer.commit(group).await;
            }
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

/// What one transaction did.
struct Committed {
    /// For each job of the group.
    answers: Vec<Result<Vec<Accepted>, PublishError>>,
    fan_out: Option<FanOut>,
}

impl Committer {
    async fn commit(&self, mut group: Vec<Job>) {
        while !group.is_empty() {
            let (now, later) = without_conflicts(group);
            self.commit_distinct(now).await;
            group = later;
        }
    }

    /// Commits requests that share no key, together if possible.
    async fn commit_distinct(&self, group: Vec<Job>) {
        match self.transact(&group).await {
            Ok(committed) => self.answer(group, committed).await,
            // What the database refuses for one request must not fail the others.
            Err(failed) if group.len() > 1 && !failed.is_unavailable() => {
                warn!(error = %Chain(&failed), requests = group.len(), "A group failed; each request is tried alone");
                for job in group {
                    let alone = vec![job];
                    match self.transact(&alone).await {
                        Ok(committed) => self.answer(alone, committed).await,
                        Err(failed) => refuse(alone, failed),
                    }
                }
            }
            Err(failed) => refuse(group, failed),
        }
    }

    async fn answer(&self, group: Vec<Job>, committed: Committed) {
        for (job, answer) in group.into_iter().zip(committed.answers) {
            // A client that went away needs no answer; its events are stored all the same.
            let _ = job.answer.send(answer);
        }
        crate::fault::point("publisher.before-fan-out").await;
        if let Some(fan_out) = committed.fan_out {
            self.fanouts.submit(fan_out);
        }
    }

    async fn transact(&self, group: &[Job]) -> Result<Committed, StoreError> {
        let mut tries = 1;
        loop {
            match self.try_transact(group).await {
                Err(failed) if failed.is_conflict() && tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    async fn try_transact(&self, group: &[Job]) -> Result<Committed, StoreError> {
        let mut transaction = pg::begin(&self.pool).await?;
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
        let (events, fan_out) = plan.new_events(&snapshots);
        if !events.is_empty() {
            pg::insert_events(&mut transaction, &events).await?;
        }
        let fan_out = self.store_fan_out(&mut transaction, fan_out).await?;
        pg::commit(transaction).await?;
        counter!("bus_events_published").increment(events.len() as u64);
        histogram!("bus_publish_group_events").record(u32::try_from(events.len()).unwrap_or(u32::MAX));
        Ok(Committed { answers: plan.answers(&first), fan_out })
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

    async fn store_fan_out(
        &self,
        transaction: &mut PgConnection,
        events: Vec<FanOutEvent>,
    ) -> Result<Option<FanOut>, StoreError> {
        if events.is_empty() {
            return Ok(None);
        }
        if let Some((prefix, lanes)) = &self.queue_in_database {
            let mut keys = Vec::with_capacity(MAX_QUEUED);
            for event in &events {
                for target in &event.targets {
                    keys.push((event.delivery(target), 0));
                    if keys.len() == MAX_QUEUED {
                        pg::insert_queued(transaction, &keys, *lanes).await?;
                        keys.clear();
                    }
                }
            }
            pg::insert_queued(transaction, &keys, *lanes).await?;
            pg::notify_enqueued(transaction, prefix).await?;
            return Ok(None);
        }
        let outbox = OutboxId(self.ids.next());
        let uids: Vec<EventUid> = events.iter().map(|event| event.uid).collect();
        pg::insert_outbox(transaction, outbox, &uids, self.config.outbox_lease_s).await?;
        Ok(Some(FanOut { outbox, events }))
    }
}

/// Requests that share a key with an earlier one of the group wait for the next transaction, where they
/// find what the earlier one has committed.
fn without_conflicts(group: Vec<Job>) -> (Vec<Job>, Vec<Job>) {
    let mut seen = HashSet::new();
    group.into_iter().partition(|job| {
        let keys: HashSet<UniqueKey> = job.keys().collect();
        let distinct = keys.is_disjoint(&seen);
        if distinct {
            seen.extend(keys);
        }
        distinct
    })
}

fn refuse(group: Vec<Job>, failed: StoreError) {
    error!(error = %Chain(&failed), requests = group.len(), "Events not published");
    let failed = Arc::new(failed);
    for job in group {
        // A client that went away needs no answer.
        let _ = job.answer.send(Err(PublishError::Store(Arc::clone(&failed))));
    }
}

/// What is to become of one request's events.
enum Fate {
    /// The whole request is refused.
    Refused(PublishError),
    /// The whole request is a repetition of one that stored these.
    Repeated(Vec<EventUid>),
    /// For each event: itself if new, or the uid of the one that it repeats.
    Events(Vec<Option<EventUid>>),
}

/// The fate of every event of a group, settled step by step within the transaction.
struct Plan<'a> {
    group: &'a [Job],
    fates: Vec<Fate>,
}

impl<'a> Plan<'a> {
    fn new(group: &'a [Job], valid: &HashMap<KeyId, (OrganizationId, Arc<Snapshot>)>) -> Self {
        let fates = group
            .iter()
            .map(|job| {
                if valid.contains_key(&job.publish.principal.key) {
                    Fate::Events(vec![None; job.publish.events.len()])
                } else {
                    Fate::Refused(PublishError::KeyRevoked)
                }
            })
            .collect();
        Self { group, fates }
    }

    fn live(&self) -> impl Iterator<Item = &'a Job> {
        self.group
            .iter()
            .zip(&self.fates)
            .filter(|(_, fate)| matches!(fate, Fate::Events(_)))
            .map(|(job, _)| job)
    }

    fn idempotency_claims(&self) -> Vec<Claim> {
        self.live().filter_map(Job::idempotency_claim).collect()
    }

    fn settle_repeated_requests(&mut self, taken: &HashMap<UniqueKey, Taken>) {
        for (job, fate) in self.group.iter().zip(&mut self.fates) {
            let Some(claim) = job.idempotency_claim() else { continue };
            let (Some(taken), Fate::Events(_)) = (taken.get(&claim.key), &*fate) else { continue };
            let same = taken.fingerprint.as_deref() == claim.fingerprint.as_ref().map(|f| &f[..]);
            *fate = if same {
                Fate::Repeated(taken.events.clone())
            } else {
                Fate::Refused(PublishError::IdempotencyMismatch)
            };
        }
    }

    /// One claim for each distinct named event; within a request the first of equals has it.
    fn event_claims(&self) -> Vec<Claim> {
        let mut seen = HashSet::new();
        let mut claims = Vec::new();
        for job in self.live() {
            for (index, uid) in job.publish.uids.iter().enumerate() {
                let Some(key) = job.event_key(index) else { continue };
                if seen.insert(key.clone()) {
                    claims.push(Claim { key, events: vec![*uid], fingerprint: None });
                }
            }
        }
        claims
    }

    /// Returns the idempotency keys whose requests hold events that were published before, with the
    /// events that they stand for now.
    fn settle_repeated_events(
        &mut self,
        taken: &HashMap<UniqueKey, Taken>,
    ) -> Vec<(UniqueKey, Vec<EventUid>)> {
        let mut amended = Vec::new();
        for (job, fate) in self.group.iter().zip(&mut self.fates) {
            let Fate::Events(events) = fate else { continue };
            let mut first: HashMap<UniqueKey, EventUid> = HashMap::new();
            for (index, uid) in job.publish.uids.iter().enumerate() {
                let Some(key) = job.event_key(index) else { continue };
                let before = taken.get(&key).and_then(|taken| taken.events.first());
                events[index] = before.or(first.get(&key)).copied();
                first.entry(key).or_insert(*uid);
            }
            if let Some(claim) = job.idempotency_claim().filter(|_| events.iter().any(Option::is_some)) {
                let stands_for = events.iter().zip(&claim.events).map(|(before, own)| before.unwrap_or(*own));
                amended.push((claim.key, stands_for.collect()));
            }
        }
        amended
    }

    /// Events of earlier transactions that this group's answers speak of.
    fn repeated(&self) -> Vec<EventUid> {
        let mut uids = Vec::new();
        for fate in &self.fates {
            match fate {
                Fate::Refused(_) => {}
                Fate::Repeated(events) => uids.extend(events),
                Fate::Events(events) => uids.extend(events.iter().flatten()),
            }
        }
        uids
    }

    /// The events to store, each with its matches, and those of them that have any.
    fn new_events(
        &self,
        snapshots: &HashMap<KeyId, (OrganizationId, Arc<Snapshot>)>,
    ) -> (Vec<NewEvent>, Vec<FanOutEvent>) {
        let (mut stored, mut fan_out) = (Vec::new(), Vec::new());
        for (job, fate) in self.group.iter().zip(&self.fates) {
            let (Fate::Events(fates), Some((organization, snapshot))) =
                (fate, snapshots.get(&job.publish.principal.key))
            else {
                continue;
            };
            for (index, fate) in fates.iter().enumerate() {
                if fate.is_some() {
                    continue;
                }
                let (uid, body) = (job.publish.uids[index], &job.bodies[index]);
                let event = &job.publish.events[index];
                let publisher = job.publish.principal.connection;
                let subject = Subject { event_type: &event.r#type, publisher, payload: event.json_payload() };
                let targets: Vec<Target> = snapshot.matching(subject).into_iter().map(Target::from).collect();
                stored.push(NewEvent {
                    uid,
                    organization: *organization,
                    id: event.id.clone(),
                    source: event.source.clone(),
                    r#type: event.r#type.clone(),
                    subject: event.subject.clone(),
                    time: event.time.unwrap_or(job.publish.at),
                    publisher,
                    subscriptions: targets.iter().map(|target| target.subscription).collect(),
                    body: body.clone(),
                });
                if !targets.is_empty() {
                    fan_out.push(FanOutEvent {
                        uid,
                        organization: *organization,
                        body: body.clone(),
                        targets,
                    });
                }
            }
        }
        (stored, fan_out)
    }

    fn answers(self, first: &HashMap<EventUid, Identity>) -> Vec<Result<Vec<Accepted>, PublishError>> {
        let repeated = |uid: &EventUid| {
            first.get(uid).map(|identity| Accepted { identity: identity.clone(), duplicate: true })
        };
        self.group
            .iter()
            .zip(self.fates)
            .map(|(job, fate)| match fate {
                Fate::Refused(error) => Err(error),
                // One that has expired since is left out: there is nothing to say about it.
                Fate::Repeated(events) => Ok(events.iter().filter_map(repeated).collect()),
                Fate::Events(events) => Ok(events
                    .iter()
                    .enumerate()
                    .map(|(index, before)| {
                        let own = |duplicate| Accepted { identity: identity(job, index), duplicate };
                        match before {
                            None => own(false),
                            Some(uid) => repeated(uid).unwrap_or_else(|| {
                                let mut accepted = own(true);
                                accepted.identity.uid = *uid;
                                accepted
                            }),
                        }
                    })
                    .collect()),
            })
            .collect()
    }
}

fn identity(job: &Job, index: usize) -> Identity {
    let event = &job.publish.events[index];
    Identity {
        uid: job.publish.uids[index],
        id: event.id.clone(),
        source: event.source.clone(),
        r#type: event.r#type.clone(),
        time: event.time.unwrap_or(job.publish.at),
    }
}
