//! What the ledger proves. No part of the bus is asked here; what it says of itself (dead letters, ticks) is in the
//! ledger too, and must fit what was seen.

use std::collections::{BTreeMap, BTreeSet};

use bus_core::ids::DeliveryId;
use jiff::{SignedDuration, Timestamp};

use super::ledger::{Accepted, Dead, Endpoint, Entry, Line, Phase, Request};

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) kind: Kind,
    /// By which it is found in logs: ids of events and deliveries.
    pub(super) ids: Vec<String>,
    pub(super) told: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Neither delivered nor dead.
    Lost,
    /// Before its time, or before a wait was over.
    Early,
    /// At an endpoint of another organization.
    Misdelivered,
    /// Signed with another secret.
    Forged,
    /// Nobody asked for it.
    Unwanted,
    /// Again, though nothing had happened.
    Doubled,
    /// Neither fired nor skipped, or both.
    Tick,
    /// Attempts that were not made, or were not counted.
    Dishonest,
    /// Refused, though it was well formed.
    Refused,
    /// A process that uses too much memory.
    Memory,
}

/// What came of it all.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    pub(super) events: usize,
    pub(super) resent: usize,
    /// Deliveries that are due, by the subscriptions that match.
    pub(super) expected: usize,
    pub(super) delivered: usize,
    pub(super) dead: BTreeMap<String, usize>,
    pub(super) requests: usize,
    /// Requests for what had been taken already, around a fault.
    pub(super) repeats: usize,
    pub(super) ticks_fired: usize,
    pub(super) ticks_skipped: i64,
    pub(super) findings: Vec<Finding>,
}

impl Judgement {
    fn find(&mut self, kind: Kind, ids: &[&str], told: String) {
        let ids = ids.iter().map(|id| (*id).to_owned()).collect();
        self.findings.push(Finding { kind, ids, told });
    }
}

/// An event that must reach whoever wants it.
struct Event<'a> {
    uid: &'a str,
    kind: &'a str,
    number: u32,
    due: Option<Timestamp>,
}

/// One attempt, as its endpoint saw it.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    at: Timestamp,
    status: u16,
    after_ms: Option<u64>,
}

