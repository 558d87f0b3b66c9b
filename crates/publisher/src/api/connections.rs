//! Connections: who publishes, and where events go.

mod limits;
mod patch;
mod view;

use std::{collections::BTreeMap, time::Duration};

use axum::{Json as Answer, extract::State, response::Response};
use bus_core::{
    address::AddressPolicy,
    connection::{Connection, ContentMode, Target, Webhook},
    ids::ConnectionId,
    notify::Hint,
    pg::{self, ChangeConnection, CreateConnection, NewConnection},
    signature::SigningSecret,
    webhook_rules::{
        self, FinalStatusesRefused, HeadersRefused, MAX_TIMEOUT, MIN_TIMEOUT, REDACTED, is_sensitive,
    },
};
use http::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use url::Url;
use utoipa::ToSchema;

pub(super) use self::view::ConnectionView;
use self::{
    limits::read_limits,
    patch::ConnectionPatch,
    view::{ContentModeName, Kind},
};
use super::{
    Api,
    auth::{Authorized, Look, Manage, Recorded},
    created,
    extract::{Id, Json, MergePatch, Query, push_token},
    openapi::{ListProblems, NamedProblems, OneProblems, RenameProblems},
    organizations::{ListQuery, check_name},
    page::{self, Page},
    problem::{FieldError, Problem, ProblemType},
};

/// How long an answer may take if nothing is said.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = NewConnection)]
pub(super) struct NewConnectionBody {
    /// Unique within the organization.
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    kind: Kind,
    /// Where a webhook receives: `http` or `https`, without user information or fragment, at a public
    /// address unless the configuration allows others.
    #[schema(max_length = 2048, format = "uri")]
    url: Option<String>,
    /// Sent with every request of a webhook; at most 32, 8 KiB in all. The bus's own headers cannot be
    /// set.
    headers: Option<BTreeMap<String, String>>,
    /// For the whole exchange, milliseconds; 15000 if absent.
    #[schema(minimum = 1000, maximum = 30000)]
    timeout_ms: Option<u64>,
    /// `structured` if absent.
    content_mode: Option<ContentModeName>,
    /// Answers of a webhook with one of these HTTP statuses (300 to 599, distinct) are final: such a
    /// delivery is not tried again. None if absent.
    #[schema(max_items = 50)]
    final_statuses: Option<Vec<u16>>,
    /// Requests of a webhook that are under way at a time; as many as the bus is configured for if absent.
    #[schema(minimum = 1, maximum = 10000)]
    max_in_flight: Option<u32>,
    /// Requests of a webhook per second; no limit if absent.
    #[schema(minimum = 0.001, maximum = 100000)]
    rate_per_second: Option<f64>,
    /// How many requests may follow at once after a pause; those of one second if absent. Needs `ratePerSecond`.
    #[schema(minimum = 1, maximum = 100000)]
    burst: Option<u32>,
    /// Signs every request (Standard Webhooks): `whsec_` and the Base64 of 24 to 64 bytes. Generated if
    /// absent.
    #[schema(value_type = Option<String>, write_only)]
    secret: Option<SecretString>,
    /// Nothing is delivered while this is false; true if absent.
    enabled: Option<bool>,
}

impl NewConnectionBody {
    fn target(self, addresses: &AddressPolicy, errors: &mut Vec<FieldError>) -> Option<Target> {
        if self.kind == Kind::Publisher {
            let given = [
                ("/url", self.url.is_some()),
                ("/headers", self.headers.is_some()),
                ("/timeoutMs", self.timeout_ms.is_some()),
                ("/contentMode", self.content_mode.is_some()),
                ("/finalStatuses", self.final_statuses.is_some()),
                ("/maxInFlight", self.max_in_flight.is_some()),
                ("/ratePerSecond", self.rate_per_second.is_some()),
                ("/burst", self.burst.is_some()),
                ("/secret", self.secret.is_some()),
            ];
            errors.extend(given.into_iter().filter(|(_, given)| *given).map(|(at, _)| receives_nothing(at)));
            return Some(Target::Publisher);
        }
        let url = match self.url {
            Some(url) => read_url(&url, addresses),
            None => Err(FieldError::at("/url", "a webhook needs a url")),
        };
        let headers = read_headers(self.headers.unwrap_or_default());
        let timeout = self.timeout_ms.map_or(Ok(DEFAULT_TIMEOUT), read_timeout);
        let final_statuses = read_final_statuses(self.final_statuses.unwrap_or_default());
        let limits = read_limits(self.max_in_flight, self.rate_per_second, self.burst);
        let secret = self.secret.map_or_else(|| Ok(generate_secret()), |text| read_secret(&text));
        // All of them before the first `?`: the client learns of every mistake at once.
        let (url, headers) = (keep(url, errors), keep(headers, errors));
        let (timeout, final_statuses) = (keep(timeout, errors), keep(final_statuses, errors));
        let (limits, secret) = (keep(limits, errors), keep(secret, errors));
        Some(Target::Webhook(Box::new(Webhook {
            url: url?,
            headers: headers?,
            timeout: timeout?,
            content_mode: self.content_mode.map_or_else(ContentMode::default, Into::into),
            final_statuses: final_statuses?,
            limits: limits?,
            secret: secret?,
            previous_secret: None,
        })))
    }
}

