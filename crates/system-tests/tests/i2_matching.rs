//! Invariant I2: an event published after a subscription call returned is matched against that
//! subscription, whichever replica handles either.

use std::collections::BTreeSet;

use devkit::{
    processes::Role,
    receiver::Receiver,
    stack::{Stack, StackOptions},
};
use serde_json::json;
use system_tests::{Tenant, all_arrived};

const ROUNDS: usize = 500;

#[tokio::test]
async fn i2_a_subscription_on_one_replica_matches_the_next_event_on_another() {
    let mut stack = Stack::start(StackOptions::default().replicas(Role::Publisher, 2)).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let a = Tenant::create(&mut stack, "acme").await.unwrap();
    let b = Tenant { api: a.api.at(stack.publisher(1).http_url()), ..a.clone() };
    let (connection, _) = a.webhook("all", &receiver.url("/all")).await.unwrap();
    let mut accepted = BTreeSet::new();
    for n in 0..ROUNDS {
        let event_type = format!("round.{n}");
        a.subscribe(&connection, &event_type).await.unwrap();
        accepted.insert(b.publish_number(&event_type, n).await.unwrap());
    }
    assert_eq!(all_arrived(&receiver, &["/all"], &accepted).await, 0);
    assert_eq!(receiver.count("/all"), ROUNDS);
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i2_a_deleted_subscription_matches_nothing_and_a_moved_connection_is_used_at_once() {
    let mut stack = Stack::start(StackOptions::default().replicas(Role::Publisher, 2)).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let a = Tenant::create(&mut stack, "acme").await.unwrap();
    let b = Tenant { api: a.api.at(stack.publisher(1).http_url()), ..a.clone() };
    let (connection, _) = a.webhook("moves", &receiver.url("/0")).await.unwrap();
    let subscription = a.subscribe(&connection, "moves").await.unwrap();
    for n in 1..=50 {
        let url = receiver.url(&format!("/{n}"));
        let path = format!("/v1/connections/{connection}");
        a.api.patch(&path, &json!({ "url": url })).await.unwrap().expect(200);
        b.publish_number("moves", n).await.unwrap();
        // The worker's copy is older than the version that the delivery carries, so it reads it again.
        receiver.wait_for(&format!("/{n}"), 1).await;
    }
    a.api.delete(&format!("/v1/subscriptions/{subscription}")).await.unwrap().expect(204);
    let event = b.publish_number("moves", 51).await.unwrap();
    let deliveries = b.api.get(&format!("/v1/events/{event}/deliveries")).await.unwrap().expect(200);
    assert_eq!(deliveries.body["items"], json!([]));
    assert_eq!(receiver.total(), 50);
    stack.shutdown().await.unwrap();
}
