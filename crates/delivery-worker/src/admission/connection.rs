//! What is known of one connection.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bus_core::ids::ConnectionId;
use metrics::{counter, gauge};
use tokio::{sync::oneshot, time::Instant};

use super::{
    Admission, Place, Refusal, Why,
    breaker::{Breaker, Ticket},
    pace::Pace,
    rate::{Bucket, Rate},
};
use crate::slots::Usage;

/// If no request has ended for so long, nobody waits for that to happen.
pub(super) const STALLED: Duration = Duration::from_secs(1);

/// If no place was found within this time, no more are recalled at a time than had room: what finds none is parked again.
pub(super) const FULL: Duration = Duration::from_secs(3);

/// Between two that are recalled, at least: so those of one recall are on their way for longer than the shortest time
/// between two, and one of them is there to begin the next.
const CLOSEST: Duration = Duration::from_millis(4);

/// An attempt's share in the mean of durations: about the last ten count.
const WEIGHT: u32 = 8;

/// This worker's share of a connection's limits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shares {
    pub(super) in_flight: u32,
    pub(super) rate: Option<Rate>,
    /// Between two that come back to a connection of which nothing better is known.
    pub(super) backlog: Duration,
}

impl Shares {
    /// Between two requests, at least: by the rate.
    fn interval(&self) -> Duration {
        self.rate.map_or(Duration::ZERO, Rate::interval)
    }
}

/// What is known of one connection.
#[derive(Debug)]
pub(super) struct Known {
    version: i64,
    /// When it was asked for last.
    pub(super) used: Instant,
    breaker: Breaker,
    pub(super) bucket: Bucket,
    pub(super) pace: Pace,
    /// Requests that have a place, and how many may.
    in_flight: u32,
    most_in_flight: u32,
    /// As many places as it has found free lately: its lane may have room for fewer than it may take.
    room: u32,
    /// The slots of lanes that they hold.
    slots: usize,
    /// Those who wait for a place, first come, first served.
    pub(super) waiting: VecDeque<Waiting>,
    /// When a place was given back last, or the first one was taken.
    moved_at: Instant,
    /// How long a place is held.
    mean: Option<Duration>,
    /// When no place was found last.
    full_at: Option<Instant>,
}

/// One who waits for a place.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) lane: Arc<Usage>,
    pub(super) slots: usize,
    pub(super) ticket: Ticket,
    pub(super) admitted: oneshot::Sender<Place>,
}

impl Known {
    pub(super) fn new(version: i64, pace: Pace, now: Instant) -> Self {
        Self {
            version,
            used: now,
            breaker: Breaker::new(now),
            bucket: Bucket::new(now),
            pace,
            in_flight: 0,
            most_in_flight: 1,
            room: 0,
            slots: 0,
            waiting: VecDeque::new(),
            moved_at: now,
            mean: None,
            full_at: None,
        }
    }

    /// One that was changed is another one, except for what it has under way, and for its rate.
    pub(super) fn is_asked(&mut self, version: i64, shares: &Shares, now: Instant) {
        self.used = now;
        self.most_in_flight = shares.in_flight;
        if version > self.version {
            self.version = version;
            self.breaker(|breaker| breaker.reset(now));
            (self.mean, self.room) = (None, 0);
        }
    }

    /// Works with the breaker, and tells the metrics what became of it.
    pub(super) fn breaker<T>(&mut self, work: impl FnOnce(&mut Breaker) -> T) -> T {
        let (was, was_closed) = (self.breaker.state(), self.breaker.is_closed());
        let done = work(&mut self.breaker);
        let is = self.breaker.state();
        if was != is {
            counter!("bus_breaker_transitions", "to" => is).increment(1);
        }
        match (was_closed, self.breaker.is_closed()) {
            (true, false) => gauge!("bus_breaker_open").increment(1.0),
            (false, true) => gauge!("bus_breaker_open").decrement(1.0),
            _ => {}
        }
        done
    }

    /// The breaker has opened or closed: who waits is judged anew, and what was measured before counts no more.
    pub(super) fn has_changed(&mut self) {
        self.waiting.clear();
        (self.mean, self.room) = (None, 0);
    }

    pub(super) fn has_place(&self, lane: &Usage, slots: usize) -> bool {
        self.in_flight < self.most_in_flight && lane.has_room(self.slots, slots)
    }

