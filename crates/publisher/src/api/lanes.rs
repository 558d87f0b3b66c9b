//! The lane of an organization's deliveries, for the administrator.

use axum::{Json as Answer, extract::State};
use bus_core::{
    ids::OrganizationId,
    notify::Hint,
    pg::{self, HIGHEST_LANE, SetLane, WantedLane},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    Api,
    auth::{AdminAccess, Recorded},
    extract::{Id, Json},
    openapi::ChildLimitProblems,
    organizations::OrganizationView,
    problem::{Problem, ProblemType},
};

/// Which lane the deliveries of an organization take
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NewLane {
    /// `"own"` for one that no other organization has, a number from 0 to 255 for that one, `null` for the one that the
    /// organization's id falls on, among others.
    #[schema(value_type = Option<LaneName>, required = true)]
    lane: Value,
}

/// A lane
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "describes what `wanted` reads")]
pub(super) enum LaneName {
    /// The lowest one that is neither configured nor another organization's.
    Own(OwnName),
    /// This one.
    Number(u16),
}

/// A lane that no other organization has
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, reason = "describes what `wanted` reads")]
pub(super) enum OwnName {
    Own,
}

fn wanted(lane: &Value) -> Option<WantedLane> {
    match lane {
        Value::Null => Some(WantedLane::Shared),
        Value::String(name) => (name == "own").then_some(WantedLane::Own),
        number => {
            let number = number.as_u64().and_then(|number| u16::try_from(number).ok());
            number.filter(|number| *number <= HIGHEST_LANE).map(WantedLane::Number)
        }
    }
}

/// Give an organization a lane of its own, or take it back
///
/// Lanes share the workers' time evenly, so that an organization with a lane of its own neither holds up others nor waits
/// for them. Events that are published from now on take the new lane; deliveries that are queued already are moved by the
/// workers as they come to them. Nothing is lost, and no attempt is counted.
#[utoipa::path(
    put,
    path = "/v1/admin/organizations/{id}/lane",
    tag = "admin",
    operation_id = "setLane",
    params(("id" = Uuid, Path, description = "The organization")),
    request_body = NewLane,
    responses(
        (status = 200, description = "The organization, with its lane", body = OrganizationView),
        ChildLimitProblems
    ),
    security(("adminToken" = []))
)]
pub(super) async fn set(
    State(api): State<Api>,
    Recorded(access, by): Recorded<AdminAccess>,
    Id(id): Id<OrganizationId>,
    Json(new): Json<NewLane>,
) -> Result<Answer<OrganizationView>, Problem> {
    access.everything()?;
    let wanted = wanted(&new.lane).ok_or_else(|| {
        let detail = format!(r#"a lane is "own", a number from 0 to {HIGHEST_LANE}, or null"#);
        Problem::invalid_at("/lane", detail)
    })?;
    match pg::set_lane(&api.pool, id, wanted, api.lanes, &by).await? {
        SetLane::Set(organization) => {
            // The workers look by themselves, too.
            api.hints.notify(Hint::LanesChanged).await;
            Ok(Answer(organization.into()))
        }
        SetLane::NotFound => Err(Problem::not_found()),
        SetLane::NoneFree => Err(Problem::new(
            ProblemType::LimitReached,
            format!(
                "every lane from {} to {HIGHEST_LANE} is some organization's; name one to share it",
                api.lanes
            ),
        )),
    }
}
