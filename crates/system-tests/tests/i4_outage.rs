//! Invariant I4: what was not sent is not charged, however long the database is away.

use std::{collections::BTreeSet, time::Duration};

use devkit::{
    process::Signal,
    processes::Role,
    receiver::{Receiver, Script},
    servers::Durability,
    stack::{ServerChoice, Stack, StackOptions},
    wait_until,
};
use system_tests::{QUICK_ACK_WAIT_MS, QUICK_TIMEOUT_MS, Tenant, all_arrived};

const DEADLINE: Duration = Duration::from_secs(60);

/// Several times as long as a worker's hold lasts unless it is extended.
const OUTAGE: Duration = Duration::from_millis(2 * QUICK_ACK_WAIT_MS);

/// Waits until every delivery is in the queue.
async fn fanned_out(stack: &Stack) {
    let pool = stack.owner_pool().await.unwrap();
    wait_until("the fan-out", DEADLINE, || async {
        let left: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox WHERE finished_at IS NULL")
            .fetch_one(&pool)
            .await
            .unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    pool.close().await;
}

#[tokio::test]
async fn i4_deliveries_that_need_an_absent_database_are_held_and_charged_nothing() {
    let options = StackOptions::default()
        .servers(ServerChoice::Own(Durability::Fast))
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        // With a put-back for each failed look at the database, these would be used up long before its end.
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__MAX_ATTEMPTS", 2)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 5_500)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__ENABLED", false)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/known", "known").await.unwrap();
    tenant.receive(&receiver, "/fresh", "fresh").await.unwrap();
    tenant.publish_number("known", 0).await.unwrap();
    receiver.wait_for("/known", 1).await;
    // One retry of this connection will have to be parked while the database is away.
    receiver.script("/known", Script::fail_first(1, 500));

    // The deliveries are in the queue, and the worker does not know their connection, when the database goes.
    stack.worker(0).signal(Signal::STOP).unwrap();
    let mut fresh = BTreeSet::new();
    for n in 0..20 {
        fresh.insert(tenant.publish_number("fresh", n).await.unwrap());
    }
    let failing = tenant.publish_number("known", 1).await.unwrap();
    fanned_out(&stack).await;
    stack.postgres().kill().await.unwrap();
    stack.worker(0).signal(Signal::CONT).unwrap();
    receiver.wait_for("/known", 2).await;
    // The length of the fault, not a wait for something.
    tokio::time::sleep(OUTAGE).await;
    assert_eq!(receiver.count("/fresh"), 0, "nothing can be sent without its connection");
    stack.postgres().restart().await.unwrap();

    assert_eq!(all_arrived(&receiver, &["/fresh"], &fresh).await, 0, "nothing was given out twice");
    receiver.wait_for_within("/known", 3, DEADLINE).await;
    let pool = stack.owner_pool().await.unwrap();
    let attempts = wait_until("two attempts in history", DEADLINE, || async {
        let attempts: Vec<(i32, String)> = sqlx::query_as(
            "SELECT a.attempt, a.outcome FROM delivery_attempts a JOIN events e ON e.uid = a.event_uid
             WHERE e.id = $1 ORDER BY a.attempt",
        )
        .bind(&failing)
        .fetch_all(&pool)
        .await
        .unwrap();
        if attempts.len() == 2 { Ok(attempts) } else { Err(attempts) }
    })
    .await;
    assert_eq!(attempts, [(1, "failed".to_owned()), (2, "delivered".to_owned())]);
    let dead: i64 = sqlx::query_scalar("SELECT count(*) FROM delivery_states WHERE state = 'dead'")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(dead, 0);
    pool.close().await;
    stack.shutdown().await.unwrap();
}

/// More failures than a worker has slots, all of them to be parked: it takes no more than it can hold, and what it
/// holds is nobody else's, so that nothing is attempted twice.
#[tokio::test]
async fn i4_i10_what_cannot_be_parked_is_held_and_takes_the_slots_that_it_has() {
    /// One connection takes half of them.
    const SLOTS: usize = 64;
    const TAKEN: usize = SLOTS / 2;
    const EVENTS: usize = 60;
    let options = StackOptions::default()
        .servers(ServerChoice::Own(Durability::Fast))
        .env("EVENT_BUS_LANES", 1)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__IN_FLIGHT", SLOTS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", QUICK_TIMEOUT_MS)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RETRY__BASE_MS", 5_500)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__BREAKER__ENABLED", false)
        .env("EVENT_BUS_NATS__ACK_WAIT_MS", QUICK_ACK_WAIT_MS);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/known", "known").await.unwrap();
    let first = tenant.publish_number("known", 0).await.unwrap();
    receiver.wait_for("/known", 1).await;
    // Until then it holds a place, and a worker that is frozen gives none back.
    tenant.event_is(&first, "delivered").await;
    receiver.script("/known", Script::fail_first(EVENTS, 500));

    stack.worker(0).signal(Signal::STOP).unwrap();
    let mut published = BTreeSet::new();
    for n in 1..=EVENTS {
        published.insert(tenant.publish_number("known", n).await.unwrap());
    }
    fanned_out(&stack).await;
    stack.postgres().kill().await.unwrap();
    stack.worker(0).signal(Signal::CONT).unwrap();
    receiver.wait_for("/known", 1 + TAKEN).await;
    // The length of the fault, not a wait for something.
    tokio::time::sleep(OUTAGE).await;
    assert_eq!(receiver.count("/known"), 1 + TAKEN, "each slot that it may take has one, and keeps it");
    stack.postgres().restart().await.unwrap();

    receiver.wait_for_within("/known", 1 + 2 * EVENTS, DEADLINE).await;
    let twice = system_tests::arrivals(&receiver, "/known");
    assert!(published.iter().all(|event| twice.get(event) == Some(&2)), "each failed once: {twice:?}");
    stack.shutdown().await.unwrap();
}
