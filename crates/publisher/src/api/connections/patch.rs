//! Changes of connections, as JSON Merge Patch (RFC 7396).

use std::collections::BTreeMap;

use bus_core::{
    address::AddressPolicy,
    connection::{Connection, ContentMode, Limits, Target, Webhook},
};
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    ContentModeName, DEFAULT_TIMEOUT, FieldError, Kind, Problem, check_name, generate_secret,
    read_final_statuses, read_headers, read_limits, read_secret, read_timeout, read_url, receives_nothing,
};
use crate::api::extract::present;

/// How long a replaced secret goes on signing, so that a subscriber can change over.
const ROTATION: SignedDuration = SignedDuration::from_hours(24);

/// A change of a connection: what is absent stays, `null` restores the default
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::api) struct ConnectionPatch {
    /// Unique within the organization; cannot be `null`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, nullable = false, min_length = 1, max_length = 200)]
    name: Option<Option<String>>,
    /// Must be what it is.
    #[serde(default)]
    kind: Option<Kind>,
    /// Cannot be `null`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, max_length = 2048, format = "uri")]
    url: Option<Option<String>>,
    /// Each is set, or removed by `null`; those that are absent stay. `null` removes all.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    headers: Option<Option<BTreeMap<String, Option<String>>>>,
    /// `null` for 15000.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u64>, minimum = 1000, maximum = 30000)]
    timeout_ms: Option<Option<u64>>,
    /// `null` for `structured`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<ContentModeName>)]
    content_mode: Option<Option<ContentModeName>>,
    /// All of them, 300 to 599, distinct; `null` for none.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<Vec<u16>>, max_items = 50)]
    final_statuses: Option<Option<Vec<u16>>>,
    /// `null` for as many as the bus is configured for.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 10000)]
    max_in_flight: Option<Option<u32>>,
    /// `null` for no limit; `burst` goes with it.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<f64>, minimum = 0.001, maximum = 100000)]
    rate_per_second: Option<Option<f64>>,
    /// `null` for the requests of one second.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 100000)]
    burst: Option<Option<u32>>,
    /// A new signing secret; `null` to have one generated.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, write_only)]
    secret: Option<Option<SecretString>>,
    /// `null` for true.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<bool>)]
    enabled: Option<Option<bool>>,
}

impl ConnectionPatch {
    /// The connection as it shall be. A secret that is new is put into `new_secret`.
    pub(super) fn apply(
        self,
        mut connection: Connection,
        addresses: &AddressPolicy,
        now: Timestamp,
        new_secret: &mut Option<String>,
    ) -> Result<Connection, Problem> {
        let mut errors = Vec::new();
        match &self.name {
            None => {}
            Some(None) => errors.push(FieldError::at("/name", "a connection needs a name")),
            Some(Some(name)) => {
                errors.extend(check_name(name, "/name").err());
                connection.name.clone_from(name);
            }
        }
        if let Some(enabled) = self.enabled {
            connection.enabled = enabled.unwrap_or(true);
            connection.disabled_reason = connection.disabled_reason.filter(|_| !connection.enabled);
        }
        // Whoever enables it, or sends it elsewhere, begins anew.
        if self.enabled.is_some_and(|enabled| enabled.unwrap_or(true)) || self.url.is_some() {
            connection.failing_since = None;
        }
        let kind = match connection.target {
            Target::Webhook(_) => Kind::Webhook,
            Target::Publisher => Kind::Publisher,
        };
        if self.kind.is_some_and(|wanted| wanted != kind) {
            errors.push(FieldError::at("/kind", "the kind cannot change; create another connection"));
        }
        match &mut connection.target {
            Target::Publisher => self.refuse_target(&mut errors),
            Target::Webhook(webhook) => {
                if let Err(error) = self.apply_target(webhook, addresses, now, new_secret) {
                    errors.push(error);
                }
            }
        }
        if errors.is_empty() { Ok(connection) } else { Err(Problem::invalid(errors)) }
    }

    fn refuse_target(&self, errors: &mut Vec<FieldError>) {
        let set = [
            ("/url", matches!(self.url, Some(Some(_)))),
            ("/headers", matches!(self.headers, Some(Some(_)))),
            ("/timeoutMs", matches!(self.timeout_ms, Some(Some(_)))),
            ("/contentMode", matches!(self.content_mode, Some(Some(_)))),
            ("/finalStatuses", matches!(self.final_statuses, Some(Some(_)))),
            ("/maxInFlight", matches!(self.max_in_flight, Some(Some(_)))),
            ("/ratePerSecond", matches!(self.rate_per_second, Some(Some(_)))),
            ("/burst", matches!(self.burst, Some(Some(_)))),
            // null would generate one
            ("/secret", self.secret.is_some()),
        ];
        errors.extend(set.into_iter().filter(|(_, set)| *set).map(|(at, _)| receives_nothing(at)));
    }

    fn limits(&self, now: Limits) -> Result<Limits, FieldError> {
        let rate = self.rate_per_second.unwrap_or(now.rate.map(|rate| rate.per_second));
        let burst = self.burst.unwrap_or(now.rate.and_then(|rate| rate.burst));
        // Without a rate none that it had before.
        let burst = burst.filter(|_| rate.is_some() || self.burst.is_some());
        read_limits(self.max_in_flight.unwrap_or(now.max_in_flight), rate, burst)
    }

    fn apply_target(
        self,
        webhook: &mut Webhook,
        addresses: &AddressPolicy,
        now: Timestamp,
        new_secret: &mut Option<String>,
    ) -> Result<(), FieldError> {
        webhook.limits = self.limits(webhook.limits)?;
        if let Some(url) = self.url {
            let url = url.ok_or_else(|| FieldError::at("/url", "a webhook needs a url"))?;
            webhook.url = read_url(&url, addresses)?;
        }
        match self.headers {
            None => {}
            Some(None) => webhook.headers.clear(),
            Some(Some(changes)) => webhook.headers = merge_headers(webhook.headers.clone(), changes)?,
        }
        if let Some(timeout) = self.timeout_ms {
            webhook.timeout = timeout.map_or(Ok(DEFAULT_TIMEOUT), read_timeout)?;
        }
        if let Some(mode) = self.content_mode {
            webhook.content_mode = mode.map_or_else(ContentMode::default, Into::into);
        }
        if let Some(statuses) = self.final_statuses {
            webhook.final_statuses = read_final_statuses(statuses.unwrap_or_default())?;
        }
        if let Some(secret) = self.secret {
            let secret = secret.map_or_else(|| Ok(generate_secret()), |text| read_secret(&text))?;
            *new_secret = Some(secret.expose());
            if secret != webhook.secret {
                let until = now.saturating_add(ROTATION).expect("hours have no calendar");
                let before = std::mem::replace(&mut webhook.secret, secret);
                webhook.previous_secret = Some((before, until));
            }
        }
        Ok(())
    }
}

fn merge_headers(
    mut headers: BTreeMap<String, String>,
    changes: BTreeMap<String, Option<String>>,
) -> Result<BTreeMap<String, String>, FieldError> {
    // What is set must be good by itself: `X-A` and `x-a` in one patch would otherwise hide each other.
    let set = changes.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
    let set = read_headers(set)?;
    for (name, _) in changes.iter().filter(|(_, value)| value.is_none()) {
        headers.remove(&name.to_ascii_lowercase());
    }
    headers.extend(set);
    check_all(headers)
}

/// The limits hold for all headers together.
fn check_all(headers: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, FieldError> {
    bus_core::webhook_rules::check_headers(&headers)
        .map(|()| headers)
        .map_err(|refused| FieldError::at("/headers", refused.to_string()))
}