impl Attempt {
    fn taken(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// The times in which a fault may have repeated something. What it disturbs comes out a little later: what was held is
/// handed out again, and what was buffered arrives. And where an attempt was repeated, each of the two may be followed by
/// another one; so what came of a delivery is excused by whatever happened since its first attempt.
struct Disturbances(Vec<(Timestamp, Timestamp)>);

impl Disturbances {
    fn of(lines: &[Line]) -> Self {
        let mut begun: BTreeMap<usize, Timestamp> = BTreeMap::new();
        let mut all = Vec::new();
        for line in lines {
            match &line.entry {
                Entry::Fault { number, phase: Phase::Begins, aftermath_s: Some(_), .. } => {
                    begun.insert(*number, line.at);
                }
                Entry::Fault { number, phase: Phase::Over, aftermath_s: Some(aftermath), .. } => {
                    let from = begun.remove(number).unwrap_or(line.at);
                    all.push((from, line.at + SignedDuration::from_secs(*aftermath)));
                }
                _ => {}
            }
        }
        all.extend(begun.into_values().map(|from| (from, Timestamp::MAX)));
        Self(all)
    }

    /// Whether one of them touches the time between.
    fn between(&self, from: Timestamp, to: Timestamp) -> bool {
        self.0.iter().any(|(begin, end)| *begin <= to && *end >= from)
    }
}

/// Judges a whole ledger. `memory` is the most that a process may use, bytes.
pub(super) fn judge(lines: &[Line], memory: u64) -> Judgement {
    let mut judgement = Judgement::default();
    let disturbances = Disturbances::of(lines);
    let endpoints: BTreeMap<(&str, &str), &Endpoint> = lines
        .iter()
        .filter_map(|line| match &line.entry {
            Entry::Endpoint(endpoint) => Some(((&*endpoint.organization, &*endpoint.path), endpoint)),
            _ => None,
        })
        .collect();
    let events = events(lines, &mut judgement);
    let unresolved: BTreeSet<(&str, &str)> = lines
        .iter()
        .filter_map(|line| match &line.entry {
            Entry::Unresolved { organization, id } => Some((&**organization, &**id)),
            _ => None,
        })
        .collect();

    // What came, by endpoint, event and delivery.
    let mut seen: BTreeMap<(&str, &str, &str), BTreeMap<&str, Vec<Attempt>>> = BTreeMap::new();
    for line in lines {
        let Entry::Request(request) = &line.entry else { continue };
        judgement.requests += 1;
        let Some(endpoint) = endpoints.get(&(&*request.organization, &*request.path)) else {
            let told = format!("a request came to {} of {}", request.path, request.organization);
            judgement.find(Kind::Unwanted, &[&request.delivery], told);
            continue;
        };
        for id in wanted(request, line.at, endpoint, &events, &unresolved, &mut judgement) {
            // A batch has a name of its own, and each of its events is a delivery.
            let delivery = if endpoint.batched { id } else { &request.delivery };
            let attempt = Attempt { at: line.at, status: request.status, after_ms: request.after_ms };
            let of_event = seen.entry((&endpoint.organization, &endpoint.path, id)).or_default();
            of_event.entry(delivery).or_default().push(attempt);
        }
    }

    let mut dead: BTreeMap<(&str, &str), Vec<(&Dead, Timestamp)>> = BTreeMap::new();
    for line in lines {
        let Entry::Dead(letter) = &line.entry else { continue };
        *judgement.dead.entry(letter.reason.clone()).or_default() += 1;
        dead.entry((&letter.connection, &letter.uid)).or_default().push((letter, line.at));
    }

    for endpoint in endpoints.values() {
        let ours = events.iter().filter(|((organization, _), _)| *organization == endpoint.organization);
        for ((organization, id), event) in ours {
            let expected = endpoint.wants.iter().filter(|want| want.is_met(event.kind, event.number)).count();
            if expected == 0 {
                continue;
            }
            judgement.expected += expected;
            let none = BTreeMap::new();
            let attempts = seen.get(&(*organization, &*endpoint.path, *id)).unwrap_or(&none);
            let letters =
                dead.get(&(&*endpoint.connection, event.uid)).map(Vec::as_slice).unwrap_or_default();
            settle(endpoint, id, event, expected, attempts, letters, &disturbances, &mut judgement);
        }
    }
    ticks(lines, &mut judgement);
    for line in lines {
        match &line.entry {
            Entry::Memory { process, bytes } if *bytes > memory => {
                let told = format!("{process} had {} MiB in use", bytes >> 20);
                judgement.find(Kind::Memory, &[process], told);
            }
            Entry::Refused { organization, id, answer } => {
                judgement.find(Kind::Refused, &[id], format!("event {id} of {organization}: {answer}"));
            }
            _ => {}
        }
    }
    judgement.findings.sort_by_key(|finding| finding.kind);
    judgement
}

/// What was accepted, and what a schedule has fired.
fn events<'a>(lines: &'a [Line], judgement: &mut Judgement) -> BTreeMap<(&'a str, &'a str), Event<'a>> {
    let mut events = BTreeMap::new();
    let mut schedules: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for line in lines {
        match &line.entry {
            Entry::Accepted(Accepted { organization, id, uid, kind, number, deliver_at, tries, .. }) => {
                judgement.resent += usize::from(*tries > 1);
                let event = Event { uid, kind, number: *number, due: *deliver_at };
                events.insert((&**organization, &**id), event);
            }
            Entry::Schedule { organization, schedule, kind, .. } => {
                schedules.insert(schedule, (organization, kind));
            }
            Entry::Tick { schedule, first, uid: Some(uid), .. } => {
                if let Some((organization, kind)) = schedules.get(&**schedule) {
                    let due = Timestamp::from_second(*first).ok();
                    // A tick is an event like any other; its number passes every filter.
                    events.insert((organization, &**uid), Event { uid, kind, number: u32::MAX, due });
                }
            }
            _ => {}
        }
    }
    judgement.events = events.len();
    events
}

