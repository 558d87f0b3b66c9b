//! The whole set of a connection's subscriptions at once.

use std::collections::HashMap;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{
    Identity, SubscriptionRefused, SubscriptionRow, Wanted, check_connections, columns, exceeded, filter_hash,
};
use crate::{
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pg::{
        During as _, StoreError,
        organizations::{bump_organization, lock_organization},
    },
    subscription::Subscription,
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
    /// How many were enabled or disabled.
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
) -> Result<SyncSubscriptions, StoreError> {
    let mut transaction = pool.begin().await.during("begin to sync subscriptions")?;
    lock_organization(&mut transaction, organization).await?;
    let publishers = wanted.iter().filter_map(|(_, wanted)| wanted.publisher);
    if let Some(refused) = check_connections(&mut transaction, organization, connection, publishers).await? {
        return Ok(SyncSubscriptions::Refused(refused));
    }
    let before = of_connection(&mut transaction, connection).await?;
    let mut present: HashMap<Identity, (Uuid, bool)> = before
        .into_iter()
        .map(|row| ((row.event_type, row.publisher, row.filter), (row.id, row.enabled)))
        .collect();
    let mut synced = Synced { created: 0, updated: 0, deleted: 0, unchanged: 0, items: Vec::new() };
    let mut new = NewRows::default();
    let (mut enable, mut disable) = (Vec::new(), Vec::new());
    for (id, wanted) in wanted {
        let identity = wanted.identity();
        match present.remove(&identity) {
            None => new.push(*id, identity, wanted),
            Some((_, enabled)) if enabled == wanted.enabled => synced.unchanged += 1,
            Some((id, _)) => if wanted.enabled { &mut enable } else { &mut disable }.push(id),
        }
    }
    let gone: Vec<Uuid> = present.into_values().map(|(id, _)| id).collect();
    (synced.created, synced.updated, synced.deleted) =
        (new.ids.len(), enable.len() + disable.len(), gone.len());
    if synced.created + synced.updated + synced.deleted > 0 {
        write_sync(&mut transaction, organization, connection, new, &enable, &disable, &gone).await?;
        if synced.created > 0
            && let Some(refused) = exceeded(&mut transaction, organization).await?
        {
            return Ok(SyncSubscriptions::Refused(refused));
        }
        bump_organization(&mut transaction, organization).await?;
    }
    synced.items = of_connection(&mut transaction, connection)
        .await?
        .into_iter()
        .map(Subscription::try_from)
        .collect::<Result<_, _>>()?;
    transaction.commit().await.during("commit synced subscriptions")?;
    Ok(SyncSubscriptions::Synced(synced))
}

/// The columns of the subscriptions that a sync adds.
#[derive(Default)]
struct NewRows {
    ids: Vec<Uuid>,
    event_types: Vec<String>,
    publishers: Vec<Option<Uuid>>,
    filters: Vec<Option<String>>,
    filter_hashes: Vec<Option<Vec<u8>>>,
    filter_bytes: Vec<i32>,
    enabled: Vec<bool>,
}

impl NewRows {
    fn push(&mut self, id: SubscriptionId, (event_type, publisher, filter): Identity, wanted: &Wanted) {
        self.ids.push(id.0);
        self.event_types.push(event_type);
        self.publishers.push(publisher);
        self.filter_hashes.push(filter_hash(filter.as_deref()));
        self.filters.push(filter);
        self.filter_bytes.push(wanted.filter_bytes());
        self.enabled.push(wanted.enabled);
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
    enable: &[Uuid],
    disable: &[Uuid],
    gone: &[Uuid],
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE subscriptions
            SET enabled = (id = ANY ($1)), updated_at = now()
          WHERE id = ANY ($1) OR id = ANY ($2)",
    )
    .bind(enable)
    .bind(disable)
    .execute(&mut *transaction)
    .await
    .during("update synced subscriptions")?;
    sqlx::query("UPDATE subscriptions SET deleted_at = now(), updated_at = now() WHERE id = ANY ($1)")
        .bind(gone)
        .execute(&mut *transaction)
        .await
        .during("delete synced subscriptions")?;
    sqlx::query(
        "INSERT INTO subscriptions (id, organization_id, connection_id, event_type, publisher, filter, filter_hash,
                                    filter_bytes, enabled)
         SELECT id, $1, $2, event_type, publisher, filter, filter_hash, filter_bytes, enabled
           FROM unnest($3::uuid[], $4::text[], $5::uuid[], $6::text[], $7::bytea[], $8::integer[], $9::boolean[])
             AS new (id, event_type, publisher, filter, filter_hash, filter_bytes, enabled)",
    )
    .bind(organization.0)
    .bind(connection.0)
    .bind(new.ids)
    .bind(new.event_types)
    .bind(new.publishers)
    .bind(new.filters)
    .bind(new.filter_hashes)
    .bind(new.filter_bytes)
    .bind(new.enabled)
    .execute(transaction)
    .await
    .during("create synced subscriptions")?;
    Ok(())
}
