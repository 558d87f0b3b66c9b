//! Endpoints that fail for long: since when is noted with their connection, and after some days it is disabled.
//!
//! The note is written when a circuit opens, and removed by the next success; both are rare. It outlives workers, so
//! that none of them has to see all of the failure.

use std::{sync::Arc, time::Duration};

use bus_core::{
    connection::Connection,
    ids::ConnectionId,
    notify::{Hint, Notifier},
    pg::{self, StoreError},
    sink::{AttemptReport, Failure, Outcome},
    telemetry::Chain,
};
use jiff::Timestamp;
use moka::sync::Cache;
use sqlx::PgPool;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::admission::Change;

/// Connections whose note was removed lately: copies of them that are kept in memory still have it.
const REMOVED: u64 = 10_000;

/// Keeps the notes. Each is written beside the deliveries; one that cannot be is left to the next time.
#[derive(Debug, Clone)]
pub(crate) struct Failing {
    pool: PgPool,
    hints: Arc<dyn Notifier>,
    disable_after_s: u64,
    removed: Cache<ConnectionId, Timestamp>,
    tasks: TaskTracker,
}

impl Failing {
    pub(crate) fn new(
        pool: PgPool,
        hints: Arc<dyn Notifier>,
        disable_after_s: u64,
        tasks: TaskTracker,
    ) -> Self {
        Self { pool, hints, disable_after_s, removed: Cache::new(REMOVED), tasks }
    }

    /// What came of an attempt: whether the endpoint failed, and what that has changed.
    pub(crate) fn note(&self, connection: &Connection, failed: Option<bool>, changed: Option<Change>) {
        match changed {
            Some(Change::Opened(period)) => self.opened(connection, period),
            Some(Change::Closed) => {
                info!(connection.id = %connection.id, "The endpoint works again");
                self.works(connection);
            }
            // Another worker, or an earlier one, noted it.
            None => {
                let noted = connection.failing_since.filter(|_| failed == Some(false));
                if noted.is_some_and(|since| self.removed.get(&connection.id) != Some(since)) {
                    self.works(connection);
                }
            }
        }
    }

    fn opened(&self, connection: &Connection, period: Duration) {
        warn!(connection.id = %connection.id, ?period, "The endpoint fails; it is left alone for a while");
        let (this, after) = (self.clone(), self.disable_after_s);
        let (organization, id, version) = (connection.organization, connection.id, connection.version);
        self.tasks.spawn(async move {
            let noted = pg::note_failing(&this.pool, organization, id, version, after);
            match pg::answered("note that an endpoint fails", noted).await {
                Ok(true) => {
                    info!(connection.id = %id, "Connection disabled: its endpoint has failed for too long");
                    this.hints.notify(Hint::ConnectionChanged(id)).await;
                    // The event that says so.
                    this.hints.notify(Hint::Due).await;
                }
                Ok(false) => {}
                Err(failed) => not_noted(id, &failed),
            }
        });
    }

    fn works(&self, connection: &Connection) {
        let (this, id, organization) = (self.clone(), connection.id, connection.organization);
        // At once: the next success comes before the answer of the database.
        if let Some(since) = connection.failing_since {
            self.removed.insert(id, since);
        }
        self.tasks.spawn(async move {
            let noted = pg::note_working(&this.pool, organization, id);
            if let Err(failed) = pg::answered("note that an endpoint works", noted).await {
                this.removed.invalidate(&id);
                not_noted(id, &failed);
            }
        });
    }
}

fn not_noted(id: ConnectionId, failed: &StoreError) {
    warn!(connection.id = %id, error = %Chain(failed), "Cannot note how the connection's endpoint does");
}

/// Whether the endpoint failed, by what its one answer says of each delivery. `None` if that says nothing of it: it asked
/// to be left alone, or no request was made.
pub(crate) fn failed(reports: &[AttemptReport]) -> Option<bool> {
    let of_each = || reports.iter().filter_map(|report| failed_by(&report.outcome));
    let any = of_each().next()?;
    // It works if it took, or judged, any of them.
    Some(any && of_each().all(|failed| failed))
}

fn failed_by(outcome: &Outcome) -> Option<bool> {
    let failure = match outcome {
        Outcome::Delivered => return Some(false),
        Outcome::Deferred { .. } => return None,
        Outcome::Failed { failure, .. } => failure,
    };
    match failure {
        Failure::Status(status) => Some(matches!(status, 408 | 429 | 500..)),
        Failure::Reported(_) => Some(false),
        Failure::Timeout(_)
        | Failure::Resolve(_)
        | Failure::AddressRefused(_)
        | Failure::Connect(_)
        | Failure::Exchange(_) => Some(true),
        Failure::Request(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use rstest::rstest;

    use super::*;

    fn report(outcome: Outcome) -> AttemptReport {
        AttemptReport { outcome, status: None, answer: Bytes::new(), duration: Duration::ZERO }
    }

    #[rstest]
    #[case::taken(Outcome::Delivered, Some(false))]
    #[case::server_error(Failure::Status(500).into(), Some(true))]
    #[case::unavailable(Failure::Status(503).into(), Some(true))]
    #[case::too_many(Failure::Status(429).into(), Some(true))]
    #[case::timed_out(Failure::Status(408).into(), Some(true))]
    #[case::not_found(Failure::Status(404).into(), Some(false))]
    #[case::gone(Failure::Status(410).into(), Some(false))]
    #[case::redirected(Failure::Status(302).into(), Some(false))]
    #[case::refused(Failure::Reported("no".into()).into(), Some(false))]
    #[case::slow(Failure::Timeout(Duration::ZERO).into(), Some(true))]
    #[case::unknown(Failure::Resolve("x".into()).into(), Some(true))]
    #[case::not_allowed(Failure::AddressRefused([10, 0, 0, 1].into()).into(), Some(true))]
    #[case::unreachable(Failure::Connect("x".into()).into(), Some(true))]
    #[case::broken(Failure::Exchange("x".into()).into(), Some(true))]
    #[case::no_request(Failure::Request("x".into()).into(), None)]
    #[case::deferred(Outcome::Deferred { wait: Duration::ZERO, why: "x".into() }, None)]
    fn what_counts_as_the_endpoints_failure(#[case] outcome: Outcome, #[case] expected: Option<bool>) {
        assert_eq!(failed(&[report(outcome.clone())]), expected);
        let with_a_good_one = [report(outcome), report(Outcome::Delivered)];
        assert_eq!(failed(&with_a_good_one), Some(false), "it took one of the batch");
    }
}
