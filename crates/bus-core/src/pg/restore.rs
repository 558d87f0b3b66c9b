//! Rows that come back from cold storage into the tables that they were dropped from.

use serde_json::Value;
use sqlx::{PgPool, types::Json};

use super::{DayTable, During as _, StoreError};

/// Puts rows back; those that are there stay as they are. Each is an object with the columns that cold storage has: bytes
/// in base64, JSON as text. Says how many came back.
///
/// They lie outside of the partitions by day, where the archiver expires them once their day is past its retention and
/// does not take them for a day that was never archived. A payload that was erased meanwhile does not come back.
pub async fn restore_rows(pool: &PgPool, table: DayTable, rows: &[Value]) -> Result<u64, StoreError> {
    const OPERATION: &str = "restore rows";
    let statement = match table {
        DayTable::Events => {
            "INSERT INTO events (uid, organization_id, id, source, type, subject, time, publisher, received_at,
                                 subscriptions, body, expunged_at)
             SELECT r.uid, r.organization, r.id, r.source, r.type, r.subject, r.time, r.publisher, r.received_at,
                    ARRAY(SELECT jsonb_array_elements_text(r.subscriptions::jsonb)::uuid),
                    CASE WHEN e.erased THEN '' ELSE coalesce(decode(r.body, 'base64'), '') END,
                    CASE WHEN e.erased THEN coalesce(r.expunged_at, now()) ELSE r.expunged_at END
             FROM jsonb_to_recordset($1) AS r (
                 uid uuid, organization uuid, id text, source text, type text, subject text, time timestamptz,
                 publisher uuid, received_at timestamptz, subscriptions text, body text, expunged_at timestamptz)
             CROSS JOIN LATERAL (SELECT EXISTS (
                 SELECT FROM erasures x WHERE x.organization_id = r.organization
                    AND (x.event_uid = r.uid OR x.event_uid IS NULL AND r.received_at <= x.requested_at))) AS e (erased)
             ON CONFLICT DO NOTHING"
        }
        DayTable::DeliveryAttempts => {
            "INSERT INTO delivery_attempts (delivery_id, attempt, turn, event_uid, organization_id, subscription_id,
                                            connection_id, outcome, status, error, at, duration_ms)
             SELECT * FROM jsonb_to_recordset($1) AS r (
                 delivery uuid, attempt int4, turn int8, event uuid, organization uuid, subscription uuid,
                 connection uuid, outcome text, status int4, error text, at timestamptz, duration_ms int4)
             ON CONFLICT DO NOTHING"
        }
        DayTable::Occurrences => {
            "INSERT INTO occurrences (uid, schedule_id, organization_id, state, reason, manual, tick, last_tick, ticks, at)
             SELECT * FROM jsonb_to_recordset($1) AS r (
                 uid uuid, schedule uuid, organization uuid, state text, reason text, manual bool, tick timestamptz,
                 last_tick timestamptz, ticks int8, at timestamptz)
             ON CONFLICT DO NOTHING"
        }
        // The audit stream has had them.
        DayTable::AuditRecords => {
            "INSERT INTO audit_records (id, organization_id, at, actor, key_id, connection_id, action, target_kind,
                                        target_id, before, after, request_id, relayed_at)
             SELECT id, organization, at, actor, key, connection, action, target_kind, target_id, before::jsonb,
                    after::jsonb, request_id, at
             FROM jsonb_to_recordset($1) AS r (
                 id uuid, organization uuid, at timestamptz, actor text, key uuid, connection uuid, action text,
                 target_kind text, target_id text, before text, after text, request_id text)
             ON CONFLICT DO NOTHING"
        }
    };
    let mut transaction = pool.begin().await.during(OPERATION)?;
    if table == DayTable::Events {
        // An erasure that is asked for from here on waits, and then finds these rows; an earlier one is seen.
        sqlx::query(
            "SELECT id FROM organizations
             WHERE id IN (SELECT r.organization FROM jsonb_to_recordset($1) AS r (organization uuid))
             ORDER BY id FOR SHARE",
        )
        .bind(Json(rows))
        .execute(&mut *transaction)
        .await
        .during(OPERATION)?;
    }
    let restored =
        sqlx::query(statement).bind(Json(rows)).execute(&mut *transaction).await.during(OPERATION)?;
    transaction.commit().await.during(OPERATION)?;
    Ok(restored.rows_affected())
}
