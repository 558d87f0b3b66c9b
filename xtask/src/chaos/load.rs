//! What is published: the same for the same seed, and each again and again until its fate is known.

use std::{
    sync::{Arc, RwLock},
    time::Duration,
};

use anyhow::{Context as _, Result};
use devkit::client::Reply;
use jiff::{SignedDuration, Timestamp};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};
use tokio::{
    sync::Semaphore,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    ledger::{Accepted, Entry, Ledger, now},
    scene::Tenant,
};

/// Requests under way at a time, those that are tried again among them.
const REQUESTS: usize = 256;
/// How long one request may take, and the pause before it is tried again.
const REQUEST: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(200);
/// How long after the end of the load a request is still tried again.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// How far ahead an event may be due.
pub(super) const AHEAD_MS: u64 = 12_000;

const KINDS: [&str; 8] = [
    "order.created",
    "order.paid",
    "order.paid.late",
    "user.created",
    "user.signed.up",
    "stock.low",
    "stock.gone",
    "bad.luck",
];

/// Where the publishers are, by index; a place is empty while its publisher is away.
pub(super) type Publishers = Arc<RwLock<Vec<Option<String>>>>;

/// Publishes until it is told to stop.
#[derive(Debug)]
pub(super) struct Load {
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// One request.
#[derive(Debug, Clone)]
struct Letter {
    number: u64,
    tenant: Tenant,
    events: Vec<Event>,
}

#[derive(Debug, Clone)]
struct Event {
    id: String,
    kind: &'static str,
    number: u32,
    deliver_at: Option<Timestamp>,
}

impl Load {
    pub(super) fn start(
        seed: u64,
        per_second: u32,
        tenants: Vec<Tenant>,
        publishers: Publishers,
        ledger: Ledger,
    ) -> Self {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (stopped, sending) = (stop.clone(), tasks.clone());
        let room = Arc::new(Semaphore::new(REQUESTS));
        tasks.spawn(async move {
            let mut pace = interval(Duration::from_secs(1) / per_second.max(1));
            pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for number in 0.. {
                let next = async {
                    pace.tick().await;
                    Arc::clone(&room).acquire_owned().await.ok()
                };
                let Some(Some(permit)) = stopped.run_until_cancelled(next).await else { return };
                let letter = Letter::draw(seed, number, &tenants);
                let send = send(letter, publishers.clone(), ledger.clone(), stopped.clone());
                sending.spawn(async move {
                    send.await;
                    drop(permit);
                });
            }
        });
        Self { stop, tasks }
    }

    /// Stops, and waits until the fate of every request is known, or cannot be learned.
    pub(super) async fn finish(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Letter {
    fn draw(seed: u64, number: u64, tenants: &[Tenant]) -> Self {
        let mut random = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003).wrapping_add(number));
        let tenant = &tenants[random.random_range(0..tenants.len())];
        let events = if random.random_bool(0.1) { random.random_range(2..8) } else { 1 };
        let later = random.random_bool(0.1);
        let ahead = random.random_range(500..AHEAD_MS);
        let deliver_at =
            later.then(|| now() + SignedDuration::from_millis(i64::try_from(ahead).unwrap_or_default()));
        let event = |place: u32| {
            let kind = KINDS.choose(&mut random).copied().unwrap_or(KINDS[0]);
            Event {
                id: format!("e-{number}-{place}"),
                kind,
                number: random.random_range(0..1_000),
                deliver_at,
            }
        };
        Self { number, tenant: tenant.clone(), events: (0..events).map(event).collect() }
    }

    fn body(&self) -> Value {
        let mut bodies = self.events.iter().map(|event| {
            let mut body = json!({
                "type": event.kind, "id": event.id, "source": "/chaos",
                "data": { "organization": self.tenant.name, "item": { "number": event.number } },
            });
            if let Some(deliver_at) = event.deliver_at {
                body["deliverAt"] = deliver_at.to_string().into();
            }
            body
        });
        match &self.events[..] {
            [_] => bodies.next().unwrap_or_default(),
            _ => bodies.collect(),
        }
    }

