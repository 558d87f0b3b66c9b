//! History, and cold storage, are what the receiver saw, attempt by attempt. `cargo xtask bench history` does the same
//! with many more.

use std::time::Duration;

use cold_storage::{ColdStorage, Config};
use devkit::{attempts::Load, stack::Stack};
use url::Url;

const EVENTS: usize = 2_000;
const ORGANIZATIONS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test]
async fn history_and_cold_storage_are_what_the_receiver_saw_attempt_by_attempt() {
    let mut stack = Stack::start(Load::options()).await.unwrap();
    let load = Load::set(&mut stack, ORGANIZATIONS).await.unwrap();
    load.publish(EVENTS).await.unwrap();
    load.settle(&stack, EVENTS, DEADLINE).await.unwrap();
    let account = load.account(&stack).await.unwrap();
    assert!(account.differences.is_empty(), "{account}\n{}", account.differences.join("\n"));
    assert_eq!(account.deliveries, EVENTS);
    // Of every twenty deliveries two fail first, two are deferred, and one is refused for good.
    let twentieth = EVENTS / 20;
    for (outcome, times) in [("delivered", 19), ("failed", 2), ("deferred", 2), ("dead", 1)] {
        assert_eq!(account.outcomes[outcome], times * twentieth, "{outcome}");
    }
    assert!(account.days >= ORGANIZATIONS);
    let cold = ColdStorage::open(&Config::at(Url::from_directory_path(stack.cold_dir()).unwrap())).unwrap();
    let report = cold.verify(|_| ()).await.unwrap();
    assert!(report.problems.is_empty() && report.in_progress.is_empty(), "{report:?}");
    stack.shutdown().await.unwrap();
}
