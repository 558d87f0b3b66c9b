//! What happens in a shop: events that look like real ones, the same ones for the same seed.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

/// Who publishes an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Publisher {
    Storefront,
    Warehouse,
}

impl Publisher {
    pub(super) const ALL: [Self; 2] = [Self::Storefront, Self::Warehouse];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Storefront => "storefront",
            Self::Warehouse => "warehouse",
        }
    }
}

/// One product in an order. Prices are in cents.
#[derive(Debug, Clone)]
pub(super) struct Item {
    sku: &'static str,
    quantity: u32,
    pub(super) price: u32,
}

/// How loyal a customer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    Basic,
    Silver,
    Gold,
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Basic => "basic",
            Self::Silver => "silver",
            Self::Gold => "gold",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone)]
pub(super) enum Happening {
    OrderPlaced { items: Vec<Item>, tier: Tier },
    OrderCancelled { reason: &'static str },
    PaymentCaptured { amount: u32, method: &'static str },
    PaymentDeclined { amount: u32, code: &'static str },
    CustomerRegistered { tier: Tier, newsletter: bool },
    ShipmentDispatched { carrier: &'static str, parcels: u32 },
    ParcelDelivered { carrier: &'static str },
    ParcelReturned { carrier: &'static str, reason: &'static str },
}

/// An event of one shop.
#[derive(Debug, Clone)]
pub(super) struct Event {
    /// Unique within a shop; the shops use the same ones.
    pub(super) id: String,
    pub(super) publisher: Publisher,
    pub(super) happening: Happening,
    subject: String,
    customer: &'static str,
}

const PRODUCTS: [(&str, u32); 10] = [
    ("tent-2p", 24_900),
    ("tent-4p", 42_900),
    ("stove", 6_450),
    ("sleeping-bag", 15_900),
    ("headlamp", 3_990),
    ("boots", 17_950),
    ("rain-jacket", 21_900),
    ("water-filter", 4_990),
    ("gps-watch", 38_500),
    ("socks", 1_490),
];
const CUSTOMERS: [&str; 8] = [
    "Amara Okafor",
    "Björn Lindqvist",
    "Chen Wei",
    "Dolores Ibáñez",
    "Elif Yılmaz",
    "Farid Haddad",
    "Grace O'Neill",
    "Hana Sato",
];
const CARRIERS: [&str; 3] = ["Northwind Freight", "Swift Parcel", "Blue Heron"];

impl Happening {
    pub(super) fn event_type(&self) -> &'static str {
        match self {
            Self::OrderPlaced { .. } => "order.placed",
            Self::OrderCancelled { .. } => "order.cancelled",
            Self::PaymentCaptured { .. } => "payment.captured",
            Self::PaymentDeclined { .. } => "payment.declined",
            Self::CustomerRegistered { .. } => "customer.registered",
            Self::ShipmentDispatched { .. } => "shipment.dispatched",
            Self::ParcelDelivered { .. } => "shipment.parcel.delivered",
            Self::ParcelReturned { .. } => "shipment.parcel.returned",
        }
    }

    fn publisher(&self) -> Publisher {
        match self {
            Self::ShipmentDispatched { .. } | Self::ParcelDelivered { .. } | Self::ParcelReturned { .. } => {
                Publisher::Warehouse
            }
            _ => Publisher::Storefront,
        }
    }

    fn data(&self) -> Value {
        match self {
            Self::OrderPlaced { items, tier } => json!({
                "items": items
                    .iter()
                    .map(|item| json!({ "sku": item.sku, "quantity": item.quantity, "price": item.price }))
                    .collect::<Vec<_>>(),
                "total": items.iter().map(|item| item.quantity * item.price).sum::<u32>(),
                "customer": { "tier": tier.name() },
            }),
            Self::OrderCancelled { reason } => json!({ "reason": reason }),
            Self::PaymentCaptured { amount, method } => json!({ "amount": amount, "method": method }),
            Self::PaymentDeclined { amount, code } => json!({ "amount": amount, "code": code }),
            Self::CustomerRegistered { tier, newsletter } => {
                json!({ "customer": { "tier": tier.name() }, "newsletter": newsletter })
            }
            Self::ShipmentDispatched { carrier, parcels } => {
                json!({ "carrier": carrier, "parcels": parcels })
            }
            Self::ParcelDelivered { carrier } => json!({ "carrier": carrier }),
            Self::ParcelReturned { carrier, reason } => json!({ "carrier": carrier, "reason": reason }),
        }
    }

    fn draw(random: &mut StdRng) -> Self {
        let amount = random.random_range(1_490..60_000);
        let carrier = pick(random, &CARRIERS);
        match random.random_range(0..100) {
            0..30 => {
                let items = (0..random.random_range(1..=3)).map(|_| {
                    let (sku, price) = pick(random, &PRODUCTS);
                    Item { sku, quantity: random.random_range(1..=2), price }
                });
                Self::OrderPlaced { items: items.collect(), tier: tier(random) }
            }
            30..36 => Self::OrderCancelled { reason: pick(random, &["changed my mind", "found it cheaper"]) },
            36..58 => Self::PaymentCaptured { amount, method: pick(random, &["card", "invoice", "wallet"]) },
            58..64 => {
                Self::PaymentDeclined { amount, code: pick(random, &["insufficient_funds", "expired_card"]) }
            }
            64..74 => Self::CustomerRegistered { tier: tier(random), newsletter: random.random() },
            74..88 => Self::ShipmentDispatched { carrier, parcels: random.random_range(1..=3) },
            88..97 => Self::ParcelDelivered { carrier },
            _ => Self::ParcelReturned { carrier, reason: pick(random, &["address unknown", "refused"]) },
        }
    }
}

fn tier(random: &mut StdRng) -> Tier {
    pick(random, &[Tier::Basic, Tier::Basic, Tier::Silver, Tier::Gold])
}

fn pick<T: Copy>(random: &mut StdRng, choices: &[T]) -> T {
    *choices.choose(random).expect("there is something to choose from")
}

/// The events of one shop: always the same for the same seed.
pub(super) fn draw(n: usize, seed: u64) -> Vec<Event> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..n)
        .map(|number| {
            let happening = Happening::draw(&mut random);
            let publisher = happening.publisher();
            let subject = format!("{}/{}", publisher.name(), random.random_range(10_000..100_000));
            Event {
                id: format!("e-{number:05}"),
                publisher,
                happening,
                subject,
                customer: pick(&mut random, &CUSTOMERS),
            }
        })
        .collect()
}

impl Event {
    pub(super) fn event_type(&self) -> &'static str {
        self.happening.event_type()
    }

    /// The CloudEvent, structured. `shop` is the only trace of where it belongs.
    pub(super) fn to_json(&self, shop: &str) -> Value {
        let mut data = self.happening.data();
        data["shop"] = shop.into();
        data["name"] = self.customer.into();
        json!({
            "specversion": "1.0",
            "id": self.id,
            "source": format!("/shop/{}", self.publisher.name()),
            "type": self.event_type(),
            "subject": self.subject,
            "datacontenttype": "application/json",
            "data": data,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    fn text(events: &[Event]) -> Vec<String> {
        events.iter().map(|event| event.to_json("a").to_string()).collect()
    }

    #[test]
    fn a_seed_always_tells_the_same_story_and_another_one_does_not() {
        assert_eq!(text(&draw(50, 7)), text(&draw(50, 7)));
        assert_ne!(text(&draw(50, 7)), text(&draw(50, 8)));
    }

    #[test]
    fn a_few_hundred_events_hold_some_of_each_kind() {
        let mut types: Vec<_> = draw(300, 1).iter().map(Event::event_type).collect();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), 8, "{types:?}");
    }
}
