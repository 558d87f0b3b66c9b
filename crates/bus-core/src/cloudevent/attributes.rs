//! The rules for context attributes (CloudEvents 1.0.2, "Context Attributes" and "Type System").

use jiff::Timestamp;

use super::{
    Draft, ExtensionValue, MAX_ATTRIBUTE_BYTES, MAX_EXTENSIONS,
    error::{EventError, shortened},
    media_type::MediaType,
    recurring,
};

/// The extension attribute that says when an event is to be delivered.
pub(super) const DELIVER_AT: &str = "deliverat";
/// Extensions are named by `^[a-z0-9]{1,20}$` ("Naming Conventions").
const MAX_NAME: usize = 20;

/// Collects the attributes of one event. Names come in the case of their source.
#[derive(Debug, Default)]
pub(super) struct Attributes {
    draft: Draft,
    has_type: bool,
    bytes: usize,
    deliver_before: Option<Timestamp>,
}

impl Attributes {
    /// None yet; for the bound see [`Limits`](super::Limits).
    pub(super) fn new(deliver_before: Option<Timestamp>) -> Self {
        Self { deliver_before, ..Self::default() }
    }

    /// Takes one attribute other than `specversion`.
    pub(super) fn set(&mut self, name: &str, value: ExtensionValue) -> Result<(), EventError> {
        self.bytes = self.bytes.saturating_add(name.len()).saturating_add(value.len());
        if self.bytes > MAX_ATTRIBUTE_BYTES {
            return Err(EventError::attribute(format!(
                "the names and values of all attributes together have at most {MAX_ATTRIBUTE_BYTES} bytes; \
                 move what is large into the payload"
            )));
        }
        let draft = &mut self.draft;
        match name {
            "id" => draft.id = Some(text(name, value, 255)?),
            "source" => draft.source = Some(uri_reference(name, value)?),
            "type" => {
                draft.r#type = text(name, value, 255)?;
                self.has_type = true;
            }
            "subject" => draft.subject = Some(text(name, value, 1024)?),
            "time" => draft.time = Some(time(name, value)?),
            "datacontenttype" => draft.datacontenttype = Some(content_type(name, value)?),
            "dataschema" => draft.dataschema = Some(uri_reference(name, value)?),
            _ => {
                check_name(name)?;
                if let ExtensionValue::String(text) = &value {
                    check_characters(name, text)?;
                }
                if draft.extensions.len() == MAX_EXTENSIONS {
                    return Err(EventError::attribute(format!(
                        "an event has at most {MAX_EXTENSIONS} extension attributes; move the others into the payload"
                    )));
                }
                if name == DELIVER_AT {
                    let at = time(name, value.clone())?;
                    if let Some(bound) = self.deliver_before.filter(|bound| at >= *bound) {
                        return Err(EventError::attribute(format!(
                            "an event cannot wait so long: its time must be before {bound}; publish it later"
                        )));
                    }
                    draft.deliver_at = Some(at);
                }
                if name == "cron" {
                    return Err(recurring::refused(
                        "an event that recurs is published as plain JSON (application/json), with `cron` beside `type`",
                    ));
                }
                if draft.extensions.insert(name.to_owned(), value).is_some() {
                    return Err(EventError::attribute(format!(
                        "`{name}` is there twice; leave one of them out"
                    )));
                }
            }
        }
        Ok(())
    }

    pub(super) fn datacontenttype(&self) -> Option<&str> {
        self.draft.datacontenttype.as_deref()
    }

    /// The event without its payload, or the name of the required attribute that is missing: always
    /// `type`, and if it must be `complete` also `id` and `source`.
    pub(super) fn finish(self, complete: bool) -> Result<Draft, &'static str> {
        if !self.has_type {
            return Err("type");
        }
        if complete && self.draft.id.is_none() {
            return Err("id");
        }
        if complete && self.draft.source.is_none() {
            return Err("source");
        }
        Ok(self.draft)
    }
}

/// Checks the one version of CloudEvents there is.
pub(super) fn check_specversion(version: &str) -> Result<(), EventError> {
    if version == "1.0" {
        return Ok(());
    }
    Err(EventError::attribute(
        "`specversion` must be \"1.0\", the version of CloudEvents that is spoken here",
    ))
}

fn string(name: &str, value: ExtensionValue) -> Result<String, EventError> {
    match value {
        ExtensionValue::String(text) => Ok(text),
        ExtensionValue::Bool(_) | ExtensionValue::Integer(_) => {
            Err(EventError::attribute(format!("`{name}` must be a string")))
        }
    }
}

/// A string that is not empty, has at most `most` characters, and none that CloudEvents forbids.
fn text(name: &str, value: ExtensionValue, most: usize) -> Result<String, EventError> {
    let text = string(name, value)?;
    if text.is_empty() {
        return Err(EventError::attribute(format!("`{name}` must not be empty; leave out what is optional")));
    }
    if text.chars().nth(most).is_some() {
        return Err(EventError::attribute(format!("`{name}` must have at most {most} characters")));
    }
    check_characters(name, &text)?;
    Ok(text)
}

