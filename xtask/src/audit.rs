//! What an operator changes by a command leaves an audit record, like what is changed through the API.

use anyhow::{Context as _, Result};
use async_nats::HeaderMap;
use bus_core::{
    audit::{Actor, By, Change, Record, Target},
    clock::{Clock as _, SystemClock},
    ids::{AuditId, Ids as _, OrganizationId, SystemIds},
    nats::Nats,
    pg,
};
use sqlx::PgPool;

fn by() -> By {
    By { record: AuditId(SystemIds.next()), actor: Actor::Admin, request: None }
}

/// Writes the record of what is about to be done; what cannot be recorded is not done.
pub(crate) async fn record(pool: &PgPool, whose: Option<OrganizationId>, change: Change) -> Result<()> {
    let mut transaction = pg::begin(pool).await?;
    pg::audit::record(&mut transaction, &by(), whose, change).await?;
    Ok(pg::commit(transaction).await?)
}

/// The same for a command that has the broker and no right to write records: straight to the audit stream, from where
/// they go to cold storage.
pub(crate) async fn publish(nats: &Nats, change: Change) -> Result<()> {
    let By { record, actor, request } = by();
    let record = Record {
        id: record,
        organization_id: None,
        at: SystemClock.now(),
        actor,
        action: change.action.as_str().to_owned(),
        target: Target { kind: change.target_kind.as_str().to_owned(), id: change.target_id },
        before: change.before,
        after: change.after,
        request_id: request,
    };
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, record.id.to_string());
    let subject = nats.names.audit_record(&record);
    let published =
        nats.jetstream.publish_with_headers(subject, headers, serde_json::to_vec(&record)?.into()).await;
    published.context("publish the audit record")?.await.context("publish the audit record")?;
    Ok(())
}
