//! Organizations, and the row lock that orders the changes inside one.

use jiff::Timestamp;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{During as _, StoreError, audit};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    ids::OrganizationId,
};

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Organization {
    /// Its id.
    pub id: OrganizationId,
    /// Unique among all organizations.
    pub name: String,
    /// When it was created.
    pub created_at: Timestamp,
}

/// What [`create_organization`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateOrganization {
    /// It is there now.
    Created(Organization),
    /// Another one has the name.
    NameTaken,
}

/// Which part of a list that is ordered by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// Only what comes after this id.
    pub after: Option<Uuid>,
    /// At most so many items.
    pub limit: u32,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paged<T> {
    /// The items, in order.
    pub items: Vec<T>,
    /// Where the next part starts; none if this was the last.
    pub next: Option<Uuid>,
}

impl PageRequest {
    /// The bound of the key set: no id is smaller than the nil UUID, and none equals it.
    pub(super) fn bound(self) -> Uuid {
        self.after.unwrap_or_default()
    }

    /// One row more than was asked for, which tells whether there is a next part.
    pub(super) fn rows(self) -> i64 {
        i64::from(self.limit) + 1
    }
}

impl<T> Paged<T> {
    /// Makes a part of what [`PageRequest::rows`] rows gave.
    pub(super) fn cut(mut items: Vec<T>, page: PageRequest, id: impl Fn(&T) -> Uuid) -> Self {
        let limit = usize::try_from(page.limit).unwrap_or(usize::MAX);
        let more = items.len() > limit;
        items.truncate(limit);
        let next = if more { items.last().map(id) } else { None };
        Self { items, next }
    }
}

#[derive(sqlx::FromRow)]
struct OrganizationRow {
    id: Uuid,
    name: String,
    created_at: jiff_sqlx::Timestamp,
}

impl From<OrganizationRow> for Organization {
    fn from(row: OrganizationRow) -> Self {
        Self { id: OrganizationId(row.id), name: row.name, created_at: row.created_at.to_jiff() }
    }
}

/// Creates an organization.
pub async fn create_organization(
    pool: &PgPool,
    id: OrganizationId,
    name: &str,
    by: &By,
) -> Result<CreateOrganization, StoreError> {
    let mut transaction = pool.begin().await.during("begin to create an organization")?;
    let row: Option<OrganizationRow> = sqlx::query_as(
        "INSERT INTO organizations (id, name) VALUES ($1, $2)
         ON CONFLICT (name) DO NOTHING
         RETURNING id, name, created_at",
    )
    .bind(id.0)
    .bind(name)
    .fetch_optional(&mut *transaction)
    .await
    .during("create an organization")?;
    let Some(row) = row else { return Ok(CreateOrganization::NameTaken) };
    let organization = Organization::from(row);
    let change = Change::new(Action::OrganizationCreated, TargetKind::Organization, id);
    let change = change.after(shown::organization(&organization));
    audit::record(&mut transaction, by, Some(id), change).await?;
    transaction.commit().await.during("commit a new organization")?;
    Ok(CreateOrganization::Created(organization))
}

/// The organization of that id.
pub async fn organization(pool: &PgPool, id: OrganizationId) -> Result<Option<Organization>, StoreError> {
    let row: Option<OrganizationRow> =
        sqlx::query_as("SELECT id, name, created_at FROM organizations WHERE id = $1")
            .bind(id.0)
            .fetch_optional(pool)
            .await
            .during("read an organization")?;
    Ok(row.map(Into::into))
}

/// The organizations, oldest first.
pub async fn organizations(pool: &PgPool, page: PageRequest) -> Result<Paged<Organization>, StoreError> {
    let rows: Vec<OrganizationRow> =
        sqlx::query_as("SELECT id, name, created_at FROM organizations WHERE id > $1 ORDER BY id LIMIT $2")
            .bind(page.bound())
            .bind(page.rows())
            .fetch_all(pool)
            .await
            .during("list organizations")?;
    Ok(Paged::cut(rows.into_iter().map(Organization::from).collect(), page, |item| item.id.0))
}

/// Takes the organization's row lock, which orders all changes of its connections, subscriptions and
/// bound keys. Every such transaction takes it before anything else, so that no two of them can wait
/// for each other. False if there is no such organization.
pub(super) async fn lock_organization(
    transaction: &mut PgConnection,
    id: OrganizationId,
) -> Result<bool, StoreError> {
    // NO KEY UPDATE: inserts that refer to the organization need not wait.
    let found: Option<Uuid> =
        sqlx::query_scalar("SELECT id FROM organizations WHERE id = $1 FOR NO KEY UPDATE")
            .bind(id.0)
            .fetch_optional(transaction)
            .await
            .during("lock an organization")?;
    Ok(found.is_some())
}

/// Counts a change that matching must see (invariant I2). Belongs in the change's own transaction.
pub(super) async fn bump_organization(
    transaction: &mut PgConnection,
    id: OrganizationId,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE organizations SET version = version + 1 WHERE id = $1")
        .bind(id.0)
        .execute(transaction)
        .await
        .during("count a change of an organization")?;
    Ok(())
}
