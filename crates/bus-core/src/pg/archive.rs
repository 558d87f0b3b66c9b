//! The archiver's account: who works on which source, and how far it is in cold storage.
//!
//! A source is a stream, or a table that is partitioned by day. Every change names the epoch of the lease that it is
//! made under, and changes nothing if somebody else has taken the lease since.

use jiff::Timestamp;
use sqlx::{PgPool, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{During as _, StoreError};

/// The right to archive and trim one source, for a while, and how far that has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveLease {
    /// What it is about.
    pub source: String,
    /// Counts the holders.
    pub epoch: i64,
    /// Where it stands.
    pub position: ArchivePosition,
}

/// How far a source is in cold storage.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ArchivePosition {
    /// Which stream of that name, or which day of the table; `None` if nothing was archived yet.
    pub incarnation: Option<String>,
    /// Everything before it is in cold storage.
    pub next: u64,
    /// The key of the last row, where positions count the parts of a table's day.
    pub after: Option<Uuid>,
    /// When the last message that is in cold storage came to the stream (the broker's time).
    pub last_at: Option<Timestamp>,
}

/// A batch that is in cold storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchivedBatch {
    /// The position of its first message.
    pub first: u64,
    /// The position of its last message.
    pub last: u64,
    /// When its last message came to the stream.
    pub newest: Timestamp,
}

/// Takes the lease of a source, unless somebody holds it.
pub async fn take_archive_lease(
    pool: &PgPool,
    source: &str,
    holder: &str,
    seconds: u32,
) -> Result<Option<ArchiveLease>, StoreError> {
    const OPERATION: &str = "take the lease of an archive source";
    sqlx::query("INSERT INTO archive_sources (source) VALUES ($1) ON CONFLICT DO NOTHING")
        .bind(source)
        .execute(pool)
        .await
        .during(OPERATION)?;
    let row = sqlx::query(
        "UPDATE archive_sources
         SET epoch = epoch + 1, holder = $2, lease_until = now() + make_interval(secs => $3)
         WHERE source = $1 AND lease_until < now()
         RETURNING epoch, incarnation, next, after, last_at",
    )
    .bind(source)
    .bind(holder)
    .bind(f64::from(seconds))
    .fetch_optional(pool)
    .await
    .during(OPERATION)?;
    row.map(|row| {
        Ok(ArchiveLease {
            source: source.to_owned(),
            epoch: row.try_get("epoch")?,
            position: position(&row)?,
        })
    })
    .transpose()
    .during(OPERATION)
}

fn position(row: &PgRow) -> Result<ArchivePosition, sqlx::Error> {
    Ok(ArchivePosition {
        incarnation: row.try_get("incarnation")?,
        // The table's CHECK keeps it positive.
        next: row.try_get::<i64, _>("next")?.unsigned_abs(),
        after: row.try_get("after")?,
        last_at: row.try_get::<Option<jiff_sqlx::Timestamp>, _>("last_at")?.map(|at| at.to_jiff()),
    })
}

/// How far a source is, whoever holds its lease; `None` if nothing of it was ever archived.
pub async fn archive_position(pool: &PgPool, source: &str) -> Result<Option<ArchivePosition>, StoreError> {
    const OPERATION: &str = "read how far an archive source is";
    let row = sqlx::query("SELECT incarnation, next, after, last_at FROM archive_sources WHERE source = $1")
        .bind(source)
        .fetch_optional(pool)
        .await
        .during(OPERATION)?;
    row.as_ref().map(position).transpose().during(OPERATION)
}

/// Holds the lease for so long from now; `false` if somebody else has taken it.
pub async fn renew_archive_lease(
    pool: &PgPool,
    lease: &ArchiveLease,
    seconds: u32,
) -> Result<bool, StoreError> {
    let renewed = sqlx::query(
        "UPDATE archive_sources SET lease_until = now() + make_interval(secs => $3)
         WHERE source = $1 AND epoch = $2",
    )
    .bind(&lease.source)
    .bind(lease.epoch)
    .bind(f64::from(seconds))
    .execute(pool)
    .await
    .during("renew the lease of an archive source")?;
    Ok(renewed.rows_affected() == 1)
}

