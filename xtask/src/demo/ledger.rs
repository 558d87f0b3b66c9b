//! What was published, what came, and what should have come.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use devkit::receiver::Received;
use serde::Deserialize;
use standardwebhooks::Webhook;

use super::{
    events::Event,
    scenario::{Shop, Subscription, Verdict},
};

/// The most problems that are told one by one.
const MAX_TOLD: usize = 10;

/// What came for one subscription.
pub(super) struct Inbox<'a> {
    pub(super) shop: &'a Shop,
    pub(super) subscription: &'a Subscription,
    /// The secret that the bus showed when the connection was made.
    pub(super) secret: &'a str,
    pub(super) received: Vec<Received>,
}

/// An event that the bus accepted.
pub(super) struct Published {
    pub(super) event: Event,
    /// When the request was sent.
    pub(super) at: Instant,
}

/// The numbers of one subscription.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) published: usize,
    pub(super) matched: usize,
    pub(super) filtered: usize,
    pub(super) delivered: usize,
    pub(super) duplicates: usize,
    pub(super) p50: Option<Duration>,
    pub(super) p99: Option<Duration>,
}

/// What is wrong, if anything. All of these must be zero.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// Events of one organization at a receiver of another.
    pub(super) leaks: usize,
    /// Deliveries that the subscription did not ask for.
    pub(super) unwanted: usize,
    /// Signatures that do not verify.
    pub(super) forged: usize,
    /// Repeats of a delivery under another `webhook-id`.
    pub(super) renamed: usize,
    /// The first of them, in words.
    pub(super) told: Vec<String>,
}

impl Faults {
    fn tell(&mut self, text: String) {
        if self.told.len() < MAX_TOLD {
            self.told.push(text);
        }
    }
}

/// What a receiver reads of an event.
#[derive(Deserialize)]
struct Seen {
    id: String,
    data: SeenData,
}

#[derive(Deserialize)]
struct SeenData {
    shop: String,
}

/// Compares what came for one subscription with what its shop published.
pub(super) fn settle(published: &[Published], inbox: &Inbox<'_>, faults: &mut Faults) -> Row {
    let events: HashMap<&str, &Published> =
        published.iter().map(|published| (published.event.id.as_str(), published)).collect();
    let count = |verdict| {
        published.iter().filter(|published| inbox.subscription.judge(&published.event) == verdict).count()
    };
    let place = format!("{} / {}", inbox.shop.name, inbox.subscription.name);
    // Each event's first arrival, under its webhook-id.
    let mut first: HashMap<&str, (&str, Duration)> = HashMap::new();
    let mut duplicates = 0;
    for received in &inbox.received {
        if let Err(error) = verify(inbox.secret, received) {
            faults.forged += 1;
            faults.tell(format!("{place}: {error}"));
        }
        let Ok(seen) = serde_json::from_slice::<Seen>(&received.body) else {
            faults.unwanted += 1;
            faults.tell(format!("{place}: not an event of this demo"));
            continue;
        };
        if seen.data.shop != inbox.shop.slug {
            faults.leaks += 1;
            faults.tell(format!("{place}: event {} belongs to {}", seen.id, seen.data.shop));
            continue;
        }
        let known = events.get(seen.id.as_str());
        let Some(known) = known.filter(|known| inbox.subscription.judge(&known.event) == Verdict::Deliver)
        else {
            faults.unwanted += 1;
            faults.tell(format!("{place}: event {} was not asked for", seen.id));
            continue;
        };
        let id = received.header("webhook-id");
        match first.get(known.event.id.as_str()) {
            None => {
                first.insert(&known.event.id, (id, received.at.saturating_duration_since(known.at)));
            }
            Some((first_id, _)) => {
                duplicates += 1;
                if *first_id != id {
                    faults.renamed += 1;
                    faults.tell(format!("{place}: event {} came as {first_id} and as {id}", seen.id));
                }
            }
        }
    }
    let mut latencies: Vec<Duration> = first.values().map(|(_, latency)| *latency).collect();
    latencies.sort_unstable();
    Row {
        published: published.len(),
        matched: count(Verdict::Deliver),
        filtered: count(Verdict::Filtered),
        delivered: first.len(),
        duplicates,
        p50: percentile(&latencies, 50),
        p99: percentile(&latencies, 99),
    }
}

