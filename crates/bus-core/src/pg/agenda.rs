//! What is due next of everything that the clock drives: one question for all of it.

use std::time::Duration;

use sqlx::{PgPool, Row as _};

use super::{During as _, StoreError};

/// In how long the next of each is due, by the database's clock; zero if it is due. `None` if there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Agenda {
    /// A parked delivery.
    pub deliveries: Option<Duration>,
    /// A chunk of a replay.
    pub replays: Option<Duration>,
    /// An event with a `deliverAt`.
    pub events: Option<Duration>,
    /// A tick of a schedule.
    pub ticks: Option<Duration>,
}

/// Reads what is due next.
pub async fn agenda(pool: &PgPool) -> Result<Agenda, StoreError> {
    const OPERATION: &str = "read what is due next";
    let row = sqlx::query(
        "SELECT extract(epoch FROM (SELECT min(greatest(due_at, lease_until)) FROM delivery_states
                                    WHERE state = 'waiting') - now())::float8 AS deliveries,
                extract(epoch FROM (SELECT min(next_at) FROM replays
                                    WHERE state IN ('pending', 'running')) - now())::float8 AS replays,
                extract(epoch FROM (SELECT min(due_at) FROM scheduled_events
                                    WHERE cancelled_at IS NULL) - now())::float8 AS events,
                extract(epoch FROM (SELECT min(due_at) FROM schedules
                                    WHERE due_at IS NOT NULL) - now())::float8 AS ticks",
    )
    .fetch_one(pool)
    .await
    .during(OPERATION)?;
    let due = |column: &str| {
        let seconds: Option<f64> = row.try_get(column).during(OPERATION)?;
        // Further away than a Duration reaches is no time at all.
        Ok::<_, StoreError>(seconds.and_then(|s| Duration::try_from_secs_f64(s.max(0.0)).ok()))
    };
    Ok(Agenda {
        deliveries: due("deliveries")?,
        replays: due("replays")?,
        events: due("events")?,
        ticks: due("ticks")?,
    })
}
