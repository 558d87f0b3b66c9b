//! Invariant I6: a delivery that succeeds costs the worker no statement. Asked of Postgres, not of the code.

use devkit::{
    processes::Role,
    receiver::Receiver,
    servers::Durability,
    stack::{ServerChoice, Stack, StackOptions},
};
use serde_json::{Value, json};
use system_tests::Tenant;

const DELIVERIES: usize = 10_000;
const BATCH: usize = 500;

#[tokio::test]
async fn i6_ten_thousand_deliveries_without_a_statement_of_the_worker() {
    // pg_stat_statements counts a whole server, so this one must have no other tenant.
    // On a machine that is busy with other things the worker itself may be slow: who waits for a place is not to be parked
    // for that.
    let options = StackOptions::default().servers(ServerChoice::Own(Durability::Fast)).role_env(
        Role::DeliveryWorker,
        "EVENT_BUS_WORKER__CONNECTION__WAIT_MS",
        1_000,
    );
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/all", "happy").await.unwrap();
    // The first delivery reads the connection; it stays in memory from then on.
    tenant.publish_number("happy", 0).await.unwrap();
    receiver.wait_for("/all", 1).await;

    let pool = stack.owner_pool().await.unwrap();
    sqlx::query("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").execute(&pool).await.unwrap();
    sqlx::query("SELECT pg_stat_statements_reset()").execute(&pool).await.unwrap();
    for _ in 0..DELIVERIES / BATCH {
        let events: Vec<Value> = (0..BATCH).map(|n| json!({ "type": "happy", "data": { "n": n } })).collect();
        tenant.api.publish(&Value::from(events)).await.unwrap().expect(202);
    }
    receiver.wait_for_within("/all", 1 + DELIVERIES, system_tests::ARRIVAL).await;

    let statements = "SELECT s.query, s.calls FROM pg_stat_statements s JOIN pg_roles r ON r.oid = s.userid
                      WHERE r.rolname = $1 AND s.calls > 0";
    let of_the_worker: Vec<(String, i64)> =
        sqlx::query_as(statements).bind("bus_worker").fetch_all(&pool).await.unwrap();
    assert!(of_the_worker.is_empty(), "{of_the_worker:#?}");
    // The same question about the publisher has an answer, so the empty one above means something.
    let of_the_publisher: Vec<(String, i64)> =
        sqlx::query_as(statements).bind("bus_publisher").fetch_all(&pool).await.unwrap();
    assert!(of_the_publisher.iter().any(|(query, _)| query.contains("INSERT INTO events")));
    assert_eq!(receiver.count("/all"), 1 + DELIVERIES);
    pool.close().await;
    stack.shutdown().await.unwrap();
}
