//! Who wants what: the shops, their subscriptions, and what each subscription must get.
//!
//! What must be delivered is written here as Rust over typed events. The bus sees only the patterns and
//! the JSONPath over JSON, so the two can disagree.

use super::events::{Event, Happening, Publisher, Tier};

/// An organization of the demo.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shop {
    /// Its name.
    pub(super) name: &'static str,
    /// What it writes into its events, and the start of its receivers' paths.
    pub(super) slug: &'static str,
    /// Its subscriptions.
    pub(super) subscriptions: [Subscription; 5],
}

/// What a subscription says of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Another type or another publisher.
    NotMine,
    /// The right kind, but the filter selects nothing in it.
    Filtered,
    /// To be delivered.
    Deliver,
}

/// A subscription, with a connection of the same name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subscription {
    pub(super) name: &'static str,
    pub(super) event_type: &'static str,
    pub(super) publisher: Option<Publisher>,
    pub(super) filter: Option<&'static str>,
    /// The same in Rust: the kind of event, and what the filter asks of it.
    wants: fn(&Event) -> bool,
    selects: fn(&Event) -> bool,
}

impl Subscription {
    pub(super) fn judge(&self, event: &Event) -> Verdict {
        match ((self.wants)(event), (self.selects)(event)) {
            (false, _) => Verdict::NotMine,
            (true, false) => Verdict::Filtered,
            (true, true) => Verdict::Deliver,
        }
    }

    /// What it asks for, for people.
    pub(super) fn describe(&self) -> String {
        let publisher =
            self.publisher.map_or_else(String::new, |publisher| format!(" from {}", publisher.name()));
        let filter = self.filter.map_or_else(String::new, |filter| format!(" where {filter}"));
        format!("{}{publisher}{filter}", self.event_type)
    }
}

fn all(_: &Event) -> bool {
    true
}

fn is_order(event: &Event) -> bool {
    matches!(event.happening, Happening::OrderPlaced { .. })
}

fn is_payment(event: &Event) -> bool {
    matches!(event.happening, Happening::PaymentCaptured { .. } | Happening::PaymentDeclined { .. })
}

fn is_shipment(event: &Event) -> bool {
    matches!(
        event.happening,
        Happening::ShipmentDispatched { .. }
            | Happening::ParcelDelivered { .. }
            | Happening::ParcelReturned { .. }
    )
}

fn has_expensive_item(event: &Event) -> bool {
    matches!(&event.happening, Happening::OrderPlaced { items, .. } if items.iter().any(|item| item.price >= 20_000))
}

fn is_of_gold_customer(event: &Event) -> bool {
    matches!(event.happening, Happening::OrderPlaced { tier: Tier::Gold, .. })
}

const FULFILMENT: Subscription = Subscription {
    name: "fulfilment",
    event_type: "order.placed",
    publisher: None,
    filter: None,
    wants: is_order,
    selects: all,
};

const ACCOUNTING: Subscription = Subscription {
    name: "accounting",
    event_type: "payment.*",
    publisher: None,
    filter: None,
    wants: is_payment,
    selects: all,
};

const TRACKING: Subscription = Subscription {
    name: "tracking",
    event_type: "shipment.>",
    publisher: None,
    filter: None,
    wants: is_shipment,
    selects: all,
};

const ANALYTICS: Subscription = Subscription {
    name: "analytics",
    event_type: ">",
    publisher: Some(Publisher::Storefront),
    filter: None,
    wants: |event| event.publisher == Publisher::Storefront,
    selects: all,
};

const CONCIERGE: Subscription = Subscription {
    name: "concierge",
    event_type: "order.placed",
    publisher: None,
    filter: Some("$.items[?@.price >= 20000]"),
    wants: is_order,
    selects: has_expensive_item,
};

/// Two shops that call everything by the same names. Only what `concierge` asks for differs.
pub(super) const SHOPS: [Shop; 2] = [
    Shop {
        name: "Alpine Outfitters",
        slug: "alpine",
        subscriptions: [FULFILMENT, ACCOUNTING, TRACKING, ANALYTICS, CONCIERGE],
    },
    Shop {
        name: "Boreal Trading",
        slug: "boreal",
        subscriptions: [
            FULFILMENT,
            ACCOUNTING,
            TRACKING,
            ANALYTICS,
            Subscription { filter: Some("$[?@.tier == 'gold']"), selects: is_of_gold_customer, ..CONCIERGE },
        ],
    },
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::{super::events::draw, *};

    #[test]
    fn every_subscription_gets_something_and_refuses_something() {
        let events = draw(300, 1);
        for subscription in SHOPS.iter().flat_map(|shop| &shop.subscriptions) {
            let count = |verdict| events.iter().filter(|event| subscription.judge(event) == verdict).count();
            assert!(count(Verdict::Deliver) > 0, "{subscription:?}");
            assert!(count(Verdict::NotMine) > 0, "{subscription:?}");
            assert_eq!(count(Verdict::Filtered) > 0, subscription.filter.is_some(), "{subscription:?}");
        }
    }
}
