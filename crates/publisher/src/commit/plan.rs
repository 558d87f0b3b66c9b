//! What is to become of each event of a group, settled within its transaction.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bus_core::{
    fanout::{FanOutEvent, Target},
    ids::{EventUid, KeyId, OrganizationId},
    matcher::Snapshot,
    pg::{Claim, Identity, NewEvent, ScheduledEvent, Taken, UniqueKey},
};
use jiff::Timestamp;

use crate::ingest::{Accepted, Job, PublishError};

/// What is to become of one request's events.
enum Fate {
    /// The whole request is refused.
    Refused(PublishError),
    /// The whole request is a repetition of one that stored these.
    Repeated(Vec<EventUid>),
    /// For each event: itself if new, or the uid of the one that it repeats.
    Events(Vec<Option<EventUid>>),
}

/// What a transaction stores.
#[derive(Default)]
pub(super) struct NewEvents {
    /// Events that are published now, each with its matches.
    pub(super) published: Vec<NewEvent>,
    /// Where those go.
    pub(super) fan_out: Vec<FanOutEvent>,
    /// Events that are due later, and matched then.
    pub(super) scheduled: Vec<ScheduledEvent>,
}

/// The fate of every event of a group, settled step by step within the transaction.
pub(super) struct Plan<'a> {
    group: &'a [Job],
    fates: Vec<Fate>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(group: &'a [Job], valid: &HashMap<KeyId, (OrganizationId, Arc<Snapshot>)>) -> Self {
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

    pub(super) fn idempotency_claims(&self) -> Vec<Claim> {
        self.live().filter_map(Job::idempotency_claim).collect()
    }

    pub(super) fn settle_repeated_requests(&mut self, taken: &HashMap<UniqueKey, Taken>) {
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
    pub(super) fn event_claims(&self) -> Vec<Claim> {
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
    pub(super) fn settle_repeated_events(
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
    pub(super) fn repeated(&self) -> Vec<EventUid> {
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

    /// The events to store; or the place of a request in the group that has more than `max_matches`. What is due after
    /// `now` is left for then (invariant I5).
    pub(super) fn new_events(
        &self,
        snapshots: &HashMap<KeyId, (OrganizationId, Arc<Snapshot>)>,
        now: Timestamp,
        max_matches: usize,
    ) -> Result<NewEvents, usize> {
        let mut new = NewEvents::default();
        for (place, (job, fate)) in self.group.iter().zip(&self.fates).enumerate() {
            let mut left = max_matches;
            let (Fate::Events(fates), Some((organization, snapshot))) =
                (fate, snapshots.get(&job.publish.principal.key))
            else {
                continue;
            };
            for (index, fate) in fates.iter().enumerate() {
                if fate.is_some() {
                    continue;
                }
                let event = &job.publish.events[index];
                let publisher = job.publish.principal.connection;
                let (uid, body) = (job.publish.uids[index], job.bodies[index].clone());
                let mut stored = NewEvent::of(event, body, uid, *organization, publisher, job.publish.at);
                if let Some(due_at) = job.publish.deliver_at[index].filter(|due_at| *due_at > now) {
                    new.scheduled.push(ScheduledEvent {
                        event: stored,
                        due_at,
                        schedule: None,
                        cancelled_at: None,
                    });
                    continue;
                }
                let targets = Target::of(snapshot, event, publisher);
                left = left.checked_sub(targets.len()).ok_or(place)?;
                new.fan_out.push(FanOutEvent::of(&mut stored, snapshot.lane, targets));
                new.published.push(stored);
            }
        }
        Ok(new)
    }

    pub(super) fn answers(
        self,
        first: &HashMap<EventUid, Identity>,
    ) -> Vec<Result<Vec<Accepted>, PublishError>> {
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
