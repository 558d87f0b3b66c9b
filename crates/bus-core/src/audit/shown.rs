//! What things look like in audit records: as the API shows them, without what is secret, without the payload of
//! events, and without their times, since the record has one.
//!
//! Where something hidden has changed, the record names it in `alsoChanged`, as JSON pointers (RFC 6901).

use serde_json::{Value, json};
use url::Url;

use crate::{
    connection::{Connection, Target, Webhook},
    pg::{
        ApiKey, DeadLetterAction, DeadLetterFilter, DeadLetters, NewReplay, Organization, OwnLimits,
        Schedule, Scope, Selection,
    },
    schedule::Missed,
    subscription::Subscription,
    webhook_rules::{REDACTED, is_sensitive},
};

pub(crate) fn organization(organization: &Organization) -> Value {
    let OwnLimits { rate, quota } = organization.limits;
    json!({
        "id": organization.id,
        "name": organization.name,
        "lane": organization.lane,
        "limits": {
            "rate": rate.map(|rate| rate.per_second),
            "burst": rate.map(|rate| rate.burst),
            "quota": quota.map(|quota| quota.events),
            "quotaPeriod": quota.map(|quota| quota.period.as_str()),
        },
    })
}

/// Neither the key nor its hash is part of an [`ApiKey`].
pub(crate) fn key(key: &ApiKey) -> Value {
    json!({
        "id": key.id,
        "name": key.name,
        "scopes": key.scopes.iter().map(Scope::as_str).collect::<Vec<_>>(),
        "connectionId": key.connection,
        "expiresAt": key.expires_at,
        "revokedAt": key.revoked_at,
    })
}

pub(crate) fn connection(connection: &Connection) -> Value {
    let mut shown = json!({
        "id": connection.id,
        "name": connection.name,
        "kind": "publisher",
        "enabled": connection.enabled,
    });
    if let Some(reason) = &connection.disabled_reason {
        shown["disabledReason"] = json!(reason);
    }
    if let Target::Webhook(webhook) = &connection.target {
        let header = |(name, value): (&String, &String)| {
            (name.clone(), json!(if is_sensitive(name) { REDACTED } else { value }))
        };
        shown["kind"] = json!("webhook");
        shown["url"] = json!(url(&webhook.url));
        shown["headers"] = webhook.headers.iter().map(header).collect::<serde_json::Map<_, _>>().into();
        shown["timeoutMs"] = json!(u64::try_from(webhook.timeout.as_millis()).unwrap_or(u64::MAX));
        shown["contentMode"] = json!(webhook.content_mode);
        shown["finalStatuses"] = json!(webhook.final_statuses);
        if let Some(most) = webhook.limits.max_in_flight {
            shown["maxInFlight"] = json!(most);
        }
        if let Some(rate) = webhook.limits.rate {
            shown["ratePerSecond"] = json!(rate.per_second);
            shown["burst"] = json!(rate.burst());
        }
        if let Some((_, until)) = &webhook.previous_secret {
            shown["previousSecretUntil"] = json!(until);
        }
    }
    shown
}

/// Receivers are given tokens in the query, and often in the path, and records are kept for long: only where it goes is
/// shown.
fn url(url: &Url) -> String {
    let mut shown = url.clone();
    if shown.query().is_some() {
        shown.set_query(Some(REDACTED));
    }
    if shown.path() != "/" {
        shown.set_path(REDACTED);
    }
    // A webhook's URL has none; should one get into the table, it is a credential. Only a URL without a host refuses.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.into()
}

/// A connection before and after a change.
pub(crate) fn changed_connection(before: &Connection, after: &Connection) -> (Value, Value) {
    let mut now = connection(after);
    if let (Target::Webhook(was), Target::Webhook(is)) = (&before.target, &after.target) {
        also_changed(&mut now, hidden_changes(was, is));
    }
    (connection(before), now)
}

