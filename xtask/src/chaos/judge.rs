//! What the ledger proves. No part of the bus is asked here; what it says of itself (dead letters, ticks) is in the
//! ledger too, and must fit what was seen.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::{
    case::{Attempt, Case},
    disturbances::Disturbances,
    ledger::{Accepted, Dead, Endpoint, Entry, Line, Request},
};

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
    /// Under another name than the one that follows from event and subscription.
    Misnamed,
    /// Again, though nothing had happened.
    Doubled,
    /// Given up where everything is taken, or for another reason than failures, or after it was taken.
    Buried,
    /// Neither fired nor skipped, or both.
    Tick,
    /// Attempts that were not made, or were not counted.
    Dishonest,
    /// Refused, though it was well formed.
    Refused,
    /// Neither taken nor refused, long after everything was whole.
    Unresolved,
    /// Not done with everything, long after everything was whole.
    Restless,
    /// A process that uses too much memory.
    Memory,
    /// Too little happened, or too little of it undisturbed, to prove anything.
    Unproven,
}

/// What is compared with what must be, and may be excused by a fault at that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Compared {
    /// The time of an attempt with that for which its event was promised; nothing excuses it.
    Times,
    /// The time of an attempt with the end of the wait after the one before.
    Waits,
    /// What was taken with what came again.
    Repeats,
    /// Attempts on record with attempts that were made.
    Attempts,
}

/// How often something was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Comparisons {
    /// Where nothing would have been excused.
    pub(super) undisturbed: usize,
    pub(super) disturbed: usize,
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
    /// Requests for what had been taken just before.
    pub(super) repeats: usize,
    pub(super) ticks_fired: usize,
    pub(super) ticks_skipped: i64,
    pub(super) comparisons: BTreeMap<Compared, Comparisons>,
    pub(super) findings: Vec<Finding>,
}

impl Judgement {
    pub(super) fn find(&mut self, kind: Kind, ids: &[&str], told: String) {
        let ids = ids.iter().map(|id| (*id).to_owned()).collect();
        self.findings.push(Finding { kind, ids, told });
    }

    pub(super) fn compared(&mut self, compared: Compared, disturbed: bool) {
        let comparisons = self.comparisons.entry(compared).or_default();
        if disturbed {
            comparisons.disturbed += 1;
        } else {
            comparisons.undisturbed += 1;
        }
    }

    /// Finds what was too little to prove anything.
    fn suffice(&mut self, proof: usize) {
        let compared = self.comparisons.iter().map(|(compared, comparisons)| {
            (format!("undisturbed comparisons of {compared:?}"), comparisons.undisturbed)
        });
        let figures: Vec<_> = [("events".to_owned(), self.events), ("deliveries".to_owned(), self.delivered)]
            .into_iter()
            .chain(compared)
            .filter(|(_, n)| *n < proof)
            .collect();
        for (what, n) in figures {
            self.find(Kind::Unproven, &[], format!("only {n} {what}, and {proof} are the least"));
        }
    }
}

/// An event that must reach whoever wants it.
#[derive(Debug)]
pub(super) struct Event<'a> {
    pub(super) uid: &'a str,
    pub(super) kind: &'a str,
    pub(super) number: u32,
    pub(super) sent: Timestamp,
    pub(super) due: Option<Timestamp>,
}

/// What a run must keep to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// The most memory of a process, bytes.
    pub(super) memory: u64,
    /// So many events, deliveries and comparisons without an excuse at least: fewer prove nothing.
    pub(super) proof: usize,
}

/// Judges a whole ledger.
pub(super) fn judge(lines: &[Line], bounds: Bounds) -> Judgement {
    let mut judgement = Judgement::default();
    for kind in [Compared::Times, Compared::Waits, Compared::Repeats, Compared::Attempts] {
        judgement.comparisons.entry(kind).or_default();
    }
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

    for attempts in seen.values_mut().flat_map(BTreeMap::values_mut) {
        attempts.sort_by_key(|attempt| attempt.at);
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
            if !endpoint.wants.iter().any(|want| want.is_met(event.kind, event.number)) {
                continue;
            }
            let none = BTreeMap::new();
            let seen = seen.get(&(*organization, &*endpoint.path, *id)).unwrap_or(&none);
            let letters =
                dead.get(&(&*endpoint.connection, event.uid)).map(Vec::as_slice).unwrap_or_default();
            Case { endpoint, id, event, seen, letters, disturbances: &disturbances }.settle(&mut judgement);
        }
    }
    ticks(lines, &mut judgement);
    for line in lines {
        match &line.entry {
            Entry::Memory { process, bytes } if *bytes > bounds.memory => {
                let told = format!("{process} had {} MiB in use", bytes >> 20);
                judgement.find(Kind::Memory, &[process], told);
            }
            Entry::Refused { organization, id, answer } => {
                judgement.find(Kind::Refused, &[id], format!("event {id} of {organization}: {answer}"));
            }
            Entry::Unresolved { organization, id } => {
                let told =
                    format!("event {id} of {organization} was not answered for good, though all is whole");
                judgement.find(Kind::Unresolved, &[id], told);
            }
            Entry::Restless { open } => {
                judgement.find(Kind::Restless, &[], format!("it does not come to rest: {open}"));
            }
            _ => {}
        }
    }
    judgement.suffice(bounds.proof);
    judgement.findings.sort_by_key(|finding| finding.kind);
    judgement
}

/// What was accepted, and what a schedule has fired.
fn events<'a>(lines: &'a [Line], judgement: &mut Judgement) -> BTreeMap<(&'a str, &'a str), Event<'a>> {
    let mut events = BTreeMap::new();
    let mut schedules: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for line in lines {
        match &line.entry {
            Entry::Accepted(Accepted { organization, id, uid, kind, number, sent, deliver_at, tries }) => {
                judgement.resent += usize::from(*tries > 1);
                let event = Event { uid, kind, number: *number, sent: *sent, due: *deliver_at };
                events.insert((&**organization, &**id), event);
            }
            Entry::Schedule { organization, schedule, kind, .. } => {
                schedules.insert(schedule, (organization, kind));
            }
            Entry::Tick { schedule, first, uid: Some(uid), .. } => {
                if let Some((organization, kind)) = schedules.get(&**schedule) {
                    let due = Timestamp::from_second(*first).unwrap_or_default();
                    // A tick is an event like any other; its number passes every filter.
                    let event = Event { uid, kind, number: u32::MAX, sent: due, due: Some(due) };
                    events.insert((organization, &**uid), event);
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
        if let Some(due) = event.due {
            // No fault excuses it.
            judgement.compared(Compared::Times, false);
            if at < due {
                let told = format!("event {} is due at {due}, and came to {place} at {at}", seen.id);
                judgement.find(Kind::Early, &ids, told);
            }
        }
        wanted.push(&*seen.id);
    }
    wanted
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
