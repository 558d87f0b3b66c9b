#![allow(clippy::unwrap_used)]

use http::HeaderValue;
use proptest::prelude::*;

use super::*;

const EVENT: &[u8] = br#"{"specversion":"1.0","source":"/s","type":"t","data":{"id":"inner"},"id":"e-1"}"#;
const OTHER: &[u8] = br#"{"specversion":"1.0","id":"e\u002d2","source":"/s","type":"t"}"#;

fn at() -> Timestamp {
    "1994-11-06T08:49:30.5Z".parse().unwrap()
}

fn read(status: u16, headers: &[(HeaderName, &str)], body: Option<&[u8]>) -> Answer {
    let headers =
        headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect();
    Answer::read(&HttpAnswer { status, headers: &headers, body, at: at() })
}

fn says(body: &str) -> Outcome {
    read(200, &[], Some(body.as_bytes())).about(EVENT).clone()
}

fn reported(error: &str) -> Outcome {
    Failure::Reported(error.into()).into()
}

fn later(millis: u64) -> Outcome {
    let why = "the subscriber asked to be called later".into();
    Outcome::Deferred { wait: Duration::from_millis(millis), why }
}

#[test]
fn an_unrelated_body_is_success() {
    for body in [
        "",
        "ok",
        "null",
        "[]",
        "[{\"success\":false}]",
        "{}",
        "\"error\"",
        "{\"success\":false",
        "{\"success\":false} and more",
        "{\"ok\":false,\"errors\":[\"x\"]}",
        // Of the wrong type, or blank.
        r#"{"success":"false"}"#,
        r#"{"success":null,"error":null,"retryAfter":null,"results":null}"#,
        r#"{"success":0,"error":{"code":7},"retryAfter":"5000","results":[1]}"#,
        r#"{"retryAfter":-1}"#,
        r#"{"error":""}"#,
        r#"{"error":" \u0000 "}"#,
    ] {
        assert_eq!(says(body), Outcome::Delivered, "{body}");
    }
    assert_eq!(*read(200, &[], None).about(EVENT), Outcome::Delivered);
    assert_eq!(*read(200, &[], Some(b"{\"error\":\"\xff\"}")).about(EVENT), Outcome::Delivered);
    let deep = format!(r#"{{"x":{}{},"success":false}}"#, "[".repeat(5_000), "]".repeat(5_000));
    assert_eq!(says(&deep), reported("no reason given"), "what is unrelated may be deep");
}

#[test]
fn success_wins_over_retry_after_and_that_over_failure() {
    for (body, outcome) in [
        (r#"{"success":true,"retryAfter":5,"error":"x"}"#, Outcome::Delivered),
        (r#"{"success":false,"retryAfter":5}"#, later(5)),
        (r#"{"retryAfter":0}"#, later(0)),
        (
            r#"{"retryAfter":1500.5}"#,
            Outcome::Deferred {
                wait: Duration::from_micros(1_500_500),
                why: "the subscriber asked to be called later".into(),
            },
        ),
        (
            r#"{"retryAfter":1e300}"#,
            Outcome::Deferred { wait: Duration::MAX, why: "the subscriber asked to be called later".into() },
        ),
        (
            r#"{"retryAfter":5,"error":"busy"}"#,
            Outcome::Deferred {
                wait: Duration::from_millis(5),
                why: "the subscriber asked to be called later: busy".into(),
            },
        ),
        (r#"{"success":false,"error":"no stock"}"#, reported("no stock")),
        (r#"{"error":"no stock"}"#, reported("no stock")),
        (r#"{"success":false}"#, reported("no reason given")),
        (r#"{"success":false,"error":{"code":1}}"#, reported("no reason given")),
        (r#"{"success":true,"success":false}"#, reported("no reason given")),
    ] {
        assert_eq!(says(body), outcome, "{body}");
    }
}

#[test]
fn results_are_mapped_by_the_id_of_the_event() {
    let answer = read(
        207,
        &[],
        Some(
            br#"{"error":"outer","results":{"e-1":{"success":true},"inner":{"error":"x"},"e-3":{"retryAfter":9}}}"#,
        ),
    );
    assert_eq!(*answer.about(EVENT), Outcome::Delivered);
    assert_eq!(*answer.about(OTHER), reported("outer"), "what is not listed takes the outer members");
    assert_eq!(*answer.about(br#"{"id":"e-3"}"#), later(9));
    assert_eq!(*answer.about(b"no event"), reported("outer"));
}

#[test]
fn a_listed_event_takes_nothing_from_the_outer_members() {
    for (body, outcome) in [
        (r#"{"success":false,"results":{"e-1":{}}}"#, Outcome::Delivered),
        (r#"{"success":true,"results":{"e-1":{"success":false}}}"#, reported("no reason given")),
        // No object: as if it were not listed.
        (r#"{"error":"outer","results":{"e-1":"ok"}}"#, reported("outer")),
        (r#"{"error":"outer","results":{"e-1":null}}"#, reported("outer")),
    ] {
        assert_eq!(says(body), outcome, "{body}");
    }
    let escaped = read(200, &[], Some(br#"{"results":{"\u0065-2":{"error":"x"}}}"#));
    assert_eq!(*escaped.about(OTHER), reported("x"));
}

#[test]
fn only_the_start_of_an_error_is_kept_and_no_control_characters() {
    assert_eq!(says(r#"{"error":"a\u0000b\r\nc\t"}"#), reported("a b  c"));
    let body = format!(r#"{{"error":"{}"}}"#, "ö".repeat(MAX_ERROR));
    assert_eq!(says(&body), reported(&"ö".repeat(MAX_ERROR / 2)));
    let odd = format!(r#"{{"error":"x{}"}}"#, "ö".repeat(MAX_ERROR));
    assert_eq!(says(&odd), reported(&format!("x{}", "ö".repeat(MAX_ERROR / 2 - 1))));
}

#[test]
fn the_body_of_another_status_says_nothing() {
    for body in [r#"{"success":true}"#, r#"{"retryAfter":5}"#, r#"{"error":"x"}"#] {
        for status in [199, 300, 404, 429, 500, 503] {
            let answer = read(status, &[], Some(body.as_bytes()));
            assert_eq!(*answer.about(EVENT), Failure::Status(status).into());
        }
    }
}

#[test]
fn retry_after_is_read_in_every_form() {
    const LATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    for (value, date, seconds) in [
        ("120", None, Some(120.0)),
        (" 0 ", None, Some(0.0)),
        // Relative to the time of the attempt, 08:49:30.5,
        (LATE, None, Some(6.5)),
        ("Sunday, 06-Nov-94 08:49:37 GMT", None, Some(6.5)),
        ("Sun Nov  6 08:49:37 1994", None, Some(6.5)),
        // or to the endpoint's own clock.
        (LATE, Some("Sun, 06 Nov 1994 08:49:30 GMT"), Some(7.0)),
        (LATE, Some("Sun, 06 Nov 1994 08:48:37 GMT"), Some(60.0)),
        (LATE, Some("yesterday"), Some(6.5)),
        ("Sun, 06 Nov 1994 08:00:00 GMT", None, Some(0.0)),
        ("", None, None),
        ("-1", None, None),
        ("1.5", None, None),
        ("soon", None, None),
        ("1994-11-06T08:49:37Z", None, None),
    ] {
        let mut headers = vec![(RETRY_AFTER, value)];
        headers.extend(date.map(|date| (DATE, date)));
        let wait = seconds.map(Duration::from_secs_f64);
        assert_eq!(
            *read(500, &headers, None).about(EVENT),
            Outcome::Failed { failure: Failure::Status(500), not_before: wait },
            "{value} {date:?}"
        );
        let limited = read(429, &headers, None).about(EVENT).clone();
        match wait {
            Some(expected) => assert!(matches!(limited, Outcome::Deferred { wait, .. } if wait == expected)),
            None => assert_eq!(limited, Failure::Status(429).into()),
        }
    }
    for value in ["18446744073709551616", "Fri, 31 Dec 9999 23:59:59 GMT"] {
        let outcome = read(503, &[(RETRY_AFTER, value)], None).about(EVENT).clone();
        assert!(matches!(outcome, Outcome::Deferred { wait, .. } if wait > Duration::from_hours(24 * 365)));
    }
    assert_eq!(*read(200, &[(RETRY_AFTER, "5")], None).about(EVENT), Outcome::Delivered);
}

proptest! {
    #[test]
    fn no_answer_panics(status: u16, value in "\\PC*", date in "\\PC*", body: Vec<u8>, cut: bool) {
        let headers = [(RETRY_AFTER, value), (DATE, date)];
        let headers = headers.into_iter().filter_map(|(name, value)| Some((name, value.parse().ok()?)));
        let headers: HeaderMap = headers.collect();
        let http = HttpAnswer { status, headers: &headers, body: (!cut).then_some(&body), at: at() };
        Answer::read(&http).about(&body);
    }

    #[test]
    fn no_json_answer_panics(
        success in "(true|false|null|1)", after: f64, error in "\\PC*", id in "\\PC{0,3}", listed: bool,
    ) {
        let mut body = serde_json::json!({"retryAfter": after, "error": error});
        body["success"] = serde_json::from_str(&success).unwrap();
        if listed {
            body = serde_json::json!({"results": {&id: body}});
        }
        let event = serde_json::json!({"id": id}).to_string();
        let outcome = read(200, &[], Some(body.to_string().as_bytes())).about(event.as_bytes()).clone();
        prop_assert_eq!(outcome == Outcome::Delivered, success == "true"
            || (success != "false" && (after.is_nan() || after < 0.0) && kept(&error).is_empty()));
    }
}