/// The events of a request that its endpoint was to get.
fn wanted<'a>(
    request: &'a Request,
    at: Timestamp,
    endpoint: &Endpoint,
    events: &BTreeMap<(&str, &str), Event<'_>>,
    unresolved: &BTreeSet<(&str, &str)>,
    judgement: &mut Judgement,
) -> Vec<&'a str> {
    let place = format!("{} of {}", endpoint.path, endpoint.organization);
    if !request.signed {
        let told = format!("{} came to {place} with a signature that is not its own", request.delivery);
        judgement.find(Kind::Forged, &[&request.delivery], told);
    }
    let mut wanted = Vec::new();
    for seen in &request.events {
        let ids = [&*seen.id, &*request.delivery];
        if seen.organization != endpoint.organization {
            let told = format!("event {} of {} came to {place}", seen.id, seen.organization);
            judgement.find(Kind::Misdelivered, &ids, told);
            continue;
        }
        let key = (&*endpoint.organization, &*seen.id);
        let Some(event) = events.get(&key) else {
            if !unresolved.contains(&key) {
                let told = format!("event {} came to {place}, and was never accepted", seen.id);
                judgement.find(Kind::Unwanted, &ids, told);
            }
            continue;
        };
        if !endpoint.wants.iter().any(|want| want.is_met(event.kind, event.number)) {
            let told = format!("event {} ({}) came to {place}", seen.id, event.kind);
            judgement.find(Kind::Unwanted, &ids, told);
            continue;
        }
        if let Some(due) = event.due.filter(|due| at < *due) {
            let told = format!("event {} is due at {due}, and came to {place} at {at}", seen.id);
            judgement.find(Kind::Early, &ids, told);
        }
        wanted.push(&*seen.id);
    }
    wanted
}