    /// Whether a place will be free within `longest`. By Little's law one is given back in each mean duration, divided by
    /// the number of those that are taken; a connection of which nothing is known yet is taken for a quick one.
    pub(super) fn may_wait(&self, longest: Duration, now: Instant) -> bool {
        let turn = u32::try_from(self.waiting.len() + 1).unwrap_or(u32::MAX);
        let expected = self.mean.unwrap_or_default().saturating_mul(turn) / self.in_flight.max(1);
        expected <= longest && now.duration_since(self.moved_at) < STALLED
    }

    pub(super) fn take(
        &mut self,
        admission: &Admission,
        connection: ConnectionId,
        ticket: Ticket,
        lane: &Arc<Usage>,
        slots: usize,
        now: Instant,
    ) -> Place {
        if self.in_flight == 0 {
            self.moved_at = now;
        }
        self.in_flight += 1;
        self.room = self.room.max(self.in_flight);
        self.slots += slots;
        lane.take(slots);
        Place {
            admission: admission.clone(),
            connection,
            ticket,
            lane: Arc::clone(lane),
            slots,
            taken_at: now,
            reported: false,
        }
    }

    /// A place is free again; those who wait may have it. Gives the places of those who do not wait any more: to be
    /// dropped, but not under the lock.
    pub(super) fn give_back(&mut self, place: &Place, now: Instant) -> Vec<Place> {
        self.in_flight -= 1;
        self.slots -= place.slots;
        place.lane.give_back(place.slots);
        self.moved_at = now;
        if place.reported {
            let took = now.duration_since(place.taken_at);
            self.mean = Some(self.mean.map_or(took, |mean| mean - mean / WEIGHT + took / WEIGHT));
        }
        let mut unwanted = Vec::new();
        while let Some(next) = self.next_waiting() {
            let given =
                self.take(&place.admission, place.connection, next.ticket, &next.lane, next.slots, now);
            unwanted.extend(next.admitted.send(given).err());
        }
        unwanted
    }

    /// The next one who waits and can have a place. One that holds nothing gets one, so nobody waits for nothing.
    fn next_waiting(&mut self) -> Option<Waiting> {
        while self.waiting.front()?.admitted.is_closed() {
            self.waiting.pop_front();
        }
        let next = self.waiting.front()?;
        if self.has_place(&next.lane, next.slots) { self.waiting.pop_front() } else { None }
    }

    /// One more is parked, from `from` on at the earliest. They come back as fast as they can be delivered, as far as
    /// that is known, and a little faster, so that more room is found when there is some.
    pub(super) fn park(
        &mut self,
        why: Why,
        from: Instant,
        shares: &Shares,
        now: Instant,
        random: f64,
    ) -> Refusal {
        if why == Why::NoPlace {
            self.room = self.in_flight;
            self.full_at = Some(now);
        }
        let known = self.mean.filter(|_| why != Why::CircuitOpen).map(|mean| mean / (self.room + 1));
        let interval = known.unwrap_or(shares.backlog).max(shares.interval());
        Refusal { why, wait: self.pace.next(now, from, interval, random) }
    }

    /// Whether most places are free while others are parked for long, and how fast these may come back then: twice as many
    /// at a time as had room lately, so that a few recalls find out how many there is room for.
    pub(super) fn recalls(&mut self, version: i64, shares: &Shares, now: Instant) -> Option<Duration> {
        let has_room =
            self.breaker.is_closed() && self.waiting.is_empty() && self.in_flight <= shares.in_flight / 4;
        // Whoever knows an older version knows older limits.
        if !has_room || version < self.version {
            return None;
        }
        let was_full = self.full_at.is_some_and(|at| now.duration_since(at) < FULL);
        let more = if was_full { 1 } else { 2 };
        let places = self.room.max(1).saturating_mul(more).min(shares.in_flight.max(1));
        let interval = self.mean.map_or(shares.backlog, |mean| mean / places);
        let interval = interval.max(shares.interval()).max(CLOSEST);
        self.pace.recalls(interval, now).then_some(interval)
    }

    /// Whether nothing is under way, nor waits.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.waiting.is_empty()
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        if !self.breaker.is_closed() {
            gauge!("bus_breaker_open").decrement(1.0);
        }
    }
}
