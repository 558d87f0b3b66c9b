//! Organizations, and the row lock that orders the changes inside one.

use std::collections::HashMap;

use jiff::Timestamp;
use sqlx::{PgConnection, PgPool, Postgres, Row as _, Transaction, postgres::PgRow};
use uuid::Uuid;

use super::{
    During as _, StoreError, audit, stored_lane,
    usage::{OwnLimits, limits},
};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    ids::OrganizationId,
};

/// A tenant.
#[derive(Debug, Clone, PartialEq)]
pub struct Organization {
    /// Its id.
    pub id: OrganizationId,
    /// Unique among all organizations.
    pub name: String,
    /// The lane that its deliveries have instead of the one that its id falls on.
    pub lane: Option<u16>,
    /// Its own limits of publishing.
    pub limits: OwnLimits,
    /// When it was created.
    pub created_at: Timestamp,
}

/// What [`create_organization`] found.
#[derive(Debug, Clone, PartialEq)]
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

/// What [`OrganizationRow`] reads.
macro_rules! columns {
    () => {
        "id, name, lane, publish_rate, publish_burst, publish_quota, publish_quota_period, created_at"
    };
}

struct OrganizationRow(Organization);

impl<'r> sqlx::FromRow<'r, PgRow> for OrganizationRow {
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self(Organization {
            id: OrganizationId(row.try_get("id")?),
            name: row.try_get("name")?,
            lane: row.try_get::<Option<i16>, _>("lane")?.and_then(stored_lane),
            limits: limits(row)?,
            created_at: row.try_get::<jiff_sqlx::Timestamp, _>("created_at")?.to_jiff(),
        }))
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
    let row: Option<OrganizationRow> = sqlx::query_as(concat!(
        "INSERT INTO organizations (id, name) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(name)
    .fetch_optional(&mut *transaction)
    .await
    .during("create an organization")?;
    let Some(row) = row else { return Ok(CreateOrganization::NameTaken) };
    let organization = row.0;
    let change = Change::new(Action::OrganizationCreated, TargetKind::Organization, id);
    let change = change.after(shown::organization(&organization));
    audit::record(&mut transaction, by, Some(id), change).await?;
    transaction.commit().await.during("commit a new organization")?;
    Ok(CreateOrganization::Created(organization))
}

/// The organization of that id.
pub async fn organization(pool: &PgPool, id: OrganizationId) -> Result<Option<Organization>, StoreError> {
    let row: Option<OrganizationRow> =
        sqlx::query_as(concat!("SELECT ", columns!(), " FROM organizations WHERE id = $1"))
            .bind(id.0)
            .fetch_optional(pool)
            .await
            .during("read an organization")?;
    Ok(row.map(|row| row.0))
}

/// The organizations, oldest first.
pub async fn organizations(pool: &PgPool, page: PageRequest) -> Result<Paged<Organization>, StoreError> {
    let rows: Vec<OrganizationRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM organizations WHERE id > $1 ORDER BY id LIMIT $2"
    ))
    .bind(page.bound())
    .bind(page.rows())
    .fetch_all(pool)
    .await
    .during("list organizations")?;
    Ok(Paged::cut(rows.into_iter().map(|row| row.0).collect(), page, |item| item.id.0))
}

/// The highest number that a lane may have.
pub const HIGHEST_LANE: u16 = 255;

/// Which lane an organization is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedLane {
    /// The one that its id falls on.
    Shared,
    /// The lowest one that is neither configured, so that no id falls on it, nor another organization's.
    Own,
    /// This one.
    Number(u16),
}

/// What [`set_lane`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum SetLane {
    /// It has that lane now.
    Set(Organization),
    /// There is no such organization.
    NotFound,
    /// Every lane that is not configured is somebody's.
    NoneFree,
}

