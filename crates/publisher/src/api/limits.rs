//! How much organizations may publish: what the administrator sets, and what publishing answers about it.

use axum::{
    Json as Answer,
    extract::State,
    response::{IntoResponse as _, Response},
};
use bus_core::{
    ids::OrganizationId,
    pg::{self, OwnLimits, PublishQuota, PublishRate, QuotaPeriod},
};
use http::{HeaderName, HeaderValue};
use jiff::civil::Date;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Api,
    auth::{AdminAccess, Recorded},
    extract::{Id, Json},
    openapi::{ChildProblems, OneProblems},
    organizations::OrganizationView,
    problem::{FieldError, Problem, ProblemType},
};
use crate::limits::{MAX_RATE, MIN_RATE, Standing, Verdict, is_rate};

/// draft-ietf-httpapi-ratelimit-headers-10.
const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// See [`POLICY`].
const LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The largest burst or quota, events. JSON numbers are exact up to 2^53.
const MAX_EVENTS: u64 = 1_000_000_000_000;
/// The largest integer of a structured field (RFC 9651 §3.3.1).
const MAX_INTEGER: u64 = 999_999_999_999_999;
/// Days of which usage is shown.
const DAYS: u32 = 62;

/// For how long a quota is
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum QuotaPeriodName {
    /// A calendar day, UTC.
    Day,
    /// A calendar month, UTC.
    Month,
}

impl From<QuotaPeriodName> for QuotaPeriod {
    fn from(name: QuotaPeriodName) -> Self {
        match name {
            QuotaPeriodName::Day => Self::Day,
            QuotaPeriodName::Month => Self::Month,
        }
    }
}

impl From<QuotaPeriod> for QuotaPeriodName {
    fn from(period: QuotaPeriod) -> Self {
        match period {
            QuotaPeriod::Day => Self::Day,
            QuotaPeriod::Month => Self::Month,
        }
    }
}

/// How much an organization may publish. What is absent or `null` is as configured; 0 is no limit
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PublishLimits {
    /// Events a second, in the long run: 0, or at least 0.001.
    #[schema(minimum = 0, maximum = 1_000_000)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rate: Option<f64>,
    /// Events at once; goes with `rate`.
    #[schema(maximum = 1_000_000_000_000_u64)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    burst: Option<u64>,
    /// Events in a period.
    #[schema(maximum = 1_000_000_000_000_u64)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    /// For how long `quota` is, and goes with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota_period: Option<QuotaPeriodName>,
}

impl From<OwnLimits> for PublishLimits {
    fn from(limits: OwnLimits) -> Self {
        Self {
            rate: limits.rate.map(|rate| rate.per_second),
            burst: limits.rate.map(|rate| rate.burst),
            quota: limits.quota.map(|quota| quota.events),
            quota_period: limits.quota.map(|quota| quota.period.into()),
        }
    }
}

impl PublishLimits {
    fn check(self) -> Result<OwnLimits, Problem> {
        let mut errors = Vec::new();
        let mut refuse = |pointer: &str, detail: String| errors.push(FieldError::at(pointer, detail));
        if self.rate.is_some() != self.burst.is_some() {
            refuse(
                if self.rate.is_some() { "/burst" } else { "/rate" },
                "`rate` and `burst` go together".into(),
            );
        }
        if self.quota.is_some() != self.quota_period.is_some() {
            let missing = if self.quota.is_some() { "/quotaPeriod" } else { "/quota" };
            refuse(missing, "`quota` and `quotaPeriod` go together".into());
        }
        if self.rate.is_some_and(|rate| !is_rate(rate)) {
            refuse("/rate", format!("a rate is 0, or between {MIN_RATE} and {MAX_RATE} events a second"));
        }
        if self.rate.is_some_and(|rate| rate > 0.0) && self.burst == Some(0) {
            refuse("/burst", "a limited rate needs a burst of at least 1".into());
        }
        for (pointer, events) in [("/burst", self.burst), ("/quota", self.quota)] {
            if events.is_some_and(|events| events > MAX_EVENTS) {
                refuse(pointer, format!("at most {MAX_EVENTS} events"));
            }
        }
        if !errors.is_empty() {
            return Err(Problem::invalid(errors));
        }
        let rate = self.rate.zip(self.burst).map(|(per_second, burst)| PublishRate { per_second, burst });
        let quota = self.quota.zip(self.quota_period);
        let quota = quota.map(|(events, period)| PublishQuota { events, period: period.into() });
        Ok(OwnLimits { rate, quota })
    }
}

