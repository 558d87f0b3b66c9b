//! What a webhook connection may ask for: the rules that the HTTP API checks and the sink relies on.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use http::HeaderName;

/// The shortest timeout of a connection.
pub const MIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The longest timeout of a connection (Standard Webhooks, "Timeouts": 15–30 s).
pub const MAX_TIMEOUT: Duration = Duration::from_secs(30);

/// The most headers of its own that a connection may have.
pub const MAX_HEADERS: usize = 32;

/// The most bytes that a connection's own headers may have, names and values together.
pub const MAX_HEADER_BYTES: usize = 8 * 1024;

/// The HTTP statuses that a connection may declare final: what is neither an interim answer nor success.
pub const FINAL_STATUSES: RangeInclusive<u16> = 300..=599;

/// The most statuses that a connection may declare final.
pub const MAX_FINAL_STATUSES: usize = 50;

/// Frame the message or manage the connection (RFC 9110 §7.6.1, RFC 9112 §6), describe the body, or ask
/// for an encoding that the bus does not decode. The bus sets them, or nobody does.
const RESERVED_HEADERS: [&str; 14] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Standard Webhooks and CloudEvents binary mode.
const RESERVED_PREFIXES: [&str; 2] = ["webhook-", "ce-"];

/// Stands for a value that is not shown.
pub const REDACTED: &str = "***";

/// A header whose name contains one of these carries a credential, as far as can be told.
const SENSITIVE: [&str; 8] =
    ["auth", "cookie", "credential", "key", "password", "secret", "signature", "token"];

/// Whether the value of a connection's header of that name is shown to nobody.
pub fn is_sensitive(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SENSITIVE.iter().any(|part| name.contains(part))
}

/// Why a connection's own headers were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeadersRefused {
    /// More than [`MAX_HEADERS`].
    #[error("there must be at most {MAX_HEADERS} headers")]
    TooMany,
    /// More than [`MAX_HEADER_BYTES`].
    #[error("the headers must have at most {MAX_HEADER_BYTES} bytes, names and values together")]
    TooLong,
    /// Not a token (RFC 9110 §5.1).
    #[error("{0:?} is not a header name")]
    Name(String),
    /// Other than printable ASCII, space and tab.
    #[error("the value of {0} must be printable ASCII")]
    Value(String),
    /// See [`forbidden_header`].
    #[error("the bus sets {0} itself")]
    Forbidden(String),
    /// The same name in different case.
    #[error("{0} is given twice")]
    Repeated(String),
}

/// Why a connection's final statuses were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FinalStatusesRefused {
    /// More than [`MAX_FINAL_STATUSES`].
    #[error("there must be at most {MAX_FINAL_STATUSES} final statuses")]
    TooMany,
    /// The one at this index is not one of [`FINAL_STATUSES`].
    #[error("a final status must be from {} to {}", FINAL_STATUSES.start(), FINAL_STATUSES.end())]
    OutOfRange(usize),
    /// The one at this index was there before.
    #[error("this status is given twice")]
    Repeated(usize),
}

/// Whether `name` (in any case) is the bus's to set, and never a connection's. An underscore counts as a
/// hyphen: to a CGI or WSGI subscriber `webhook_id` and `webhook-id` are the same (RFC 3875 §4.1.18).
pub fn forbidden_header(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('_', "-");
    RESERVED_HEADERS.contains(&name.as_str())
        || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Checks the headers that a connection wants to send besides the bus's own.
///
/// # Errors
/// The first rule that they break. No error shows a value: it may be a credential.
pub fn check_headers(headers: &BTreeMap<String, String>) -> Result<(), HeadersRefused> {
    if headers.len() > MAX_HEADERS {
        return Err(HeadersRefused::TooMany);
    }
    if headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > MAX_HEADER_BYTES {
        return Err(HeadersRefused::TooLong);
    }
    let mut seen = Vec::with_capacity(headers.len());
    for (name, value) in headers {
        let parsed =
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| HeadersRefused::Name(name.clone()))?;
        if forbidden_header(name) {
            return Err(HeadersRefused::Forbidden(name.clone()));
        }
        // Bytes above ASCII could be sent, but mean nothing that is agreed on (RFC 9110 §5.5).
        if !value.bytes().all(|byte| byte == b'\t' || matches!(byte, b' '..=b'~')) {
            return Err(HeadersRefused::Value(name.clone()));
        }
        if seen.contains(&parsed) {
            return Err(HeadersRefused::Repeated(name.clone()));
        }
        seen.push(parsed);
    }
    Ok(())
}

