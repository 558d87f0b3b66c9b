//! Subscriptions: what a connection receives.

mod rules;

use axum::{
    Json as Answer,
    extract::State,
    response::{IntoResponse as _, Response},
};
use bus_core::{
    filter::PayloadFilter,
    ids::{ConnectionId, SubscriptionId},
    notify::Hint,
    pattern::TypePattern,
    pg::{
        self, ChangeSubscription, CreateSubscription, MAX_FILTER_BYTES, MAX_SUBSCRIPTIONS, SubscriptionQuery,
        SubscriptionRefused, Wanted,
    },
    subscription::{Subscription, SubscriptionRules},
};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use self::rules::{BatchBody, BatchPatch, RetryPolicyBody, RetryPolicyPatch, mistakes};
use super::{
    Api,
    auth::{Authorized, Look, Manage, Recorded},
    created,
    extract::{Id, Json, MergePatch, Query, present},
    openapi::{ListProblems, OneProblems, ResubscribeProblems, SubscribeProblems},
    page::{self, Cursor, Limit, Page},
    problem::{FieldError, Problem, ProblemType},
};

/// A subscription
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Subscription)]
pub(super) struct SubscriptionView {
    #[schema(value_type = Uuid)]
    id: SubscriptionId,
    /// Where the events go.
    #[schema(value_type = Uuid)]
    connection_id: ConnectionId,
    /// Which types: exact, or tokens with `*` (one token) and a final `>` (the rest).
    event_type: String,
    /// Only events of this connection.
    #[schema(value_type = Option<Uuid>)]
    publisher: Option<ConnectionId>,
    /// Only events of whose payload this JSONPath (RFC 9535) selects something.
    filter: Option<String>,
    /// `null` for the bus's own retry policy.
    retry_policy: Option<RetryPolicyBody>,
    /// `null` for one event per request.
    batch: Option<BatchBody>,
    enabled: bool,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
}

