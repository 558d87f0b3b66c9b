//! Audit records: who changed what. They are written where the change is made, in `bus_core::pg`; here they are read,
//! and here the reading of payloads is recorded.

use std::str::FromStr;

use axum::{Json as Answer, extract::State};
use bus_core::{
    audit::{Action, By, Change, Record, TargetKind},
    ids::{AuditId, ConnectionId, EventUid, KeyId, OrganizationId},
    pg::{self, audit::RecordQuery},
    telemetry::Chain,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::error;
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    auth::{AdminAccess, Audit, Authorized},
    extract::Query,
    history::has_nul,
    openapi::ListProblems,
    page::{Cursor, Limit, Page},
    problem::Problem,
};

/// Who did something: `key`, somebody with an API key; `admin`, the bearer of the admin token; `system`, the event bus
/// by itself
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = AuditActorKind)]
#[allow(dead_code, reason = "describes what bus_core::audit writes")]
enum ActorKind {
    Key,
    Admin,
    System,
}

/// Who did something
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = AuditActor)]
#[allow(dead_code, reason = "describes what bus_core::audit writes")]
struct ActorBody {
    kind: ActorKind,
    /// The key.
    #[schema(value_type = Option<Uuid>)]
    key_id: Option<KeyId>,
    /// The connection that the key was bound to.
    #[schema(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
}

/// What something was done to
#[derive(Serialize, ToSchema)]
#[schema(as = AuditTarget)]
#[allow(dead_code, reason = "describes what bus_core::audit writes")]
struct TargetBody {
    /// `organization`, `key`, `connection`, `subscription`, `schedule`, `event`, `dead_letter` or `replay`.
    kind: String,
    /// Which one.
    id: String,
}

/// One change, or one reading of payloads
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = AuditRecord)]
#[allow(dead_code, reason = "describes what bus_core::audit writes")]
pub(super) struct RecordBody {
    #[schema(value_type = Uuid)]
    id: AuditId,
    /// Whose thing it was.
    #[schema(value_type = Option<Uuid>)]
    organization_id: Option<OrganizationId>,
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    actor: ActorBody,
    /// What was done, as `connection.changed`. More may be added.
    action: String,
    target: TargetBody,
    /// As it was. Never with a secret, nor with the payload of an event.
    #[schema(value_type = Option<Object>, nullable = false)]
    before: Option<Value>,
    /// As it was afterwards, or how much was done. `alsoChanged` names what has changed besides and is not shown.
    #[schema(value_type = Option<Object>, nullable = false)]
    after: Option<Value>,
    /// The `x-request-id` of the request.
    #[schema(nullable = false)]
    request_id: Option<String>,
}

/// One of the words of an enumeration.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String", bound = "T: FromStr")]
struct Word<T>(T);

impl<T: FromStr> TryFrom<String> for Word<T> {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self).map_err(|_| "there is no such word; docs/api.md lists them")
    }
}

/// Which records to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only those about this organization's things; a key sees only those of its own.
    #[param(value_type = Option<Uuid>)]
    organization_id: Option<OrganizationId>,
    /// Only those about this kind of thing.
    #[param(value_type = Option<String>)]
    target_kind: Option<Word<TargetKind>>,
    /// Only those about the thing with this id.
    target_id: Option<String>,
    /// Only those of this action.
    #[param(value_type = Option<String>)]
    action: Option<Word<Action>>,
    /// Only what was done with this key.
    #[param(value_type = Option<Uuid>)]
    key_id: Option<KeyId>,
    /// Only those of this time or later (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Only those before this time (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

impl ListQuery {
    /// The part of the list that is asked for; with `own` only of that organization.
    async fn answer(self, api: &Api, own: Option<OrganizationId>) -> Result<Answer<Page<Record>>, Problem> {
        let foreign = own.is_some_and(|own| self.organization_id.is_some_and(|asked| asked != own));
        if foreign || self.target_id.as_deref().is_some_and(has_nul) {
            return Ok(Answer(Page { items: Vec::new(), next_cursor: None }));
        }
        let query = RecordQuery {
            organization: own.or(self.organization_id),
            target_kind: self.target_kind.map(|Word(kind)| kind),
            target_id: self.target_id,
            action: self.action.map(|Word(action)| action),
            key: self.key_id,
            since: self.since,
            until: self.until,
            before: self.cursor.map(|cursor| AuditId(cursor.0)),
            limit: self.limit.unwrap_or_default().0,
        };
        let records = pg::audit::records(&api.pool, &query).await?;
        Ok(Answer(Page::of(records, |record| record)))
    }
}

/// List the audit records of the organization, newest first
///
/// Every change through the API is here. With `action`, `keyId`, or only one of `targetKind` and `targetId`, one request
/// looks at a bounded number of records: a part may have fewer items than `limit`, or none, and still a `nextCursor`.
#[utoipa::path(
    get,
    path = "/v1/audit",
    tag = "audit",
    operation_id = "listAudit",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<RecordBody>), ListProblems),
    security(("apiKey" = ["admin"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Audit>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<Record>>, Problem> {
    query.answer(&api, Some(principal.organization)).await
}

/// List the audit records of all organizations, newest first
///
/// As `GET /v1/audit`, for the administrator.
#[utoipa::path(
    get,
    path = "/v1/admin/audit",
    tag = "admin",
    operation_id = "listAllAudit",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<RecordBody>), ListProblems),
    security(("adminToken" = []))
)]
pub(super) async fn list_all(
    State(api): State<Api>,
    access: AdminAccess,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<Record>>, Problem> {
    access.everything()?;
    query.answer(&api, None).await
}

/// Records that somebody is about to read what these events of a list say.
pub(super) async fn list_read(
    api: &Api,
    by: &By,
    organization: OrganizationId,
    events: &[EventUid],
) -> Result<(), Problem> {
    if events.is_empty() {
        return Ok(());
    }
    let change = Change::new(Action::PayloadRead, TargetKind::Organization, organization);
    payload_read(api, by, organization, change.after(json!({ "events": events }))).await
}

/// Records that somebody is about to read what an event, or a schedule's event, says.
pub(super) async fn one_read(
    api: &Api,
    by: &By,
    organization: OrganizationId,
    kind: TargetKind,
    id: impl ToString,
) -> Result<(), Problem> {
    payload_read(api, by, organization, Change::new(Action::PayloadRead, kind, id)).await
}

/// Nobody reads without a record, if records are asked for. It has an id of its own: the request may have made a change,
/// too.
async fn payload_read(
    api: &Api,
    by: &By,
    organization: OrganizationId,
    change: Change,
) -> Result<(), Problem> {
    if !api.payload_access {
        return Ok(());
    }
    let by = By { record: AuditId(api.ids.next()), ..by.clone() };
    let recorded = async {
        let mut connection = pg::acquire(&api.pool).await?;
        pg::audit::record(&mut connection, &by, Some(organization), change).await
    };
    recorded.await.map_err(|failed| {
        error!(error = %Chain(&failed), "Payloads are not shown, since that cannot be recorded");
        let detail =
            "the reading of payloads is recorded, and the record could not be written; nothing is shown";
        Problem::unavailable(detail)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_names_every_action_and_kind_of_target() {
        let page = include_str!("../../../../docs/api.md");
        let table = page.split("## Audit").nth(1).expect("the section");
        let actions = Action::ALL.iter().map(|action| action.as_str());
        for word in actions.chain(TargetKind::ALL.iter().map(|kind| kind.as_str())) {
            assert!(table.contains(&format!("`{word}`")), "docs/api.md lacks {word}");
        }
    }
}
