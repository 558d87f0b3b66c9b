//! An organization's subscriptions, read for matching.

use std::collections::HashMap;

use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError, stored_lane};
use crate::{
    filter::PayloadFilter,
    ids::{OrganizationId, SubscriptionId},
    matcher::{Candidate, Snapshot},
    pattern::TypePattern,
};

/// Reads every live subscription of an organization.
pub async fn load_snapshot(
    connection: &mut PgConnection,
    organization: OrganizationId,
) -> Result<Snapshot, StoreError> {
    load_snapshot_of(connection, organization, None).await
}

/// Reads the live subscriptions of an organization: all, or only one.
pub async fn load_snapshot_of(
    connection: &mut PgConnection,
    organization: OrganizationId,
    only: Option<SubscriptionId>,
) -> Result<Snapshot, StoreError> {
    const OPERATION: &str = "load an organization's subscriptions";
    // The version first: whatever changes between the two statements makes the snapshot newer than its
    // version says, which costs one more load and never a missed subscription.
    let own: Option<(i64, Option<i16>)> =
        sqlx::query_as("SELECT version, lane FROM organizations WHERE id = $1")
            .bind(organization.0)
            .fetch_optional(&mut *connection)
            .await
            .during("read an organization's version")?;
    let (version, lane) = own.unwrap_or_default();
    let rows = sqlx::query(
        "SELECT s.id, s.connection_id, c.version AS connection_version, s.enabled AND c.enabled AS enabled,
                s.event_type, s.publisher, s.filter
         FROM subscriptions s
         JOIN connections c ON c.id = s.connection_id AND c.deleted_at IS NULL
         WHERE s.organization_id = $1 AND ($2::uuid IS NULL OR s.id = $2) AND s.deleted_at IS NULL
         ORDER BY s.id",
    )
    .bind(organization.0)
    .bind(only.map(|id| id.0))
    .fetch_all(&mut *connection)
    .await
    .during(OPERATION)?;
    let candidates = rows.iter().map(candidate).collect::<Result<_, _>>()?;
    Ok(Snapshot::new(version, lane.and_then(stored_lane), candidates))
}

fn candidate(row: &sqlx::postgres::PgRow) -> Result<Candidate, StoreError> {
    const OPERATION: &str = "read a subscription";
    let id = SubscriptionId(row.try_get("id").during(OPERATION)?);
    let inconsistent =
        |problem: String| StoreError::Inconsistent { table: "subscriptions", id: id.to_string(), problem };
    let event_type: &str = row.try_get("event_type").during(OPERATION)?;
    let filter: Option<&str> = row.try_get("filter").during(OPERATION)?;
    Ok(Candidate {
        subscription: id,
        connection: row.try_get::<Uuid, _>("connection_id").during(OPERATION)?.into(),
        connection_version: row.try_get("connection_version").during(OPERATION)?,
        enabled: row.try_get("enabled").during(OPERATION)?,
        event_type: TypePattern::parse(event_type)
            .map_err(|refused| inconsistent(format!("event_type: {refused}")))?,
        publisher: row.try_get::<Option<Uuid>, _>("publisher").during(OPERATION)?.map(Into::into),
        filter: filter
            .map(PayloadFilter::parse)
            .transpose()
            .map_err(|refused| inconsistent(format!("filter: {refused}")))?,
    })
}

/// The versions of several organizations; see [`read_version`]. One that does not exist is missing.
pub async fn read_versions_of(
    connection: &mut PgConnection,
    organizations: &[OrganizationId],
) -> Result<HashMap<OrganizationId, i64>, StoreError> {
    let versions: Vec<(Uuid, i64)> =
        sqlx::query_as("SELECT id, version FROM organizations WHERE id = ANY($1)")
            .bind(organizations.iter().map(|id| id.0).collect::<Vec<_>>())
            .fetch_all(connection)
            .await
            .during("read organizations' versions")?;
    Ok(versions.into_iter().map(|(id, version)| (OrganizationId(id), version)).collect())
}

/// The organization's version, which every change of its subscriptions increments; 0 if there is no such
/// organization.
pub async fn read_version(
    connection: &mut PgConnection,
    organization: OrganizationId,
) -> Result<i64, StoreError> {
    let version: Option<i64> = sqlx::query_scalar("SELECT version FROM organizations WHERE id = $1")
        .bind(organization.0)
        .fetch_optional(connection)
        .await
        .during("read an organization's version")?;
    Ok(version.unwrap_or(0))
}
