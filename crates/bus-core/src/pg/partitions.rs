//! Partitions by time: one per UTC day, over UUIDv7 keys.

use jiff::{Span, Timestamp, tz::TimeZone};
use sqlx::PgPool;

use super::{During as _, StoreError};

/// The tables that are partitioned by day.
const PARTITIONED: [&str; 4] = ["events", "delivery_attempts", "occurrences", "audit_records"];

/// Creates the partitions of the `days` days after today, so that each is there before its first row; the
/// migration creates those of the first days. Should nobody do it for longer, rows go to the default
/// partition, and today's is not created behind them. Returns how many were created; safe to call by any
/// number of processes.
pub async fn create_partitions(pool: &PgPool, now: Timestamp, days: i32) -> Result<u32, StoreError> {
    let today = now.to_zoned(TimeZone::UTC).date();
    let mut created = 0;
    for table in PARTITIONED {
        for ahead in 1..=days {
            let Ok(day) = today.checked_add(Span::new().days(ahead)) else { continue };
            let new: bool = sqlx::query_scalar("SELECT create_day_partition($1, $2::text::date)")
                .bind(table)
                .bind(day.to_string())
                .fetch_one(pool)
                .await
                .during("create a partition")?;
            created += u32::from(new);
        }
    }
    Ok(created)
}
