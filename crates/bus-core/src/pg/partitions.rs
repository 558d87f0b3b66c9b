//! Tables that are partitioned by time: one partition per UTC day, over UUIDv7 keys.

use jiff::{Span, Timestamp, civil::Date, tz::TimeZone};
use sqlx::{
    PgPool,
    postgres::{PgRow, types::Oid},
};
use uuid::Uuid;

use super::{During as _, StoreError};
use crate::ids::uuid_floor;

/// A table that is partitioned by day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DayTable {
    /// The events, by the day of their arrival.
    Events,
    /// The attempts, by the day of their event.
    DeliveryAttempts,
    /// The occurrences of schedules, by the day of their tick.
    Occurrences,
    /// Who changed what.
    AuditRecords,
}

/// The statements of one table; the names in them cannot be bound.
macro_rules! of_table {
    ($self:expr, $before:literal, $after:literal) => {
        match $self {
            DayTable::Events => concat!($before, "events", $after),
            DayTable::DeliveryAttempts => concat!($before, "delivery_attempts", $after),
            DayTable::Occurrences => concat!($before, "occurrences", $after),
            DayTable::AuditRecords => concat!($before, "audit_records", $after),
        }
    };
}

impl DayTable {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Events, Self::DeliveryAttempts, Self::Occurrences, Self::AuditRecords];

    /// Its name.
    pub fn name(self) -> &'static str {
        of_table!(self, "", "")
    }
}

/// Creates the partitions of the `days` days after today, so that each is there before its first row; the
/// migration creates those of the first days. Should nobody do it for longer, rows go to the default
/// partition, and today's is not created behind them. Returns how many were created; safe to call by any
/// number of processes.
pub async fn create_partitions(pool: &PgPool, now: Timestamp, days: i32) -> Result<u32, StoreError> {
    let today = now.to_zoned(TimeZone::UTC).date();
    let mut created = 0;
    for table in DayTable::ALL {
        for ahead in 1..=days {
            let Ok(day) = today.checked_add(Span::new().days(ahead)) else { continue };
            let new: bool = sqlx::query_scalar("SELECT create_day_partition($1, $2::text::date)")
                .bind(table.name())
                .bind(day.to_string())
                .fetch_one(pool)
                .await
                .during("create a partition")?;
            created += u32::from(new);
        }
    }
    Ok(created)
}

/// The days for which a table has a partition, oldest first.
pub async fn partition_days(pool: &PgPool, table: DayTable) -> Result<Vec<Date>, StoreError> {
    const OPERATION: &str = "list the partitions of a table";
    let names: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = to_regclass($1) ORDER BY c.relname",
    )
    .bind(table.name())
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    // The default partition has no day.
    Ok(names.iter().filter_map(|name| Date::strptime("%Y%m%d", name.rsplit('_').next()?).ok()).collect())
}

/// How many rows there are in a day of a table.
pub async fn day_count(pool: &PgPool, table: DayTable, day: Date) -> Result<u64, StoreError> {
    let (from, to) = bounds(day);
    let sql = match table {
        DayTable::Events => "SELECT count(*) FROM events WHERE uid >= $1 AND uid < $2",
        DayTable::DeliveryAttempts => {
            "SELECT count(*) FROM delivery_attempts WHERE event_uid >= $1 AND event_uid < $2"
        }
        DayTable::Occurrences => "SELECT count(*) FROM occurrences WHERE uid >= $1 AND uid < $2",
        DayTable::AuditRecords => "SELECT count(*) FROM audit_records WHERE id >= $1 AND id < $2",
    };
    let rows: i64 = sqlx::query_scalar(sql)
        .bind(from)
        .bind(to)
        .fetch_one(pool)
        .await
        .during("count the rows of a day")?;
    Ok(rows.unsigned_abs())
}

/// Rows of a day in the order of their keys, from behind `after`, with the columns in the order in which cold storage
/// has them, and the key once more as `key`. About `limit`: rows with one key come together.
pub async fn day_rows(
    pool: &PgPool,
    table: DayTable,
    day: Date,
    after: Option<Uuid>,
    limit: u32,
) -> Result<Vec<PgRow>, StoreError> {
    let (from, to) = bounds(day);
    // Nothing has the smallest key: its version bits would be another version's.
    let after = after.unwrap_or(Uuid::nil());
    let sql = match table {
        DayTable::Events => {
            "SELECT uid, organization_id, id, source, type, subject, time, publisher, received_at,
                    to_jsonb(subscriptions)::text AS subscriptions,
                    CASE WHEN expunged_at IS NULL THEN body END AS body, expunged_at, uid AS key
             FROM events WHERE uid >= $1 AND uid < $2 AND uid > $3
             ORDER BY uid FETCH FIRST $4 ROWS WITH TIES"
        }
        DayTable::DeliveryAttempts => {
            "SELECT delivery_id, attempt, turn, event_uid, organization_id, subscription_id, connection_id,
                    outcome, status, error, at, duration_ms, event_uid AS key
             FROM delivery_attempts WHERE event_uid >= $1 AND event_uid < $2 AND event_uid > $3
             ORDER BY event_uid FETCH FIRST $4 ROWS WITH TIES"
        }
        DayTable::Occurrences => {
            "SELECT uid, schedule_id, organization_id, state, reason, manual, tick, last_tick, ticks, at, uid AS key
             FROM occurrences WHERE uid >= $1 AND uid < $2 AND uid > $3
             ORDER BY uid FETCH FIRST $4 ROWS WITH TIES"
        }
        DayTable::AuditRecords => {
            "SELECT id, organization_id, at, actor, key_id, connection_id, action, target_kind, target_id,
                    before::text, after::text, request_id, id AS key
             FROM audit_records WHERE id >= $1 AND id < $2 AND id > $3
             ORDER BY id FETCH FIRST $4 ROWS WITH TIES"
        }
    };
    sqlx::query(sql)
        .bind(from)
        .bind(to)
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await
        .during("read the rows of a day")
}

