//! API keys of an organization.

use std::collections::BTreeSet;

use axum::{Json as Answer, extract::State, response::Response};
use bus_core::{
    ids::{ConnectionId, KeyId, OrganizationId},
    pg::{self, ApiKey, CreateKey, NewKey, Scope},
};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Api,
    auth::{AdminAccess, FreshKey, Recorded},
    created,
    extract::{Id, Json, Query},
    openapi::{ChildProblems, OneProblems, SublistProblems},
    organizations::{ListQuery, check_name},
    page::{self, Page},
    problem::{FieldError, Problem},
};

/// What a key may do: `publish` events; `subscribe`, that is read and change connections and
/// subscriptions; `read` everything of the organization; `admin` is all of that and the organization's keys
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = Scope)]
pub(super) enum ScopeName {
    Publish,
    Subscribe,
    Read,
    Admin,
}

impl From<ScopeName> for Scope {
    fn from(name: ScopeName) -> Self {
        match name {
            ScopeName::Publish => Self::Publish,
            ScopeName::Subscribe => Self::Subscribe,
            ScopeName::Read => Self::Read,
            ScopeName::Admin => Self::Admin,
        }
    }
}

impl From<Scope> for ScopeName {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Publish => Self::Publish,
            Scope::Subscribe => Self::Subscribe,
            Scope::Read => Self::Read,
            Scope::Admin => Self::Admin,
        }
    }
}

/// A key, without its secret part
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Key)]
pub(super) struct KeyView {
    #[schema(value_type = Uuid)]
    id: KeyId,
    name: String,
    scopes: Vec<ScopeName>,
    /// The identity that it publishes under. Without the scope `admin` the key may see and change, of all
    /// connections and subscriptions, only this connection and its own.
    #[schema(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// The key is refused from this time on.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    /// The key is refused since this time.
    #[schema(value_type = Option<String>, format = DateTime)]
    revoked_at: Option<Timestamp>,
    /// The key itself, shown when it is created and never again.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl From<ApiKey> for KeyView {
    fn from(key: ApiKey) -> Self {
        Self {
            id: key.id,
            name: key.name,
            scopes: key.scopes.iter().map(ScopeName::from).collect(),
            connection_id: key.connection,
            created_at: key.created_at,
            expires_at: key.expires_at,
            revoked_at: key.revoked_at,
            key: None,
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = NewKey)]
pub(super) struct NewKeyBody {
    /// For people; need not be unique.
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    #[schema(min_items = 1)]
    scopes: BTreeSet<ScopeName>,
    /// A connection of the organization: the identity that the key publishes under.
    #[serde(default)]
    #[schema(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
    /// In the future.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
}

impl NewKeyBody {
    fn check(&self, now: Timestamp) -> Result<(), Problem> {
        let mut errors = Vec::new();
        errors.extend(check_name(&self.name, "/name").err());
        if self.scopes.is_empty() {
            errors.push(FieldError::at("/scopes", "a key needs at least one scope"));
        }
        if self.expires_at.is_some_and(|end| end <= now) {
            errors.push(FieldError::at("/expiresAt", "expiresAt must be in the future"));
        }
        if errors.is_empty() { Ok(()) } else { Err(Problem::invalid(errors)) }
    }
}

/// Create a key
///
/// The answer shows the key; keep it, nobody can read it again.
#[utoipa::path(
    post,
    path = "/v1/admin/organizations/{id}/keys",
    tag = "admin",
    operation_id = "createKey",
    params(("id" = Uuid, Path, description = "The organization")),
    request_body = NewKeyBody,
    responses((status = 201, description = "It was created", body = KeyView), ChildProblems),
    security(("adminToken" = []), ("apiKey" = ["admin"]))
)]
pub(super) async fn create(
    State(api): State<Api>,
    Recorded(access, by): Recorded<AdminAccess>,
    Id(organization): Id<OrganizationId>,
    Json(new): Json<NewKeyBody>,
) -> Result<Response, Problem> {
    access.organization(organization)?;
    new.check(api.clock.now())?;
    let fresh = FreshKey::generate();
    let new = NewKey {
        id: KeyId(api.ids.next()),
        organization,
        name: new.name,
        hash: fresh.hash,
        scopes: new.scopes.into_iter().map(Scope::from).collect(),
        connection: new.connection_id,
        expires_at: new.expires_at,
    };
    match pg::create_key(&api.pool, new, &by).await? {
        CreateKey::Created(key) => {
            let path = format!("/v1/admin/organizations/{organization}/keys/{}", key.id);
            Ok(created(&path, Answer(KeyView { key: Some(fresh.text), ..key.into() })))
        }
        CreateKey::NoSuchOrganization => Err(Problem::not_found()),
        CreateKey::NoSuchConnection => {
            Err(Problem::invalid_at("/connectionId", "there is no such connection"))
        }
    }
}

/// List the keys of an organization, oldest first
///
/// Keys that were revoked or have expired are listed too.
#[utoipa::path(
    get,
    path = "/v1/admin/organizations/{id}/keys",
    tag = "admin",
    operation_id = "listKeys",
    params(("id" = Uuid, Path, description = "The organization"), ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<KeyView>), SublistProblems),
    security(("adminToken" = []), ("apiKey" = ["admin"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    access: AdminAccess,
    Id(organization): Id<OrganizationId>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<KeyView>>, Problem> {
    access.organization(organization)?;
    let paged = pg::keys(&api.pool, organization, page::request(query.limit, query.cursor)).await?;
    if paged.items.is_empty() && pg::organization(&api.pool, organization).await?.is_none() {
        return Err(Problem::not_found());
    }
    Ok(Answer(Page::of(paged, KeyView::from)))
}

/// Revoke a key
///
/// It is refused from now on. Revoking it again changes nothing.
#[utoipa::path(
    delete,
    path = "/v1/admin/organizations/{id}/keys/{keyId}",
    tag = "admin",
    operation_id = "revokeKey",
    params(
        ("id" = Uuid, Path, description = "The organization"),
        ("keyId" = Uuid, Path, description = "The key")
    ),
    responses((status = 204, description = "It is revoked"), OneProblems),
    security(("adminToken" = []), ("apiKey" = ["admin"]))
)]
pub(super) async fn revoke(
    State(api): State<Api>,
    Recorded(access, by): Recorded<AdminAccess>,
    Id((organization, key)): Id<(OrganizationId, KeyId)>,
) -> Result<StatusCode, Problem> {
    access.organization(organization)?;
    let known = pg::revoke_key(&api.pool, organization, key, &by).await?;
    if known { Ok(StatusCode::NO_CONTENT) } else { Err(Problem::not_found()) }
}
