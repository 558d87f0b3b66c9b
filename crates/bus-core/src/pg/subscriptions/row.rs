//! The table's columns, and what they hold.

use sha2::{Digest as _, Sha256};
use sqlx::types::Json;
use uuid::Uuid;

use super::Wanted;
use crate::{
    filter::PayloadFilter,
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pattern::TypePattern,
    pg::StoreError,
    retry::RetryOverride,
    subscription::{BatchPolicy, Subscription, SubscriptionRules},
};

/// What makes a subscription of a connection unique: pattern, publisher, filter.
pub(super) type Identity = (String, Option<Uuid>, Option<String>);

#[derive(sqlx::FromRow)]
pub(super) struct SubscriptionRow {
    pub(super) id: Uuid,
    organization_id: Uuid,
    connection_id: Uuid,
    pub(super) event_type: String,
    pub(super) publisher: Option<Uuid>,
    pub(super) filter: Option<String>,
    #[sqlx(flatten)]
    pub(super) rules: RulesColumns,
    pub(super) enabled: bool,
    created_at: jiff_sqlx::Timestamp,
    updated_at: jiff_sqlx::Timestamp,
}

/// The columns that hold the rules.
#[derive(sqlx::FromRow)]
pub(in crate::pg) struct RulesColumns {
    retry_policy: Option<Json<RetryOverride>>,
    batch: Option<Json<BatchPolicy>>,
}

impl From<RulesColumns> for SubscriptionRules {
    fn from(columns: RulesColumns) -> Self {
        Self { retry: columns.retry_policy.map(|Json(it)| it), batch: columns.batch.map(|Json(it)| it) }
    }
}

impl TryFrom<SubscriptionRow> for Subscription {
    type Error = StoreError;

    fn try_from(row: SubscriptionRow) -> Result<Self, StoreError> {
        let unfit = |problem: String| StoreError::Inconsistent {
            table: "subscriptions",
            id: row.id.to_string(),
            problem,
        };
        Ok(Self {
            id: SubscriptionId(row.id),
            organization: OrganizationId(row.organization_id),
            connection: ConnectionId(row.connection_id),
            event_type: TypePattern::parse(&row.event_type)
                .map_err(|error| unfit(format!("event_type: {error}")))?,
            publisher: row.publisher.map(ConnectionId),
            filter: row
                .filter
                .as_deref()
                .map(PayloadFilter::parse)
                .transpose()
                .map_err(|error| unfit(format!("filter: {error}")))?,
            rules: row.rules.into(),
            enabled: row.enabled,
            created_at: row.created_at.to_jiff(),
            updated_at: row.updated_at.to_jiff(),
        })
    }
}

macro_rules! columns {
    () => {
        "id, organization_id, connection_id, event_type, publisher, filter, retry_policy, batch, enabled, \
         created_at, updated_at"
    };
}
pub(super) use columns;

impl Wanted {
    pub(super) fn identity(&self) -> Identity {
        (
            self.event_type.as_str().to_owned(),
            self.publisher.map(|id| id.0),
            self.filter.as_ref().map(ToString::to_string),
        )
    }

    pub(super) fn filter_bytes(&self) -> i32 {
        let bytes = self.filter.as_ref().map_or(0, PayloadFilter::memory_bytes);
        i32::try_from(bytes).unwrap_or(i32::MAX)
    }
}

/// What the unique index has in a filter's place.
pub(super) fn filter_hash(filter: Option<&str>) -> Option<Vec<u8>> {
    filter.map(|filter| Sha256::digest(filter).to_vec())
}