/// Gives an organization another lane of the queue, where `lanes` are configured. Events that are published from now
/// on go there; what is queued already is moved by the workers, to whom a [hint](crate::notify::Hint::LanesChanged) is
/// the caller's to send.
pub async fn set_lane(
    pool: &PgPool,
    id: OrganizationId,
    wanted: WantedLane,
    lanes: u16,
    by: &By,
) -> Result<SetLane, StoreError> {
    const OPERATION: &str = "give an organization a lane";
    /// Names the choice of a lane among all advisory locks of the database.
    const CHOICE: i64 = 0x6c61_6e65;
    let mut transaction = pool.begin().await.during(OPERATION)?;
    // Two that look for a free one at a time would find the same.
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(CHOICE)
        .execute(&mut *transaction)
        .await
        .during(OPERATION)?;
    if !lock_organization(&mut transaction, id).await? {
        return Ok(SetLane::NotFound);
    }
    let lane = match wanted {
        WantedLane::Shared => None,
        WantedLane::Number(lane) => Some(stored(lane)),
        WantedLane::Own => {
            // If it has one already, that is it.
            let free: Option<i16> = sqlx::query_scalar(
                "SELECT n::smallint FROM generate_series($2::int, $3::int) AS n
                 WHERE NOT EXISTS (SELECT FROM organizations o WHERE o.lane = n AND o.id <> $1)
                 ORDER BY NOT EXISTS (SELECT FROM organizations o WHERE o.lane = n AND o.id = $1), n LIMIT 1",
            )
            .bind(id.0)
            .bind(i32::from(lanes))
            .bind(i32::from(HIGHEST_LANE))
            .fetch_optional(&mut *transaction)
            .await
            .during(OPERATION)?;
            let Some(free) = free else { return Ok(SetLane::NoneFree) };
            Some(free)
        }
    };
    let before = read(&mut transaction, id).await?;
    if before.lane.map(stored) != lane {
        sqlx::query("UPDATE organizations SET lane = $2, version = version + 1 WHERE id = $1")
            .bind(id.0)
            .bind(lane)
            .execute(&mut *transaction)
            .await
            .during(OPERATION)?;
    }
    Ok(SetLane::Set(record_change(transaction, before, by).await?))
}

fn stored(lane: u16) -> i16 {
    i16::try_from(lane).unwrap_or(i16::MAX)
}

async fn read(transaction: &mut PgConnection, id: OrganizationId) -> Result<Organization, StoreError> {
    let row: OrganizationRow =
        sqlx::query_as(concat!("SELECT ", columns!(), " FROM organizations WHERE id = $1"))
            .bind(id.0)
            .fetch_one(transaction)
            .await
            .during("read an organization")?;
    Ok(row.0)
}

/// Gives an organization other limits of publishing. None if there is no such organization.
pub async fn set_limits(
    pool: &PgPool,
    id: OrganizationId,
    limits: OwnLimits,
    by: &By,
) -> Result<Option<Organization>, StoreError> {
    const OPERATION: &str = "give an organization other limits";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    if !lock_organization(&mut transaction, id).await? {
        return Ok(None);
    }
    let before = read(&mut transaction, id).await?;
    let whole = |events: u64| i64::try_from(events).unwrap_or(i64::MAX);
    sqlx::query(
        "UPDATE organizations SET publish_rate = $2, publish_burst = $3, publish_quota = $4, publish_quota_period = $5
         WHERE id = $1",
    )
    .bind(id.0)
    .bind(limits.rate.map(|rate| rate.per_second))
    .bind(limits.rate.map(|rate| whole(rate.burst)))
    .bind(limits.quota.map(|quota| whole(quota.events)))
    .bind(limits.quota.map(|quota| quota.period.as_str()))
    .execute(&mut *transaction)
    .await
    .during(OPERATION)?;
    Ok(Some(record_change(transaction, before, by).await?))
}

/// Commits, with a record if the organization is another than before.
async fn record_change(
    mut transaction: Transaction<'_, Postgres>,
    before: Organization,
    by: &By,
) -> Result<Organization, StoreError> {
    let after = read(&mut transaction, before.id).await?;
    if after != before {
        let change = Change::new(Action::OrganizationChanged, TargetKind::Organization, after.id);
        let change = change.before(shown::organization(&before)).after(shown::organization(&after));
        audit::record(&mut transaction, by, Some(after.id), change).await?;
    }
    transaction.commit().await.during("commit a change of an organization")?;
    Ok(after)
}

/// The organizations that have a lane of their own, and which.
pub async fn assigned_lanes(pool: &PgPool) -> Result<HashMap<OrganizationId, u16>, StoreError> {
    let rows: Vec<(Uuid, i16)> = sqlx::query_as("SELECT id, lane FROM organizations WHERE lane IS NOT NULL")
        .fetch_all(pool)
        .await
        .during("read which organizations have a lane of their own")?;
    let assigned = rows.into_iter().filter_map(|(id, lane)| Some((OrganizationId(id), stored_lane(lane)?)));
    Ok(assigned.collect())
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