/// Set how much an organization may publish
///
/// Replaces all of its limits. Publishers follow within about a second; within 5 s if the organization publishes rarely.
#[utoipa::path(
    put,
    path = "/v1/admin/organizations/{id}/limits",
    tag = "admin",
    operation_id = "setLimits",
    params(("id" = Uuid, Path, description = "The organization")),
    request_body = PublishLimits,
    responses(
        (status = 200, description = "The organization, with its limits", body = OrganizationView),
        ChildProblems
    ),
    security(("adminToken" = []))
)]
pub(super) async fn set(
    State(api): State<Api>,
    Recorded(access, by): Recorded<AdminAccess>,
    Id(id): Id<OrganizationId>,
    Json(new): Json<PublishLimits>,
) -> Result<Answer<OrganizationView>, Problem> {
    access.everything()?;
    let changed = pg::set_limits(&api.pool, id, new.check()?, &by).await?;
    Ok(Answer(changed.ok_or_else(Problem::not_found)?.into()))
}

/// What an organization published on a day
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DayUsage {
    /// The day, UTC.
    #[schema(value_type = String, format = Date)]
    day: Date,
    events: u64,
}

/// What an organization has published, as far as publishers have counted it: about a second late
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct UsageView {
    /// Events since the day began, UTC.
    today: u64,
    /// Events since the month began, UTC.
    this_month: u64,
    /// The latest days on which there were any, at most 62, the latest first.
    days: Vec<DayUsage>,
}

/// Read how much an organization has published
#[utoipa::path(
    get,
    path = "/v1/admin/organizations/{id}/usage",
    tag = "admin",
    operation_id = "getUsage",
    params(("id" = Uuid, Path, description = "The organization")),
    responses((status = 200, description = "What it has published", body = UsageView), OneProblems),
    security(("adminToken" = []), ("apiKey" = ["admin"]))
)]
pub(super) async fn usage(
    State(api): State<Api>,
    access: AdminAccess,
    Id(id): Id<OrganizationId>,
) -> Result<Answer<UsageView>, Problem> {
    access.organization(id)?;
    let usage = pg::add_usage(&api.pool, &[(id, 0)]).await?;
    let usage = usage.first().ok_or_else(Problem::not_found)?;
    let days = pg::usage_by_day(&api.pool, id, DAYS).await?;
    let days = days.into_iter().map(|(day, events)| DayUsage { day, events }).collect();
    Ok(Answer(UsageView { today: usage.day, this_month: usage.month, days }))
}

/// The problem of a request that is not let through.
pub(super) fn refusal(verdict: &Verdict) -> Option<Problem> {
    let refused = verdict.refused.as_ref()?;
    let detail = match refused.policy {
        "quota" => {
            "the organization has published as much as it may in this period; nothing of this request was"
        }
        _ => "the organization publishes faster than it may; nothing of this request was published",
    };
    Some(Problem {
        retry_after: Some(refused.retry_after),
        violated_policy: Some(refused.policy),
        ..Problem::new(ProblemType::QuotaExceeded, detail)
    })
}

/// Says in the answer where the organization stands with its limits.
pub(super) fn with_standings(verdict: &Verdict, answer: Result<Response, Problem>) -> Response {
    let mut response = answer.unwrap_or_else(Problem::into_response);
    if !verdict.standings.is_empty() {
        let list = |item: fn(&Standing) -> String| {
            let items: Vec<String> = verdict.standings.iter().map(item).collect();
            HeaderValue::try_from(items.join(", ")).expect("names and numbers are visible ASCII")
        };
        let headers = response.headers_mut();
        headers.insert(POLICY, list(policy));
        headers.insert(LIMIT, list(standing));
    }
    response
}

