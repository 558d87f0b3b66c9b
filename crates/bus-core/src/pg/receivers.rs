//! Connections as the workers see them: with the rules of their subscriptions, and how they end.

use sqlx::PgPool;
use uuid::Uuid;

use super::{
    During as _, StoreError,
    connections::connection,
    subscriptions::{MAX_SUBSCRIPTIONS, RulesColumns},
};
use crate::{
    connection::Receiver,
    ids::{ConnectionId, OrganizationId, SubscriptionId},
};

#[derive(sqlx::FromRow)]
struct RulesRow {
    id: Uuid,
    #[sqlx(flatten)]
    rules: RulesColumns,
}

/// The connection of that id, with the rules of those of its subscriptions that have some. Of the deleted
/// ones those that were deleted last, so that there are at most [`MAX_SUBSCRIPTIONS`] in all.
pub async fn receiver(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
) -> Result<Option<Receiver>, StoreError> {
    // The connection first: rules that change between the two statements are newer than its version says,
    // which costs one more read and never an outdated rule.
    let Some(connection) = connection(pool, organization, id).await? else { return Ok(None) };
    // None of the others is left out by the limit: an organization has no more of them.
    let rows: Vec<RulesRow> = sqlx::query_as(
        "SELECT id, retry_policy, batch FROM subscriptions
          WHERE connection_id = $1 AND organization_id = $2
            AND (retry_policy IS NOT NULL OR batch IS NOT NULL)
          ORDER BY deleted_at DESC NULLS FIRST LIMIT $3",
    )
    .bind(id.0)
    .bind(organization.0)
    .bind(MAX_SUBSCRIPTIONS)
    .fetch_all(pool)
    .await
    .during("read the rules of a connection's subscriptions")?;
    let rules = rows.into_iter().map(|row| (SubscriptionId(row.id), row.rules.into())).collect();
    Ok(Some(Receiver { connection, rules }))
}

/// Disables a connection because its endpoint is gone, and says why in `disabled_reason`. `version` is the
/// connection's own at the attempt that was told so (not the one that the delivery was matched with): one
/// that was changed meanwhile stays as it is. True if this call disabled it; hints are the caller's to send.
pub async fn disable_connection(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
    version: i64,
    reason: &str,
) -> Result<bool, StoreError> {
    sqlx::query_scalar("SELECT disable_connection($1, $2, $3, $4)")
        .bind(organization.0)
        .bind(id.0)
        .bind(version)
        .bind(reason)
        .fetch_one(pool)
        .await
        .during("disable a connection")
}

/// Notes that the endpoint of a connection fails, and since when, unless the connection was changed since `version`. If
/// that was noted longer than `after_s` seconds ago, 0 for never, the connection is disabled, which is true then; hints
/// are the caller's to send.
pub async fn note_failing(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
    version: i64,
    after_s: u64,
) -> Result<bool, StoreError> {
    sqlx::query_scalar("SELECT note_failing($1, $2, $3, $4)")
        .bind(organization.0)
        .bind(id.0)
        .bind(version)
        .bind(super::publish::seconds(after_s))
        .fetch_one(pool)
        .await
        .during("note a connection that fails")
}

/// Notes that the endpoint of a connection works.
pub async fn note_working(
    pool: &PgPool,
    organization: OrganizationId,
    id: ConnectionId,
) -> Result<(), StoreError> {
    sqlx::query("SELECT note_working($1, $2)")
        .bind(organization.0)
        .bind(id.0)
        .execute(pool)
        .await
        .during("note a connection that works")?;
    Ok(())
}
