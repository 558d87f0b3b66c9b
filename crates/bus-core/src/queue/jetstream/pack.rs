//! Packs: several deliveries of one connection in one message, which the broker stores, hands out and forgets at the cost of
//! one.
//!
//! Only what enters the queue for the first time travels in packs. What comes back (a retry, a replay, what was parked) is
//! alone, so that nobody waits for it and nothing is repeated with it.

use std::collections::HashMap;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use jiff::Timestamp;
use uuid::Uuid;

use super::super::{Body, Enqueue};
use crate::{
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, OrganizationId},
};

/// The namespace (RFC 9562 §5.5) of the ids of packs. Arbitrary, and never to change.
const PACKS: Uuid = Uuid::from_u128(0x2f5d3f2e_6a0b_4f0b_9c39_51d6a3c1e7b4);

/// What an entry has besides its body: three ids of 16 bytes, and the body's length.
const ENTRY: usize = 3 * 16 + 4;

/// What may be in one message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Deliveries; 1 for no packs.
    pub(super) deliveries: usize,
    /// Bytes of a pack; what is larger alone is alone.
    pub(super) bytes: usize,
}

/// What all deliveries of a pack have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Common {
    pub(super) organization: OrganizationId,
    pub(super) connection: ConnectionId,
    pub(super) connection_version: i64,
    pub(super) since: Timestamp,
}

/// A message that is to be made, and how large it has become.
struct Open {
    place: usize,
    bytes: usize,
}

/// The deliveries of each message, so that those of a connection stay in their order. The same deliveries in the same order
/// always make the same messages, and so are recognised when they come again.
pub(super) fn group(deliveries: &[Enqueue], lanes: u16, limits: Limits) -> Vec<Vec<&Enqueue>> {
    let mut groups: Vec<Vec<&Enqueue>> = Vec::new();
    let mut open: HashMap<(u16, Common), Open> = HashMap::new();
    for delivery in deliveries {
        let key = &delivery.key;
        let common = Common {
            organization: key.organization,
            connection: key.connection,
            connection_version: key.connection_version,
            since: delivery.progress.since,
        };
        let to = (delivery.lane(lanes), common);
        let size = match &delivery.body {
            Body::Inline(body) if delivery.progress == Progress::new(common.since) => ENTRY + body.len(),
            // Alone, and what comes after it must not overtake it.
            _ => usize::MAX,
        };
        match open.get_mut(&to) {
            Some(open)
                if groups[open.place].len() < limits.deliveries
                    && open.bytes.saturating_add(size) <= limits.bytes =>
            {
                groups[open.place].push(delivery);
                open.bytes += size;
            }
            _ => {
                open.insert(to, Open { place: groups.len(), bytes: size });
                groups.push(vec![delivery]);
            }
        }
    }
    groups
}

/// The id of a pack of these deliveries, for the broker to recognise it by.
pub(super) fn id(deliveries: &[&Enqueue]) -> String {
    let mut ids = Vec::with_capacity(deliveries.len() * 16);
    for delivery in deliveries {
        ids.extend_from_slice(delivery.key.id.0.as_bytes());
    }
    format!("pack:{}", Uuid::new_v5(&PACKS, &ids))
}

/// The bytes of a pack: of each delivery its id, its event's and its subscription's, the length of its body as four bytes,
/// the highest first, and its body.
pub(super) fn encode(deliveries: &[&Enqueue]) -> Bytes {
    let bodies = deliveries.iter().map(|delivery| match &delivery.body {
        Body::Inline(body) => &body[..],
        Body::Stored => &[],
    });
    let size = bodies.clone().map(|body| ENTRY + body.len()).sum();
    let mut bytes = BytesMut::with_capacity(size);
    for (delivery, body) in deliveries.iter().zip(bodies) {
        let key = &delivery.key;
        for id in [key.id.0, key.event.0, key.subscription.0] {
            bytes.put_slice(id.as_bytes());
        }
        bytes.put_u32(u32::try_from(body.len()).expect("a body in the queue is far shorter"));
        bytes.put_slice(body);
    }
    bytes.freeze()
}

