//! Who may be attempted now: limits per connection, so that a bad neighbour stays alone (invariant I7).
//!
//! A delivery asks for a place of its connection before its attempt. It gets one, waits briefly for one if the
//! connection is quick, or is told how long it is to be parked, so that what does not fit neither holds its lane's slots
//! nor the broker's window. All of it is decided from memory. What is known of a connection is this worker's own; of
//! what is limited for the whole deployment each worker takes its share.

mod breaker;
mod connection;
mod pace;
mod rate;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bus_core::{
    connection::{Connection, Target},
    ids::ConnectionId,
    peers::Peers,
};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

pub(crate) use self::breaker::Change;
use self::{
    breaker::{Pass, Ticket},
    connection::{Known, STALLED, Shares, Waiting},
    pace::Pace,
    rate::Rate,
};
use crate::{
    config::{BreakerConfig, ConnectionConfig},
    slots::Usage,
};

/// One request that is to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) connection: &'a Connection,
    /// The lane that it comes from.
    pub(crate) lane: &'a Arc<Usage>,
    /// The lane's slots that its deliveries hold.
    pub(crate) slots: usize,
    /// One of its deliveries has been in the queue before, and is not to be kept waiting by those that are new.
    pub(crate) returns: bool,
}

/// Why a request cannot be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// The endpoint fails.
    CircuitOpen,
    /// So many were made lately as the connection allows.
    RateLimit,
    /// So many are under way as the connection may have.
    NoPlace,
    /// Others that came earlier are parked.
    Behind,
}

impl Why {
    /// Its word in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::CircuitOpen => "circuit_open",
            Self::RateLimit => "rate_limit",
            Self::NoPlace => "no_place",
            Self::Behind => "behind",
        }
    }
}

/// What those who look are told.
impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CircuitOpen => "circuit open: the endpoint fails, and is left alone for a while",
            Self::RateLimit => "rate limit of the connection",
            Self::NoPlace => "no free place: the connection has as many requests under way as it may have",
            Self::Behind => "behind earlier deliveries of the connection",
        })
    }
}

/// The request is to be made later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) why: Why,
    /// How much later.
    pub(crate) wait: Duration,
}

/// What this worker knows of the connections that it delivers to. Cheap to clone.
///
/// At most so many are known as connections are kept; of each about 600 bytes. Beyond it those are forgotten that were
/// idle for the longest, and with them that their circuit is open.
#[derive(Debug, Clone)]
pub(crate) struct Admission(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    connections: Mutex<HashMap<ConnectionId, Known>>,
    capacity: usize,
    limits: ConnectionConfig,
    breaker: BreakerConfig,
    peers: Peers,
    /// In `0.0..1.0`.
    random: fn() -> f64,
}

/// What became of a request at first sight.
enum Entered {
    Admitted(Place),
    Waits(oneshot::Receiver<Place>),
    Refused(Refusal),
}

impl Admission {
    pub(crate) fn new(
        limits: ConnectionConfig,
        breaker: BreakerConfig,
        capacity: u64,
        peers: Peers,
        random: fn() -> f64,
    ) -> Self {
        let capacity = usize::try_from(capacity).unwrap_or(usize::MAX).max(1);
        Self(Arc::new(Inner { connections: Mutex::default(), capacity, limits, breaker, peers, random }))
    }

    /// Asks for a place. Takes a second at most.
    pub(crate) async fn admit(&self, request: Request<'_>) -> Result<Place, Refusal> {
        let shares = self.shares(request.connection);
        let place = match self.enter(&request, &shares) {
            Entered::Admitted(place) => place,
            Entered::Refused(refusal) => return Err(refusal),
            Entered::Waits(admitted) => match wait_for(admitted).await {
                Some(place) => place,
                None => return Err(self.refuse(request.connection, Why::NoPlace, &shares)),
            },
        };
        if let Some(rate) = shares.rate {
            match self.token(request.connection, rate) {
                Some(wait) => sleep(wait).await,
                None => return Err(self.refuse(request.connection, Why::RateLimit, &shares)),
            }
        }
        Ok(place)
    }

    /// What of the connection's limits is this worker's.
    fn shares(&self, connection: &Connection) -> Shares {
        let Inner { limits, peers, .. } = &*self.0;
        let own = match &connection.target {
            Target::Webhook(webhook) => webhook.limits,
            Target::Publisher => Default::default(),
        };
        let rate = own.rate.map(|rate| Rate {
            per_second: peers.share_of_rate(rate.per_second),
            burst: peers.share(rate.burst()),
        });
        Shares {
            in_flight: peers.share(own.max_in_flight.unwrap_or(limits.in_flight)),
            rate,
            backlog: Duration::from_secs_f64(peers.share_of_rate(limits.backlog_per_s).recip()),
        }
    }

