//! Parked deliveries whose endpoint has room again come back sooner than they were told.
//!
//! They were parked at the pace that the endpoint had at the time. After a bad minute that is slow, and would be kept for
//! hours beside an endpoint that has nothing to do.

use std::{sync::Arc, time::Duration};

use bus_core::{
    connection::Connection,
    ids::ConnectionId,
    notify::{Hint, Notifier},
    pg,
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::admission::Admission;

/// As many come back by one statement.
const LIMIT: u32 = 500;

/// Recalls what is parked, beside the deliveries. What cannot be is left to the next time.
#[derive(Debug, Clone)]
pub(crate) struct Recall {
    pool: PgPool,
    hints: Arc<dyn Notifier>,
    tasks: TaskTracker,
}

impl Recall {
    pub(crate) fn new(pool: PgPool, hints: Arc<dyn Notifier>, tasks: TaskTracker) -> Self {
        Self { pool, hints, tasks }
    }

    /// An attempt has ended: if few others are under way, and some are parked for long, these may come.
    pub(crate) fn if_there_is_room(&self, admission: &Admission, connection: &Connection) {
        let Some(interval) = admission.recalls(connection) else { return };
        let (this, admission, id) = (self.clone(), admission.clone(), connection.id);
        self.tasks.spawn(async move { this.recall(&admission, id, interval).await });
    }

    async fn recall(&self, admission: &Admission, connection: ConnectionId, interval: Duration) {
        let recalled = pg::recall(&self.pool, connection, interval, LIMIT);
        match pg::answered("recall parked deliveries", recalled).await {
            Ok(recalled) => {
                debug!(connection.id = %connection, recalled, ?interval, "Parked deliveries are recalled");
                counter!("bus_recalled").increment(recalled.into());
                admission.recalled(connection, interval, recalled, recalled < LIMIT);
                if recalled > 0 {
                    self.hints.notify(Hint::Due).await;
                }
            }
            Err(failed) => {
                warn!(connection.id = %connection, error = %Chain(&failed), "Parked deliveries are not recalled");
            }
        }
    }
}
