//! What every role does around its own work: wait for the database and the broker, and say whether
//! they are there.

use std::time::Duration;

use sqlx::{Connection as _, PgPool};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    launcher::{BoxError, Condition, Ctx, Heartbeat},
    nats::NatsError,
    pg::{self, StoreError},
    queue::{QueueError, Transport},
    telemetry::Chain,
};

/// Between two looks at the database's health.
const PROBE: Duration = Duration::from_secs(5);

/// Between two looks whether the broker still has the streams.
const LOOK: Duration = Duration::from_secs(10);

/// Between two tries while something is away.
const AGAIN: Duration = Duration::from_millis(500);

/// Whether a role can do anything useful without the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broker {
    /// It is not ready while the broker is away.
    Needed,
    /// It works on: what the broker is wanted for waits in the database.
    Optional,
}

/// Connects to what the backend needs and waits, as long as it takes, until the schema is there, and the
/// streams if the role needs them. `None` if the process was told to stop meanwhile.
pub async fn connect<C>(ctx: &Ctx<C>, pool: &PgPool, broker: Broker) -> Result<Option<Transport>, BoxError> {
    let transport = match &ctx.transport {
        Some(shared) => shared.clone(),
        None => Transport::connect(&ctx.common, pool, ctx.role.name, ctx.stop.clone()).await?,
    };
    let postgres = ctx.health.condition("postgres");
    let needed = transport.nats.is_some() && broker == Broker::Needed;
    let nats = needed.then(|| ctx.health.condition("nats"));
    let ready = async {
        until_ready("the database", || async { pg::check_schema(pool).await.map_err(retryable_store) })
            .await?;
        postgres.set(true);
        if let Some(nats) = &nats {
            prepare(&transport).await?;
            nats.set(true);
        }
        Ok::<_, BoxError>(())
    };
    match ctx.stop.run_until_cancelled(ready).await {
        None => return Ok(None),
        Some(result) => result?,
    }
    let beat = ctx.health.heartbeat("supervisor", PROBE * 6);
    ctx.spawn("supervisor", watch(pool.clone(), transport.clone(), postgres, nats, beat, ctx.stop.clone()));
    ctx.spawn("broker", keep_prepared(transport.clone(), ctx.stop.clone()));
    Ok(Some(transport))
}

async fn prepare(transport: &Transport) -> Result<(), BoxError> {
    until_ready("the broker", || async { transport.queue.prepare().await.map_err(retryable_queue) }).await
}

/// The streams are looked for again after each new connection, since the broker may be another one or have lost what it
/// had, and from time to time: somebody may have deleted them.
async fn keep_prepared(transport: Transport, stop: CancellationToken) -> Result<(), BoxError> {
    let Some(nats) = &transport.nats else {
        stop.cancelled().await;
        return Ok(());
    };
    let mut epoch = nats.epoch();
    let follow = async {
        loop {
            // A look that finds everything is not worth a line.
            if let Err(failed) = transport.queue.prepare().await.map_err(retryable_queue) {
                if let Wait::Over(error) = failed {
                    return Err(error);
                }
                prepare(&transport).await?;
            }
            if let Ok(Err(_)) = tokio::time::timeout(LOOK, epoch.changed()).await {
                return Ok(());
            }
        }
    };
    stop.run_until_cancelled(follow).await.unwrap_or(Ok(()))
}

/// An error that ends the wait, or one to be waited out.
enum Wait {
    Over(BoxError),
    Again(BoxError),
}

fn retryable_store(error: StoreError) -> Wait {
    // Somebody may be migrating right now, and a database that is away comes back.
    Wait::Again(error.into())
}

fn retryable_queue(error: QueueError) -> Wait {
    match error {
        QueueError::Nats(error @ NatsError::TooOld { .. }) => Wait::Over(error.into()),
        other => Wait::Again(other.into()),
    }
}

async fn until_ready<F>(what: &'static str, mut attempt: impl FnMut() -> F) -> Result<(), BoxError>
where
    F: Future<Output = Result<(), Wait>>,
{
    let mut said = None;
    loop {
        match attempt().await {
            Ok(()) => {
                info!(what, "Ready");
                return Ok(());
            }
            Err(Wait::Over(error)) => return Err(error),
            Err(Wait::Again(error)) => {
                // Once per cause, not twice a second.
                let text = Chain(error.as_ref()).to_string();
                if said.as_ref() != Some(&text) {
                    warn!(what, error = text, "Not ready yet");
                    said = Some(text);
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Keeps readiness truthful. A ping is a round trip without a statement, so that an idle worker leaves
/// no trace in `pg_stat_statements` (invariant I6).
async fn watch(
    pool: PgPool,
    transport: Transport,
    postgres: Condition,
    needed: Option<Condition>,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    loop {
        if stop.run_until_cancelled(tokio::time::sleep(PROBE)).await.is_none() {
            return Ok(());
        }
        beat.beat();
        if let (Some(needed), Some(nats)) = (&needed, &transport.nats) {
            // A partition keeps the connection, for as long as pings may be unanswered.
            needed.set(nats.is_connected() && nats.round_trip().await.is_ok());
        }
        let ping = async { pool.acquire().await?.ping().await };
        postgres.set(matches!(tokio::time::timeout(PROBE, ping).await, Ok(Ok(()))));
    }
}
