//! Cron expressions in time zones: [`bus_core::schedule::Recurrence`].

#![allow(clippy::unwrap_used, missing_docs)]

mod independent;
mod page;
mod properties;
mod syntax;

use bus_core::schedule::Recurrence;
use jiff::{
    Timestamp,
    tz::{TimeZone, TimeZoneDatabase},
};

fn recurrence(cron: &str, timezone: &str) -> Recurrence {
    Recurrence::parse(cron, timezone).unwrap_or_else(|error| panic!("{cron} in {timezone}: {error}"))
}

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn zone(name: &str) -> TimeZone {
    TimeZoneDatabase::bundled().get(name).unwrap()
}

/// When a zone's clocks are changed.
fn changes(timezone: &str, from: Timestamp, until: Timestamp) -> Vec<Timestamp> {
    let zone = zone(timezone);
    let changes = zone.following(from).map(|change| change.timestamp());
    changes.take_while(|change| *change < until).collect()
}
