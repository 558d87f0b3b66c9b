//! Subscriptions. Every change counts up the organization's version in its own transaction, so that
//! an event which is published after the change returned is matched against it (invariant I2).

mod row;
mod sync;

use std::collections::BTreeSet;

use sqlx::{PgConnection, PgPool, types::Json};
use uuid::Uuid;

pub(super) use self::row::RulesColumns;
use self::row::{Identity, SubscriptionRow, columns, filter_hash};
pub use self::sync::*;
use super::{
    During as _, PageRequest, Paged, StoreError, audit,
    connections::bump_connection,
    organizations::{bump_organization, lock_organization},
};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    filter::PayloadFilter,
    ids::{ConnectionId, OrganizationId, SubscriptionId},
    pattern::TypePattern,
    subscription::{Subscription, SubscriptionRules},
};

/// The most subscriptions of one organization. Every publisher holds an organization's subscriptions
/// in memory while it publishes, so their number needs a bound (invariant I10).
pub const MAX_SUBSCRIPTIONS: i64 = 10_000;

/// The most memory that the compiled filters of one organization's subscriptions take together, bytes
/// (invariant I10). A filter takes a few KiB, and one with regular expressions up to about 1 MiB.
pub const MAX_FILTER_BYTES: i64 = 64 * 1024 * 1024;

/// What a connection wants to receive.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Which event types.
    pub event_type: TypePattern,
    /// Whose events, if not everyone's.
    pub publisher: Option<ConnectionId>,
    /// Which payloads, if not all.
    pub filter: Option<PayloadFilter>,
    /// How deliveries are made.
    pub rules: SubscriptionRules,
    /// Whether it matches at all.
    pub enabled: bool,
}

/// Why a subscription cannot be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubscriptionRefused {
    /// The organization has no such connection.
    NoSuchConnection,
    /// The connection receives nothing.
    NotAReceiver,
    /// The organization has no such connection to publish.
    NoSuchPublisher(ConnectionId),
    /// The organization has [`MAX_SUBSCRIPTIONS`] already.
    TooMany,
    /// The organization's filters would take more than [`MAX_FILTER_BYTES`].
    FiltersTooLarge,
}

/// What [`create_subscription`] found.
#[derive(Debug, Clone)]
pub enum CreateSubscription {
    /// It is there now.
    Created(Subscription),
    /// An identical one was there; it stays as it is.
    Existing(Subscription),
    /// It cannot be stored.
    Refused(SubscriptionRefused),
}

/// What [`change_subscription`] found.
#[derive(Debug, Clone)]
pub enum ChangeSubscription<E> {
    /// It is stored as it shall be.
    Stored(Box<Subscription>),
    /// There is no such subscription.
    NotFound,
    /// Another subscription of the connection is like that already.
    Identical,
    /// It cannot be stored like that.
    Refused(SubscriptionRefused),
    /// The caller's function refused; nothing changed.
    Rejected(E),
}

/// Which subscriptions a list shows.
#[derive(Debug, Clone, Default)]
pub struct SubscriptionQuery {
    /// Only those of this connection.
    pub connection: Option<ConnectionId>,
    /// Only those with exactly this pattern.
    pub event_type: Option<String>,
}

/// Checks that the connection can receive and that the publishers exist, within the organization. The
/// caller holds the organization's lock, so both stay true until its commit.
async fn check_connections(
    transaction: &mut PgConnection,
    organization: OrganizationId,
    connection: ConnectionId,
    publishers: impl IntoIterator<Item = ConnectionId>,
) -> Result<Option<SubscriptionRefused>, StoreError> {
    let kind: Option<String> = sqlx::query_scalar(
        "SELECT kind FROM connections WHERE id = $1 AND organization_id = $2 AND deleted_at IS NULL",
    )
    .bind(connection.0)
    .bind(organization.0)
    .fetch_optional(&mut *transaction)
    .await
    .during("find the connection of a subscription")?;
    match kind.as_deref() {
        None => return Ok(Some(SubscriptionRefused::NoSuchConnection)),
        Some("publisher") => return Ok(Some(SubscriptionRefused::NotAReceiver)),
        Some(_) => {}
    }
    let publishers: BTreeSet<Uuid> = publishers.into_iter().map(|id| id.0).collect();
    if publishers.is_empty() {
        return Ok(None);
    }
    let known: Vec<Uuid> = sqlx::query_scalar(
        "SELECT id FROM connections WHERE id = ANY ($1) AND organization_id = $2 AND deleted_at IS NULL",
    )
    .bind(publishers.iter().copied().collect::<Vec<_>>())
    .bind(organization.0)
    .fetch_all(transaction)
    .await
    .during("find the publishers of subscriptions")?;
    let unknown = publishers.into_iter().find(|id| !known.contains(id));
    Ok(unknown.map(|id| SubscriptionRefused::NoSuchPublisher(ConnectionId(id))))
}