/// What became of a day that was to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropDay {
    /// It is gone.
    Dropped,
    /// It is as it was: it has so many rows, and not as many as expected.
    Has(u64),
}

/// How long the rows of a day may take to be counted.
const COUNT: &str = "600s";

/// Removes a day of a table with all its rows; if `expected` is given, only if there are as many, counted while nobody
/// can write to it.
pub async fn drop_day(
    pool: &PgPool,
    table: DayTable,
    day: Date,
    expected: Option<u64>,
) -> Result<DropDay, StoreError> {
    const OPERATION: &str = "drop a partition";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    // More than a statement may take otherwise.
    sqlx::query("SELECT set_config('statement_timeout', $1, true)")
        .bind(COUNT)
        .execute(&mut *transaction)
        .await
        .during(OPERATION)?;
    let found: Option<i64> = sqlx::query_scalar("SELECT drop_day_partition($1, $2::text::date, $3)")
        .bind(table.name())
        .bind(day.to_string())
        .bind(expected.map(|rows| i64::try_from(rows).unwrap_or(i64::MAX)))
        .fetch_one(&mut *transaction)
        .await
        .during(OPERATION)?;
    transaction.commit().await.during(OPERATION)?;
    Ok(found.map_or(DropDay::Dropped, |rows| DropDay::Has(rows.unsigned_abs())))
}

/// How many audit records of a day the audit stream does not have yet.
pub async fn unrelayed_records(pool: &PgPool, day: Date) -> Result<u64, StoreError> {
    let (from, to) = bounds(day);
    let rows: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM audit_records WHERE relayed_at IS NULL AND id >= $1 AND id < $2",
    )
    .bind(from)
    .bind(to)
    .fetch_one(pool)
    .await
    .during("count audit records that the stream does not have")?;
    Ok(rows.unsigned_abs())
}

/// How many rows of the days before `horizon` lie in no partition of their day, at most `limit`.
pub async fn strays(pool: &PgPool, table: DayTable, horizon: Date, limit: u32) -> Result<u64, StoreError> {
    let sql = match table {
        DayTable::Events => "SELECT count(*) FROM (SELECT FROM events WHERE uid < $1 AND tableoid = 'events_default'::regclass
              LIMIT $2) s",
        DayTable::DeliveryAttempts => {
            "SELECT count(*) FROM (SELECT FROM delivery_attempts WHERE event_uid < $1 AND tableoid = 'delivery_attempts_default'::regclass
              LIMIT $2) s"
        }
        DayTable::Occurrences => {
            "SELECT count(*) FROM (SELECT FROM occurrences WHERE uid < $1 AND tableoid = 'occurrences_default'::regclass
              LIMIT $2) s"
        }
        DayTable::AuditRecords => {
            "SELECT count(*) FROM (SELECT FROM audit_records WHERE id < $1 AND tableoid = 'audit_records_default'::regclass
              LIMIT $2) s"
        }
    };
    let rows: i64 = sqlx::query_scalar(sql)
        .bind(uuid_floor(midnight(horizon)))
        .bind(i64::from(limit))
        .fetch_one(pool)
        .await
        .during("count rows outside of their day")?;
    Ok(rows.unsigned_abs())
}

/// Removes at most `limit` rows of the days before `horizon` that lie in no partition of their day: what came late, for
/// a day that had gone already.
pub async fn sweep_strays(
    pool: &PgPool,
    table: DayTable,
    horizon: Date,
    limit: u32,
) -> Result<u64, StoreError> {
    let sql = match table {
        DayTable::Events => {
            "DELETE FROM events WHERE (tableoid, ctid) IN
             (SELECT tableoid, ctid FROM events WHERE uid < $1 AND tableoid = $2 LIMIT $3)"
        }
        DayTable::DeliveryAttempts => {
            "DELETE FROM delivery_attempts WHERE (tableoid, ctid) IN
             (SELECT tableoid, ctid FROM delivery_attempts WHERE event_uid < $1 AND tableoid = $2 LIMIT $3)"
        }
        DayTable::Occurrences => {
            "DELETE FROM occurrences WHERE (tableoid, ctid) IN
             (SELECT tableoid, ctid FROM occurrences WHERE uid < $1 AND tableoid = $2 LIMIT $3)"
        }
        DayTable::AuditRecords => {
            "DELETE FROM audit_records WHERE (tableoid, ctid) IN
             (SELECT tableoid, ctid FROM audit_records WHERE id < $1 AND tableoid = $2 LIMIT $3)"
        }
    };
    const OPERATION: &str = "sweep rows of days that are gone";
    let default: Option<Oid> =
        sqlx::query_scalar(of_table!(table, "SELECT to_regclass('", "_default')::oid"))
            .fetch_one(pool)
            .await
            .during(OPERATION)?;
    let Some(default) = default else { return Ok(0) };
    let swept = sqlx::query(sql)
        .bind(uuid_floor(midnight(horizon)))
        .bind(default)
        .bind(i64::from(limit))
        .execute(pool)
        .await
        .during(OPERATION)?;
    Ok(swept.rows_affected())
}

/// The keys of a day: from the first of it to the first of the next.
fn bounds(day: Date) -> (Uuid, Uuid) {
    let next = day.checked_add(Span::new().days(1)).unwrap_or(day);
    (uuid_floor(midnight(day)), uuid_floor(midnight(next)))
}

fn midnight(day: Date) -> Timestamp {
    day.to_zoned(TimeZone::UTC).map_or(Timestamp::UNIX_EPOCH, |midnight| midnight.timestamp())
}