/// The deliveries of a pack, each with its body, which shares the memory of the message.
pub(super) fn decode(mut bytes: Bytes, common: &Common) -> Result<Vec<(DeliveryKey, Bytes)>, &'static str> {
    let mut deliveries = Vec::new();
    while !bytes.is_empty() {
        if bytes.len() < ENTRY {
            return Err("a pack that is cut off");
        }
        let [id, event, subscription] = std::array::from_fn(|_| Uuid::from_u128(bytes.get_u128()));
        let length = usize::try_from(bytes.get_u32()).unwrap_or(usize::MAX);
        if bytes.len() < length {
            return Err("a pack that is cut off");
        }
        let key = DeliveryKey {
            id: id.into(),
            event: event.into(),
            organization: common.organization,
            subscription: subscription.into(),
            connection: common.connection,
            connection_version: common.connection_version,
        };
        deliveries.push((key, bytes.split_to(length)));
    }
    if deliveries.is_empty() { Err("an empty pack") } else { Ok(deliveries) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const LANES: u16 = 4;

    /// The n-th delivery, to one of a few connections.
    fn delivery(n: u128, connection: u128, body: Body, turn: i64) -> Enqueue {
        let since = Timestamp::from_second(1_800_000_000).unwrap();
        let key = DeliveryKey {
            id: Uuid::from_u128(n).into(),
            event: Uuid::from_u128(n + 1).into(),
            organization: Uuid::from_u128(7).into(),
            subscription: Uuid::from_u128(n + 2).into(),
            connection: Uuid::from_u128(connection).into(),
            connection_version: 3,
        };
        Enqueue { key, progress: Progress { turn, ..Progress::new(since) }, lane: None, body }
    }

    fn any_delivery() -> impl Strategy<Value = Enqueue> {
        let body = prop_oneof![
            9 => prop::collection::vec(any::<u8>(), 0..200).prop_map(|body| Body::Inline(body.into())),
            1 => Just(Body::Stored),
        ];
        (any::<u64>(), 0..3_u128, body, prop_oneof![9 => Just(0_i64), 1 => 1..5_i64])
            .prop_map(|(n, connection, body, turn)| delivery(n.into(), connection, body, turn))
    }

    proptest! {
        #[test]
        fn what_is_packed_is_within_the_limits_in_order_and_comes_out_again(
            deliveries in prop::collection::vec(any_delivery(), 0..60),
            limits in (1..10_usize, 1..1_000_usize).prop_map(|(deliveries, bytes)| Limits { deliveries, bytes }),
        ) {
            let groups = group(&deliveries, LANES, limits);
            let again = group(&deliveries, LANES, limits);
            prop_assert_eq!(groups.iter().map(|group| id(group)).collect::<Vec<_>>(),
                            again.iter().map(|group| id(group)).collect::<Vec<_>>());
            for connection in 0..3 {
                let of = |delivery: &&Enqueue| delivery.key.connection.0 == Uuid::from_u128(connection);
                let sent: Vec<_> = deliveries.iter().filter(of).map(|delivery| delivery.key).collect();
                let packed: Vec<_> =
                    groups.iter().flatten().copied().filter(of).map(|delivery| delivery.key).collect();
                prop_assert_eq!(sent, packed);
            }
            for group in groups.iter().filter(|group| group.len() > 1) {
                let first = group[0];
                prop_assert!(group.len() <= limits.deliveries);
                let common = Common {
                    organization: first.key.organization,
                    connection: first.key.connection,
                    connection_version: first.key.connection_version,
                    since: first.progress.since,
                };
                let bytes = encode(group);
                prop_assert!(bytes.len() <= limits.bytes);
                let out = decode(bytes, &common).unwrap();
                let sent: Vec<_> =
                    group.iter().map(|one| (one.key, one.body.clone())).collect();
                let out: Vec<_> = out.into_iter().map(|(key, body)| (key, Body::Inline(body))).collect();
                prop_assert_eq!(sent, out);
                prop_assert!(group.iter().all(|one| one.progress.turn == 0));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let common = Common {
                organization: Uuid::nil().into(),
                connection: Uuid::nil().into(),
                connection_version: 1,
                since: Timestamp::UNIX_EPOCH,
            };
            let _ = decode(bytes.into(), &common);
        }
    }
}