/// Checks the statuses that a connection wants to be final.
///
/// # Errors
/// The first rule that they break.
pub fn check_final_statuses(statuses: &[u16]) -> Result<(), FinalStatusesRefused> {
    if statuses.len() > MAX_FINAL_STATUSES {
        return Err(FinalStatusesRefused::TooMany);
    }
    for (index, status) in statuses.iter().enumerate() {
        if !FINAL_STATUSES.contains(status) {
            return Err(FinalStatusesRefused::OutOfRange(index));
        }
        if statuses[..index].contains(status) {
            return Err(FinalStatusesRefused::Repeated(index));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(headers: &[(&str, &str)]) -> Result<(), HeadersRefused> {
        check_headers(&headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    #[test]
    fn headers_that_may_carry_credentials_are_hidden() {
        for name in
            ["authorization", "Proxy-Authorization", "cookie", "x-api-key", "X-Auth-Token", "x-hub-signature"]
        {
            assert!(is_sensitive(name), "{name}");
        }
        for name in ["user-agent", "x-environment", "accept"] {
            assert!(!is_sensitive(name), "{name}");
        }
    }

    #[test]
    fn what_the_bus_sets_is_forbidden_in_any_spelling() {
        for name in [
            "webhook-id",
            "Webhook-Signature",
            "WEBHOOK_TIMESTAMP",
            "webhook-anything",
            "ce-id",
            "CE-Specversion",
            "Content-Type",
            "content_length",
            "Host",
            "Transfer-Encoding",
            "connection",
            "Upgrade",
            "Accept-Encoding",
        ] {
            assert!(forbidden_header(name), "{name}");
        }
        for name in ["authorization", "X-Webhook-Id", "user-agent", "accept", "cookie", "cell", "webhook"] {
            assert!(!forbidden_header(name), "{name}");
        }
    }

    #[test]
    fn final_statuses_are_few_distinct_and_no_success() {
        let most: Vec<u16> = (400..450).collect();
        for fine in [&[][..], &[300, 599], &most] {
            assert_eq!(check_final_statuses(fine), Ok(()));
        }
        assert_eq!(check_final_statuses(&[404, 299]), Err(FinalStatusesRefused::OutOfRange(1)));
        assert_eq!(check_final_statuses(&[600]), Err(FinalStatusesRefused::OutOfRange(0)));
        assert_eq!(check_final_statuses(&[404, 410, 404]), Err(FinalStatusesRefused::Repeated(2)));
        let many: Vec<u16> = (400..451).collect();
        assert_eq!(check_final_statuses(&many), Err(FinalStatusesRefused::TooMany));
    }

    #[test]
    fn ordinary_headers_pass() {
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[("Authorization", "Bearer a b\tc"), ("x-empty", "")]), Ok(()));
    }

    #[test]
    fn the_first_broken_rule_is_named() {
        assert_eq!(check(&[("a b", "x")]), Err(HeadersRefused::Name("a b".into())));
        assert_eq!(check(&[("", "x")]), Err(HeadersRefused::Name(String::new())));
        assert_eq!(check(&[("x-a\r\nhost", "x")]), Err(HeadersRefused::Name("x-a\r\nhost".into())));
        assert_eq!(check(&[("x-a", "x\r\nhost: y")]), Err(HeadersRefused::Value("x-a".into())));
        assert_eq!(check(&[("x-a", "ä")]), Err(HeadersRefused::Value("x-a".into())));
        assert_eq!(check(&[("Host", "x")]), Err(HeadersRefused::Forbidden("Host".into())));
        assert_eq!(check(&[("X-A", "1"), ("x-a", "2")]), Err(HeadersRefused::Repeated("x-a".into())));
    }

    #[test]
    fn the_limits_are_exact() {
        let many = |count| (0..count).map(|n| (format!("x-{n}"), String::new())).collect::<BTreeMap<_, _>>();
        assert_eq!(check_headers(&many(MAX_HEADERS)), Ok(()));
        assert_eq!(check_headers(&many(MAX_HEADERS + 1)), Err(HeadersRefused::TooMany));
        let longest = "v".repeat(MAX_HEADER_BYTES - 3);
        assert_eq!(check(&[("x-a", &longest)]), Ok(()));
        assert_eq!(check(&[("x-ab", &longest)]), Err(HeadersRefused::TooLong));
    }
}