/// Verifies a request with the reference implementation of Standard Webhooks.
fn verify(secret: &str, received: &Received) -> Result<(), String> {
    let webhook = Webhook::new(secret).map_err(|error| format!("the secret cannot be used: {error}"))?;
    webhook
        .verify(&received.body, &received.headers)
        .map_err(|error| format!("a signature does not verify: {error}"))
}

/// The value below which `percent` of the sorted values lie (nearest rank).
fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items, clippy::disallowed_methods)]

    use std::time::SystemTime;

    use super::{
        super::{events::draw, scenario::SHOPS},
        *,
    };

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn delivery(event: &Event, shop: &str, webhook_id: &'static str, secret: &str) -> Received {
        let body = event.to_json(shop).to_string();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let webhook = Webhook::new(secret).unwrap();
        let signature = webhook.sign(webhook_id, now.try_into().unwrap(), body.as_bytes()).unwrap();
        let mut received = Received {
            method: Default::default(),
            path: String::new(),
            query: None,
            headers: Default::default(),
            body: body.into(),
            at: Instant::now(),
            time: Default::default(),
        };
        received.headers.insert("webhook-id", webhook_id.parse().unwrap());
        received.headers.insert("webhook-timestamp", now.into());
        received.headers.insert("webhook-signature", signature.parse().unwrap());
        received
    }

    /// What the ledger says of the first subscription of the first shop, `order.placed`.
    fn settled(receive: impl FnOnce(&[Event]) -> Vec<Received>) -> (Row, Faults) {
        let shop = &SHOPS[0];
        let at = Instant::now();
        let events = draw(200, 3);
        let received = receive(&events);
        let published: Vec<_> = events.into_iter().map(|event| Published { event, at }).collect();
        let mut faults = Faults::default();
        let inbox = Inbox { shop, subscription: &shop.subscriptions[0], secret: SECRET, received };
        (settle(&published, &inbox, &mut faults), faults)
    }

    fn is_order(event: &&Event) -> bool {
        event.event_type() == "order.placed"
    }

    #[test]
    fn all_that_was_asked_for_and_nothing_else_is_well() {
        let (row, faults) = settled(|events| {
            events.iter().filter(is_order).map(|event| delivery(event, "alpine", "m_1", SECRET)).collect()
        });
        assert_eq!((row.published, row.delivered, row.duplicates), (200, row.matched, 0));
        assert!(row.matched > 0 && row.p50.is_some() && row.p50 <= row.p99);
        assert!(faults.told.is_empty(), "{faults:?}");
    }

    #[test]
    fn what_does_not_come_is_missing() {
        let (row, _) = settled(|_| Vec::new());
        assert!(row.matched > 0);
        assert_eq!((row.delivered, row.p50), (0, None));
    }

    #[test]
    fn a_repeat_is_a_duplicate_and_under_another_id_a_fault() {
        let (row, faults) = settled(|events| {
            let order = events.iter().find(is_order).unwrap();
            ["m_1", "m_1", "m_2"].map(|id| delivery(order, "alpine", id, SECRET)).into()
        });
        assert_eq!((row.delivered, row.duplicates, faults.renamed), (1, 2, 1));
    }

    #[test]
    fn an_event_of_another_organization_is_a_leak_and_not_delivered() {
        let (row, faults) = settled(|events| {
            let order = events.iter().find(is_order).unwrap();
            vec![delivery(order, "boreal", "m_1", SECRET)]
        });
        assert_eq!((row.delivered, faults.leaks), (0, 1));
    }

    #[test]
    fn an_event_that_was_not_asked_for_and_a_wrong_signature_are_faults() {
        let (row, faults) = settled(|events| {
            let other = events.iter().find(|event| !is_order(event)).unwrap();
            let order = events.iter().find(is_order).unwrap();
            let wrong = "whsec_d3Jvbmd3cm9uZ3dyb25nd3Jvbmd3cm9uZw==";
            vec![delivery(other, "alpine", "m_1", SECRET), delivery(order, "alpine", "m_2", wrong)]
        });
        assert_eq!((row.delivered, faults.unwanted, faults.forged), (1, 1, 1));
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&values, 50), Some(Duration::from_millis(100)));
        assert_eq!(percentile(&values, 99), Some(Duration::from_millis(198)));
        assert_eq!(percentile(&values[..1], 50), Some(Duration::from_millis(1)));
        assert_eq!(percentile(&[], 99), None);
    }
}
