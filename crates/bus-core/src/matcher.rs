//! Matching: which subscriptions of an organization take an event.

use std::{
    cell::OnceCell,
    collections::{HashMap, HashSet},
    sync::Arc,
};

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
    exact: HashMap<Arc<str>, Places>,
    /// Patterns whose first token is literal, by that token.
    by_first: HashMap<Arc<str>, Places>,
    /// Patterns that start with a wildcard.
    open: Places,
}

/// Candidates of the same types, by what else they ask for. Each is in one place.
#[derive(Debug, Default)]
struct Places {
    count: usize,
    /// Those that can be told only by looking at them.
    others: Vec<usize>,
    /// Those that take the events of one publisher, by that.
    by_publisher: HashMap<ConnectionId, Vec<usize>>,
    /// Those whose filter holds only for payloads with a certain string, by that.
    by_string: HashMap<Arc<str>, Vec<usize>>,
}

impl Places {
    fn add(&mut self, place: usize, candidate: &Candidate) {
        self.count += 1;
        let required = candidate.filter.as_ref().and_then(PayloadFilter::required_string);
        let places = match (required, candidate.publisher) {
            (Some(string), _) => self.by_string.entry(string.into()).or_default(),
            (None, Some(publisher)) => self.by_publisher.entry(publisher).or_default(),
            (None, None) => &mut self.others,
        };
        places.push(place);
    }

    /// Those that may take an event of their types.
    fn of<'s>(
        &'s self,
        publisher: Option<ConnectionId>,
        payload: &'s Payload<'_>,
    ) -> impl Iterator<Item = usize> + 's {
        let by_publisher = publisher.and_then(|publisher| self.by_publisher.get(&publisher));
        let strings = if self.by_string.is_empty() { None } else { Some(payload.strings()) };
        let by_string = strings.into_iter().flatten().filter_map(|string| self.by_string.get(string));
        std::iter::once(&self.others).chain(by_publisher).chain(by_string).flatten().copied()
    }
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
    parsed: OnceCell<Option<Value>>,
}

impl<'a> Payload<'a> {
    fn new(raw: Option<&'a RawValue>) -> Self {
        Self { raw, parsed: OnceCell::new() }
    }

    fn value(&self) -> Option<&Value> {
        self.parsed.get_or_init(|| self.raw.and_then(|raw| serde_json::from_str(raw.get()).ok())).as_ref()
    }

    /// Each string among its values.
    fn strings(&self) -> HashSet<&str> {
        let mut strings = HashSet::new();
        let mut left: Vec<&Value> = self.value().into_iter().collect();
        while let Some(value) = left.pop() {
            match value {
                Value::String(string) => drop(strings.insert(string.as_str())),
                Value::Array(values) => left.extend(values),
                Value::Object(members) => left.extend(members.values()),
                Value::Null | Value::Bool(_) | Value::Number(_) => {}
            }
        }
        strings
    }
}

impl Snapshot {
    /// Indexes the subscriptions of one organization.
    pub fn new(version: i64, lane: Option<u16>, candidates: Vec<Candidate>) -> Self {
        let mut snapshot = Self { version, lane, ..Self::default() };
        for (index, candidate) in candidates.iter().enumerate() {
            let pattern = &candidate.event_type;
            let places = match pattern.first_token() {
                _ if pattern.is_exact() => snapshot.exact.entry(pattern.as_str().into()).or_default(),
                Some(first) => snapshot.by_first.entry(first.into()).or_default(),
                None => &mut snapshot.open,
            };
            places.add(index, candidate);
        }
        snapshot.candidates = candidates;
        snapshot
    }

    /// The subscriptions that take the event, ordered by id.
    pub fn matching(&self, subject: Subject<'_>) -> Vec<&Candidate> {
        let payload = Payload::new(subject.payload);
        let mut matching: Vec<_> = self
            .indexed(subject.event_type)
            .flat_map(|places| places.of(subject.publisher, &payload))
            .map(|index| &self.candidates[index])
            .filter(|candidate| mismatch(candidate, subject, &payload).is_none())
            .collect();
        matching.sort_unstable_by_key(|candidate| candidate.subscription);
        matching
    }

    /// Every subscription with the reason why it does not take the event, or none if it does.
    pub fn explain(&self, subject: Subject<'_>) -> Vec<(&Candidate, Option<Mismatch>)> {
        let payload = Payload::new(subject.payload);
        self.candidates.iter().map(|candidate| (candidate, mismatch(candidate, subject, &payload))).collect()
    }