impl From<Subscription> for SubscriptionView {
    fn from(subscription: Subscription) -> Self {
        Self {
            id: subscription.id,
            connection_id: subscription.connection,
            event_type: subscription.event_type.to_string(),
            publisher: subscription.publisher,
            filter: subscription.filter.map(|filter| filter.to_string()),
            retry_policy: subscription.rules.retry.map(Into::into),
            batch: subscription.rules.batch.map(Into::into),
            enabled: subscription.enabled,
            created_at: subscription.created_at,
            updated_at: subscription.updated_at,
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NewSubscription {
    /// A webhook.
    #[schema(value_type = Uuid)]
    connection_id: ConnectionId,
    /// Which types: exact, or tokens with `*` (one token) and a final `>` (the rest).
    #[schema(min_length = 1, max_length = 255, example = "order.*")]
    event_type: String,
    /// Only events of this connection.
    #[schema(value_type = Option<Uuid>)]
    publisher: Option<ConnectionId>,
    /// Only events of whose payload this JSONPath (RFC 9535) selects something.
    #[schema(min_length = 1, max_length = 1024, example = "$[?@.total > 100]")]
    filter: Option<String>,
    /// The bus's own retry policy if absent.
    retry_policy: Option<RetryPolicyBody>,
    /// Several events per request; one if absent.
    batch: Option<BatchBody>,
    /// True if absent.
    enabled: Option<bool>,
}

/// A subscription without its connection.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WantedSubscription {
    /// Which types: exact, or tokens with `*` (one token) and a final `>` (the rest).
    #[schema(min_length = 1, max_length = 255)]
    pub(super) event_type: String,
    /// Only events of this connection.
    #[schema(value_type = Option<Uuid>)]
    pub(super) publisher: Option<ConnectionId>,
    /// Only events of whose payload this JSONPath (RFC 9535) selects something.
    #[schema(min_length = 1, max_length = 1024)]
    pub(super) filter: Option<String>,
    /// The bus's own retry policy if absent.
    retry_policy: Option<RetryPolicyBody>,
    /// Several events per request; one if absent.
    batch: Option<BatchBody>,
    /// True if absent.
    enabled: Option<bool>,
}

/// A change of a subscription: what is absent stays, `null` restores the default
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SubscriptionPatch {
    /// Cannot be `null`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 255)]
    event_type: Option<Option<String>>,
    /// `null` for everyone's events.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<Uuid>)]
    publisher: Option<Option<ConnectionId>>,
    /// `null` for all payloads.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 1024)]
    filter: Option<Option<String>>,
    /// `null` for the bus's own retry policy. Each of its members is set, or removed by `null`; those that
    /// are absent stay.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<RetryPolicyBody>)]
    retry_policy: Option<Option<RetryPolicyPatch>>,
    /// `null` for one event per request. Those of its members that are absent stay.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<BatchPatch>)]
    batch: Option<Option<BatchPatch>>,
    /// `null` for true.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<bool>)]
    enabled: Option<Option<bool>>,
}

impl NewSubscription {
    fn split(self) -> (ConnectionId, WantedSubscription) {
        let Self { connection_id, event_type, publisher, filter, retry_policy, batch, enabled } = self;
        (connection_id, WantedSubscription { event_type, publisher, filter, retry_policy, batch, enabled })
    }
}

impl WantedSubscription {
    /// Reads what it wants; `pointer` leads to the object that says it.
    pub(super) fn read(self, pointer: &str) -> Result<Wanted, Vec<FieldError>> {
        let event_type = read_event_type(pointer, &self.event_type);
        let filter = self.filter.map(|filter| read_filter(pointer, &filter)).transpose();
        let rules =
            SubscriptionRules { retry: self.retry_policy.map(Into::into), batch: self.batch.map(Into::into) };
        let mut errors = mistakes(pointer, &rules);
        match (event_type, filter) {
            (Ok(event_type), Ok(filter)) if errors.is_empty() => {
                let enabled = self.enabled.unwrap_or(true);
                Ok(Wanted { event_type, publisher: self.publisher, filter, rules, enabled })
            }
            (event_type, filter) => {
                errors.splice(0..0, event_type.err().into_iter().chain(filter.err()));
                Err(errors)
            }
        }
    }
}

fn read_event_type(pointer: &str, text: &str) -> Result<TypePattern, FieldError> {
    TypePattern::parse(text)
        .map_err(|error| FieldError::at(format!("{pointer}/eventType"), error.to_string()))
}

fn read_filter(pointer: &str, text: &str) -> Result<PayloadFilter, FieldError> {
    PayloadFilter::parse(text).map_err(|error| FieldError {
        position: Some(error.position),
        ..FieldError::at(format!("{pointer}/filter"), error.message)
    })
}

/// What another organization has, this one has not: the answer is the same as for an id that nobody has.
pub(super) fn refused(refused: SubscriptionRefused, connection: &str, publisher: &str) -> Problem {
    match refused {
        SubscriptionRefused::NoSuchConnection => {
            Problem::invalid_at(connection, "there is no such connection")
        }
        SubscriptionRefused::NotAReceiver => {
            Problem::invalid_at(connection, "a connection of the kind publisher receives nothing")
        }
        SubscriptionRefused::NoSuchPublisher(_) => {
            Problem::invalid_at(publisher, "there is no such connection")
        }
        SubscriptionRefused::TooMany => Problem::new(
            ProblemType::LimitReached,
            format!("an organization has at most {MAX_SUBSCRIPTIONS} subscriptions"),
        ),
        SubscriptionRefused::FiltersTooLarge => Problem::new(
            ProblemType::LimitReached,
            format!(
                "the filters of an organization's subscriptions take at most {} MiB of memory together; use fewer or \
                 smaller regular expressions (`match` and `search`): repetitions such as `{{1,100}}` and classes such \
                 as `\\p{{L}}` take the most",
                MAX_FILTER_BYTES / (1024 * 1024)
            ),
        ),
    }
}

/// Create a subscription
///
/// If the connection has one with the same `eventType`, `publisher` and `filter`, the answer is 200 with
/// that one, which stays as it is.
#[utoipa::path(
    post,
    path = "/v1/subscriptions",
    tag = "subscriptions",
    operation_id = "createSubscription",
    request_body = NewSubscription,
    responses(
        (status = 201, description = "It was created", body = SubscriptionView),
        (status = 200, description = "It was there already", body = SubscriptionView),
        SubscribeProblems
    ),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn create(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Json(new): Json<NewSubscription>,
) -> Result<Response, Problem> {
    let (connection, wanted) = new.split();
    let wanted = wanted.read("").map_err(Problem::invalid)?;
    let refused = |why| refused(why, "/connectionId", "/publisher");
    if !principal.sees(connection) {
        return Err(refused(SubscriptionRefused::NoSuchConnection));
    }
    let id = SubscriptionId(api.ids.next());
    let organization = principal.organization;
    match pg::create_subscription(&api.pool, organization, id, connection, &wanted, &by).await? {
        CreateSubscription::Created(subscription) => {
            if wanted.rules != SubscriptionRules::default() {
                api.hints.notify(Hint::ConnectionChanged(connection)).await;
            }
            Ok(created(&format!("/v1/subscriptions/{id}"), Answer(SubscriptionView::from(subscription))))
        }
        CreateSubscription::Existing(subscription) => {
            Ok(Answer(SubscriptionView::from(subscription)).into_response())
        }
        CreateSubscription::Refused(why) => Err(refused(why)),
    }
}

/// Which subscriptions to list.
#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only those of this connection.
    #[param(value_type = Option<Uuid>)]
    connection_id: Option<ConnectionId>,
    /// Only those with exactly this `eventType`.
    event_type: Option<String>,
    /// The most items to give.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Option<Limit>,
    /// The `nextCursor` of the part before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// List the subscriptions, oldest first
#[utoipa::path(
    get,
    path = "/v1/subscriptions",
    tag = "subscriptions",
    operation_id = "listSubscriptions",
    params(ListQuery),
    responses((status = 200, description = "A part of the list", body = Page<SubscriptionView>), ListProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn list(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Query(query): Query<ListQuery>,
) -> Result<Answer<Page<SubscriptionView>>, Problem> {
    if let Some(text) = &query.event_type {
        TypePattern::parse(text)
            .map_err(|error| Problem::invalid(vec![FieldError::parameter("eventType", error.to_string())]))?;
    }
    let own = principal.restricted_to();
    if query.connection_id.is_some_and(|wanted| !principal.sees(wanted)) {
        return Ok(Answer(Page { items: Vec::new(), next_cursor: None }));
    }
    let page = page::request(query.limit, query.cursor);
    let query = SubscriptionQuery { connection: own.or(query.connection_id), event_type: query.event_type };
    let paged = pg::subscriptions(&api.pool, principal.organization, &query, page).await?;
    Ok(Answer(Page::of(paged, SubscriptionView::from)))
}

/// Read a subscription
#[utoipa::path(
    get,
    path = "/v1/subscriptions/{id}",
    tag = "subscriptions",
    operation_id = "getSubscription",
    params(("id" = Uuid, Path, description = "The subscription")),
    responses((status = 200, description = "The subscription", body = SubscriptionView), OneProblems),
    security(("apiKey" = ["subscribe"]), ("apiKey" = ["read"]))
)]
pub(super) async fn get(
    State(api): State<Api>,
    Authorized(principal, _): Authorized<Look>,
    Id(id): Id<SubscriptionId>,
) -> Result<Answer<SubscriptionView>, Problem> {
    let found = pg::subscription(&api.pool, principal.organization, principal.restricted_to(), id).await?;
    found.map(|subscription| Answer(subscription.into())).ok_or_else(Problem::not_found)
}

/// Change a subscription
///
/// The body is a JSON Merge Patch (RFC 7396): what is absent stays, `null` restores the default.
/// `connectionId` cannot change.
#[utoipa::path(
    patch,
    path = "/v1/subscriptions/{id}",
    tag = "subscriptions",
    operation_id = "changeSubscription",
    params(("id" = Uuid, Path, description = "The subscription")),
    request_body(
        content((SubscriptionPatch = "application/merge-patch+json"), (SubscriptionPatch = "application/json"))
    ),
    responses((status = 200, description = "As it is now", body = SubscriptionView), ResubscribeProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn change(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<SubscriptionId>,
    MergePatch(patch): MergePatch<SubscriptionPatch>,
) -> Result<Answer<SubscriptionView>, Problem> {
    let (organization, only) = (principal.organization, principal.restricted_to());
    let says_rules = patch.retry_policy.is_some() || patch.batch.is_some();
    let apply = |wanted: Wanted| patch.apply(wanted);
    match pg::change_subscription(&api.pool, organization, only, id, apply, &by).await? {
        ChangeSubscription::Stored(subscription) => {
            if says_rules {
                api.hints.notify(Hint::ConnectionChanged(subscription.connection)).await;
            }
            Ok(Answer((*subscription).into()))
        }
        ChangeSubscription::NotFound => Err(Problem::not_found()),
        ChangeSubscription::Identical => Err(Problem::new(
            ProblemType::SubscriptionExists,
            "the connection has another subscription with this eventType, publisher and filter",
        )),
        ChangeSubscription::Refused(why) => Err(refused(why, "", "/publisher")),
        ChangeSubscription::Rejected(problem) => Err(problem),
    }
}

impl SubscriptionPatch {
    fn apply(self, mut wanted: Wanted) -> Result<Wanted, Problem> {
        let mut errors = Vec::new();
        match self.event_type {
            None => {}
            Some(None) => errors.push(FieldError::at("/eventType", "a subscription needs an eventType")),
            Some(Some(text)) => match read_event_type("", &text) {
                Ok(event_type) => wanted.event_type = event_type,
                Err(error) => errors.push(error),
            },
        }
        if let Some(publisher) = self.publisher {
            wanted.publisher = publisher;
        }
        if let Some(filter) = self.filter {
            match filter.map(|text| read_filter("", &text)).transpose() {
                Ok(filter) => wanted.filter = filter,
                Err(error) => errors.push(error),
            }
        }
        if let Some(retry) = self.retry_policy {
            let before = wanted.rules.retry.take().unwrap_or_default();
            wanted.rules.retry = retry.map(|patch| patch.apply(before));
        }
        if let Some(batch) = self.batch {
            match batch.map(|patch| patch.apply(wanted.rules.batch)).transpose() {
                Ok(batch) => wanted.rules.batch = batch,
                Err(error) => errors.push(error),
            }
        }
        errors.extend(mistakes("", &wanted.rules));
        if let Some(enabled) = self.enabled {
            wanted.enabled = enabled.unwrap_or(true);
        }
        if errors.is_empty() { Ok(wanted) } else { Err(Problem::invalid(errors)) }
    }
}

/// Delete a subscription
///
/// Events that were published before may still be delivered.
#[utoipa::path(
    delete,
    path = "/v1/subscriptions/{id}",
    tag = "subscriptions",
    operation_id = "deleteSubscription",
    params(("id" = Uuid, Path, description = "The subscription")),
    responses((status = 204, description = "It is gone"), OneProblems),
    security(("apiKey" = ["subscribe"]))
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Recorded(Authorized(principal, _), by): Recorded<Authorized<Manage>>,
    Id(id): Id<SubscriptionId>,
) -> Result<StatusCode, Problem> {
    let (organization, only) = (principal.organization, principal.restricted_to());
    let deleted = pg::delete_subscription(&api.pool, organization, only, id, &by).await?;
    if deleted { Ok(StatusCode::NO_CONTENT) } else { Err(Problem::not_found()) }
}
