//! Compares a broker that was not met before with history: it may have lost what was fanned out into its predecessor. A
//! single server writes to its disk at intervals, and a crash of its machine takes with it what came since the last one.

use std::time::Duration;

use bus_core::{
    launcher::{BoxError, Heartbeat},
    nats::Nats,
    pg::{self, Broker, NewBroker},
    queue::Transport,
    reconcile::{ReconcileError, Reconciled, Reconciler},
    telemetry::Chain,
};
use jiff::{SignedDuration, Timestamp};
use metrics::counter;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Between two looks at which broker is there, besides those after each new connection.
pub(crate) const LOOK: Duration = Duration::from_secs(15);

/// Another replica takes the task over if this one is not heard of for so long.
const LEASE: Duration = Duration::from_secs(120);

/// Compares new brokers with history, one replica at a time.
pub(crate) struct Reconciling {
    pub(crate) pool: PgPool,
    pub(crate) transport: Transport,
    /// How far back from the last sign of an earlier broker the comparison begins.
    pub(crate) window: Duration,
    /// How far back if the stream is another one.
    pub(crate) whole_stream: Duration,
    pub(crate) beat: Heartbeat,
    pub(crate) stop: CancellationToken,
}

impl Reconciling {
    /// Runs until the stop.
    pub(crate) async fn run(self) -> Result<(), BoxError> {
        let Some(nats) = &self.transport.nats else {
            self.stop.cancelled().await;
            return Ok(());
        };
        let mut epoch = nats.epoch();
        let work = async {
            loop {
                self.beat.beat();
                epoch.mark_unchanged();
                if nats.is_connected()
                    && let Err(failed) = self.look(nats).await
                {
                    warn!(error = %Chain(failed.as_ref()), "A broker is not compared with history yet");
                }
                // Without a sender there is no connection any more, and nothing to see.
                let _ = tokio::time::timeout(LOOK, epoch.changed()).await;
            }
        };
        self.stop.run_until_cancelled(work).await;
        Ok(())
    }

    async fn look(&self, nats: &Nats) -> Result<(), BoxError> {
        let Some((stream, copies)) = nats.delivery_stream_created().await? else { return Ok(()) };
        let broker = Broker { server: nats.client.server_info().server_id, stream };
        let met = pg::meet_broker(&self.pool, &broker, LEASE);
        let Some(new) = pg::answered("note which broker is there", met).await? else { return Ok(()) };
        if copies > 1 && !new.stream_is_new {
            // Another server of a cluster: the stream has lost nothing with the one before.
            return Ok(pg::answered(
                "note which broker is there",
                pg::broker_is_reconciled(&self.pool, &broker),
            )
            .await?);
        }
        let since = self.since(&new);
        info!(broker.server, broker.stream, %since, "A broker that was not met before is compared with history");
        let found = match self.reconcile(nats, &broker, since).await {
            Ok(found) => found,
            Err(failed) => {
                let left = pg::hold_broker(&self.pool, &broker, Duration::ZERO);
                if let Err(failed) = pg::answered("leave a broker", left).await {
                    debug!(error = %Chain(&failed), "The broker is compared again when the lease is over");
                }
                return Err(failed.into());
            }
        };
        pg::answered("note that a broker is reconciled", pg::broker_is_reconciled(&self.pool, &broker))
            .await?;
        counter!("bus_reconciled_deliveries").increment(found.put_back);
        let Reconciled { events, deliveries, lost, put_back, .. } = found;
        if lost > 0 {
            warn!(events, deliveries, lost, put_back, "The broker had lost deliveries");
        } else {
            info!(events, deliveries, "The broker has lost nothing");
        }
        Ok(())
    }

    fn since(&self, new: &NewBroker) -> Timestamp {
        let back = if new.stream_is_new { self.whole_stream } else { self.window };
        let back = SignedDuration::try_from(back).unwrap_or(SignedDuration::MAX);
        new.known_until.saturating_sub(back).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// Holds the task while it lasts.
    async fn reconcile(
        &self,
        nats: &Nats,
        broker: &Broker,
        since: Timestamp,
    ) -> Result<Reconciled, ReconcileError> {
        let reconciler = Reconciler {
            pool: &self.pool,
            queue: self.transport.queue.as_ref(),
            hints: self.transport.hints.as_ref(),
            nats: Some(nats),
            settled_after: Duration::from_millis(nats.config.ack_wait_ms),
            dry_run: false,
        };
        let work = reconciler.run(since, |_| self.beat.beat());
        tokio::pin!(work);
        loop {
            match tokio::time::timeout(LEASE / 4, &mut work).await {
                Ok(done) => return done,
                Err(_) => {
                    self.beat.beat();
                    pg::answered("hold on to a broker", pg::hold_broker(&self.pool, broker, LEASE)).await?;
                }
            }
        }
    }
}