/// Judges the deliveries of one event to one endpoint.
#[expect(clippy::too_many_arguments, reason = "all that is known of one event at one endpoint")]
fn settle(
    endpoint: &Endpoint,
    id: &str,
    event: &Event<'_>,
    expected: usize,
    seen: &BTreeMap<&str, Vec<Attempt>>,
    letters: &[(&Dead, Timestamp)],
    disturbances: &Disturbances,
    judgement: &mut Judgement,
) {
    let place = format!("event {id} ({}) at {} of {}", event.kind, endpoint.path, endpoint.organization);
    let taken = seen.iter().filter(|(_, attempts)| attempts.iter().any(Attempt::taken));
    let mut over: BTreeSet<&str> = taken.map(|(delivery, _)| *delivery).collect();
    judgement.delivered += over.len();
    over.extend(letters.iter().map(|(letter, _)| if endpoint.batched { id } else { &*letter.delivery }));
    // Of a delivery that was never seen the logs may know.
    let met = endpoint.wants.iter().filter(|want| want.is_met(event.kind, event.number));
    let derived: Vec<String> = met.filter_map(|want| delivery_id(event.uid, &want.subscription)).collect();
    let deliveries: Vec<&str> = [id, event.uid]
        .into_iter()
        .chain(seen.keys().copied().filter(|delivery| !derived.iter().any(|derived| derived == delivery)))
        .chain(derived.iter().map(String::as_str))
        .collect();
    if over.len() < expected {
        let told = format!("{place}: {} of {expected} deliveries ended", over.len());
        judgement.find(Kind::Lost, &deliveries, told);
    }
    if seen.len().max(over.len()) > expected {
        let told = format!("{place}: {} deliveries, and {expected} subscriptions match", seen.len());
        judgement.find(Kind::Unwanted, &deliveries, told);
    }
    for (delivery, attempts) in seen {
        let ids = [id, event.uid, *delivery];
        let disturbed =
            |until: Timestamp| attempts.first().is_some_and(|first| disturbances.between(first.at, until));
        let mut took: Option<Timestamp> = None;
        for attempt in attempts {
            let Some(first) = took else {
                took = attempt.taken().then_some(attempt.at);
                continue;
            };
            if disturbed(attempt.at) {
                judgement.repeats += 1;
            } else {
                let told = format!("{place}: taken at {first}, and came again at {}", attempt.at);
                judgement.find(Kind::Doubled, &ids, told);
            }
        }
        for (before, next) in
            attempts.iter().zip(attempts.iter().skip(1)).filter(|(before, _)| !before.taken())
        {
            let wait = before.after_ms.unwrap_or(endpoint.wait_ms);
            let soonest = before.at + SignedDuration::from_millis(i64::try_from(wait).unwrap_or(i64::MAX));
            if next.at < soonest && !disturbed(next.at) {
                let told =
                    format!("{place}: came at {}, and again at {}, before {soonest}", before.at, next.at);
                judgement.find(Kind::Early, &ids, told);
            }
        }
    }
    for (letter, died) in letters.iter().filter(|(letter, _)| letter.reason == "attempts_exhausted") {
        let ids = [id, event.uid, &*letter.delivery];
        if letter.attempts != endpoint.attempts {
            let told = format!(
                "{place}: dead after {} attempts, the policy says {}",
                letter.attempts, endpoint.attempts
            );
            judgement.find(Kind::Dishonest, &ids, told);
        }
        let attempts = seen.get(&*letter.delivery).map(Vec::as_slice).unwrap_or_default();
        let failed = attempts.iter().filter(|attempt| !attempt.taken() && attempt.after_ms.is_none()).count();
        let begun = attempts.first().map_or(*died, |first| first.at);
        let honest = failed == letter.attempts as usize || disturbances.between(begun, *died);
        if endpoint.visible && !endpoint.batched && !honest {
            let told = format!("{place}: {} failed attempts on record, {failed} were made", letter.attempts);
            judgement.find(Kind::Dishonest, &ids, told);
        }
    }
}

/// What the bus calls the delivery of an event to a subscription.
fn delivery_id(uid: &str, subscription: &str) -> Option<String> {
    Some(DeliveryId::derive(uid.parse().ok()?, subscription.parse().ok()?).to_string())
}

/// Every tick is fired once, or skipped once.
fn ticks(lines: &[Line], judgement: &mut Judgement) {
    let mut told: BTreeMap<&str, BTreeMap<i64, usize>> = BTreeMap::new();
    let schedules = lines.iter().filter_map(|line| match &line.entry {
        Entry::Schedule { schedule, first, last, every, .. } => Some((&**schedule, *first, *last, *every)),
        _ => None,
    });
    let schedules: Vec<_> = schedules.collect();
    for line in lines {
        let Entry::Tick { schedule, state, first, last, .. } = &line.entry else { continue };
        let every = schedules.iter().find(|(name, ..)| name == schedule).map_or(1, |(.., every)| *every);
        let mut tick = *first;
        while tick <= *last {
            *told.entry(schedule).or_default().entry(tick).or_default() += 1;
            tick += every.max(1);
        }
        if state == "fired" {
            judgement.ticks_fired += 1;
        } else {
            judgement.ticks_skipped += (last - first) / every.max(1) + 1;
        }
    }
    for (schedule, first, last, every) in schedules {
        let none = BTreeMap::new();
        let told = told.get(schedule).unwrap_or(&none);
        let mut tick = first;
        while tick <= last {
            let n = told.get(&tick).copied().unwrap_or_default();
            if n != 1 {
                let at = Timestamp::from_second(tick).unwrap_or_default();
                let told = format!("tick {at} of schedule {schedule} is on record {n} times");
                judgement.find(Kind::Tick, &[schedule], told);
            }
            tick += every.max(1);
        }
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