/// The quota unit is no registered one: a request is as many events as are in it.
fn policy(standing: &Standing) -> String {
    let window = whole_seconds(standing.window).max(1);
    format!(r#""{}";q={};w={window};qu="events""#, standing.policy, standing.limit.min(MAX_INTEGER))
}

fn standing(standing: &Standing) -> String {
    let left = standing.left.min(MAX_INTEGER);
    format!(r#""{}";r={left};t={}"#, standing.policy, whole_seconds(standing.restored_in))
}

/// Never earlier than meant, as far as a structured field can say it.
fn whole_seconds(duration: std::time::Duration) -> u64 {
    duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0)).min(MAX_INTEGER)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::limits::Refused;

    #[test]
    fn the_headers_are_those_of_the_draft() {
        let verdict = Verdict {
            standings: vec![
                Standing {
                    policy: "rate",
                    limit: 50,
                    window: Duration::from_millis(2_500),
                    left: 3,
                    restored_in: Duration::from_millis(2_001),
                },
                Standing {
                    policy: "quota",
                    limit: 1_000,
                    window: Duration::from_secs(86_400),
                    left: 0,
                    restored_in: Duration::from_secs(77),
                },
            ],
            refused: Some(Refused { policy: "quota", retry_after: Duration::from_secs(77) }),
        };
        let problem = refusal(&verdict).expect("it is refused");
        assert_eq!(problem.violated_policy, Some("quota"));
        let response = with_standings(&verdict, Err(problem));
        assert_eq!(
            response.headers()["ratelimit-policy"],
            r#""rate";q=50;w=3;qu="events", "quota";q=1000;w=86400;qu="events""#
        );
        assert_eq!(response.headers()["ratelimit"], r#""rate";r=3;t=3, "quota";r=0;t=77"#);
        let longest = Standing {
            policy: "rate",
            limit: u64::MAX,
            window: Duration::MAX,
            left: u64::MAX,
            restored_in: Duration::MAX,
        };
        assert_eq!(policy(&longest), r#""rate";q=999999999999999;w=999999999999999;qu="events""#);
        assert_eq!(standing(&longest), r#""rate";r=999999999999999;t=999999999999999"#);
        let none = Verdict { standings: vec![], refused: None };
        assert!(with_standings(&none, Ok(Response::default())).headers().is_empty());
    }

    #[test]
    fn limits_that_make_no_sense_are_refused_by_place() {
        let limits = |text: &str| serde_json::from_str::<PublishLimits>(text).expect("JSON").check();
        let places = |text: &str| {
            let errors = limits(text).expect_err(text).errors;
            errors.into_iter().filter_map(|error| error.pointer).collect::<Vec<_>>()
        };
        assert_eq!(places(r#"{"rate": 1}"#), ["/burst"]);
        assert_eq!(places(r#"{"burst": 1, "quotaPeriod": "day"}"#), ["/rate", "/quota"]);
        for rate in ["-1", "1e-300", "0.0009", "1000001"] {
            assert_eq!(places(&format!(r#"{{"rate": {rate}, "burst": 1}}"#)), ["/rate"]);
        }
        assert!(limits(r#"{"rate": 0.001, "burst": 1}"#).is_ok());
        assert_eq!(places(r#"{"rate": 1, "burst": 0}"#), ["/burst"]);
        assert_eq!(places(r#"{"quota": 1000000000001, "quotaPeriod": "day"}"#), ["/quota"]);
        assert_eq!(limits("{}").expect("nothing"), OwnLimits::default());
        assert_eq!(limits(r#"{"rate": null}"#).expect("nothing"), OwnLimits::default());
        let both = limits(r#"{"rate": 0, "burst": 0, "quota": 5, "quotaPeriod": "month"}"#).expect("limits");
        assert_eq!(both.quota, Some(PublishQuota { events: 5, period: QuotaPeriod::Month }));
    }
}
