//! Every parser that faces the outside, with input that nobody meant well: no panic, no work without bound, and an answer
//! that can be told. The inputs are sound ones that were damaged at random, since plain noise does not come past the first
//! character.
//!
//! `HOSTILE_CASES` says how many inputs each parser gets (2,000 if absent). A parser that does not come to an end makes the
//! test end by the time limit of the test runner.

use std::collections::BTreeMap;

use bus_core::{
    answer::{Answer, HttpAnswer},
    cloudevent::{CloudEvent, Limits, Submission, parse_http, to_batch},
    config::load_common,
    filter::PayloadFilter,
    notify::Hint,
    pattern::TypePattern,
    schedule::Recurrence,
    signature::SigningSecret,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use jiff::{SignedDuration, Timestamp};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::TestRunner,
};

/// The longest input, bytes: damage that repeats a piece grows it.
const LONGEST: usize = 64 * 1024;

fn cases() -> u32 {
    std::env::var("HOSTILE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2_000)
}

/// One kind of damage.
#[derive(Debug, Clone)]
enum Damage {
    /// Takes a piece out.
    Cut(Index, u8),
    /// Puts bytes in.
    Insert(Index, Vec<u8>),
    /// Repeats a piece many times: nesting, long tokens.
    Repeat(Index, u8, u16),
    /// Changes one byte.
    Flip(Index, u8),
    /// Leaves out what comes after.
    End(Index),
}

impl Damage {
    fn apply(&self, text: &mut Vec<u8>) {
        let place = |index: &Index, text: &[u8]| index.index(text.len() + 1);
        match self {
            Self::Cut(at, length) => {
                let from = place(at, text);
                let to = from.saturating_add(usize::from(*length)).min(text.len());
                text.drain(from..to);
            }
            Self::Insert(at, bytes) => {
                let from = place(at, text);
                text.splice(from..from, bytes.iter().copied());
            }
            Self::Repeat(at, length, times) => {
                let from = place(at, text);
                let to = from.saturating_add(usize::from(*length)).min(text.len());
                let piece = text[from..to].repeat(usize::from(*times));
                text.splice(from..from, piece);
            }
            Self::Flip(at, bits) => {
                let from = place(at, text);
                if let Some(byte) = text.get_mut(from) {
                    *byte ^= bits;
                }
            }
            Self::End(at) => text.truncate(place(at, text)),
        }
        text.truncate(LONGEST);
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let fragments = select(vec![
        &b"\""[..],
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"{",
        b"}",
        b"[",
        b"]",
        b"[[[[[[[[",
        b"{\"a\":",
        b":",
        b",",
        b".",
        b"..",
        b"*",
        b">",
        b"(",
        b")",
        b"((",
        b"?",
        b"@",
        b"$",
        b"&&",
        b"||",
        b"!",
        b"==",
        b"-",
        b"-1",
        b"0",
        b"1e999",
        b"99999999999999999999",
        b"\0",
        b"\r\n",
        b"\n",
        b" ",
        b"\xff\xfe",
        b"\xf0\x9f\x98\x80",
        b"\xe2\x80\xae",
        b"#",
        b"L",
        b"W",
        b"/",
        b"%",
        b"%ZZ",
        b"true",
        b"null",
        b";",
        b"=",
        b"60",
        b"*/0",
        b"data",
        b"id",
        b"specversion",
        b"retryAfter",
        b"results",
    ]);
    prop_oneof![
        2 => (any::<Index>(), 1..40u8).prop_map(|(at, length)| Damage::Cut(at, length)),
        4 => (any::<Index>(), fragments).prop_map(|(at, bytes)| Damage::Insert(at, bytes.to_vec())),
        1 => (any::<Index>(), vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        2 => (any::<Index>(), 1..12u8, 1..2_000u16).prop_map(|(at, length, times)| Damage::Repeat(at, length, times)),
        2 => (any::<Index>(), 1..=255u8).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        1 => any::<Index>().prop_map(Damage::End),
    ]
}

fn damaged(sound: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    (select(sound), vec(damage(), 0..6)).prop_map(|(sound, damages)| {
        let mut text = sound.as_bytes().to_vec();
        for damage in damages {
            damage.apply(&mut text);
        }
        text
    })
}

/// As most parsers take it.
fn damaged_text(sound: &'static [&'static str]) -> impl Strategy<Value = String> {
    damaged(sound).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn check<S: Strategy>(inputs: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config).run(&inputs, test).unwrap();
}

fn now() -> Timestamp {
    "2026-03-08T06:59:59Z".parse().unwrap()
}

const EVENTS: &[&str] = &[
    r#"{"specversion":"1.0","id":"1","source":"/shop","type":"order.created","time":"2026-01-01T00:00:00Z","data":{"total":12.50}}"#,
    r#"{"specversion":"1.0","id":"1","source":"/shop","type":"t","datacontenttype":"text/plain","data_base64":"aGk="}"#,
    r#"[{"specversion":"1.0","id":"1","source":"/s","type":"a"},{"specversion":"1.0","id":"2","source":"/s","type":"b"}]"#,
    r#"{"type":"order.created","data":{"a":[1,2,{"b":null}]},"deliverAt":"2026-03-09T00:00:00Z"}"#,
    r#"{"type":"tick","cron":"*/5 * * * *","timezone":"Europe/Berlin","missed":"all","data":1}"#,
];

#[test]
fn events_of_every_mode() {
    let header = (
        select(vec![
            "ce-id",
            "ce-source",
            "ce-type",
            "ce-specversion",
            "ce-time",
            "ce-data",
            "ce-x",
            "ce-deliverat",
            "content-type",
        ]),
        damaged(&[
            "1.0",
            "/shop",
            "a.b",
            "2026-01-01T00:00:00Z",
            "%E2%82%AC",
            "application/json; charset=utf-8",
        ]),
    );
    let content_type = select(vec![
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
        "application/json",
        "text/plain",
        "application/cloudevents+json; charset=\"utf-8\"",
        "application/json;;",
        "",
    ]);
    let limits = Limits { deliver_before: Some(now()), ..Limits::default() };
    check((content_type, vec(header, 0..6), damaged(EVENTS)), |(content_type, extra, body)| {
        let mut headers = HeaderMap::new();
        if !content_type.is_empty() {
            headers.insert("content-type", HeaderValue::from_static(content_type));
        }
        for (name, value) in extra {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                headers.append(HeaderName::from_static(name), value);
            }
        }
        match parse_http(&headers, &Bytes::from(body), &limits) {
            Ok(submission) => {
                let drafts = match submission {
                    Submission::Single(draft) => vec![draft],
                    Submission::Batch(drafts) => drafts,
                };
                for draft in drafts {
                    // What is accepted can be delivered, in each mode, and read again.
                    let event = draft.complete(|| "id".into(), || "/source".into(), now());
                    let structured = event.to_structured();
                    let again = CloudEvent::from_structured(&structured);
                    prop_assert!(again.is_ok(), "{structured:?}: {again:?}");
                    prop_assert_eq!(CloudEvent::id_of(&structured), Some(event.id.clone()));
                    let _ = event.to_binary();
                    let batch = to_batch([&structured[..]]);
                    prop_assert!(serde_json::from_slice::<serde_json::Value>(&batch).is_ok());
                }
            }
            Err(refused) => prop_assert!(!refused.to_string().is_empty()),
        }
        Ok(())
    });
}

#[test]
fn stored_events() {
    check(damaged(EVENTS), |body| {
        let _ = (CloudEvent::from_structured(&body).is_ok(), CloudEvent::id_of(&body));
        Ok(())
    });
}

#[test]
fn json_path_filters() {
    const FILTERS: &[&str] = &[
        "$.a.b[0]",
        "$..*",
        "$['a','b'][1:10:2]",
        "$[?@.total > 12.5 && @.state == 'paid']",
        "$[?count(@..*) > 1]",
        "$[?match(@.a, '(a|b)*c')]",
        "$[?search(@.name, '[a-z]{1,5}x?')]",
        "$[?!@.a]",
        "$[?length(value($..a)) == 3]",
        "$[?(@.a == $.b) || ((@.c))]",
        "$[-1]",
        "$[?@['\\u00e9'] != null]",
    ];
    const PAYLOADS: &[&str] = &[
        r#"{"a":{"b":[1,2,3]},"total":13,"state":"paid","name":"xyz"}"#,
        r#"[[[[[]]]],{"a":[{"a":[{"a":1}]}]}]"#,
        "null",
        r#"{"a":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","b":1e308}"#,
    ];
    check((damaged_text(FILTERS), damaged(PAYLOADS)), |(filter, payload)| {
        match (PayloadFilter::parse(&filter), serde_json::from_slice::<serde_json::Value>(&payload)) {
            (Ok(filter), Ok(payload)) => {
                let _ = filter.matches(&payload);
            }
            (Err(refused), _) => prop_assert!(!refused.to_string().is_empty()),
            _ => {}
        }
        Ok(())
    });
}

#[test]
fn type_patterns() {
    check(damaged_text(&["order.*.created", "a.>", ">", "*", "com.example.thing.v1"]), |pattern| {
        match TypePattern::parse(&pattern) {
            Ok(parsed) => {
                let _ = parsed.matches(&pattern);
            }
            Err(refused) => prop_assert!(!refused.to_string().is_empty()),
        }
        Ok(())
    });
}

#[test]
fn schedules() {
    const CRONS: &[&str] = &[
        "*/5 * * * *",
        "0 30 2 * * *",
        "0 0 31 2 *",
        "0 0 29 2 1#2",
        "0 0 L * *",
        "0 0 15W * *",
        "1-59/7 0-23 1,15 JAN-DEC MON-FRI",
        "@daily",
        "59 59 23 31 12 *",
        "0 0 * * 5L",
    ];
    const ZONES: &[&str] =
        &["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "Etc/GMT+12"];
    check((damaged_text(CRONS), damaged_text(ZONES)), |(cron, zone)| {
        let zones = [zone.as_str(), "America/New_York"];
        for zone in zones {
            match Recurrence::parse(&cron, zone) {
                Ok(recurrence) => {
                    let next = recurrence.next_after(now());
                    prop_assert!(next.is_none_or(|next| next > now()));
                    let last = recurrence.last_before(now());
                    prop_assert!(last.is_none_or(|last| last < now()));
                    let _ = recurrence.shortest_interval(now());
                    prop_assert!(recurrence.ticks_after(now()).take(20).is_sorted());
                }
                Err(refused) => prop_assert!(!refused.to_string().is_empty()),
            }
        }
        Ok(())
    });
}

#[test]
fn answers_of_subscribers() {
    const RETRY_AFTER: &[&str] = &[
        "120",
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "-1",
        "1.5",
    ];
    const BODIES: &[&str] = &[
        r#"{"success":false,"error":"busy","retryAfter":5000}"#,
        r#"{"results":[{"id":"1","success":true},{"id":"2","success":false,"retryAfter":1}]}"#,
        "ok",
    ];
    let inputs =
        (select(vec![200u16, 204, 302, 404, 410, 429, 500, 503, 599]), damaged(RETRY_AFTER), damaged(BODIES));
    check(inputs, |(status, retry_after, body)| {
        let mut headers = HeaderMap::new();
        for name in ["retry-after", "date"] {
            if let Ok(value) = HeaderValue::from_bytes(&retry_after) {
                headers.append(HeaderName::from_static(name), value);
            }
        }
        let answer = Answer::read(&HttpAnswer { status, headers: &headers, body: Some(&body), at: now() });
        let _ = answer.about(EVENTS[0].as_bytes());
        Ok(())
    });
}

#[test]
fn hints_and_secrets() {
    const LINES: &[&str] = &[
        "due",
        "enqueued",
        "missed",
        "connection 0199c0de-0000-7000-8000-000000000000",
        "closed 0199c0de-0000-7000-8000-000000000000",
        "probe 0199c0de-0000-7000-8000-000000000000",
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    ];
    check(damaged_text(LINES), |line| {
        if let Some(hint) = Hint::parse(&line) {
            // Two processes agree on what it says.
            prop_assert_eq!(Hint::parse(&hint.to_string()), Some(hint));
        }
        if let Err(refused) = SigningSecret::parse(&line) {
            prop_assert!(!refused.to_string().is_empty());
        }
        Ok(())
    });
}

#[test]
fn configurations() {
    const VALUES: &[&str] = &[
        "bus",
        "4",
        "true",
        "[\"10.0.0.0/8\"]",
        "{a=1}",
        "nats://user:pass@127.0.0.1:4222",
        "60000",
        "1.5",
        "jetstream",
    ];
    let names = select(vec![
        "EVENT_BUS_LANES",
        "EVENT_BUS_PREFIX",
        "EVENT_BUS_BACKEND",
        "EVENT_BUS_NATS__REPLICAS",
        "EVENT_BUS_NATS__ACK_WAIT_MS",
        "EVENT_BUS_STREAMS__DELIVER__MAX_BYTES",
        "EVENT_BUS_STREAMS__EXTRA__SUBJECTS",
        "EVENT_BUS_NOTIFY__POLL_MS",
        "EVENT_BUS_SHUTDOWN__DRAIN_MS",
        "EVENT_BUS_ADMIN__LISTEN",
        "EVENT_BUS_UNKNOWN",
        "EVENT_BUS_",
        "EVENT_BUS___",
        "NATS_URL",
    ]);
    check(vec((names, damaged_text(VALUES)), 1..4), |variables| {
        let mut environment: BTreeMap<String, String> =
            [("DATABASE_URL", "postgres://localhost/bus"), ("NATS_URL", "nats://localhost")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into();
        environment.extend(variables.into_iter().map(|(name, value)| (name.to_owned(), value)));
        if let Err(refused) = load_common(None, environment) {
            prop_assert!(!refused.to_string().is_empty());
        }
        Ok(())
    });
}

/// The longest span that a subscriber can ask for does not lead beyond what a time can be.
#[test]
fn spans_of_time() {
    for text in ["99999999999", "18446744073709551615", "253402300799"] {
        let headers =
            HeaderMap::from_iter([(HeaderName::from_static("retry-after"), HeaderValue::from_static(text))]);
        let answer =
            Answer::read(&HttpAnswer { status: 503, headers: &headers, body: None, at: Timestamp::MAX });
        let _ = answer.about(b"{}");
    }
    let far = Timestamp::MAX - SignedDuration::from_secs(1);
    let recurrence = Recurrence::parse("* * * * *", "UTC").unwrap();
    assert_eq!(recurrence.next_after(far), None);
}
