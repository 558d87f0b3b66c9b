//! Fault points: places where a test stops a process, to kill it there. They exist only with the feature
//! `fault-points`, which no shipped build has.

/// Waits for ever if the environment variable `BUS_FAULT_POINT` names this point.
#[cfg(feature = "fault-points")]
pub async fn point(name: &str) {
    if std::env::var("BUS_FAULT_POINT").is_ok_and(|chosen| chosen == name) {
        tracing::warn!(point = name, "Stopped at a fault point");
        std::future::pending::<()>().await;
    }
}

/// Nothing, in a shipped build.
#[cfg(not(feature = "fault-points"))]
pub async fn point(_name: &str) {}
