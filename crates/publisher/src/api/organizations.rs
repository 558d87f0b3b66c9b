//! Organizations, for the administrator.

use axum::{Json as Answer, extract::State, response::Response};
use bus_core::{
    ids::OrganizationId,
    pg::{self, CreateOrganization, Organization},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    auth::{AdminAccess, Recorded},
    created,
    extract::{Id, Json, Query},
    limits::PublishLimits,
    openapi::{ListProblems, NamedProblems, OneProblems},
    page::{self, Cursor, Limit, Page},
    problem::{FieldError, Problem, ProblemType},
};

/// The longest name of anything that has one, characters.
const MAX_NAME: usize = 200;

/// A tenant
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Organization)]
pub(super) struct OrganizationView {
    #[schema(value_type = Uuid)]
    id: OrganizationId,
    name: String,
    /// The lane that its deliveries have of their own; `null` for the one that its id falls on.
    #[schema(maximum = 255, required = true)]
    lane: Option<u16>,
    /// How much it may publish; what is not there is as configured.
    limits: PublishLimits,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

impl From<Organization> for OrganizationView {
    fn from(organization: Organization) -> Self {
        Self {
            id: organization.id,
            name: organization.name,
            lane: organization.lane,
            limits: organization.limits.into(),
            created_at: organization.created_at,
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NewOrganization {
    /// Unique among all organizations.
    #[schema(min_length = 1, max_length = 200)]
    name: String,
}

/// Which part of a list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    pub(super) limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    pub(super) cursor: Option<Cursor>,
}

/// A name that people can tell from others.
pub(super) fn check_name(name: &str, pointer: &str) -> Result<(), FieldError> {
    let refuse = |detail: &str| Err(FieldError::at(pointer, detail));
    if name.is_empty() || name.chars().nth(MAX_NAME).is_some() {
        return refuse("a name has 1 to 200 characters");
    }
    if name.chars().any(char::is_control) {
        return refuse("a name has no control characters");
    }
    if name.trim() != name {
        return refuse("a name neither starts nor ends with a space");
    }
    Ok(())
}

/// Create an organization
#[utoipa::path(
    post,
    path = "/v1/admin/organizations",
    tag = "admin",
    operation_id = "createOrganization",
    request_body = NewOrganization,
    responses((status = 201, description = "It was created", body = OrganizationView), NamedProblems),
    security(("adminToken" = []))
)]
pub(super) async fn create(
    State(api): State<Api>,
    Recorded(access, by): Recorded<AdminAccess>,
    Json(new): Json<NewOrganization>,
) -> Result<Response, Problem> {
    access.everything()?;
    check_name(&new.name, "/name").map_err(|error| Problem::invalid(vec![error]))?;
    match pg::create_organization(&api.pool, OrganizationId(api.ids.next()), &new.name, &by).await? {
        CreateOrganization::Created(organization) => {
            let path = format!("/v1/admin/organizations/{}", organization.id);
            Ok(created(&path, Answer(OrganizationView::from(organization))))
        }
        CreateOrganization::NameTaken => {
            Err(Problem::new(ProblemType::NameTaken, "another organization has this name"))
        }
    }
}

/// List the organizations, oldest first
#[utoipa::path(
    get,
    path = "/v1/admin/organizations",
    tag = "admin",
    operation_id = "listOrganizations",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<OrganizationView>), ListProblems),
    security(("adminToken" = []))
)]
pub(super) async fn list(
    State(api): State<Api>,
    access: AdminAccess,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<OrganizationView>>, Problem> {
    access.everything()?;
    let paged = pg::organizations(&api.pool, page::request(query.limit, query.cursor)).await?;
    Ok(Answer(Page::of(paged, OrganizationView::from)))
}

/// Read an organization
#[utoipa::path(
    get,
    path = "/v1/admin/organizations/{id}",
    tag = "admin",
    operation_id = "getOrganization",
    params(("id" = Uuid, Path, description = "The organization")),
    responses((status = 200, description = "The organization", body = OrganizationView), OneProblems),
    security(("adminToken" = []), ("apiKey" = ["admin"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    access: AdminAccess,
    Id(id): Id<OrganizationId>,
) -> Result<Answer<OrganizationView>, Problem> {
    access.organization(id)?;
    let organization = pg::organization(&api.pool, id).await?.ok_or_else(Problem::not_found)?;
    Ok(Answer(organization.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_visible_and_trimmed() {
        for good in ["a", "Größe 1", &"é".repeat(200)] {
            assert!(check_name(good, "/name").is_ok(), "{good}");
        }
        for bad in ["", " a", "a ", "a\nb", "a\0b", &"a".repeat(201)] {
            assert!(check_name(bad, "/name").is_err(), "{bad:?}");
        }
    }
}