    fn enter(&self, request: &Request<'_>, shares: &Shares) -> Entered {
        let (now, id, longest) = (Instant::now(), request.connection.id, self.0.limits.wait());
        let mut connections = self.lock();
        if connections.len() >= self.0.capacity && !connections.contains_key(&id) {
            forget_idle(&mut connections);
        }
        let version = request.connection.version;
        let known = connections.entry(id).or_insert_with(|| {
            // One that was parked before this worker knew of its connection: others may be, too.
            let pace = if request.returns { Pace::unknown(now) } else { Pace::new(now) };
            Known::new(version, pace, now)
        });
        known.is_asked(version, shares, now);
        let ticket = match known.breaker(|breaker| breaker.ask(now, &self.0.breaker)) {
            Pass::Granted(ticket) => ticket,
            Pass::Refused(until) => {
                return Entered::Refused(known.park(Why::CircuitOpen, until, shares, now, (self.0.random)()));
            }
        };
        let has_room = known.waiting.is_empty() && known.has_place(request.lane, request.slots);
        let refused = if ticket.is_probe {
            None
        } else if !request.returns && known.pace.is_ahead(now) && !has_room {
            // With room for both, nobody waits for those that are parked.
            Some(Why::Behind)
        } else {
            let waits = |rate| known.bucket.wait(now, rate) > longest;
            shares.rate.is_some_and(waits).then_some(Why::RateLimit)
        };
        let why = match refused {
            None if has_room => {
                return Entered::Admitted(known.take(self, id, ticket, request.lane, request.slots, now));
            }
            None if !ticket.is_probe && known.may_wait(longest, now) => {
                let (admitted, place) = oneshot::channel();
                let (lane, slots) = (Arc::clone(request.lane), request.slots);
                known.waiting.push_back(Waiting { lane, slots, ticket, admitted });
                return Entered::Waits(place);
            }
            refused => refused.unwrap_or(Why::NoPlace),
        };
        known.breaker(|breaker| breaker.abandon(ticket));
        Entered::Refused(known.park(why, now, shares, now, (self.0.random)()))
    }

    /// The next token, and how long until it is there, unless that is too long.
    fn token(&self, connection: &Connection, rate: Rate) -> Option<Duration> {
        let now = Instant::now();
        let mut connections = self.lock();
        // Whoever has a place is known.
        let bucket = &mut connections.get_mut(&connection.id)?.bucket;
        (bucket.wait(now, rate) <= self.0.limits.wait()).then(|| bucket.take(now, rate))
    }

    fn refuse(&self, connection: &Connection, why: Why, shares: &Shares) -> Refusal {
        let now = Instant::now();
        let mut connections = self.lock();
        let version = connection.version;
        let known =
            connections.entry(connection.id).or_insert_with(|| Known::new(version, Pace::new(now), now));
        let until = known.breaker(|breaker| breaker.open_until());
        let why = if until.is_some() { Why::CircuitOpen } else { why };
        known.park(why, until.unwrap_or(now), shares, now, (self.0.random)())
    }

    /// Whether the connection has room while others of it are parked for long, and how fast these may come back then.
    pub(crate) fn recalls(&self, connection: &Connection) -> Option<Duration> {
        let shares = self.shares(connection);
        let own =
            self.lock().get_mut(&connection.id)?.recalls(connection.version, &shares, Instant::now())?;
        // Those that are parked are nobody's; they come back to all workers.
        Some(own / self.0.peers.count().get())
    }

    /// So many come back sooner, one in each `interval`; perhaps these are all that are parked.
    pub(crate) fn recalled(&self, connection: ConnectionId, interval: Duration, seen: u32, all: bool) {
        if let Some(known) = self.lock().get_mut(&connection) {
            known.pace.recalled(interval, seen, all, Instant::now());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ConnectionId, Known>> {
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that stops to answer is noticed after this time, too.
async fn wait_for(mut admitted: oneshot::Receiver<Place>) -> Option<Place> {
    match timeout(STALLED, &mut admitted).await {
        Ok(place) => place.ok(),
        Err(_) => {
            admitted.close();
            admitted.try_recv().ok()
        }
    }
}

/// Makes room, for a while: a quarter of those that nothing is under way for, the longest idle first.
fn forget_idle(connections: &mut HashMap<ConnectionId, Known>) {
    let mut idle: Vec<(Instant, ConnectionId)> = connections
        .iter()
        .filter(|(_, known)| known.is_idle())
        .map(|(id, known)| (known.used, *id))
        .collect();
    idle.sort_unstable();
    for (_, id) in idle.iter().take(idle.len().div_ceil(4)) {
        connections.remove(id);
    }
}

/// A place among a connection's requests, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Admission,
    connection: ConnectionId,
    ticket: Ticket,
    lane: Arc<Usage>,
    slots: usize,
    taken_at: Instant,
    reported: bool,
}

impl Place {
    /// Says whether the endpoint failed; `None` if the attempt tells nothing of it.
    pub(crate) fn report(&mut self, failed: Option<bool>) -> Option<Change> {
        let (now, ticket) = (Instant::now(), self.ticket);
        let Inner { breaker: rules, random, .. } = &*self.admission.0;
        let mut connections = self.admission.lock();
        let known = connections.get_mut(&self.connection)?;
        let changed = known.breaker(|breaker| match failed {
            Some(failed) => breaker.report(ticket, failed, now, rules, random()),
            None => {
                breaker.abandon(ticket);
                None
            }
        });
        self.reported = true;
        if changed.is_some() {
            known.has_changed();
        }
        changed
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.admission.lock();
        // Nobody is forgotten who has a place.
        let Some(known) = connections.get_mut(&self.connection) else { return };
        if !self.reported {
            let ticket = self.ticket;
            known.breaker(|breaker| breaker.abandon(ticket));
        }
        let unwanted = known.give_back(self, Instant::now());
        drop(connections);
        drop(unwanted);
    }
}

#[cfg(test)]
#[path = "admission/tests.rs"]
mod tests;
