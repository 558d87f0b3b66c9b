//! Waiting for a state, never for a time.

use std::{fmt::Debug, future::Future, time::Duration};

use anyhow::anyhow;
use tokio::time::{Instant, sleep};

/// How long to wait between two looks.
const INTERVAL: Duration = Duration::from_millis(20);

/// Looks until `probe` answers `Ok`, and gives that answer.
///
/// The probe's `Err` is what it saw instead. A probe is never cut short, so one that can hang needs a
/// deadline of its own.
///
/// # Errors
/// After `deadline`, with `what` and the last thing seen.
pub async fn poll<T, E, F, Fut>(what: &str, deadline: Duration, mut probe: F) -> anyhow::Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: Debug,
{
    let until = Instant::now() + deadline;
    loop {
        match probe().await {
            Ok(value) => return Ok(value),
            Err(seen) if Instant::now() >= until => {
                return Err(anyhow!("waited {deadline:?} for {what}; last seen: {seen:?}"));
            }
            Err(_) => sleep(INTERVAL).await,
        }
    }
}

/// [`poll`] for tests.
///
/// # Panics
/// After `deadline`, with `what` and the last thing seen.
pub async fn wait_until<T, E, F, Fut>(what: &str, deadline: Duration, probe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: Debug,
{
    match poll(what, deadline, probe).await {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn looks_again_until_it_holds() {
        let mut looks = 0;
        let seen = wait_until("three looks", Duration::from_secs(5), || {
            looks += 1;
            let now = looks;
            async move { if now == 3 { Ok(now) } else { Err(now) } }
        })
        .await;
        assert_eq!(seen, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn says_what_it_saw_last() {
        let error = poll("a miracle", Duration::from_secs(1), || async { Err::<(), _>("nothing") })
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "waited 1s for a miracle; last seen: \"nothing\"");
    }
}