    /// The subscription of that id.
    pub fn candidate(&self, id: SubscriptionId) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.subscription == id)
    }

    /// How many subscriptions [`matching`](Self::matching) looks at for an event of that type, at most.
    pub fn candidates(&self, event_type: &str) -> usize {
        self.indexed(event_type).map(|places| places.count).sum()
    }

    /// What the indexes lead to: everything that may take an event of that type.
    fn indexed<'s>(&'s self, event_type: &str) -> impl Iterator<Item = &'s Places> + use<'s> {
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

fn mismatch(candidate: &Candidate, subject: Subject<'_>, payload: &Payload<'_>) -> Option<Mismatch> {
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
    use proptest::{prelude::*, sample::select};
    use uuid::Uuid;

    use super::*;

    /// Those that name a string that is required, those that only seem to, and those that name none.
    const FILTERS: [&str; 16] = [
        "$[?@.a == 'x']",
        "$[?'y' == @.a]",
        "$[?@.a == 'x' && @.b == 1]",
        "$[?@.b == 1 && (@.a == 'y' && @.c)]",
        "$[?$.b == 'x']",
        "$..[?@.a == 'x']",
        "$.a[?@ == 'x'].b",
        "$[?value(@..a) == 'x']",
        "$[?@.a == 'x' || @.b == 1]",
        "$[?@.a != 'x']",
        "$[?!(@.a == 'x')]",
        "$[?@.a == 'x', ?@.b == 1]",
        "$[?'x' == 'x']",
        "$[?length(@.a) == 'x']",
        "$[?@.a == 1]",
        "$.a",
    ];

    fn any_candidate() -> impl Strategy<Value = (&'static str, Option<u128>, Option<&'static str>)> {
        let pattern = select(&["t.a", "t.b", "t.*", "*.a", ">"][..]);
        (pattern, prop::option::of(0..2_u128), prop::option::of(select(&FILTERS[..])))
    }

    fn any_payload() -> impl Strategy<Value = Value> {
        let leaf = select(&["\"x\"", "\"y\"", "1", "null"][..])
            .prop_map(|json| serde_json::from_str(json).expect("JSON"));
        leaf.prop_recursive(4, 24, 4, |inner| {
            let members = prop::collection::btree_map(
                select(&["a", "b", "c"][..]).prop_map(str::to_owned),
                inner.clone(),
                0..4,
            );
            prop_oneof![
                prop::collection::vec(inner, 0..4).prop_map(Value::Array),
                members.prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_looked_up_is_what_would_match_if_all_were_looked_at(
            candidates in prop::collection::vec(any_candidate(), 0..40),
            payload in prop::option::of(any_payload()),
            publisher in prop::option::of(0..2_u128),
        ) {
            let publisher_of = |publisher: Option<u128>| publisher.map(|n| ConnectionId(Uuid::from_u128(n)));
            let candidates = candidates.into_iter().enumerate().map(|(n, (pattern, publisher, filter))| Candidate {
                subscription: SubscriptionId(Uuid::from_u128(n as u128)),
                connection: ConnectionId(Uuid::nil()),
                connection_version: 1,
                enabled: n % 7 != 6,
                event_type: TypePattern::parse(pattern).expect("a pattern"),
                publisher: publisher_of(publisher),
                filter: filter.map(|filter| PayloadFilter::parse(filter).expect("a filter")),
            });
            let snapshot = Snapshot::new(1, None, candidates.collect());
            let payload = payload.map(|value| serde_json::value::to_raw_value(&value).expect("JSON"));
            let subject =
                Subject { event_type: "t.a", publisher: publisher_of(publisher), payload: payload.as_deref() };
            let all = snapshot.explain(subject).into_iter().filter(|(_, mismatch)| mismatch.is_none());
            let all: Vec<_> = all.map(|(candidate, _)| candidate.subscription).collect();
            let found: Vec<_> =
                snapshot.matching(subject).into_iter().map(|candidate| candidate.subscription).collect();
            prop_assert_eq!(found, all);
        }
    }

    #[test]
    fn a_filter_that_asks_for_a_string_is_evaluated_only_where_that_is() {
        for (filter, required) in
            FILTERS.iter().zip(["x", "y", "x", "y", "x", "x", "x", "x", "", "", "", "", "", "", "", ""])
        {
            let parsed = PayloadFilter::parse(filter).expect("a filter");
            assert_eq!(parsed.required_string().unwrap_or_default(), required, "{filter}");
        }
    }

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