/// Whether the organization has more than it may have, in the transaction that added something. The
/// caller holds the organization's lock.
async fn exceeded(
    transaction: &mut PgConnection,
    organization: OrganizationId,
) -> Result<Option<SubscriptionRefused>, StoreError> {
    let (count, filter_bytes): (i64, i64) = sqlx::query_as(
        "SELECT count(*), coalesce(sum(filter_bytes), 0)::bigint
           FROM subscriptions WHERE organization_id = $1 AND deleted_at IS NULL",
    )
    .bind(organization.0)
    .fetch_one(transaction)
    .await
    .during("count the subscriptions of an organization")?;
    Ok(if count > MAX_SUBSCRIPTIONS {
        Some(SubscriptionRefused::TooMany)
    } else if filter_bytes > MAX_FILTER_BYTES {
        Some(SubscriptionRefused::FiltersTooLarge)
    } else {
        None
    })
}

/// Stores a subscription, or finds the identical one. The unique index decides what is identical.
pub async fn create_subscription(
    pool: &PgPool,
    organization: OrganizationId,
    id: SubscriptionId,
    connection: ConnectionId,
    wanted: &Wanted,
    by: &By,
) -> Result<CreateSubscription, StoreError> {
    let mut transaction = pool.begin().await.during("begin to create a subscription")?;
    lock_organization(&mut transaction, organization).await?;
    if let Some(refused) =
        check_connections(&mut transaction, organization, connection, wanted.publisher).await?
    {
        return Ok(CreateSubscription::Refused(refused));
    }
    let (event_type, publisher, filter) = wanted.identity();
    let row: Option<SubscriptionRow> = sqlx::query_as(concat!(
        "INSERT INTO subscriptions (id, organization_id, connection_id, event_type, publisher, filter, filter_hash,
                                    filter_bytes, retry_policy, batch, enabled)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
         ON CONFLICT (connection_id, event_type, publisher, filter_hash) WHERE deleted_at IS NULL DO NOTHING
         RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(organization.0)
    .bind(connection.0)
    .bind(&event_type)
    .bind(publisher)
    .bind(&filter)
    .bind(filter_hash(filter.as_deref()))
    .bind(wanted.filter_bytes())
    .bind(wanted.rules.retry.as_ref().map(Json))
    .bind(wanted.rules.batch.map(Json))
    .bind(wanted.enabled)
    .fetch_optional(&mut *transaction)
    .await
    .during("create a subscription")?;
    let Some(row) = row else {
        let row: SubscriptionRow = sqlx::query_as(concat!(
            "SELECT ",
            columns!(),
            " FROM subscriptions
              WHERE connection_id = $1 AND event_type = $2 AND publisher IS NOT DISTINCT FROM $3
                AND filter_hash IS NOT DISTINCT FROM $4 AND deleted_at IS NULL"
        ))
        .bind(connection.0)
        .bind(&event_type)
        .bind(publisher)
        .bind(filter_hash(filter.as_deref()))
        .fetch_one(&mut *transaction)
        .await
        .during("read an identical subscription")?;
        return Ok(CreateSubscription::Existing(row.try_into()?));
    };
    if let Some(refused) = exceeded(&mut transaction, organization).await? {
        return Ok(CreateSubscription::Refused(refused));
    }
    if wanted.rules != SubscriptionRules::default() {
        bump_connection(&mut transaction, connection).await?;
    }
    bump_organization(&mut transaction, organization).await?;
    let subscription = Subscription::try_from(row)?;
    let change = Change::new(Action::SubscriptionCreated, TargetKind::Subscription, id);
    let change = change.after(shown::subscription(&subscription));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during("commit a new subscription")?;
    Ok(CreateSubscription::Created(subscription))
}

/// The subscription of that id; `only` hides those of all other connections.
pub async fn subscription(
    pool: &PgPool,
    organization: OrganizationId,
    only: Option<ConnectionId>,
    id: SubscriptionId,
) -> Result<Option<Subscription>, StoreError> {
    let row: Option<SubscriptionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM subscriptions
          WHERE id = $1 AND organization_id = $2 AND ($3::uuid IS NULL OR connection_id = $3)
            AND deleted_at IS NULL"
    ))
    .bind(id.0)
    .bind(organization.0)
    .bind(only.map(|id| id.0))
    .fetch_optional(pool)
    .await
    .during("read a subscription")?;
    row.map(Subscription::try_from).transpose()
}

/// The subscriptions of an organization, oldest first.
pub async fn subscriptions(
    pool: &PgPool,
    organization: OrganizationId,
    query: &SubscriptionQuery,
    page: PageRequest,
) -> Result<Paged<Subscription>, StoreError> {
    let rows: Vec<SubscriptionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM subscriptions
          WHERE organization_id = $1 AND id > $2 AND ($4::uuid IS NULL OR connection_id = $4)
            AND ($5::text IS NULL OR event_type = $5) AND deleted_at IS NULL
          ORDER BY id LIMIT $3"
    ))
    .bind(organization.0)
    .bind(page.bound())
    .bind(page.rows())
    .bind(query.connection.map(|id| id.0))
    .bind(&query.event_type)
    .fetch_all(pool)
    .await
    .during("list subscriptions")?;
    let items = rows.into_iter().map(Subscription::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &Subscription| item.id.0))
}

