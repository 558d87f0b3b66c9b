//! One event at one endpoint: whether its deliveries ended, and whether what was seen of them fits together.
//!
//! What a fault may have caused is excused by a fault at that time, not by any since the delivery began: of two attempts
//! where one was to be, what is between them counts, and what is around the first of them.

use std::collections::{BTreeMap, BTreeSet};

use bus_core::ids::DeliveryId;
use jiff::{SignedDuration, Timestamp};

use super::{
    ACK_WAIT_MS,
    disturbances::Disturbances,
    judge::{Compared, Event, Judgement, Kind},
    ledger::{Dead, Endpoint},
};

/// One attempt, as its endpoint saw it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    pub(super) at: Timestamp,
    pub(super) status: u16,
    pub(super) after_ms: Option<u64>,
}

impl Attempt {
    fn taken(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// All that is known of one event at one endpoint.
#[derive(Debug)]
pub(super) struct Case<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) id: &'a str,
    pub(super) event: &'a Event<'a>,
    /// What came, by delivery, each in the order of time.
    pub(super) seen: &'a BTreeMap<&'a str, Vec<Attempt>>,
    /// What the bus says that it has given up, and when.
    pub(super) letters: &'a [(&'a Dead, Timestamp)],
    pub(super) disturbances: &'a Disturbances,
}

