//! Identifiers. Each kind is a type of its own, so that two of them cannot be swapped in a call.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }
    };
}

id!(
    /// A tenant.
    OrganizationId
);
id!(
    /// An API key; the key's secret part is never part of it.
    KeyId
);
id!(
    /// An identity that publishes, receives, or both.
    ConnectionId
);
id!(
    /// What one connection wants to receive.
    SubscriptionId
);
id!(
    /// The bus's own id of an event, unique across organizations. A CloudEvent's `id` is unique only
    /// together with its `source` (CloudEvents 1.0, "id").
    EventUid
);
id!(
    /// One event for one subscription; the `webhook-id` of all its attempts.
    DeliveryId
);
id!(
    /// One publish transaction's unfinished fan-out.
    OutboxId
);
id!(
    /// A job that brings deliveries back, or discards dead letters.
    ReplayId
);
id!(
    /// A job that empties payloads.
    ErasureId
);
id!(
    /// An event that recurs.
    ScheduleId
);
id!(
    /// One audit record.
    AuditId
);

impl DeliveryId {
    /// The delivery of `event` to `subscription`: a UUIDv5 (RFC 9562 §5.5) of the two, so that
    /// whoever fans an event out, and however often, names each delivery alike (invariant I9).
    pub fn derive(event: EventUid, subscription: SubscriptionId) -> Self {
        Self(Uuid::new_v5(&event.0, subscription.0.as_bytes()))
    }
}

impl EventUid {
    /// The uid of an event that enters history at `at`: a UUIDv7 of that time, milliseconds, with the other bits
    /// of `random`.
    pub fn at(at: Timestamp, random: Uuid) -> Self {
        const OTHER_BITS: u128 = (1 << 76) - 1;
        Self(Uuid::from_u128((uuid_floor(at).as_u128() & !OTHER_BITS) | (random.as_u128() & OTHER_BITS)))
    }

    /// The uid of the occurrence of `schedule` at `tick`: whoever fires it, and however often it is tried, there
    /// is one. In place of the random bits are those of a UUIDv5 of the two (RFC 9562 §5.5).
    pub fn of_tick(schedule: ScheduleId, tick: Timestamp) -> Self {
        Self::at(tick, Uuid::new_v5(&schedule.0, &tick.as_millisecond().to_be_bytes()))
    }

    /// When the event arrived, milliseconds: a uid is a UUIDv7. Of one that was due later, its due time.
    pub fn received_at(self) -> Option<Timestamp> {
        let (seconds, nanos) = self.0.get_timestamp()?.to_unix();
        Timestamp::new(i64::try_from(seconds).ok()?, i32::try_from(nanos).ok()?).ok()
    }
}

impl OrganizationId {
    /// The lane of this organization among `lanes`. The low 62 bits of a UUIDv7 are random
    /// (RFC 9562 §5.7), so the remainder spreads organizations evenly.
    pub fn lane(self, lanes: u16) -> u16 {
        let lanes = u128::from(lanes.max(1));
        u16::try_from(self.0.as_u128() % lanes).expect("a remainder of a u16 fits a u16")
    }
}

/// Makes new ids.
pub trait Ids: Send + Sync + fmt::Debug {
    /// A UUIDv7 (RFC 9562 §5.7), later than every one this generator made before.
    fn next(&self) -> Uuid;
}

/// The generator of the running system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemIds;

impl Ids for SystemIds {
    #[expect(clippy::disallowed_methods, reason = "the one place that makes ids")]
    fn next(&self) -> Uuid {
        Uuid::now_v7()
    }
}

/// The smallest UUIDv7 of a moment: the bound for a range of time over a UUIDv7 key.
pub fn uuid_floor(at: Timestamp) -> Uuid {
    let millis = u64::try_from(at.as_millisecond()).unwrap_or(0) & 0xFFFF_FFFF_FFFF;
    Uuid::from_u128((u128::from(millis) << 80) | (7 << 76) | (2 << 62))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i9_the_delivery_id_depends_on_nothing_but_event_and_subscription() {
        let (event, other) = (EventUid(SystemIds.next()), EventUid(SystemIds.next()));
        let subscription = SubscriptionId(SystemIds.next());
        assert_eq!(DeliveryId::derive(event, subscription), DeliveryId::derive(event, subscription));
        assert_ne!(DeliveryId::derive(event, subscription), DeliveryId::derive(other, subscription));
    }

    #[test]
    fn the_floor_of_a_moment_sorts_between_the_ids_before_and_after_it() {
        let before = SystemIds.next();
        let (seconds, nanos) = before.get_timestamp().expect("a v7 id has a time").to_unix();
        let at = Timestamp::new(
            i64::try_from(seconds).expect("in range"),
            i32::try_from(nanos).expect("in range"),
        )
        .expect("in range");
        assert!(uuid_floor(at) <= before);
        assert!(uuid_floor(at + jiff::SignedDuration::from_millis(1)) > before);
    }

    #[test]
    fn i5_a_tick_has_one_uid_and_it_is_a_uuidv7_of_the_tick() {
        let (schedule, other) = (ScheduleId(SystemIds.next()), ScheduleId(SystemIds.next()));
        let tick: Timestamp = "2026-03-08T07:30:00Z".parse().expect("a time");
        let later = tick + jiff::SignedDuration::from_secs(1);
        let uid = EventUid::of_tick(schedule, tick);
        assert_eq!(uid, EventUid::of_tick(schedule, tick));
        assert_ne!(uid, EventUid::of_tick(other, tick));
        assert!(uuid_floor(tick) <= uid.0 && uid.0 < uuid_floor(later));
        assert_eq!(uid.received_at(), Some(tick));
        assert_eq!((uid.0.get_version_num(), uid.0.get_variant()), (7, uuid::Variant::RFC4122));
    }

    #[test]
    fn lanes_are_in_range_and_all_used() {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..1_000 {
            seen.insert(OrganizationId(SystemIds.next()).lane(4));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(OrganizationId(SystemIds.next()).lane(0), 0);
    }
}