/// Changes a subscription: `change` gets what it wants now, with all other writers shut out, and says
/// what it shall want. `only` hides the subscriptions of all other connections.
pub async fn change_subscription<E>(
    pool: &PgPool,
    organization: OrganizationId,
    only: Option<ConnectionId>,
    id: SubscriptionId,
    change: impl FnOnce(Wanted) -> Result<Wanted, E>,
    by: &By,
) -> Result<ChangeSubscription<E>, StoreError> {
    let mut transaction = pool.begin().await.during("begin to change a subscription")?;
    lock_organization(&mut transaction, organization).await?;
    let row: Option<SubscriptionRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM subscriptions
          WHERE id = $1 AND organization_id = $2 AND ($3::uuid IS NULL OR connection_id = $3)
            AND deleted_at IS NULL FOR UPDATE"
    ))
    .bind(id.0)
    .bind(organization.0)
    .bind(only.map(|id| id.0))
    .fetch_optional(&mut *transaction)
    .await
    .during("read a subscription that is to change")?;
    let Some(row) = row else { return Ok(ChangeSubscription::NotFound) };
    let found = Subscription::try_from(row)?;
    let before = Wanted {
        event_type: found.event_type.clone(),
        publisher: found.publisher,
        filter: found.filter.clone(),
        rules: found.rules.clone(),
        enabled: found.enabled,
    };
    let identity = before.identity();
    let after = match change(before) {
        Ok(after) => after,
        Err(rejected) => return Ok(ChangeSubscription::Rejected(rejected)),
    };
    let (event_type, publisher, filter) = after.identity();
    let new_rules = after.rules != found.rules;
    if after.enabled == found.enabled
        && !new_rules
        && (&event_type, &publisher, &filter) == (&identity.0, &identity.1, &identity.2)
    {
        return Ok(ChangeSubscription::Stored(Box::new(found)));
    }
    // A publisher that was deleted since is let be, unless it is what changes.
    let publishers = after.publisher.filter(|_| publisher != identity.1);
    if let Some(refused) =
        check_connections(&mut transaction, organization, found.connection, publishers).await?
    {
        return Ok(ChangeSubscription::Refused(refused));
    }
    let written: Result<SubscriptionRow, StoreError> = sqlx::query_as(concat!(
        "UPDATE subscriptions
            SET event_type = $2, publisher = $3, filter = $4, filter_hash = $5, filter_bytes = $6,
                retry_policy = $7, batch = $8, enabled = $9, updated_at = now()
          WHERE id = $1
          RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(event_type)
    .bind(publisher)
    .bind(&filter)
    .bind(filter_hash(filter.as_deref()))
    .bind(after.filter_bytes())
    .bind(after.rules.retry.as_ref().map(Json))
    .bind(after.rules.batch.map(Json))
    .bind(after.enabled)
    .fetch_one(&mut *transaction)
    .await
    .during("change a subscription");
    let row = match written {
        Err(error) if error.constraint() == Some("subscriptions_identity") => {
            return Ok(ChangeSubscription::Identical);
        }
        other => other?,
    };
    if filter != identity.2
        && let Some(refused) = exceeded(&mut transaction, organization).await?
    {
        return Ok(ChangeSubscription::Refused(refused));
    }
    if new_rules {
        bump_connection(&mut transaction, found.connection).await?;
    }
    bump_organization(&mut transaction, organization).await?;
    let changed = Subscription::try_from(row)?;
    let change = Change::new(Action::SubscriptionChanged, TargetKind::Subscription, id);
    let change = change.before(shown::subscription(&found)).after(shown::subscription(&changed));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during("commit a changed subscription")?;
    Ok(ChangeSubscription::Stored(Box::new(changed)))
}

/// Deletes a subscription; its row stays, so that history can name it. `only` hides those of all other
/// connections. False if there is no such subscription.
pub async fn delete_subscription(
    pool: &PgPool,
    organization: OrganizationId,
    only: Option<ConnectionId>,
    id: SubscriptionId,
    by: &By,
) -> Result<bool, StoreError> {
    let mut transaction = pool.begin().await.during("begin to delete a subscription")?;
    lock_organization(&mut transaction, organization).await?;
    let deleted: Option<SubscriptionRow> = sqlx::query_as(concat!(
        "UPDATE subscriptions SET deleted_at = now(), updated_at = now()
          WHERE id = $1 AND organization_id = $2 AND ($3::uuid IS NULL OR connection_id = $3)
            AND deleted_at IS NULL
          RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(organization.0)
    .bind(only.map(|id| id.0))
    .fetch_optional(&mut *transaction)
    .await
    .during("delete a subscription")?;
    let Some(row) = deleted else { return Ok(false) };
    bump_organization(&mut transaction, organization).await?;
    let change = Change::new(Action::SubscriptionDeleted, TargetKind::Subscription, id);
    let change = change.before(shown::subscription(&row.try_into()?));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during("commit a deleted subscription")?;
    Ok(true)
}