fn keep<T>(read: Result<T, FieldError>, errors: &mut Vec<FieldError>) -> Option<T> {
    read.map_err(|error| errors.push(error)).ok()
}

fn receives_nothing(pointer: &str) -> FieldError {
    FieldError::at(pointer, "a connection of the kind publisher receives nothing; leave this out")
}

fn read_url(text: &str, addresses: &AddressPolicy) -> Result<Url, FieldError> {
    let url = Url::parse(text).map_err(|error| FieldError::at("/url", format!("not a URL: {error}")))?;
    addresses.check_url(&url).map_err(|refused| FieldError::at("/url", refused.to_string()))?;
    Ok(url)
}

/// Header names are stored in lower case: they are the same in any (RFC 9110 §5.1).
fn read_headers(headers: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, FieldError> {
    let at = |name: Option<&str>| {
        let mut pointer = "/headers".to_owned();
        if let Some(name) = name {
            push_token(&mut pointer, name);
        }
        pointer
    };
    webhook_rules::check_headers(&headers).map_err(|refused| {
        let name = match &refused {
            HeadersRefused::Name(name)
            | HeadersRefused::Value(name)
            | HeadersRefused::Forbidden(name)
            | HeadersRefused::Repeated(name) => Some(name.as_str()),
            _ => None,
        };
        FieldError::at(at(name), refused.to_string())
    })?;
    if let Some((name, _)) = headers.iter().find(|(name, value)| *value == REDACTED && is_sensitive(name)) {
        let detail =
            "*** only stands for the value in answers; leave the header out to keep it, or send its value";
        return Err(FieldError::at(at(Some(name)), detail));
    }
    Ok(headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect())
}

fn read_timeout(milliseconds: u64) -> Result<Duration, FieldError> {
    let timeout = Duration::from_millis(milliseconds);
    if (MIN_TIMEOUT..=MAX_TIMEOUT).contains(&timeout) {
        return Ok(timeout);
    }
    let (least, most) = (MIN_TIMEOUT.as_millis(), MAX_TIMEOUT.as_millis());
    Err(FieldError::at("/timeoutMs", format!("timeoutMs must be from {least} to {most}")))
}

/// Their order says nothing; in ascending order the same ones are equal.
fn read_final_statuses(mut statuses: Vec<u16>) -> Result<Vec<u16>, FieldError> {
    webhook_rules::check_final_statuses(&statuses).map_err(|refused| {
        let pointer = match refused {
            FinalStatusesRefused::OutOfRange(index) | FinalStatusesRefused::Repeated(index) => {
                format!("/finalStatuses/{index}")
            }
            _ => "/finalStatuses".to_owned(),
        };
        FieldError::at(pointer, refused.to_string())
    })?;
    statuses.sort_unstable();
    Ok(statuses)
}

fn read_secret(text: &SecretString) -> Result<SigningSecret, FieldError> {
    SigningSecret::parse(text.expose_secret()).map_err(|error| FieldError::at("/secret", error.to_string()))
}

fn generate_secret() -> SigningSecret {
    SigningSecret::generate(&mut rand::rng())
}

fn name_taken() -> Problem {
    Problem::new(ProblemType::NameTaken, "another connection of the organization has this name")
}

/// Create a connection
///
/// The answer of a webhook shows its signing secret; keep it, nobody can read it again.
#[utoipa::path(
    post,
    path = "/v1/connections",
    tag = "connections",
    operation_id = "createConnection",
    request_body = NewConnectionBody,
    responses((status = 201, description = "It was created", body = ConnectionView), NamedProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn create(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Json(new): Json<NewConnectionBody>,
) -> Result<Response, Problem> {
    if principal.restricted_to().is_some() {
        let detail = "a key that is bound to a connection cannot create others";
        return Err(Problem::new(ProblemType::Forbidden, detail));
    }
    let mut errors = Vec::new();
    errors.extend(check_name(&new.name, "/name").err());
    let (name, enabled) = (new.name.clone(), new.enabled.unwrap_or(true));
    let target = new.target(&api.addresses, &mut errors);
    let (Some(target), true) = (target, errors.is_empty()) else { return Err(Problem::invalid(errors)) };
    let secret = match &target {
        Target::Webhook(webhook) => Some(webhook.secret.expose()),
        Target::Publisher => None,
    };
    let id = ConnectionId(api.ids.next());
    let new = NewConnection { id, organization: principal.organization, name, enabled, target };
    match pg::create_connection(&api.pool, new, &by).await? {
        CreateConnection::Created(connection) => {
            let view = ConnectionView::from(*connection).with_secret(secret);
            Ok(created(&format!("/v1/connections/{id}"), Answer(view)))
        }
        CreateConnection::NameTaken => Err(name_taken()),
    }
}

/// List the connections, oldest first
#[utoipa::path(
    get,
    path = "/v1/connections",
    tag = "connections",
    operation_id = "listConnections",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<ConnectionView>), ListProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<ConnectionView>>, Problem> {
    let page = page::request(query.limit, query.cursor);
    let only = principal.restricted_to();
    let paged = pg::connections(&api.pool, principal.organization, only, page).await?;
    Ok(Answer(Page::of(paged, ConnectionView::from)))
}

/// Read a connection
#[utoipa::path(
    get,
    path = "/v1/connections/{id}",
    tag = "connections",
    operation_id = "getConnection",
    params(("id" = Uuid, Path, description = "The connection")),
    responses((status = 200, description = "The connection", body = ConnectionView), OneProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Id(id): Id<ConnectionId>,
) -> Result<Answer<ConnectionView>, Problem> {
    let visible = principal.sees(id);
    let found = pg::connection(&api.pool, principal.organization, id).await?.filter(|_| visible);
    found.map(|connection| Answer(connection.into())).ok_or_else(Problem::not_found)
}

/// Change a connection
///
/// The body is a JSON Merge Patch (RFC 7396): what is absent stays, `null` restores the default. A new
/// `secret`, or `null` to have one generated, is shown once in the answer; the one before it goes on
/// signing beside it for 24 hours. `kind` cannot change.
#[utoipa::path(
    patch,
    path = "/v1/connections/{id}",
    tag = "connections",
    operation_id = "changeConnection",
    params(("id" = Uuid, Path, description = "The connection")),
    request_body(
        content((ConnectionPatch = "application/merge-patch+json"), (ConnectionPatch = "application/json"))
    ),
    responses((status = 200, description = "As it is now", body = ConnectionView), RenameProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn change(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<ConnectionId>,
    MergePatch(patch): MergePatch<ConnectionPatch>,
) -> Result<Answer<ConnectionView>, Problem> {
    if !principal.sees(id) {
        return Err(Problem::not_found());
    }
    let now = api.clock.now();
    let mut new_secret = None;
    let apply = |connection: Connection| patch.apply(connection, &api.addresses, now, &mut new_secret);
    match pg::change_connection(&api.pool, principal.organization, id, apply, &by).await? {
        ChangeConnection::Stored(connection) => {
            api.hints.notify(Hint::ConnectionChanged(id)).await;
            // What was parked for it is tried again.
            api.hints.notify(Hint::Due).await;
            Ok(Answer(ConnectionView::from(*connection).with_secret(new_secret)))
        }
        ChangeConnection::NotFound => Err(Problem::not_found()),
        ChangeConnection::NameTaken => Err(name_taken()),
        ChangeConnection::Refused(problem) => Err(problem),
    }
}

/// Delete a connection
///
/// Its subscriptions go with it, and the keys that are bound to it are revoked. What it published or
/// received stays in history.
#[utoipa::path(
    delete,
    path = "/v1/connections/{id}",
    tag = "connections",
    operation_id = "deleteConnection",
    params(("id" = Uuid, Path, description = "The connection")),
    responses((status = 204, description = "It is gone"), OneProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<ConnectionId>,
) -> Result<StatusCode, Problem> {
    if !principal.sees(id) || !pg::delete_connection(&api.pool, principal.organization, id, &by).await? {
        return Err(Problem::not_found());
    }
    api.hints.notify(Hint::ConnectionChanged(id)).await;
    Ok(StatusCode::NO_CONTENT)
}
