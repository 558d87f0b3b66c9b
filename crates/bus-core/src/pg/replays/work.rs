//! How a scheduler works a job off.

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{Cursor, Replay, ReplayRow, columns};
use crate::{
    ids::ReplayId,
    pg::{During as _, StoreError, dead_letters::read_in_order, hold_transaction},
};

/// What [`claim_replay`] found.
#[derive(Debug)]
pub enum ClaimReplay {
    /// A job that is due, held until the end of the transaction.
    Due(Box<Replay>),
    /// A job that is due, and is not stored as it should be.
    Unreadable(ReplayId, StoreError),
    /// The next one is due in so many seconds.
    In(f64),
    /// There is none, or others work on them.
    None,
}

/// Claims the job that is due the longest, for one chunk in this transaction. Should this process be cut off
/// from the database, the database ends the transaction after `hold_s` seconds and the job is free again.
pub async fn claim_replay(connection: &mut PgConnection, hold_s: u64) -> Result<ClaimReplay, StoreError> {
    const OPERATION: &str = "claim a replay";
    hold_transaction(connection, hold_s).await?;
    read_in_order(connection).await?;
    let next: Option<(Uuid, f64)> = sqlx::query_as(
        "SELECT id, extract(epoch FROM next_at - now())::float8 FROM replays
         WHERE state IN ('pending', 'running')
         ORDER BY next_at LIMIT 1 FOR UPDATE SKIP LOCKED",
    )
    .fetch_optional(&mut *connection)
    .await
    .during(OPERATION)?;
    let id = match next {
        None => return Ok(ClaimReplay::None),
        Some((_, wait)) if wait > 0.0 => return Ok(ClaimReplay::In(wait)),
        Some((id, _)) => id,
    };
    let row: ReplayRow = sqlx::query_as(concat!("SELECT ", columns!(), " FROM replays WHERE id = $1"))
        .bind(id)
        .fetch_one(connection)
        .await
        .during(OPERATION)?;
    Ok(match Replay::try_from(row) {
        Ok(replay) => ClaimReplay::Due(Box::new(replay)),
        Err(failed) => ClaimReplay::Unreadable(ReplayId(id), failed),
    })
}

/// What a chunk did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// How many events, deliveries or dead letters it looked at.
    pub looked: u64,
    /// How many deliveries it brought back, or discarded.
    pub replayed: u64,
    /// What it looked at last.
    pub cursor: Cursor,
    /// Whether the job goes on.
    pub then: Then,
}

/// How a job goes on after a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// There is more.
    More,
    /// That was all.
    Done,
    /// It cannot go on, for this reason.
    Failed(&'static str),
}

/// Notes a chunk in the transaction that did it. The next one is due when the rate allows what this one has
/// brought back.
pub async fn advance_replay(
    connection: &mut PgConnection,
    id: ReplayId,
    chunk: &Chunk,
) -> Result<(), StoreError> {
    let (state, failure) = match chunk.then {
        Then::More => ("running", None),
        Then::Done => ("done", None),
        Then::Failed(why) => ("failed", Some(why)),
    };
    sqlx::query(
        "UPDATE replays
         SET looked = looked + $2, replayed = replayed + $3, cursor_id = $4, cursor_at = $5, state = $6, failure = $7,
             next_at = now() + make_interval(secs => $3::float8 / per_second),
             finished_at = CASE WHEN $6 <> 'running' THEN now() END
         WHERE id = $1",
    )
    .bind(id.0)
    .bind(i64::try_from(chunk.looked).unwrap_or(i64::MAX))
    .bind(i64::try_from(chunk.replayed).unwrap_or(i64::MAX))
    .bind(chunk.cursor.id)
    .bind(chunk.cursor.at.map(jiff_sqlx::Timestamp::from))
    .bind(state)
    .bind(failure)
    .execute(connection)
    .await
    .during("note how far a replay has come")?;
    Ok(())
}

/// Puts off a job whose chunk failed, so that it does not keep others from their turn; with a reason it is over.
pub async fn put_off_replay(
    pool: &PgPool,
    id: ReplayId,
    seconds: u32,
    failed: Option<&'static str>,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE replays
         SET next_at = now() + make_interval(secs => $2), failure = $3,
             state = CASE WHEN $3::text IS NULL THEN state ELSE 'failed' END,
             finished_at = CASE WHEN $3::text IS NULL THEN NULL ELSE now() END
         WHERE id = $1 AND state IN ('pending', 'running')",
    )
    .bind(id.0)
    .bind(f64::from(seconds))
    .bind(failed)
    .execute(pool)
    .await
    .during("put off a replay")?;
    Ok(())
}