fn hidden_changes(before: &Webhook, after: &Webhook) -> Vec<String> {
    let mut changed = Vec::new();
    if before.secret != after.secret {
        changed.push("/secret".to_owned());
    }
    if before.url != after.url && url(&before.url) == url(&after.url) {
        changed.push("/url".to_owned());
    }
    let headers = before.headers.iter().filter(|(name, value)| {
        is_sensitive(name) && after.headers.get(*name).is_some_and(|new| new != *value)
    });
    changed.extend(headers.map(|(name, _)| format!("/headers/{}", name.replace('~', "~0"))));
    changed
}

fn also_changed(shown: &mut Value, pointers: Vec<String>) {
    if !pointers.is_empty() {
        shown["alsoChanged"] = json!(pointers);
    }
}

pub(crate) fn subscription(subscription: &Subscription) -> Value {
    json!({
        "id": subscription.id,
        "connectionId": subscription.connection,
        "eventType": subscription.event_type.as_str(),
        "publisher": subscription.publisher,
        "filter": subscription.filter.as_ref().map(ToString::to_string),
        "retryPolicy": subscription.rules.retry,
        "batch": subscription.rules.batch,
        "enabled": subscription.enabled,
    })
}

pub(crate) fn schedule(schedule: &Schedule) -> Value {
    let rules = &schedule.rules;
    let mut shown = json!({
        "id": schedule.id,
        "state": schedule.state.as_str(),
        "type": schedule.r#type,
        "source": schedule.source,
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "jitterMs": rules.jitter_ms,
        "missed": rules.missed.as_str(),
        "overlap": rules.overlap.as_str(),
    });
    if rules.missed == Missed::CatchUp {
        shown["catchUpLimit"] = json!(rules.catch_up_limit);
    }
    for (name, time) in [("startsAt", rules.starts_at), ("endsAt", rules.ends_at)] {
        if let Some(time) = time {
            shown[name] = json!(time);
        }
    }
    if let Some(publisher) = schedule.publisher {
        shown["publisher"] = json!(publisher);
    }
    shown
}

/// A schedule before and after a change; none if nothing that anybody asked for has changed.
pub(crate) fn changed_schedule(before: &Schedule, after: &Schedule) -> Option<(Value, Value)> {
    let (was, mut is) = (schedule(before), schedule(after));
    let event = before.template != after.template;
    if was == is && !event {
        return None;
    }
    also_changed(&mut is, if event { vec!["/event".to_owned()] } else { Vec::new() });
    Some((was, is))
}

/// A job, with what it is to be done to.
pub(crate) fn replay(replay: &NewReplay) -> Value {
    let mut shown = match &replay.selection {
        Selection::Event { event, subscription } => {
            json!({ "kind": "event", "eventUid": event, "subscriptionId": subscription })
        }
        Selection::Subscription { subscription, since, until } => {
            json!({ "kind": "subscription", "subscriptionId": subscription, "since": since, "until": until })
        }
        Selection::DeadLetters { action, which } => {
            let kind = match action {
                DeadLetterAction::Replay => "deadLetters",
                DeadLetterAction::Discard => "discard",
            };
            match which {
                DeadLetters::Ids(ids) => json!({ "kind": kind, "ids": ids }),
                DeadLetters::Filter(filter) => json!({ "kind": kind, "filter": dead_letters(filter) }),
            }
        }
    };
    shown["perSecond"] = json!(replay.per_second);
    shown["onlyConnectionId"] = json!(replay.whose.only);
    shown
}

fn dead_letters(filter: &DeadLetterFilter) -> Value {
    json!({
        "connectionId": filter.connection,
        "subscriptionId": filter.subscription,
        "type": filter.event_type.as_ref().map(|pattern| pattern.as_str()),
        "reason": filter.reason,
        "since": filter.since,
        "until": filter.until,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_url_is_shown_without_credentials() {
        let shown = |text: &str| url(&Url::parse(text).unwrap());
        assert_eq!(shown("https://a.example:8443"), "https://a.example:8443/");
        assert_eq!(shown("https://a.example/services/abc"), "https://a.example/***");
        assert_eq!(shown("https://a.example/hook?token=abc"), "https://a.example/***?***");
        assert_eq!(shown("https://me:pw@a.example/hook"), "https://a.example/***");
    }
}
