//! Passes audit records on to the audit stream, from where they go to cold storage, and where others may listen.
//!
//! A record is written in the transaction of its change, so none is lost; it is marked when the stream has it. Whoever
//! dies in between leaves it to be published again, under the same message id.

use std::time::Duration;

use async_nats::HeaderMap;
use bus_core::{
    launcher::{BoxError, Heartbeat},
    nats::Nats,
    pg,
    telemetry::Chain,
};
use futures::future::try_join_all;
use metrics::counter;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Between two looks for new records.
pub(crate) const LOOK: Duration = Duration::from_secs(1);

/// Records of one transaction.
const BATCH: u32 = 500;

pub(crate) async fn run(
    pool: PgPool,
    nats: Nats,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    while !stop.is_cancelled() {
        beat.beat();
        match pg::answered("publish audit records", relay_once(&pool, &nats)).await {
            Ok(BATCH) => continue,
            Ok(_) => {}
            Err(failed) => warn!(error = %Chain(failed.as_ref()), "Audit records wait for the audit stream"),
        }
        stop.run_until_cancelled(tokio::time::sleep(LOOK)).await;
    }
    Ok(())
}

/// How many records there were.
async fn relay_once(pool: &PgPool, nats: &Nats) -> Result<u32, BoxError> {
    let mut transaction = pg::begin(pool).await?;
    let records = pg::audit::take_open(&mut transaction, BATCH).await?;
    if records.is_empty() {
        return Ok(0);
    }
    let published = records.iter().map(|record| async move {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", record.id.to_string());
        let body = serde_json::to_vec(record)?;
        let subject = nats.names.audit_record(record);
        nats.jetstream.publish_with_headers(subject, headers, body.into()).await?.await?;
        Ok::<_, BoxError>(())
    });
    try_join_all(published).await?;
    let ids: Vec<_> = records.iter().map(|record| record.id).collect();
    pg::audit::note_relayed(&mut transaction, &ids).await?;
    pg::commit(transaction).await?;
    counter!("bus_audit_records_relayed").increment(ids.len() as u64);
    Ok(u32::try_from(ids.len()).unwrap_or(BATCH))
}