    fn note(&self, reply: &Reply, sent: Timestamp, tries: u32, ledger: &Ledger) {
        let items = reply.body["items"].as_array();
        let answers = items.map_or(std::slice::from_ref(&reply.body), Vec::as_slice);
        for (event, answer) in self.events.iter().zip(answers) {
            ledger.write(Entry::Accepted(Accepted {
                organization: self.tenant.name.clone(),
                id: event.id.clone(),
                uid: answer["uid"].as_str().unwrap_or_default().to_owned(),
                kind: event.kind.to_owned(),
                number: event.number,
                sent,
                deliver_at: event.deliver_at,
                tries,
            }));
        }
    }
}

/// Sends a letter to one publisher after the other until one of them says what became of it. Its events have ids, so that
/// it is taken once.
async fn send(letter: Letter, publishers: Publishers, ledger: Ledger, stop: CancellationToken) {
    let body = letter.body();
    let sent = now();
    let mut tries = 0;
    let sending = async {
        loop {
            let place = usize::try_from(letter.number).unwrap_or_default() + tries as usize;
            let base = {
                let known = publishers.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                known[place % known.len()].clone()
            };
            tries += 1;
            if let Some(base) = base
                && let Ok(Ok(reply)) = timeout(REQUEST, letter.tenant.api.at(base).publish(&body)).await
            {
                match reply.status {
                    202 => return letter.note(&reply, sent, tries, &ledger),
                    408 | 409 | 429 | 500.. => {}
                    status => {
                        for event in &letter.events {
                            let (organization, id) = (letter.tenant.name.clone(), event.id.clone());
                            let answer = format!("{status} {}", reply.body);
                            ledger.write(Entry::Refused { organization, id, answer });
                        }
                        return;
                    }
                }
            }
            sleep(PAUSE).await;
        }
    };
    let patience = async {
        stop.cancelled().await;
        sleep(PATIENCE).await;
    };
    tokio::select! {
        () = sending => {}
        () = patience => {
            for event in &letter.events {
                let (organization, id) = (letter.tenant.name.clone(), event.id.clone());
                ledger.write(Entry::Unresolved { organization, id });
            }
        }
    }
}

/// Creates schedules that tick until the load ends, before anything is broken; gives their ids with their tenants.
pub(super) async fn schedules(
    tenants: &[Tenant],
    seconds: u64,
    ledger: &Ledger,
) -> Result<Vec<(Tenant, String)>> {
    let mut created = Vec::new();
    for tenant in tenants {
        for (kind, cron, every) in [("tick.second", "* * * * * *", 1), ("tick.five", "*/5 * * * * *", 5)] {
            let end = now().as_second() + i64::try_from(seconds)?;
            let event = json!({
                "type": kind, "source": "/chaos", "cron": cron, "missed": "catch_up", "catchUpLimit": 1_000,
                "endsAt": Timestamp::from_second(end)?.to_string(),
                "data": { "organization": tenant.name, "item": { "number": 999 } },
            });
            let reply = tenant.api.publish(&event).await?.require(201)?;
            let schedule = reply.string("/id")?.to_owned();
            let first: Timestamp = reply.string("/next/0")?.parse().context("read the first tick")?;
            ledger.write(Entry::Schedule {
                organization: tenant.name.clone(),
                schedule: schedule.clone(),
                kind: kind.to_owned(),
                first: first.as_second(),
                last: end - end.rem_euclid(every),
                every,
            });
            created.push((tenant.clone(), schedule));
        }
    }
    Ok(created)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use devkit::client::ApiClient;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_load() {
        let tenants =
            ["a", "b"].map(|name| Tenant { name: name.to_owned(), api: ApiClient::new("http://x").unwrap() });
        let drawn = |seed| -> Vec<String> {
            let letters = (0..50).map(|number| Letter::draw(seed, number, &tenants));
            letters
                .map(|letter| {
                    format!(
                        "{} {:?}",
                        letter.tenant.name,
                        letter
                            .events
                            .iter()
                            .map(|event| (event.kind, event.number, event.deliver_at.is_some()))
                            .collect::<Vec<_>>()
                    )
                })
                .collect()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
    }
}
