//! What an event in plain JSON says about its recurrence.

use jiff::Timestamp;
use serde_json::value::RawValue;

use super::{
    attributes::timestamp,
    error::{EventError, EventErrorKind},
};
use crate::schedule::{MAX_CRON_BYTES, Missed, Overlap, Rules};

/// The members that mean something beside `cron`. Those in camel case cannot be extension attributes, so that without
/// `cron` they are a mistake; the others can.
const MEMBERS: [&str; 8] =
    ["cron", "timezone", "startsAt", "endsAt", "jitterMs", "missed", "catchUpLimit", "overlap"];

/// The longest text of `cron` and `timezone`, bytes.
const MAX_TEXT: usize = MAX_CRON_BYTES;

/// How an event recurs, as a request says it. Whether the expression and the zone are any good is for
/// [`Recurrence`](crate::schedule::Recurrence) to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleDraft {
    /// The cron expression.
    pub cron: String,
    /// The IANA time zone; `UTC` if the request has none.
    pub timezone: String,
    /// All else, with the defaults filled in.
    pub rules: Rules,
}

/// Takes what is about recurrence out of the members of an event.
pub(super) fn take(members: &mut Vec<(String, &RawValue)>) -> Result<Option<ScheduleDraft>, EventError> {
    let find = |name: &str| {
        let mut found = members.iter().filter(|(member, value)| member == name && value.get() != "null");
        let value = found.next().map(|(_, value)| *value);
        match found.next() {
            Some(_) => {
                let detail = format!("`{name}` is there twice; leave one of them out");
                Err(EventError::attribute(detail).at_member(name))
            }
            None => Ok(value),
        }
    };
    let Some(cron) = find("cron")? else {
        for name in MEMBERS.into_iter().filter(|name| name.bytes().any(|byte| byte.is_ascii_uppercase())) {
            if find(name)?.is_some() {
                let detail = format!("`{name}` is about events that recur: give `cron` too, or leave it out");
                return Err(EventError::attribute(detail).at_member(name));
            }
        }
        return Ok(None);
    };
    let defaults = Rules::DEFAULT;
    let missed =
        find("missed")?.map(|value| word(value, "missed", Missed::ALL, Missed::as_str)).transpose()?;
    let limit = find("catchUpLimit")?;
    if limit.is_some() && missed != Some(Missed::CatchUp) {
        let detail = "`catchUpLimit` belongs to `\"missed\": \"catch_up\"`";
        return Err(EventError::attribute(detail).at_member("catchUpLimit"));
    }
    let number = |value: Option<&RawValue>, name, least, most| {
        value.map(|value| integer(value, name, least, most)).transpose()
    };
    let draft = ScheduleDraft {
        cron: text(cron, "cron")?,
        timezone: find("timezone")?.map_or(Ok("UTC".into()), |value| text(value, "timezone"))?,
        rules: Rules {
            starts_at: find("startsAt")?.map(|value| time(value, "startsAt")).transpose()?,
            ends_at: find("endsAt")?.map(|value| time(value, "endsAt")).transpose()?,
            jitter_ms: number(find("jitterMs")?, "jitterMs", 0, Rules::MAX_JITTER_MS)?
                .unwrap_or(defaults.jitter_ms),
            missed: missed.unwrap_or(defaults.missed),
            catch_up_limit: number(limit, "catchUpLimit", 1, Rules::MAX_CATCH_UP)?
                .unwrap_or(defaults.catch_up_limit),
            overlap: find("overlap")?
                .map(|value| word(value, "overlap", Overlap::ALL, Overlap::as_str))
                .transpose()?
                .unwrap_or(defaults.overlap),
        },
    };
    if let (Some(start), Some(end)) = (draft.rules.starts_at, draft.rules.ends_at)
        && end < start
    {
        return Err(EventError::attribute("`endsAt` must not be before `startsAt`").at_member("endsAt"));
    }
    members.retain(|(name, _)| !MEMBERS.contains(&name.as_str()));
    Ok(Some(draft))
}

/// The answer where an event cannot recur.
pub(super) fn refused(detail: &str) -> EventError {
    EventError::new(EventErrorKind::NotSupported, detail)
}

fn text(value: &RawValue, name: &str) -> Result<String, EventError> {
    let text: String = serde_json::from_str(value.get())
        .map_err(|_| EventError::attribute(format!("`{name}` must be a string")).at_member(name))?;
    if text.len() > MAX_TEXT {
        let detail = format!("`{name}` must have at most {MAX_TEXT} bytes");
        return Err(EventError::attribute(detail).at_member(name));
    }
    Ok(text)
}

fn time(value: &RawValue, name: &str) -> Result<Timestamp, EventError> {
    timestamp(&text(value, name)?).ok_or_else(|| {
        let detail = format!("`{name}` must be a time as in RFC 3339, like 2026-01-31T09:30:00Z");
        EventError::attribute(detail).at_member(name)
    })
}

fn integer(value: &RawValue, name: &str, least: u32, most: u32) -> Result<u32, EventError> {
    serde_json::from_str(value.get()).ok().filter(|number| (least..=most).contains(number)).ok_or_else(|| {
        EventError::attribute(format!("`{name}` must be a whole number between {least} and {most}"))
            .at_member(name)
    })
}

fn word<T: Copy>(
    value: &RawValue,
    name: &str,
    all: &[T],
    as_str: fn(T) -> &'static str,
) -> Result<T, EventError> {
    let word: Option<String> = serde_json::from_str(value.get()).ok();
    all.iter().copied().find(|one| word.as_deref() == Some(as_str(*one))).ok_or_else(|| {
        let known: Vec<String> = all.iter().map(|one| format!("\"{}\"", as_str(*one))).collect();
        EventError::attribute(format!("`{name}` must be one of {}", known.join(", "))).at_member(name)
    })
}