/// "Type System", String: no control characters and no noncharacters. Lone surrogates are no `char`.
fn check_characters(name: &str, text: &str) -> Result<(), EventError> {
    let noncharacter = |character: char| {
        matches!(u32::from(character), 0xFDD0..=0xFDEF) || u32::from(character) & 0xFFFE == 0xFFFE
    };
    if text.chars().any(|character| character.is_control() || noncharacter(character)) {
        return Err(EventError::attribute(format!(
            "`{}` must not contain control characters or Unicode noncharacters",
            shortened(name)
        )));
    }
    Ok(())
}

/// A URI-reference (RFC 3986 §4.1), checked only for characters that no such thing has: blanks and
/// `<>"{}|\^` and backtick. Others outside of ASCII are let through, as in an IRI.
fn uri_reference(name: &str, value: ExtensionValue) -> Result<String, EventError> {
    let text = text(name, value, 1024)?;
    if text.chars().any(|character| character.is_whitespace() || "<>\"{}|\\^`".contains(character)) {
        return Err(EventError::attribute(format!(
            "`{name}` must be a URI or a path, without blanks and the characters <>\"{{}}|\\^`; percent-encode them"
        )));
    }
    Ok(text)
}

fn content_type(name: &str, value: ExtensionValue) -> Result<String, EventError> {
    let text = text(name, value, 255)?;
    if MediaType::parse(&text).is_none() {
        return Err(EventError::attribute(format!("`{name}` must be a media type, like application/json")));
    }
    Ok(text)
}

fn time(name: &str, value: ExtensionValue) -> Result<Timestamp, EventError> {
    timestamp(&string(name, value)?).ok_or_else(|| {
        EventError::attribute(format!(
            "`{name}` must be a time as in RFC 3339, like 2026-01-31T09:30:00.5Z or 2026-01-31T10:30:00+01:00"
        ))
    })
}

/// Reads a time of RFC 3339 §5.6. The `jiff` crate reads further forms, hence the look at the shape.
pub(super) fn timestamp(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    let (date_time, rest) = bytes.split_at_checked(19)?;
    let shaped = date_time.iter().enumerate().all(|(at, byte)| match at {
        4 | 7 => *byte == b'-',
        10 => matches!(byte, b'T' | b't'),
        13 | 16 => *byte == b':',
        _ => byte.is_ascii_digit(),
    });
    let zone = match rest {
        [b'.', fraction @ ..] => {
            let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if digits == 0 {
                return None;
            }
            &fraction[digits..]
        }
        zone => zone,
    };
    let zoned = match zone {
        [b'Z' | b'z'] => true,
        [b'+' | b'-', h1, h2, b':', m1, m2] => [h1, h2, m1, m2].into_iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if !shaped || !zoned {
        return None;
    }
    // An offset may lead out of the four-digit years, which RFC 3339 could not write again.
    text.parse().ok().filter(|time| (YEAR_0..YEAR_10000).contains(&Timestamp::as_second(*time)))
}

/// 0000-01-01T00:00:00Z and 10000-01-01T00:00:00Z, in seconds since the Unix epoch.
const YEAR_0: i64 = -62_167_219_200;
const YEAR_10000: i64 = 253_402_300_800;

fn check_name(name: &str) -> Result<(), EventError> {
    if is_name(name) {
        return Ok(());
    }
    let lower: String = name.chars().filter(|character| !matches!(character, '_' | '-')).collect();
    let lower = lower.to_lowercase();
    let hint = if is_name(&lower) { format!("; did you mean `{lower}`?") } else { String::new() };
    Err(EventError::attribute(format!(
        "`{}` is no attribute: extension attributes have 1 to {MAX_NAME} characters out of a-z and 0-9, and \
         everything else belongs into `data`{hint}",
        shortened(name)
    )))
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn times_are_those_of_rfc_3339() {
        for (text, expected) in [
            ("2026-01-31T09:30:00Z", "2026-01-31T09:30:00Z"),
            ("2026-01-31t09:30:00.500z", "2026-01-31T09:30:00.5Z"),
            ("2026-01-31T09:30:00.123456789+01:30", "2026-01-31T08:00:00.123456789Z"),
            ("2026-01-31T09:30:00-00:00", "2026-01-31T09:30:00Z"),
            ("2016-12-31T23:59:60Z", "2016-12-31T23:59:59Z"),
            ("0000-01-01T00:00:00Z", "0000-01-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(text).map(|time| time.to_string()).as_deref(), Some(expected), "{text}");
        }
        for text in [
            "",
            "2026-01-31",
            "2026-01-31T09:30:00",
            "2026-01-31 09:30:00Z",
            "20260131T093000Z",
            "2026-01-31T09:30Z",
            "2026-01-31T09:30:00,5Z",
            "2026-01-31T09:30:00.Z",
            "2026-01-31T09:30:00+01",
            "2026-01-31T09:30:00+0100",
            "2026-01-31T09:30:00Z[UTC]",
            "2026-02-30T09:30:00Z",
            "2026-01-31T24:00:00Z",
            "0000-01-01T00:00:00+01:00",
            "2026-01-31T09:30:00.1234567891Z",
            "2026-01-31T09:30:0\u{e9}Z",
            "1769851800",
        ] {
            assert_eq!(timestamp(text), None, "{text}");
        }
    }
}
