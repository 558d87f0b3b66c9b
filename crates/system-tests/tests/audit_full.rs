//! A full audit stream: nobody copies receipts to cold storage, and the stream refuses more of them. Deliveries must not
//! suffer from that.

use std::time::Duration;

use async_nats::jetstream::{self, Context};
use bus_core::receipt::Receipt;
use devkit::{
    processes::{Role, RoleProcess},
    receiver::Receiver,
    servers::connect_nats,
    stack::{Stack, StackOptions},
    wait_until,
};
use system_tests::Tenant;

const DEADLINE: Duration = Duration::from_secs(60);

/// How many receipts a worker keeps while they are refused, besides the batch that it is sending.
const ROOM: usize = 10;
/// Room for a message or two.
const FULL: i64 = 2_000;
const DELIVERIES: usize = 200;

/// How many receipts are in the stream.
async fn receipts(jetstream: &Context, stream: &str) -> usize {
    let stream = jetstream.get_stream(stream).await.unwrap();
    let state = &stream.cached_info().state;
    let mut receipts = 0;
    // A stream that never took a message says that its first is number 0, which is nobody's.
    for sequence in state.first_sequence.max(1)..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        receipts += serde_json::from_slice::<Vec<Receipt>>(&message.payload).unwrap().len();
    }
    receipts
}

#[tokio::test]
async fn deliveries_go_on_while_the_audit_stream_is_full_and_the_gap_is_counted() {
    let options = StackOptions::default()
        .replicas(Role::Archiver, 0)
        .env("EVENT_BUS_STREAMS__AUDIT__MAX_BYTES", FULL)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_WORKER__RECEIPT_BUFFER", ROOM);
    let mut stack = Stack::start(options).await.unwrap();
    let jetstream = jetstream::new(connect_nats(&stack.nats_url().unwrap()).await.unwrap());
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/all", "happy").await.unwrap();

    for n in 0..DELIVERIES {
        tenant.publish_number("happy", n).await.unwrap();
    }
    receiver.wait_for("/all", DELIVERIES).await;
    wait_until("every delivery to be done", DEADLINE, || async {
        let left = stack.undelivered().await.unwrap();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    assert_eq!(receiver.count("/all"), DELIVERIES, "none was made twice");
    let pool = stack.owner_pool().await.unwrap();
    let states: i64 =
        sqlx::query_scalar("SELECT count(*) FROM delivery_states").fetch_one(&pool).await.unwrap();
    assert_eq!(states, 0, "none failed or died");
    pool.close().await;
    let audit = format!("{}_AUDIT", stack.prefix().to_uppercase());
    let worker: &RoleProcess = stack.worker(0);
    assert!(worker.metric("bus_receipts_lost").await.unwrap() > 0.0, "a gap that nobody counts");

    // Once there is room again, what still waits goes in: each delivery has its receipt, or is in the gap.
    let mut config = jetstream.get_stream(&audit).await.unwrap().cached_info().config.clone();
    config.max_bytes = FULL * 1_000;
    jetstream.update_stream(config).await.unwrap();
    let accounted = async |deliveries: usize| {
        let (jetstream, audit) = (&jetstream, &audit);
        wait_until("every receipt to be in the stream or counted", DEADLINE, || async move {
            let lost = worker.metric("bus_receipts_lost").await.unwrap();
            let kept = receipts(jetstream, audit).await;
            if kept as f64 + lost == deliveries as f64 {
                Ok(lost)
            } else {
                Err(format!("{kept}, {lost} lost"))
            }
        })
        .await
    };
    let lost = accounted(DELIVERIES).await;
    tenant.publish_number("happy", DELIVERIES).await.unwrap();
    assert_eq!(accounted(DELIVERIES + 1).await, lost, "receipts are taken again");
    stack.shutdown().await.unwrap();
}
