//! API keys. The database knows a key only by its SHA-256.

use std::fmt;

use jiff::Timestamp;
use jiff_sqlx::ToSqlx as _;
use sqlx::PgPool;
use uuid::Uuid;

use super::{During as _, PageRequest, Paged, StoreError, audit, organizations::lock_organization};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    ids::{ConnectionId, KeyId, OrganizationId},
};

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Publish events.
    Publish,
    /// Read and change connections and subscriptions.
    Subscribe,
    /// Read everything of the organization.
    Read,
    /// All of that, and the organization's keys.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 4] = [Self::Publish, Self::Subscribe, Self::Read, Self::Admin];

    /// As it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Publish => 1,
            Self::Subscribe => 2,
            Self::Read => 4,
            Self::Admin => 8,
        }
    }
}

/// A set of scopes.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes(u8);

impl Scopes {
    /// Whether `scope` itself is in the set.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }

    /// Whether the set gives what `scope` stands for: [`Scope::Admin`] gives everything.
    pub fn allows(self, scope: Scope) -> bool {
        self.contains(scope) || self.contains(Scope::Admin)
    }

    /// The members, in the order of [`Scope::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | scope.bit()))
    }
}

impl fmt::Debug for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A key, as stored: without its secret part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id.
    pub id: KeyId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// For people; need not be unique.
    pub name: String,
    /// What it may do.
    pub scopes: Scopes,
    /// The identity that it publishes under.
    pub connection: Option<ConnectionId>,
    /// When it was created.
    pub created_at: Timestamp,
    /// It is refused from this time on.
    pub expires_at: Option<Timestamp>,
    /// It is refused since this time.
    pub revoked_at: Option<Timestamp>,
}

/// A key that is to be stored.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Its id.
    pub id: KeyId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// For people.
    pub name: String,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// What it may do; at least one.
    pub scopes: Scopes,
    /// The identity that it publishes under.
    pub connection: Option<ConnectionId>,
    /// When it ends.
    pub expires_at: Option<Timestamp>,
}

/// What [`create_key`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateKey {
    /// It is there now.
    Created(ApiKey),
    /// There is no such organization.
    NoSuchOrganization,
    /// The organization has no such connection.
    NoSuchConnection,
}

/// Whom a presented key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credential {
    /// The key.
    pub key: KeyId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// The identity that it publishes under.
    pub connection: Option<ConnectionId>,
    /// What it may do.
    pub scopes: Scopes,
}

#[derive(sqlx::FromRow)]
struct KeyRow {
    id: Uuid,
    organization_id: Uuid,
    name: String,
    scopes: Vec<String>,
    connection_id: Option<Uuid>,
    created_at: jiff_sqlx::Timestamp,
    expires_at: Option<jiff_sqlx::Timestamp>,
    revoked_at: Option<jiff_sqlx::Timestamp>,
}

impl TryFrom<KeyRow> for ApiKey {
    type Error = StoreError;

    fn try_from(row: KeyRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: KeyId(row.id),
            organization: OrganizationId(row.organization_id),
            name: row.name,
            scopes: read_scopes(row.id, &row.scopes)?,
            connection: row.connection_id.map(ConnectionId),
            created_at: row.created_at.to_jiff(),
            expires_at: row.expires_at.map(jiff_sqlx::Timestamp::to_jiff),
            revoked_at: row.revoked_at.map(jiff_sqlx::Timestamp::to_jiff),
        })
    }
}

fn read_scopes(key: Uuid, names: &[String]) -> Result<Scopes, StoreError> {
    names
        .iter()
        .map(|name| {
            Scope::ALL.into_iter().find(|scope| scope.as_str() == name).ok_or_else(|| {
                StoreError::Inconsistent {
                    table: "api_keys",
                    id: key.to_string(),
                    problem: format!("scopes holds {name:?}"),
                }
            })
        })
        .collect()
}

macro_rules! columns {
    () => {
        "id, organization_id, name, scopes, connection_id, created_at, expires_at, revoked_at"
    };
}

