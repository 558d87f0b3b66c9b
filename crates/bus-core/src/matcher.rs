//! Matching: which subscriptions of an organization take an event.

use std::{collections::HashMap, sync::Arc};

use serde_json::{Value, value::RawValue};

use crate::{
    filter::PayloadFilter,
    ids::{ConnectionId, SubscriptionId},
    pattern::TypePattern,
};

/// A subscription as far as matching is concerned.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The subscription.
    pub subscription: SubscriptionId,
    /// Where it sends.
    pub connection: ConnectionId,
    /// That connection's version.
    pub connection_version: i64,
    /// Both the subscription and its connection are enabled.
    pub enabled: bool,
    /// Which types it takes.
    pub event_type: TypePattern,
    /// Whose events it takes, if not everyone's.
    pub publisher: Option<ConnectionId>,
    /// Which payloads it takes, if not all.
    pub filter: Option<PayloadFilter>,
}

/// Every subscription of one organization at one version.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// `organizations.version` from before the rows were read: it can only be older than they are, so
    /// that a change in between costs one reload and never a missed subscription.
    pub version: i64,
    /// The organization's own lane, if it has one. Each change of it is a new version.
    pub lane: Option<u16>,
    candidates: Vec<Candidate>,
    /// Exact types; the usual case costs one look-up however many subscriptions there are.
    exact: HashMap<Arc<str>, Vec<usize>>,
    /// Patterns whose first token is literal, by that token.
    by_first: HashMap<Arc<str>, Vec<usize>>,
    /// Patterns that start with a wildcard.
    open: Vec<usize>,
}

/// Why a subscription does not take an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// It, or its connection, is disabled.
    Disabled,
    /// It wants other types.
    Type,
    /// It wants the events of another publisher.
    Publisher,
    /// Its filter selects nothing of the payload.
    Filter,
    /// It has a filter, and the event has no JSON payload.
    NoJson,
}

/// What matching looks at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The event's type.
    pub event_type: &'a str,
    /// The connection that published it, if the key was bound to one.
    pub publisher: Option<ConnectionId>,
    /// Its payload, if that is JSON.
    pub payload: Option<&'a RawValue>,
}

/// Parses the payload at most once, and only if a filter asks for it.
struct Payload<'a> {
    raw: Option<&'a RawValue>,
    parsed: Option<Option<Value>>,
}

impl Payload<'_> {
    fn value(&mut self) -> Option<&Value> {
        let raw = self.raw;
        self.parsed.get_or_insert_with(|| raw.and_then(|raw| serde_json::from_str(raw.get()).ok())).as_ref()
    }
}

impl Snapshot {
    /// Indexes the subscriptions of one organization.
    pub fn new(version: i64, lane: Option<u16>, candidates: Vec<Candidate>) -> Self {
        let mut snapshot = Self { version, lane, ..Self::default() };
        for (index, candidate) in candidates.iter().enumerate() {
            let pattern = &candidate.event_type;
            match pattern.first_token() {
                _ if pattern.is_exact() => {
                    snapshot.exact.entry(pattern.as_str().into()).or_default().push(index);
                }
                Some(first) => snapshot.by_first.entry(first.into()).or_default().push(index),
                None => snapshot.open.push(index),
            }
        }
        snapshot.candidates = candidates;
        snapshot
    }

    /// The subscriptions that take the event, ordered by id.
    pub fn matching(&self, subject: Subject<'_>) -> Vec<&Candidate> {
        let mut payload = Payload { raw: subject.payload, parsed: None };
        let mut matching: Vec<_> = self
            .indexed(subject.event_type)
            .flatten()
            .map(|index| &self.candidates[*index])
            .filter(|candidate| mismatch(candidate, subject, &mut payload).is_none())
            .collect();
        matching.sort_unstable_by_key(|candidate| candidate.subscription);
        matching
    }

    /// Every subscription with the reason why it does not take the event, or none if it does.
    pub fn explain(&self, subject: Subject<'_>) -> Vec<(&Candidate, Option<Mismatch>)> {
        let mut payload = Payload { raw: subject.payload, parsed: None };
        self.candidates
            .iter()
            .map(|candidate| (candidate, mismatch(candidate, subject, &mut payload)))
            .collect()
    }

    /// The subscription of that id.
    pub fn candidate(&self, id: SubscriptionId) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.subscription == id)
    }

    /// How many subscriptions [`matching`](Self::matching) looks at for an event of that type.
    pub fn candidates(&self, event_type: &str) -> usize {
        self.indexed(event_type).map(Vec::len).sum()
    }

    /// What the indexes lead to: everything that may take an event of that type.
    fn indexed<'s>(&'s self, event_type: &str) -> impl Iterator<Item = &'s Vec<usize>> + use<'s> {
        let first = event_type.split('.').next().unwrap_or_default();
        [self.exact.get(event_type), self.by_first.get(first), Some(&self.open)].into_iter().flatten()
    }

    /// About how much memory the snapshot takes, bytes: for whoever keeps many of them within a bound.
    pub fn memory_bytes(&self) -> usize {
        /// For a candidate's places in the indexes.
        const INDEXED: usize = 128;
        let filters = self.candidates.iter().filter_map(|candidate| candidate.filter.as_ref());
        size_of::<Self>()
            + self.candidates.len() * (size_of::<Candidate>() + INDEXED)
            + filters.map(PayloadFilter::memory_bytes).sum::<usize>()
    }
}

fn mismatch(candidate: &Candidate, subject: Subject<'_>, payload: &mut Payload<'_>) -> Option<Mismatch> {
    if !candidate.enabled {
        return Some(Mismatch::Disabled);
    }
    if !candidate.event_type.matches(subject.event_type) {
        return Some(Mismatch::Type);
    }
    if candidate.publisher.is_some() && candidate.publisher != subject.publisher {
        return Some(Mismatch::Publisher);
    }
    let filter = candidate.filter.as_ref()?;
    match payload.value() {
        None => Some(Mismatch::NoJson),
        Some(value) => (!filter.matches(value)).then_some(Mismatch::Filter),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn only_what_the_index_leads_to_is_counted() {
        let candidate = |(n, pattern): (usize, &str)| Candidate {
            subscription: SubscriptionId(Uuid::from_u128(n as u128)),
            connection: ConnectionId(Uuid::nil()),
            connection_version: 1,
            enabled: true,
            event_type: TypePattern::parse(pattern).expect("a pattern"),
            publisher: None,
            filter: None,
        };
        let patterns =
            ["order.created", "order.created", "order.paid", "order.*", "order.>", "*.created", ">"];
        let snapshot = Snapshot::new(1, None, patterns.into_iter().enumerate().map(candidate).collect());
        for (event_type, count) in [("order.created", 6), ("order.x.y", 4), ("order", 4), ("a.created", 2)] {
            assert_eq!(snapshot.candidates(event_type), count, "{event_type}");
            let subject = Subject { event_type, publisher: None, payload: None };
            assert!(snapshot.matching(subject).len() <= count, "{event_type}");
        }
    }
}
