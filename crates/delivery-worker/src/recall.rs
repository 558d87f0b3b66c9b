//! Parked deliveries whose endpoint has room again come back sooner than they were told.
//!
//! They were parked at the pace that the endpoint had at the time. After a bad minute that is slow, and would be kept for
//! hours beside an endpoint that has nothing to do.

use std::{sync::Arc, time::Duration};

use bus_core::{
    connection::Connection,
    ids::ConnectionId,
    notify::{Hint, Notifier},
    pg::{self, Recalled},
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::admission::Admission;

/// As many come back by one statement.
const LIMIT: u32 = 500;

/// Statements under way at a time. After an outage there are many connections that have room again.
const AT_A_TIME: usize = 2;

/// Recalls what is parked, beside the deliveries. What cannot be is left to the next time.
#[derive(Debug, Clone)]
pub(crate) struct Recall {
    pool: PgPool,
    hints: Arc<dyn Notifier>,
    tasks: TaskTracker,
    free: Arc<Semaphore>,
}

impl Recall {
    pub(crate) fn new(pool: PgPool, hints: Arc<dyn Notifier>, tasks: TaskTracker) -> Self {
        Self { pool, hints, tasks, free: Arc::new(Semaphore::new(AT_A_TIME)) }
    }

    /// An attempt has succeeded: if few others are under way, and some are parked for long, these may come.
    pub(crate) fn if_there_is_room(&self, admission: &Admission, connection: &Connection) {
        let Some(interval) = admission.recalls(connection) else { return };
        let (this, admission, id) = (self.clone(), admission.clone(), connection.id);
        self.tasks.spawn(async move { this.recall(&admission, id, interval).await });
    }

    async fn recall(&self, admission: &Admission, connection: ConnectionId, interval: Duration) {
        // It is never closed.
        let _permit = self.free.acquire().await;
        let recalled = pg::recall(&self.pool, connection, interval, LIMIT);
        match pg::answered("recall parked deliveries", recalled).await {
            Ok(Recalled { seen, moved }) => {
                debug!(connection.id = %connection, moved, ?interval, "Parked deliveries are recalled");
                counter!("bus_recalled").increment(moved.into());
                admission.recalled(connection, interval, seen, seen < LIMIT);
                if moved > 0 {
                    self.hints.notify(Hint::Due).await;
                }
            }
            Err(failed) => {
                warn!(connection.id = %connection, error = %Chain(&failed), "Parked deliveries are not recalled");
            }
        }
    }
}