/// Stores a key.
pub async fn create_key(pool: &PgPool, new: NewKey, by: &By) -> Result<CreateKey, StoreError> {
    let mut transaction = pool.begin().await.during("begin to create a key")?;
    // The lock keeps the connection from being deleted, which would revoke the keys that it has now.
    if !lock_organization(&mut transaction, new.organization).await? {
        return Ok(CreateKey::NoSuchOrganization);
    }
    if let Some(connection) = new.connection {
        let known: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM connections
              WHERE id = $1 AND organization_id = $2 AND deleted_at IS NULL)",
        )
        .bind(connection.0)
        .bind(new.organization.0)
        .fetch_one(&mut *transaction)
        .await
        .during("find the connection of a new key")?;
        if !known {
            return Ok(CreateKey::NoSuchConnection);
        }
    }
    let scopes: Vec<&str> = new.scopes.iter().map(Scope::as_str).collect();
    let row: KeyRow = sqlx::query_as(concat!(
        "INSERT INTO api_keys (id, organization_id, name, hash, scopes, connection_id, expires_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING ",
        columns!()
    ))
    .bind(new.id.0)
    .bind(new.organization.0)
    .bind(new.name)
    .bind(new.hash.as_slice())
    .bind(scopes)
    .bind(new.connection.map(|id| id.0))
    .bind(new.expires_at.map(Timestamp::to_sqlx))
    .fetch_one(&mut *transaction)
    .await
    .during("create a key")?;
    let key = ApiKey::try_from(row)?;
    let change = Change::new(Action::KeyCreated, TargetKind::Key, key.id).after(shown::key(&key));
    audit::record(&mut transaction, by, Some(key.organization), change).await?;
    transaction.commit().await.during("commit a new key")?;
    Ok(CreateKey::Created(key))
}

/// The keys of an organization, oldest first, with those that are revoked or have expired.
pub async fn keys(
    pool: &PgPool,
    organization: OrganizationId,
    page: PageRequest,
) -> Result<Paged<ApiKey>, StoreError> {
    let rows: Vec<KeyRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM api_keys WHERE organization_id = $1 AND id > $2 ORDER BY id LIMIT $3"
    ))
    .bind(organization.0)
    .bind(page.bound())
    .bind(page.rows())
    .fetch_all(pool)
    .await
    .during("list keys")?;
    let items = rows.into_iter().map(ApiKey::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &ApiKey| item.id.0))
}

/// Revokes a key; one that is revoked already stays as it is. False if the organization has no such
/// key.
pub async fn revoke_key(
    pool: &PgPool,
    organization: OrganizationId,
    id: KeyId,
    by: &By,
) -> Result<bool, StoreError> {
    const OPERATION: &str = "revoke a key";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let revoked: Option<KeyRow> = sqlx::query_as(concat!(
        "UPDATE api_keys SET revoked_at = now()
          WHERE id = $1 AND organization_id = $2 AND revoked_at IS NULL
          RETURNING ",
        columns!()
    ))
    .bind(id.0)
    .bind(organization.0)
    .fetch_optional(&mut *transaction)
    .await
    .during(OPERATION)?;
    let Some(row) = revoked else {
        return sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM api_keys WHERE id = $1 AND organization_id = $2)",
        )
        .bind(id.0)
        .bind(organization.0)
        .fetch_one(&mut *transaction)
        .await
        .during(OPERATION);
    };
    let after = ApiKey::try_from(row)?;
    let before = ApiKey { revoked_at: None, ..after.clone() };
    let change = Change::new(Action::KeyRevoked, TargetKind::Key, id);
    let change = change.before(shown::key(&before)).after(shown::key(&after));
    audit::record(&mut transaction, by, Some(organization), change).await?;
    transaction.commit().await.during(OPERATION)?;
    Ok(true)
}

/// Whom the key with this SHA-256 stands for; none if it is unknown, revoked or has expired.
pub async fn authenticate(pool: &PgPool, hash: &[u8; 32]) -> Result<Option<Credential>, StoreError> {
    let row: Option<(Uuid, Uuid, Option<Uuid>, Vec<String>)> = sqlx::query_as(
        "SELECT id, organization_id, connection_id, scopes FROM api_keys
          WHERE hash = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())",
    )
    .bind(hash.as_slice())
    .fetch_optional(pool)
    .await
    .during("look up a key")?;
    row.map(|(key, organization, connection, scopes)| {
        Ok(Credential {
            key: KeyId(key),
            organization: OrganizationId(organization),
            connection: connection.map(ConnectionId),
            scopes: read_scopes(key, &scopes)?,
        })
    })
    .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_gives_every_scope_but_is_not_every_scope() {
        let admin: Scopes = [Scope::Admin].into_iter().collect();
        assert!(Scope::ALL.into_iter().all(|scope| admin.allows(scope)));
        assert!(!admin.contains(Scope::Publish));
        let publish: Scopes = [Scope::Publish, Scope::Publish].into_iter().collect();
        assert_eq!(publish.iter().collect::<Vec<_>>(), [Scope::Publish]);
        assert!(!publish.allows(Scope::Read));
        assert!(Scopes::default().is_empty());
    }
}
