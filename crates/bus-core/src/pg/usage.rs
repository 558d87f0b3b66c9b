//! What organizations publish, and how much they may.

use std::time::Duration;

use jiff::civil::Date;
use sqlx::{PgPool, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{During as _, StoreError};
use crate::{ids::OrganizationId, words::words};

words! {
    /// For how long a quota is.
    QuotaPeriod {
        /// A calendar day, UTC.
        Day = "day",
        /// A calendar month, UTC.
        Month = "month",
    }
}

/// How fast events may be published. A rate of 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PublishRate {
    /// Events a second.
    pub per_second: f64,
    /// Events at once.
    pub burst: u64,
}

/// How many events may be published. 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishQuota {
    /// Events in a period.
    pub events: u64,
    /// For how long.
    pub period: QuotaPeriod,
}

/// The limits that an organization has of its own; for those that are missing the configured ones hold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OwnLimits {
    /// How fast.
    pub rate: Option<PublishRate>,
    /// How many.
    pub quota: Option<PublishQuota>,
}

/// What an organization has published, by the database's calendar, and its limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Whose it is.
    pub organization: OrganizationId,
    /// Its own limits.
    pub limits: OwnLimits,
    /// Events since the day began.
    pub day: u64,
    /// Events since the month began.
    pub month: u64,
    /// Until the day ends.
    pub day_ends_in: Duration,
    /// Until the month ends.
    pub month_ends_in: Duration,
    /// How long this month is.
    pub month_lasts: Duration,
}

/// The limits in a row of `organizations`.
pub(super) fn limits(row: &PgRow) -> Result<OwnLimits, sqlx::Error> {
    let (rate, burst): (Option<f64>, Option<i64>) =
        (row.try_get("publish_rate")?, row.try_get("publish_burst")?);
    let (quota, period): (Option<i64>, Option<&str>) =
        (row.try_get("publish_quota")?, row.try_get("publish_quota_period")?);
    let quota = quota.zip(period).and_then(|(events, period)| {
        Some(PublishQuota { events: whole(events), period: period.parse().ok()? })
    });
    let rate = rate.zip(burst).map(|(per_second, burst)| PublishRate { per_second, burst: whole(burst) });
    Ok(OwnLimits { rate, quota })
}

fn whole(stored: i64) -> u64 {
    u64::try_from(stored).unwrap_or(0)
}

fn seconds(row: &PgRow, column: &str) -> Result<Duration, sqlx::Error> {
    Ok(Duration::from_secs(whole(row.try_get(column)?)))
}

/// Adds what was published to today's, and reads what each of these organizations has published by now. With 0 it is only
/// read. One that does not exist is missing.
pub async fn add_usage(pool: &PgPool, counted: &[(OrganizationId, u64)]) -> Result<Vec<Usage>, StoreError> {
    const OPERATION: &str = "count published events";
    let organizations: Vec<Uuid> = counted.iter().map(|(id, _)| id.0).collect();
    let events: Vec<i64> = counted.iter().map(|(_, n)| i64::try_from(*n).unwrap_or(i64::MAX)).collect();
    let rows = sqlx::query(
        // In order, so that two publishers do not wait for each other.
        "WITH calendar AS (
             SELECT t.now, t.now::date AS today, date_trunc('month', t.now) AS month,
                    date_trunc('month', t.now) + interval '1 month' AS next_month
             FROM (SELECT now() AT TIME ZONE 'UTC' AS now) AS t
         ), counted AS (
             SELECT o.id, c.events, o.publish_rate, o.publish_burst, o.publish_quota, o.publish_quota_period
             FROM UNNEST($1::uuid[], $2::int8[]) AS c (id, events) JOIN organizations o ON o.id = c.id
         ), added AS (
             INSERT INTO organization_usage AS u (organization_id, day, events)
             SELECT c.id, calendar.today, c.events FROM counted c, calendar WHERE c.events > 0 ORDER BY c.id
             ON CONFLICT (organization_id, day) DO UPDATE SET events = u.events + excluded.events
             RETURNING u.organization_id, u.events
         )
         SELECT c.*, coalesce(a.events, t.events, 0) AS day_events,
                coalesce(a.events, t.events, 0) + coalesce(e.events, 0) AS month_events,
                ceil(extract(epoch FROM k.today + 1 - k.now))::int8 AS day_ends_in,
                ceil(extract(epoch FROM k.next_month - k.now))::int8 AS month_ends_in,
                extract(epoch FROM k.next_month - k.month)::int8 AS month_lasts
         FROM counted c CROSS JOIN calendar k
         LEFT JOIN added a ON a.organization_id = c.id
         LEFT JOIN organization_usage t ON t.organization_id = c.id AND t.day = k.today
         LEFT JOIN LATERAL (
             SELECT sum(m.events)::int8 AS events FROM organization_usage m
             WHERE m.organization_id = c.id AND m.day >= k.month::date AND m.day < k.today
         ) AS e ON true",
    )
    .bind(organizations)
    .bind(events)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let usage = |row: &PgRow| {
        Ok(Usage {
            organization: OrganizationId(row.try_get("id")?),
            limits: limits(row)?,
            day: whole(row.try_get("day_events")?),
            month: whole(row.try_get("month_events")?),
            day_ends_in: seconds(row, "day_ends_in")?,
            month_ends_in: seconds(row, "month_ends_in")?,
            month_lasts: seconds(row, "month_lasts")?,
        })
    };
    rows.iter().map(usage).collect::<Result<_, sqlx::Error>>().during(OPERATION)
}

/// How many events an organization has published on each of its last days on which there were any, the latest first.
pub async fn usage_by_day(
    pool: &PgPool,
    organization: OrganizationId,
    days: u32,
) -> Result<Vec<(Date, u64)>, StoreError> {
    const OPERATION: &str = "read what was published by day";
    let rows: Vec<(jiff_sqlx::Date, i64)> = sqlx::query_as(
        "SELECT day, events FROM organization_usage WHERE organization_id = $1 ORDER BY day DESC LIMIT $2",
    )
    .bind(organization.0)
    .bind(i64::from(days))
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    Ok(rows.into_iter().map(|(day, events)| (day.to_jiff(), whole(events))).collect())
}

/// Deletes at most `limit` days of organizations that are more than `keep_days` ago.
pub async fn sweep_usage(pool: &PgPool, keep_days: u32, limit: u32) -> Result<u64, StoreError> {
    let swept = sqlx::query(
        "DELETE FROM organization_usage WHERE (organization_id, day) IN (
             SELECT organization_id, day FROM organization_usage
             WHERE day < (now() AT TIME ZONE 'UTC')::date - $1 ORDER BY day LIMIT $2)",
    )
    .bind(i32::try_from(keep_days).unwrap_or(i32::MAX))
    .bind(i64::from(limit))
    .execute(pool)
    .await
    .during("sweep what was published long ago")?;
    Ok(swept.rows_affected())
}
