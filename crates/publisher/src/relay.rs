//! The relay: finishes fan-outs that another process, or an earlier failure of this one, left behind.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bus_core::{
    clock::Clock,
    delivery::Progress,
    fanout::Chunks,
    launcher::{BoxError, Heartbeat},
    pg::{self, OpenOutbox, Unfinished},
    queue::{DeliveryQueue, QueueError},
    telemetry::Chain,
};
use futures::future::join_all;
use metrics::{counter, gauge};
use sqlx::PgPool;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::PublishConfig;

/// Between two looks for rows whose holder did not finish.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);

/// Rows taken over at a time, and worked on side by side.
const ROWS: u32 = 8;

/// Events read at a time; with the largest body that the queue carries, 5 MiB.
const EVENTS: usize = 20;

/// Whether so much waits to be fanned out that no more is taken. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct Backlog(Arc<AtomicBool>);

impl Backlog {
    /// As of about a second ago.
    pub(crate) fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn measure(&self, open: OpenOutbox, config: &PublishConfig) {
        let over = |is: u64, limit: u64| limit > 0 && is >= limit;
        let full = over(open.events, config.max_outbox_events)
            || over(open.age.as_secs(), config.max_outbox_age_s)
            || open.more && config.max_outbox_events > 0;
        if self.0.swap(full, Ordering::Relaxed) != full {
            let (events, age) = (open.events, open.age.as_secs());
            if full {
                warn!(events, oldest_s = age, "Events are refused: too much waits to be fanned out");
            } else {
                info!(events, oldest_s = age, "Events are taken again");
            }
        }
    }
}

/// A relay.
#[derive(Debug, Clone)]
pub(crate) struct Relay {
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) config: PublishConfig,
    pub(crate) backlog: Backlog,
    pub(crate) beat: Heartbeat,
    pub(crate) stop: CancellationToken,
}

impl Relay {
    /// Runs until the stop.
    pub(crate) async fn run(self) -> Result<(), BoxError> {
        let mut measured: Option<Instant> = None;
        while !self.stop.is_cancelled() {
            self.beat.beat();
            // Also while there is more than enough to do: that is when it matters.
            if measured.is_none_or(|at| at.elapsed() >= INTERVAL) {
                self.measure().await;
                measured = Some(Instant::now());
                self.beat.beat();
            }
            let taken = pg::take_over(&self.pool, ROWS, self.config.outbox_lease_s);
            match pg::answered("take over unfinished fan-outs", taken).await {
                Ok(rows) => {
                    let full = rows.len() == ROWS as usize;
                    let finished = join_all(rows.into_iter().map(|row| self.finish(row))).await;
                    // With less than a full hand, or nothing done, there is no hurry.
                    if full && finished.into_iter().any(|finished| finished) {
                        continue;
                    }
                }
                Err(failed) => warn!(error = %Chain(&failed), "Unfinished fan-outs wait"),
            }
            self.stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
        }
        Ok(())
    }

    async fn measure(&self) {
        match pg::answered("read what is in the outbox", pg::open_outbox(&self.pool)).await {
            Ok(open) => {
                gauge!("bus_outbox_oldest_seconds").set(open.age.as_secs_f64());
                gauge!("bus_outbox_events").set(open.events as f64);
                self.backlog.measure(open, &self.config);
            }
            Err(failed) => warn!(error = %Chain(&failed), "The outbox's age is unknown"),
        }
    }

    /// Finishes one row; whether it is. What it cannot do stays in the row, for whoever takes it next.
    async fn finish(&self, row: Unfinished) -> bool {
        match self.fan_out(&row).await {
            Ok(()) => {
                counter!("bus_fan_outs", "by" => "relay").increment(1);
                info!(outbox.id = %row.id, "Finished a fan-out that was left behind");
                true
            }
            Err(failed) => {
                warn!(outbox.id = %row.id, error = %Chain(&failed), "A fan-out waits");
                false
            }
        }
    }

    async fn fan_out(&self, row: &Unfinished) -> Result<(), QueueError> {
        let mut left = &row.events[..];
        while !left.is_empty() {
            let (events, rest) = left.split_at(left.len().min(EVENTS));
            let mut chunks = Chunks::new(self.queue.as_ref(), Progress::new(self.clock.now()));
            let loaded = pg::load_fan_out(&self.pool, events);
            let loaded = pg::answered("load a fan-out", loaded).await?;
            self.beat.beat();
            for event in loaded {
                for key in &event.deliveries {
                    chunks.push(*key, event.lane, &event.body).await?;
                    self.beat.beat();
                }
            }
            chunks.finish().await?;
            left = rest;
            if !left.is_empty() {
                let advanced = pg::advance_outbox(&self.pool, row.id, left, self.config.outbox_lease_s);
                pg::answered("note how far a fan-out is", advanced).await?;
            }
        }
        pg::answered("finish a fan-out", pg::finish_outbox(&self.pool, &[row.id])).await?;
        Ok(())
    }
}