impl Case<'_> {
    pub(super) fn settle(&self, judgement: &mut Judgement) {
        self.count(judgement);
        for (delivery, attempts) in self.seen {
            self.repeats(delivery, attempts, judgement);
            self.waits(delivery, attempts, judgement);
        }
        for (letter, died) in self.letters {
            self.buried(letter, *died, judgement);
            if letter.reason == "attempts_exhausted" {
                self.honest(letter, *died, judgement);
            }
        }
    }

    /// As many deliveries as subscriptions match, under the names that follow from both, and each has ended.
    fn count(&self, judgement: &mut Judgement) {
        let Self { endpoint, id, event, seen, letters, .. } = self;
        let met = || endpoint.wants.iter().filter(|want| want.is_met(event.kind, event.number));
        let expected = met().count();
        judgement.expected += expected;
        let taken = seen.iter().filter(|(_, attempts)| attempts.iter().any(Attempt::taken));
        let mut over: BTreeSet<&str> = taken.map(|(delivery, _)| *delivery).collect();
        judgement.delivered += over.len();
        over.extend(letters.iter().map(|(letter, _)| if endpoint.batched { id } else { &*letter.delivery }));

        let derived: BTreeSet<String> =
            met().filter_map(|want| delivery_id(event.uid, &want.subscription)).collect();
        // A batch has a name of its own; of its deliveries only letters tell the names.
        let named = seen.keys().copied().filter(|_| !endpoint.batched);
        let named: BTreeSet<&str> =
            named.chain(letters.iter().map(|(letter, _)| &*letter.delivery)).collect();
        for name in named.iter().filter(|name| !derived.contains(**name)) {
            let told = format!("{}: delivery {name} is none of event and subscription", self.place());
            judgement.find(Kind::Misnamed, &[id, event.uid, name], told);
        }

        // Of a delivery that was never seen the logs may know.
        let deliveries: Vec<&str> = [*id, event.uid]
            .into_iter()
            .chain(seen.keys().copied().filter(|delivery| !derived.contains(*delivery)))
            .chain(derived.iter().map(String::as_str))
            .collect();
        if over.len() < expected {
            let told = format!("{}: {} of {expected} deliveries ended", self.place(), over.len());
            judgement.find(Kind::Lost, &deliveries, told);
        }
        if seen.len().max(over.len()) > expected {
            let told =
                format!("{}: {} deliveries, and {expected} subscriptions match", self.place(), seen.len());
            judgement.find(Kind::Unwanted, &deliveries, told);
        }
    }

    /// What was taken does not come again, unless the answer may have been lost, or the delivery was in two hands.
    fn repeats(&self, delivery: &str, attempts: &[Attempt], judgement: &mut Judgement) {
        for (place, taken) in attempts.iter().enumerate().filter(|(_, attempt)| attempt.taken()) {
            let since = before(attempts, place).unwrap_or(taken.at);
            let next = attempts.get(place + 1).map(|next| next.at);
            // What was in other hands too is there again when its hold is over.
            let watched = taken.at + SignedDuration::from_millis(AGAIN_MS);
            let disturbed = self.disturbances.between(since, next.unwrap_or(watched));
            judgement.compared(Compared::Repeats, disturbed);
            let Some(next) = next else { continue };
            judgement.repeats += 1;
            if !disturbed {
                let told = format!("{}: taken at {}, and came again at {next}", self.place(), taken.at);
                judgement.find(Kind::Doubled, &[self.id, self.event.uid, delivery], told);
            }
        }
    }

    /// After a failure comes a wait, unless the delivery was in two hands.
    fn waits(&self, delivery: &str, attempts: &[Attempt], judgement: &mut Judgement) {
        for (failed, next) in
            attempts.iter().zip(attempts.iter().skip(1)).filter(|(failed, _)| !failed.taken())
        {
            let wait = failed.after_ms.unwrap_or(self.endpoint.wait_ms);
            let soonest = failed.at + SignedDuration::from_millis(i64::try_from(wait).unwrap_or(i64::MAX));
            let disturbed = self.disturbances.between(failed.at, next.at.min(soonest));
            judgement.compared(Compared::Waits, disturbed);
            if next.at < soonest && !disturbed {
                let (place, first, next) = (self.place(), failed.at, next.at);
                let told = format!("{place}: came at {first}, and again at {next}, before {soonest}");
                judgement.find(Kind::Early, &[self.id, self.event.uid, delivery], told);
            }
        }
    }

    /// Nothing is given up at an endpoint that takes everything in the end: it has more attempts than a run has faults. No
    /// run is so long, and no endpoint so final, that there was another reason than attempts. And what was taken is
    /// not given up, unless the answer may have been lost, or the delivery was in two hands.
    fn buried(&self, letter: &Dead, died: Timestamp, judgement: &mut Judgement) {
        let (place, reason) = (self.place(), &letter.reason);
        let ids = [self.id, self.event.uid, &*letter.delivery];
        if self.endpoint.takes_all {
            let told = format!("{place}: dead ({reason}) at {died}, and everything is taken there");
            judgement.find(Kind::Buried, &ids, told);
        } else if reason != "attempts_exhausted" {
            judgement.find(Kind::Buried, &ids, format!("{place}: dead at {died} because of {reason}"));
        }
        let attempts = self.attempts(letter);
        let Some(place) = attempts.iter().rposition(Attempt::taken) else { return };
        let taken = attempts[place].at;
        let until = attempts.get(place + 1).map_or(died.max(taken), |next| next.at);
        let since = before(attempts, place).unwrap_or(taken);
        if !self.disturbances.between(since, until) {
            let told = format!("{}: taken at {taken}, and dead ({reason}) at {died}", self.place());
            judgement.find(Kind::Buried, &ids, told);
        }
    }

    /// As many attempts are on record as were seen. One that was seen may be missing on record, and one on record may
    /// not have been seen, where something was broken between it and the next one: one of them each time.
    fn honest(&self, letter: &Dead, died: Timestamp, judgement: &mut Judgement) {
        let ids = [self.id, self.event.uid, &*letter.delivery];
        let (on_record, policy) = (letter.attempts, self.endpoint.attempts);
        if on_record != policy {
            let told = format!("{}: dead after {on_record} attempts, the policy says {policy}", self.place());
            judgement.find(Kind::Dishonest, &ids, told);
        }
        if !self.endpoint.visible || self.endpoint.batched {
            return;
        }
        let attempts = self.attempts(letter);
        let failed = attempts.iter().filter(|attempt| !attempt.taken() && attempt.after_ms.is_none()).count();
        // From what began it to the first attempt, from each to the next, and from the last to the end.
        let begun = self.event.due.map_or(self.event.sent, |due| due.max(self.event.sent));
        let times: Vec<Timestamp> =
            std::iter::once(begun).chain(attempts.iter().map(|attempt| attempt.at)).collect();
        let ends = times.iter().skip(1).copied().chain([died]);
        let disturbed = times
            .iter()
            .zip(ends)
            .filter(|(from, to)| self.disturbances.between(**from, (*to).max(**from)))
            .count();
        judgement.compared(Compared::Attempts, disturbed > 0);
        if failed.abs_diff(on_record as usize) > disturbed {
            let told = format!(
                "{}: {on_record} failed attempts on record, {failed} were made, {disturbed} excused",
                self.place()
            );
            judgement.find(Kind::Dishonest, &ids, told);
        }
    }

    fn attempts(&self, letter: &Dead) -> &[Attempt] {
        let name = if self.endpoint.batched { self.id } else { &*letter.delivery };
        self.seen.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    fn place(&self) -> String {
        let Endpoint { path, organization, .. } = self.endpoint;
        format!("event {} ({}) at {path} of {organization}", self.id, self.event.kind)
    }
}

/// After so long a delivery that is in other hands too has come again.
const AGAIN_MS: i64 = ACK_WAIT_MS.cast_signed() + 500;

/// The attempt before one.
fn before(attempts: &[Attempt], place: usize) -> Option<Timestamp> {
    place.checked_sub(1).map(|before| attempts[before].at)
}

/// What the bus calls the delivery of an event to a subscription.
pub(super) fn delivery_id(uid: &str, subscription: &str) -> Option<String> {
    Some(DeliveryId::derive(uid.parse().ok()?, subscription.parse().ok()?).to_string())
}
