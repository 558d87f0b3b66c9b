//! The whole set of a connection's subscriptions at once.

use std::collections::HashMap;

use serde_json::json;
use sqlx::{PgConnection, PgPool, types::Json};
use uuid::Uuid;

use super::{
    Identity, SubscriptionRefused, SubscriptionRow, Wanted, check_connections, columns, exceeded, filter_hash,
};
use crate::{
    audit::{Action, By, Change, TargetKind},
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pg::{
        During as _, StoreError, audit,
        connections::bump_connection,
        organizations::{bump_organization, lock_organization},
    },
    retry::RetryOverride,
    subscription::{BatchPolicy, Subscription, SubscriptionRules},
};

/// What [`sync_subscriptions`] did.
#[derive(Debug, Clone)]
pub enum SyncSubscriptions {
    /// The connection has exactly the wanted subscriptions.
    Synced(Synced),
    /// One of them cannot be stored; nothing changed.
    Refused(SubscriptionRefused),
}

/// The changes of a sync, and its result.
#[derive(Debug, Clone)]
pub struct Synced {
    /// How many were added.
    pub created: usize,
    /// How many were enabled or disabled, or got other rules.
    pub updated: usize,
    /// How many were removed.
    pub deleted: usize,
    /// How many stayed as they were.
    pub unchanged: usize,
    /// The connection's subscriptions, oldest first.
    pub items: Vec<Subscription>,
}

/// Makes the wanted subscriptions the connection's only ones, in one transaction. Each comes with the
/// id that it gets if it is new; no two may have the same pattern, publisher and filter.
pub async fn sync_subscriptions(
    pool: &PgPool,
    organization: OrganizationId,
    connection: ConnectionId,
    wanted: &[(SubscriptionId, Wanted)],
    by: &By,
) -> Result<SyncSubscriptions, StoreError> {
    let mut transaction = pool.begin().await.during("begin to sync subscriptions")?;
    lock_organization(&mut transaction, organization).await?;
    let publishers = wanted.iter().filter_map(|(_, wanted)| wanted.publisher);
    if let Some(refused) = check_connections(&mut transaction, organization, connection, publishers).await? {
        return Ok(SyncSubscriptions::Refused(refused));
    }
    let before = of_connection(&mut transaction, connection).await?;
    let mut present: HashMap<Identity, Present> = before.into_iter().map(Present::identified).collect();
    let mut synced = Synced { created: 0, updated: 0, deleted: 0, unchanged: 0, items: Vec::new() };
    let (mut new, mut changed) = (NewRows::default(), Rows::default());
    let mut new_rules = false;
    for (id, wanted) in wanted {
        let identity = wanted.identity();
        match present.remove(&identity) {
            None => {
                new_rules |= wanted.rules != SubscriptionRules::default();
                new.push(*id, identity, wanted);
            }
            Some(same) if same.enabled == wanted.enabled && same.rules == wanted.rules => {
                synced.unchanged += 1;
            }
            Some(other) => {
                new_rules |= other.rules != wanted.rules;
                changed.push(other.id, wanted);
            }
        }
    }
    let gone: Vec<Uuid> = present.into_values().map(|present| present.id).collect();
    (synced.created, synced.updated, synced.deleted) = (new.rest.ids.len(), changed.ids.len(), gone.len());
    if synced.created + synced.updated + synced.deleted > 0 {
        write_sync(&mut transaction, organization, connection, new, changed, &gone).await?;
        if synced.created > 0
            && let Some(refused) = exceeded(&mut transaction, organization).await?
        {
            return Ok(SyncSubscriptions::Refused(refused));
        }
        if new_rules {
            bump_connection(&mut transaction, connection).await?;
        }
        bump_organization(&mut transaction, organization).await?;
        let change = Change::new(Action::SubscriptionsReplaced, TargetKind::Connection, connection);
        let change = change.after(json!({
            "created": synced.created,
            "updated": synced.updated,
            "deleted": synced.deleted,
            "unchanged": synced.unchanged,
        }));
        audit::record(&mut transaction, by, Some(organization), change).await?;
    }
    synced.items = of_connection(&mut transaction, connection)
        .await?
        .into_iter()
        .map(Subscription::try_from)
        .collect::<Result<_, _>>()?;
    transaction.commit().await.during("commit synced subscriptions")?;
    Ok(SyncSubscriptions::Synced(synced))
}

