//! History, as it is written: receipts become rows of `delivery_attempts`, each once.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::PgPool;
use uuid::Uuid;

use super::{During as _, StoreError, storable};
use crate::receipt::{Receipt, ReceiptOutcome};

/// The columns in the order in which [`encode`] and [`insert_attempts`] give them.
macro_rules! columns {
    () => {
        "delivery_id, attempt, event_uid, organization_id, subscription_id, connection_id, outcome, status, error, at, \
         duration_ms, turn"
    };
}

/// How many columns those are.
const COLUMNS: i16 = 12;

/// What starts a binary COPY: the signature, no flags, no extension
/// (<https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-BINARY-FORMAT>).
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What Postgres counts its times from: 2000-01-01T00:00:00Z, in microseconds since 1970.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// Appends finished attempts with one COPY, the cheapest way into a table. COPY cannot pass over what is there already:
/// if a single receipt is a repeat, after a crash for example, all of them take the way of [`insert_attempts`].
pub async fn copy_attempts(pool: &PgPool, receipts: &[Receipt]) -> Result<(), StoreError> {
    match copy(pool, receipts).await.during("copy attempts") {
        Ok(_) => mark_delivered(pool, receipts).await,
        // 23505: unique_violation
        Err(StoreError::Database { source: sqlx::Error::Database(error), .. })
            if error.code().as_deref() == Some("23505") =>
        {
            insert_attempts(pool, receipts).await
        }
        Err(error) => Err(error),
    }
}

async fn copy(pool: &PgPool, receipts: &[Receipt]) -> Result<u64, sqlx::Error> {
    let mut connection = pool.acquire().await?;
    let mut copy = connection
        .copy_in_raw(concat!("COPY delivery_attempts (", columns!(), ") FROM STDIN (FORMAT binary)"))
        .await?;
    copy.send(encode(receipts)).await?;
    copy.finish().await
}

fn encode(receipts: &[Receipt]) -> Vec<u8> {
    let mut rows = Rows(SIGNATURE.to_vec());
    for receipt in receipts {
        rows.0.extend(COLUMNS.to_be_bytes());
        rows.field(receipt.delivery.0.as_bytes());
        rows.field(&int(receipt.attempt).to_be_bytes());
        rows.field(receipt.event.0.as_bytes());
        rows.field(receipt.organization.0.as_bytes());
        rows.field(receipt.subscription.0.as_bytes());
        rows.field(receipt.connection.0.as_bytes());
        rows.field(receipt.outcome.as_str().as_bytes());
        rows.optional(receipt.status.map(|status| i32::from(status).to_be_bytes()));
        rows.optional(receipt.error.as_deref().map(storable));
        rows.field(&(receipt.at.as_microsecond() - POSTGRES_EPOCH).to_be_bytes());
        rows.field(&int(receipt.duration_ms).to_be_bytes());
        rows.field(&receipt.turn.to_be_bytes());
    }
    // the trailer: a row of -1 columns
    rows.0.extend((-1_i16).to_be_bytes());
    rows.0
}

/// Rows in the binary format of COPY.
struct Rows(Vec<u8>);

impl Rows {
    fn field(&mut self, value: &[u8]) {
        // A receipt's texts are bounded far below this.
        self.0.extend(i32::try_from(value.len()).unwrap_or(i32::MAX).to_be_bytes());
        self.0.extend(value);
    }

    fn optional(&mut self, value: Option<impl AsRef<[u8]>>) {
        match value {
            Some(value) => self.field(value.as_ref()),
            None => self.0.extend((-1_i32).to_be_bytes()),
        }
    }
}

fn int(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Appends finished attempts, and notes of deliveries that had left the straight path that they are over.
/// Repeated receipts change nothing.
pub async fn insert_attempts(pool: &PgPool, receipts: &[Receipt]) -> Result<(), StoreError> {
    let each = |f: fn(&Receipt) -> Uuid| receipts.iter().map(f).collect::<Vec<_>>();
    let times: Vec<jiff_sqlx::Timestamp> = receipts.iter().map(|receipt| receipt.at.into()).collect();
    sqlx::query(concat!(
        "INSERT INTO delivery_attempts (",
        columns!(),
        ") SELECT * FROM UNNEST($1::uuid[], $2::int4[], $3::uuid[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[],
                                $8::int4[], $9::text[], $10::timestamptz[], $11::int4[], $12::int8[])
         ON CONFLICT DO NOTHING",
    ))
    .bind(each(|receipt| receipt.delivery.0))
    .bind(receipts.iter().map(|receipt| int(receipt.attempt)).collect::<Vec<_>>())
    .bind(each(|receipt| receipt.event.0))
    .bind(each(|receipt| receipt.organization.0))
    .bind(each(|receipt| receipt.subscription.0))
    .bind(each(|receipt| receipt.connection.0))
    .bind(receipts.iter().map(|receipt| receipt.outcome.as_str()).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.status.map(i32::from)).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.error.as_deref().map(storable)).collect::<Vec<_>>())
    .bind(times)
    .bind(receipts.iter().map(|receipt| int(receipt.duration_ms)).collect::<Vec<_>>())
    .bind(receipts.iter().map(|receipt| receipt.turn).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("record attempts")?;
    mark_delivered(pool, receipts).await
}

/// Notes of deliveries that had left the straight path that they are over.
async fn mark_delivered(pool: &PgPool, receipts: &[Receipt]) -> Result<(), StoreError> {
    let over: Vec<&Receipt> = receipts
        .iter()
        .filter(|receipt| receipt.turn > 0 && receipt.outcome == ReceiptOutcome::Delivered)
        .collect();
    if over.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "WITH over AS (
             SELECT p.delivery_id, r.turn
             FROM delivery_states p
             JOIN (SELECT delivery_id, max(turn) AS turn FROM UNNEST($1::uuid[], $2::int8[]) AS r (delivery_id, turn)
                   GROUP BY delivery_id) r ON p.delivery_id = r.delivery_id
             WHERE p.turn <= r.turn AND p.state IN ('waiting', 'queued')
             ORDER BY p.delivery_id
             FOR UPDATE OF p
         )
         UPDATE delivery_states p
         SET state = 'delivered', turn = over.turn, due_at = NULL, lease_until = '-infinity', changed_at = now()
         FROM over WHERE p.delivery_id = over.delivery_id",
    )
    .bind(over.iter().map(|receipt| receipt.delivery.0).collect::<Vec<_>>())
    .bind(over.iter().map(|receipt| receipt.turn).collect::<Vec<_>>())
    .execute(pool)
    .await
    .during("note deliveries that are over")?;
    Ok(())
}

/// Notes that everything that workers had reported `ago` is in history. A note never goes back.
pub async fn note_history_through(pool: &PgPool, through: Through) -> Result<(), StoreError> {
    let (at, ago): (Option<jiff_sqlx::Timestamp>, Duration) = match through {
        Through::Time(at) => (Some(at.into()), Duration::ZERO),
        Through::Ago(ago) => (None, ago),
    };
    sqlx::query(
        "INSERT INTO history_progress AS p (through) VALUES (coalesce($1, now() - make_interval(secs => $2)))
         ON CONFLICT (one_row) DO UPDATE SET through = greatest(p.through, excluded.through)",
    )
    .bind(at)
    .bind(ago.as_secs_f64())
    .execute(pool)
    .await
    .during("note how far history goes")?;
    Ok(())
}

/// A time, by its own clock or by the database's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// This one.
    Time(Timestamp),
    /// So long before the database's now.
    Ago(Duration),
}
