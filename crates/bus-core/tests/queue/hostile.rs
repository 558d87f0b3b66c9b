//! Whoever may write to the broker can put anything into the delivery stream: no message makes a reader panic, and none
//! keeps the others from coming.
//!
//! `HOSTILE_CASES` says how many messages there are (500 if absent).

use std::{collections::BTreeSet, time::Duration};

use async_nats::{HeaderMap, jetstream::message::PublishMessage};
use bus_core::{
    ids::{Ids as _, SystemIds},
    nats::Nats,
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    strategy::ValueTree as _,
    test_runner::TestRunner,
};

use super::fixture::{Fixture, Kind, ids, pull_for};

/// What one message has wrong.
#[derive(Debug, Clone)]
struct Damage {
    /// A header, `subject`, or `headers` for none at all.
    part: &'static str,
    at: Index,
    with: Vec<u8>,
    /// Whether what comes after the damage is left out.
    end: bool,
}

impl Damage {
    fn any() -> impl Strategy<Value = Self> {
        const PARTS: [&str; 9] = [
            "Nats-Msg-Id",
            "Bus-Event",
            "Bus-Subscription",
            "Bus-Connection-Version",
            "Bus-Since",
            "Bus-Attempts",
            "Bus-Wait",
            "subject",
            "headers",
        ];
        let numbers = select(vec!["-1", "18446744073709551615", "1e9", "9999999999999999999999", ":", ":-1"])
            .prop_map(|text: &str| text.as_bytes().to_vec());
        let with = prop_oneof![vec(any::<u8>(), 0..20), numbers];
        (select(&PARTS[..]), any::<Index>(), with, any::<bool>()).prop_map(|(part, at, with, end)| Self {
            part,
            at,
            with,
            end,
        })
    }

    /// A sound text with this damage, as far as the protocol carries it.
    fn of(&self, sound: &str, is_carried: impl Fn(char) -> bool) -> String {
        let at = self.at.index(sound.len() + 1);
        let rest = if self.end { "" } else { &sound[at..] };
        let with = self.with.iter().map(|byte| char::from(*byte)).filter(|c| is_carried(*c));
        sound[..at].chars().chain(with).chain(rest.chars()).collect()
    }
}

/// A message like ours, but for its damage.
fn message(nats: &Nats, fixture: &Fixture, damage: &Damage) -> (String, PublishMessage) {
    let id = || SystemIds.next().to_string();
    let lane = format!("{}.deliver.0.", nats.names.prefix);
    let sound = format!("{}.{}", fixture.organization, id());
    let tokens = if damage.part == "subject" {
        damage.of(&sound, |c| c.is_ascii_graphic() && !"*>.".contains(c))
    } else {
        sound
    };
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("Nats-Msg-Id", id()),
        ("Bus-Event", id()),
        ("Bus-Subscription", id()),
        ("Bus-Connection-Version", "1".to_owned()),
        ("Bus-Since", "1800000000000".to_owned()),
        ("Bus-Attempts", "1".to_owned()),
    ] {
        let value = if damage.part == name { damage.of(&value, |c| !c.is_control()) } else { value };
        headers.insert(name, value);
    }
    if damage.part == "Bus-Wait" {
        headers.insert("Bus-Wait", damage.of("1", |c| !c.is_control()));
    }
    let message = PublishMessage::build().payload("{}".into());
    let message = if damage.part == "headers" { message } else { message.headers(headers) };
    // A subject neither ends with a dot nor has two in a row.
    let tokens: Vec<&str> = tokens.split('.').filter(|token| !token.is_empty()).collect();
    (lane + if tokens.is_empty() { "none".to_owned() } else { tokens.join(".") }.as_str(), message)
}

#[tokio::test]
async fn no_message_makes_a_reader_panic_or_keeps_the_others_from_coming() {
    let cases = std::env::var("HOSTILE_CASES").map_or(500, |cases| cases.parse().unwrap());
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    let mut runner = TestRunner::deterministic();
    let mut acks = FuturesUnordered::new();
    let (mut hostile, mut may_wait) = (0_u64, 0);
    for _ in 0..cases {
        let damage = Damage::any().new_tree(&mut runner).unwrap().current();
        let (subject, message) = message(&nats, &fixture, &damage);
        may_wait += u64::from(damage.part == "Bus-Wait");
        acks.push(nats.jetstream.send_publish(subject, message).await.unwrap().into_future());
        if acks.len() == 100 {
            hostile += u64::from(!acks.next().await.unwrap().unwrap().duplicate);
        }
    }
    while let Some(ack) = acks.next().await {
        hostile += u64::from(!ack.unwrap().duplicate);
    }
    let sound = fixture.put(20).await;
    let (mut came, mut read) = (BTreeSet::new(), BTreeSet::new());
    // A pull that brings nothing has seen all that there is.
    loop {
        let leased = pull_for(&fixture.queue, 100, Duration::from_secs(1)).await;
        if leased.is_empty() && came.len() == sound.len() {
            break;
        }
        for one in leased {
            if ids(&sound).contains(&one.key.id) {
                came.insert(one.key.id);
            } else {
                read.insert((one.key.id, one.progress.turn));
            }
            one.lease.ack().await.unwrap();
        }
    }
    assert_eq!(came, ids(&sound));
    let dead = nats.jetstream.get_stream(&nats.names.dead_stream).await.unwrap();
    let aside = dead.cached_info().state.messages;
    let waiting = fixture.queue.depth().await.unwrap();
    let read = read.len() as u64;
    assert_eq!(aside + read + waiting, hostile, "{aside} set aside, {read} read, {waiting} wait");
    assert!(waiting <= may_wait, "{waiting} wait, and {may_wait} may");
    assert!(aside > 0 && read > 0);
    fixture.end().await;
}
