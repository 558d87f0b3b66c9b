//! `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07).

use http::HeaderMap;
use sha2::{Digest as _, Sha256};

use crate::{
    api::{
        extract::media_type,
        problem::{FieldError, Problem, ProblemType},
    },
    ingest::Idempotency,
};

const NAME: &str = "idempotency-key";

/// The longest key, characters.
const MAX_KEY: usize = 255;

/// The idempotency key of a request to publish, if it has one, with the body's fingerprint.
pub(super) fn read_idempotency(headers: &HeaderMap, body: &[u8]) -> Result<Option<Idempotency>, Problem> {
    let key = read_key(headers)?;
    if key.is_some() && !is_plain_json(headers) {
        return Err(refused(
            "a CloudEvent is deduplicated by its source and id; send no Idempotency-Key with it",
        ));
    }
    Ok(key.map(|key| Idempotency { key, fingerprint: Sha256::digest(body).into() }))
}

/// The request's idempotency key, if it has one.
pub(in crate::api) fn read_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(NAME).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(refused("send one Idempotency-Key"));
    }
    let key = value.to_str().ok().and_then(parse).ok_or_else(|| {
        refused("an Idempotency-Key is a quoted string, or a token, of 1 to 255 printable ASCII characters")
    })?;
    Ok(Some(key))
}

/// The answer to a key with an event that recurs.
pub(in crate::api) fn unwanted_key() -> Problem {
    refused(
        "a schedule is told apart by its type, source, cron and timezone; send no Idempotency-Key with it",
    )
}

fn refused(detail: &str) -> Problem {
    Problem {
        errors: vec![FieldError::header(NAME, detail)],
        ..Problem::new(ProblemType::InvalidIdempotencyKey, detail)
    }
}

/// Neither structured nor batch nor binary mode (CloudEvents HTTP binding §3).
fn is_plain_json(headers: &HeaderMap) -> bool {
    !media_type(headers).starts_with("application/cloudevents")
        && !headers.keys().any(|name| name.as_str().starts_with("ce-"))
}

/// A string of structured fields (RFC 9651 §3.3.3), or what many clients send: the key itself.
fn parse(text: &str) -> Option<String> {
    let text = text.trim();
    let key = match text.strip_prefix('"') {
        Some(rest) => unquote(rest)?,
        None => text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"').then(|| text.to_owned())?,
    };
    (1..=MAX_KEY).contains(&key.len()).then_some(key)
}

/// The string whose opening quote has been read, which must end with the text.
fn unquote(rest: &str) -> Option<String> {
    let mut key = String::with_capacity(rest.len());
    let mut chars = rest.chars();
    loop {
        match chars.next()? {
            '"' => return chars.next().is_none().then_some(key),
            '\\' => key.push(chars.next().filter(|char| matches!(char, '"' | '\\'))?),
            char @ ' '..='~' => key.push(char),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_and_bare_keys_are_the_same_key() {
        assert_eq!(parse("8e03978e-40d5"), Some("8e03978e-40d5".to_owned()));
        assert_eq!(parse("\"8e03978e-40d5\""), Some("8e03978e-40d5".to_owned()));
        assert_eq!(parse(r#""a \"b\" \\c""#), Some(r#"a "b" \c"#.to_owned()));
        assert_eq!(parse(&"k".repeat(255)).map(|key| key.len()), Some(255));
        for bad in [
            "",
            "\"\"",
            "\"a",
            "a\"",
            "\"a\"b",
            "\"a\";x=1",
            r#""a\n""#,
            "a b",
            "\"é\"",
            "é",
            &"k".repeat(256),
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