/// Gives the lease back, so that the next holder need not wait for its end.
pub async fn release_archive_lease(pool: &PgPool, lease: &ArchiveLease) -> Result<(), StoreError> {
    sqlx::query("UPDATE archive_sources SET lease_until = '-infinity' WHERE source = $1 AND epoch = $2")
        .bind(&lease.source)
        .bind(lease.epoch)
        .execute(pool)
        .await
        .during("release the lease of an archive source")?;
    Ok(())
}

/// Begins anew with another stream, or another day: earlier positions mean nothing any more. `false` if the lease
/// was lost.
pub async fn restart_archive_source(
    pool: &PgPool,
    lease: &ArchiveLease,
    to: &ArchivePosition,
) -> Result<bool, StoreError> {
    let restarted = sqlx::query(
        "WITH held AS (
             UPDATE archive_sources SET incarnation = $3, next = $4, trimmed = least($4, 1), after = $5, last_at = $6
             WHERE source = $1 AND epoch = $2
             RETURNING source
         ),
         -- Both parts of the statement see the batches as they were.
         forgotten AS (DELETE FROM archive_batches b USING held WHERE b.source = held.source)
         SELECT count(*) = 1 FROM held",
    )
    .bind(&lease.source)
    .bind(lease.epoch)
    .bind(&to.incarnation)
    .bind(signed(to.next))
    .bind(to.after)
    .bind(to.last_at.map(jiff_sqlx::Timestamp::from))
    .fetch_one(pool)
    .await
    .and_then(|row| row.try_get(0))
    .during("begin with another archive source")?;
    Ok(restarted)
}

/// Notes that a batch is in cold storage, and that the next one begins behind it; `false` if the lease was lost. The
/// batch must begin where the one before ended.
pub async fn note_archived(
    pool: &PgPool,
    lease: &ArchiveLease,
    batch: &ArchivedBatch,
    after: Option<Uuid>,
) -> Result<bool, StoreError> {
    let noted = sqlx::query(
        "WITH held AS (
             UPDATE archive_sources SET next = $4 + 1, after = $6, last_at = $5
             WHERE source = $1 AND epoch = $2 AND next = $3
             RETURNING source
         ),
         noted AS (
             INSERT INTO archive_batches (source, first, last, newest) SELECT source, $3, $4, $5 FROM held
         )
         SELECT count(*) = 1 FROM held",
    )
    .bind(&lease.source)
    .bind(lease.epoch)
    .bind(signed(batch.first))
    .bind(signed(batch.last))
    .bind(jiff_sqlx::Timestamp::from(batch.newest))
    .bind(after)
    .fetch_one(pool)
    .await
    .and_then(|row| row.try_get(0))
    .during("note an archived batch")?;
    Ok(noted)
}

/// The batches that are in cold storage and not yet trimmed, oldest first, at most `limit`.
pub async fn archived_batches(
    pool: &PgPool,
    source: &str,
    limit: u32,
) -> Result<Vec<ArchivedBatch>, StoreError> {
    const OPERATION: &str = "list archived batches";
    let rows = sqlx::query(
        "SELECT first, last, newest FROM archive_batches WHERE source = $1 ORDER BY first LIMIT $2",
    )
    .bind(source)
    .bind(i64::from(limit))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    rows.iter()
        .map(|row| {
            Ok(ArchivedBatch {
                first: row.try_get::<i64, _>("first")?.unsigned_abs(),
                last: row.try_get::<i64, _>("last")?.unsigned_abs(),
                newest: row.try_get::<jiff_sqlx::Timestamp, _>("newest")?.to_jiff(),
            })
        })
        .collect::<Result<_, _>>()
        .during(OPERATION)
}

/// Notes that everything before `to` is gone from the stream; `false` if the lease was lost.
pub async fn note_trimmed(pool: &PgPool, lease: &ArchiveLease, to: u64) -> Result<bool, StoreError> {
    let noted = sqlx::query(
        "WITH held AS (
             UPDATE archive_sources SET trimmed = greatest(trimmed, $3) WHERE source = $1 AND epoch = $2
             RETURNING source
         ),
         gone AS (DELETE FROM archive_batches b USING held WHERE b.source = held.source AND b.last < $3)
         SELECT count(*) = 1 FROM held",
    )
    .bind(&lease.source)
    .bind(lease.epoch)
    .bind(signed(to))
    .fetch_one(pool)
    .await
    .and_then(|row| row.try_get(0))
    .during("note what was trimmed")?;
    Ok(noted)
}

fn signed(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}