/// A subscription that the connection has.
struct Present {
    id: Uuid,
    enabled: bool,
    rules: SubscriptionRules,
}

impl Present {
    fn identified(row: SubscriptionRow) -> (Identity, Self) {
        let identity = (row.event_type, row.publisher, row.filter);
        (identity, Self { id: row.id, enabled: row.enabled, rules: row.rules.into() })
    }
}

/// What a sync writes of each subscription, those that are there included.
#[derive(Default)]
struct Rows {
    ids: Vec<Uuid>,
    retry_policies: Vec<Option<Json<RetryOverride>>>,
    batches: Vec<Option<Json<BatchPolicy>>>,
    enabled: Vec<bool>,
}

impl Rows {
    fn push(&mut self, id: Uuid, wanted: &Wanted) {
        self.ids.push(id);
        self.retry_policies.push(wanted.rules.retry.clone().map(Json));
        self.batches.push(wanted.rules.batch.map(Json));
        self.enabled.push(wanted.enabled);
    }
}

/// What it writes of those that it adds.
#[derive(Default)]
struct NewRows {
    rest: Rows,
    event_types: Vec<String>,
    publishers: Vec<Option<Uuid>>,
    filters: Vec<Option<String>>,
    filter_hashes: Vec<Option<Vec<u8>>>,
    filter_bytes: Vec<i32>,
}

impl NewRows {
    fn push(&mut self, id: SubscriptionId, (event_type, publisher, filter): Identity, wanted: &Wanted) {
        self.rest.push(id.0, wanted);
        self.event_types.push(event_type);
        self.publishers.push(publisher);
        self.filter_hashes.push(filter_hash(filter.as_deref()));
        self.filters.push(filter);
        self.filter_bytes.push(wanted.filter_bytes());
    }
}

async fn of_connection(
    transaction: &mut PgConnection,
    connection: ConnectionId,
) -> Result<Vec<SubscriptionRow>, StoreError> {
    sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM subscriptions WHERE connection_id = $1 AND deleted_at IS NULL ORDER BY id"
    ))
    .bind(connection.0)
    .fetch_all(transaction)
    .await
    .during("read the subscriptions of a connection")
}

async fn write_sync(
    transaction: &mut PgConnection,
    organization: OrganizationId,
    connection: ConnectionId,
    new: NewRows,
    changed: Rows,
    gone: &[Uuid],
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE subscriptions AS s
            SET retry_policy = new.retry_policy, batch = new.batch, enabled = new.enabled, updated_at = now()
           FROM unnest($1::uuid[], $2::jsonb[], $3::jsonb[], $4::boolean[])
             AS new (id, retry_policy, batch, enabled)
          WHERE s.id = new.id",
    )
    .bind(changed.ids)
    .bind(changed.retry_policies)
    .bind(changed.batches)
    .bind(changed.enabled)
    .execute(&mut *transaction)
    .await
    .during("update synced subscriptions")?;
    sqlx::query("UPDATE subscriptions SET deleted_at = now(), updated_at = now() WHERE id = ANY ($1)")
        .bind(gone)
        .execute(&mut *transaction)
        .await
        .during("delete synced subscriptions")?;
    sqlx::query(
        "INSERT INTO subscriptions (id, organization_id, connection_id, retry_policy, batch, enabled, event_type,
                                    publisher, filter, filter_hash, filter_bytes)
         SELECT id, $1, $2, retry_policy, batch, enabled, event_type, publisher, filter, filter_hash, filter_bytes
           FROM unnest($3::uuid[], $4::jsonb[], $5::jsonb[], $6::boolean[], $7::text[], $8::uuid[], $9::text[],
                       $10::bytea[], $11::integer[])
             AS new (id, retry_policy, batch, enabled, event_type, publisher, filter, filter_hash, filter_bytes)",
    )
    .bind(organization.0)
    .bind(connection.0)
    .bind(new.rest.ids)
    .bind(new.rest.retry_policies)
    .bind(new.rest.batches)
    .bind(new.rest.enabled)
    .bind(new.event_types)
    .bind(new.publishers)
    .bind(new.filters)
    .bind(new.filter_hashes)
    .bind(new.filter_bytes)
    .execute(transaction)
    .await
    .during("create synced subscriptions")?;
    Ok(())
}
