//! The brokers that publishers have met, and which of them were compared with history.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::{PgPool, Row as _};

use super::{During as _, StoreError};

/// A run of a server with a delivery stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broker {
    /// The server's own id, a new one for each start.
    pub server: String,
    /// When the delivery stream was created.
    pub stream: String,
}

/// A broker that is to be compared with history, by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewBroker {
    /// When an earlier one was known to be there last.
    pub known_until: Timestamp,
    /// The delivery stream is another one than before: all that the old one held is gone.
    pub stream_is_new: bool,
}

/// How long a broker that nobody meets any more is remembered.
const REMEMBERED_DAYS: i32 = 30;

/// Notes that a broker is there. If nobody has compared it with history yet, and nobody else is about to, the caller holds
/// that task for `lease`.
pub async fn meet_broker(
    pool: &PgPool,
    broker: &Broker,
    lease: Duration,
) -> Result<Option<NewBroker>, StoreError> {
    const OPERATION: &str = "note which broker is there";
    let first = sqlx::query_scalar::<_, bool>(
        // The first one of all has no predecessor.
        "INSERT INTO brokers (server, stream, reconciled_at)
         VALUES ($1, $2, CASE WHEN NOT EXISTS (SELECT FROM brokers) THEN now() END)
         ON CONFLICT (server, stream) DO UPDATE SET seen_at = now()
         RETURNING seen_at = first_seen_at",
    )
    .bind(&broker.server)
    .bind(&broker.stream)
    .fetch_one(pool)
    .await
    .during(OPERATION)?;
    if first {
        sqlx::query("DELETE FROM brokers WHERE seen_at < now() - make_interval(days => $1)")
            .bind(REMEMBERED_DAYS)
            .execute(pool)
            .await
            .during("forget the brokers of long ago")?;
    }
    let row = sqlx::query(
        "UPDATE brokers b SET lease_until = now() + make_interval(secs => $3)
         WHERE server = $1 AND stream = $2 AND reconciled_at IS NULL AND lease_until <= now()
         -- `least` passes over NULL: the earlier ones may be forgotten by now.
         -- One that was not compared itself vouches for nothing.
         RETURNING least((SELECT max(o.seen_at) FROM brokers o
                          WHERE o.first_seen_at < b.first_seen_at AND o.reconciled_at IS NOT NULL),
                         b.first_seen_at) AS known_until,
                   NOT EXISTS (SELECT FROM brokers o
                               WHERE o.first_seen_at < b.first_seen_at AND o.stream = b.stream
                                 AND o.reconciled_at IS NOT NULL) AS stream_is_new",
    )
    .bind(&broker.server)
    .bind(&broker.stream)
    .bind(lease.as_secs_f64())
    .fetch_optional(pool)
    .await
    .during(OPERATION)?;
    let new = row.map(|row| {
        Ok(NewBroker {
            known_until: row.try_get::<jiff_sqlx::Timestamp, _>("known_until")?.to_jiff(),
            stream_is_new: row.try_get("stream_is_new")?,
        })
    });
    new.transpose().during(OPERATION)
}

/// Holds the task for `lease` more; none gives it up, for whoever meets the broker next.
pub async fn hold_broker(pool: &PgPool, broker: &Broker, lease: Duration) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE brokers SET lease_until = now() + make_interval(secs => $3) WHERE server = $1 AND stream = $2",
    )
    .bind(&broker.server)
    .bind(&broker.stream)
    .bind(lease.as_secs_f64())
    .execute(pool)
    .await
    .during("hold on to a broker's reconciliation")?;
    Ok(())
}

/// Notes that a broker was compared with history, down to the end.
pub async fn broker_is_reconciled(pool: &PgPool, broker: &Broker) -> Result<(), StoreError> {
    sqlx::query("UPDATE brokers SET reconciled_at = now() WHERE server = $1 AND stream = $2")
        .bind(&broker.server)
        .bind(&broker.stream)
        .execute(pool)
        .await
        .during("note that a broker is reconciled")?;
    Ok(())
}
