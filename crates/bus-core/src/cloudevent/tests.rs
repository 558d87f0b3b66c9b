#![allow(clippy::unwrap_used)]

use http::HeaderValue;

use super::*;

mod later;
mod round_trips;

const PLAIN: &str = "application/json";
const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap()))
        .collect()
}

fn parse(content_type: &str, body: &str) -> Result<Submission, EventError> {
    parse_http(
        &headers(&[("content-type", content_type)]),
        &Bytes::copy_from_slice(body.as_bytes()),
        &Limits::default(),
    )
}

fn single(submission: Submission) -> Draft {
    match submission {
        Submission::Single(draft) => draft,
        Submission::Batch(_) => panic!("a batch"),
    }
}

fn batch(submission: Submission) -> Vec<Draft> {
    match submission {
        Submission::Batch(drafts) => drafts,
        Submission::Single(_) => panic!("a single event"),
    }
}

/// An event in binary mode with these headers besides the required ones.
fn binary(more: &[(&'static str, &str)], body: &'static str) -> Result<Draft, EventError> {
    let mut all = vec![("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];
    all.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
    all.extend(more);
    parse_http(&headers(&all), &Bytes::from_static(body.as_bytes()), &Limits::default()).map(single)
}

fn json(data: Option<Data>) -> String {
    match data {
        Some(Data::Json(value)) => value.get().to_owned(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_mode_is_told_by_the_headers() {
    let event = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1}"#;
    assert_eq!(single(parse(STRUCTURED, event).unwrap()).id.as_deref(), Some("1"));
    assert_eq!(single(parse("Application/CloudEvents+JSON; charset=UTF-8", event).unwrap()).r#type, "t");
    assert_eq!(batch(parse(BATCH, &format!("[{event},{event}]")).unwrap()).len(), 2);
    assert_eq!(batch(parse(BATCH, "[]").unwrap()), []);
    // An event in the JSON format is plain JSON, too.
    assert_eq!(single(parse(PLAIN, event).unwrap()).source.as_deref(), Some("/s"));
    assert_eq!(batch(parse(PLAIN, r#" [{"type":"a"},{"type":"b"}]"#).unwrap())[1].r#type, "b");
    let untyped = Bytes::from_static(br#"{"type":"t"}"#);
    assert!(parse_http(&HeaderMap::new(), &untyped, &Limits::default()).is_ok());
    // The content type wins over ce- headers, and those over plain JSON.
    let mut both = headers(&[("content-type", STRUCTURED), ("ce-id", "other")]);
    let body = Bytes::from(event);
    assert_eq!(single(parse_http(&both, &body, &Limits::default()).unwrap()).id.as_deref(), Some("1"));
    both.insert(CONTENT_TYPE, HeaderValue::from_static(PLAIN));
    let error = parse_http(&both, &body, &Limits::default()).unwrap_err();
    assert_eq!(error.header.as_deref(), Some("ce-specversion"));
}

#[test]
fn content_types_that_are_none_of_the_modes_are_unsupported() {
    for content_type in [
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/cloudevents",
        "application/cloudevents+avro",
        "application/cloudevents-batch",
        "application/problem+json",
        "nonsense",
        "application/json; charset=latin1",
        "application/cloudevents+json; charset=utf-16",
    ] {
        let error = parse(content_type, "{}").unwrap_err();
        assert_eq!(error.kind, EventErrorKind::UnsupportedMedia, "{content_type}");
        assert_eq!(error.header.as_deref(), Some("content-type"));
    }
    let error = binary(&[("content-type", "application/json; charset=latin1")], "{}").unwrap_err();
    assert_eq!(error.kind, EventErrorKind::UnsupportedMedia);
    let mut twice = headers(&[("content-type", PLAIN)]);
    twice.append(CONTENT_TYPE, HeaderValue::from_static(PLAIN));
    let error = parse_http(&twice, &Bytes::from_static(b"{}"), &Limits::default()).unwrap_err();
    assert_eq!(error.kind, EventErrorKind::UnsupportedMedia);
}

#[test]
fn plain_json_leaves_the_rest_to_the_bus() {
    let draft = single(parse(PLAIN, r#"{"type":"order.created","data":{"n":1}}"#).unwrap());
    let now: Timestamp = "2026-01-31T09:30:00Z".parse().unwrap();
    let event = draft.complete(|| "made".to_owned(), || "/bus".to_owned(), now);
    assert_eq!(
        event.to_structured(),
        r#"{"specversion":"1.0","id":"made","source":"/bus","type":"order.created","time":"2026-01-31T09:30:00Z","data":{"n":1}}"#
    );
    let given =
        single(parse(PLAIN, r#"{"type":"t","id":"i","source":"/s","time":"2020-01-01T00:00:00Z"}"#).unwrap());
    let event = given.complete(|| panic!("has an id"), || panic!("has a source"), now);
    assert_eq!(event.time.unwrap().to_string(), "2020-01-01T00:00:00Z");
}

#[test]
fn structured_text_has_its_members_in_order_and_the_payload_as_written() {
    let text = concat!(
        r#"{"specversion":"1.0","id":"a\"b","source":"/s","type":"t","subject":"é","time":"2026-01-31T09:30:00.5Z","#,
        r#""datacontenttype":"application/vnd.x+json","dataschema":"urn:x","count":-7,"flag":true,"traceparent":"00-a","#,
        r#""data":{"z":1e2,  "a":12345678901234567890123, "a":[0.10]}}"#
    );
    let event = CloudEvent::from_structured(text.as_bytes()).unwrap();
    assert_eq!(event.to_structured(), text);
    assert_eq!(event.json_payload().unwrap().get(), r#"{"z":1e2,  "a":12345678901234567890123, "a":[0.10]}"#);
    assert!(!format!("{event:?}").contains("12345678901234567890123"));
}

#[test]
fn a_falsy_payload_is_a_payload() {
    for value in ["null", "0", "false", "\"\"", "[]", "{}", "-0.0"] {
        let plain = single(parse(PLAIN, &format!(r#"{{"type":"t","data":{value}}}"#)).unwrap());
        assert_eq!(json(plain.data), value);
        let event = CloudEvent::from_structured(
            format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"t","data":{value}}}"#).as_bytes(),
        )
        .unwrap();
        assert!(String::from_utf8_lossy(&event.to_structured()).ends_with(&format!(",\"data\":{value}}}")));
        let (headers, body) = event.to_binary();
        assert_eq!((&body[..], &headers[CONTENT_TYPE]), (value.as_bytes(), &HeaderValue::from_static(PLAIN)));
        assert_eq!(json(single(parse_http(&headers, &body, &Limits::default()).unwrap()).data), value);
    }
    let absent = single(parse(PLAIN, r#"{"type":"t"}"#).unwrap());
    assert_eq!(absent.data, None);
    assert_eq!(binary(&[], "").unwrap().data, None);
    assert_eq!(json(binary(&[], " null\n").unwrap().data), "null");
}

#[test]
fn payloads_that_are_not_json_are_bytes() {
    let bytes = |draft: Draft| match draft.data {
        Some(Data::Bytes(bytes)) => bytes,
        other => panic!("{other:?}"),
    };
    for member in ["data_base64", "dataBase64"] {
        assert_eq!(
            bytes(single(parse(PLAIN, &format!(r#"{{"type":"t","{member}":"AAH/"}}"#)).unwrap())),
            [0, 1, 255][..]
        );
    }
    assert_eq!(
        bytes(binary(&[("content-type", "text/plain; charset=latin1")], "caf\u{e9}").unwrap()),
        "café"
    );
    // A string is the text itself, if the type is not JSON (JSON format §3.1.2).
    let text =
        single(parse(PLAIN, r#"{"type":"t","datacontenttype":"text/xml","data":"<a b=\"c\"/>"}"#).unwrap());
    assert_eq!(bytes(text), r#"<a b="c"/>"#);
    // JSON in Base64 is JSON, if its type says so.
    let encoded = r#"{"type":"t","datacontenttype":"application/json","data_base64":"eyJhIjogMX0="}"#;
    assert_eq!(json(single(parse(PLAIN, encoded).unwrap()).data), r#"{"a": 1}"#);
}

#[test]
fn attributes_that_are_null_are_absent() {
    let draft = single(
        parse(PLAIN, r#"{"type":"t","subject":null,"time":null,"cron":null,"ext":null,"data_base64":null,"data":null}"#)
            .unwrap(),
    );
    assert_eq!((draft.subject, draft.time, draft.extensions.len()), (None, None, 0));
    assert_eq!(json(draft.data), "null");
}

#[test]
fn errors_say_where_and_what_to_change() {
    use EventErrorKind::{InvalidAttribute, InvalidData, Malformed, NotSupported};
    let deep = format!(r#"{{"type":"t","data":{}1{}}}"#, "[".repeat(121), "]".repeat(121));
    let long = format!(r#"{{"type":"{}"}}"#, "é".repeat(256));
    let heavy = format!(r#"{{"type":"t","ext":"{}"}}"#, "x".repeat(MAX_ATTRIBUTE_BYTES));
    let many = format!(
        r#"{{"type":"t",{}}}"#,
        (0..33).map(|n| format!(r#""x{n}":1"#)).collect::<Vec<_>>().join(",")
    );
    let wide = format!(
        r#"{{"type":"t",{}}}"#,
        (0..99).map(|n| format!(r#""X{n}":null"#)).collect::<Vec<_>>().join(",")
    );
    for (content_type, body, kind, pointer, detail) in [
        (PLAIN, "", Malformed, None, "the body is empty"),
        (PLAIN, " 3", Malformed, None, "must be a JSON object"),
        (PLAIN, "{\"type\":\"t\"", Malformed, None, "EOF while parsing an object at line 1 column 11"),
        (PLAIN, "{\"type\":\"t\"} x", Malformed, None, "trailing characters"),
        (PLAIN, "[{\"type\":\"t\"}] x", Malformed, None, "trailing characters"),
        (PLAIN, "[{\"type\":\"t\"},3]", Malformed, Some("/1"), "must be a JSON object"),
        (BATCH, "{}", Malformed, None, "must be a JSON array"),
        (STRUCTURED, "[]", Malformed, None, "must be a JSON object"),
        (PLAIN, &wide, Malformed, None, "more than 48 members"),
        (PLAIN, "{}", InvalidAttribute, Some("/type"), "`type` is missing"),
        (PLAIN, r#"{"type":null}"#, InvalidAttribute, Some("/type"), "`type` is missing"),
        (PLAIN, r#"{"type":""}"#, InvalidAttribute, Some("/type"), "must not be empty"),
        (PLAIN, r#"{"type":5}"#, InvalidAttribute, Some("/type"), "must be a string"),
        (PLAIN, &long, InvalidAttribute, Some("/type"), "at most 255 characters"),
        (PLAIN, r#"{"type":"a\u0007"}"#, InvalidAttribute, Some("/type"), "control characters"),
        (PLAIN, r#"{"type":"a\ufffe"}"#, InvalidAttribute, Some("/type"), "noncharacters"),
        (PLAIN, r#"{"type":"a\ud800"}"#, InvalidAttribute, Some("/type"), "not a Unicode string"),
        (PLAIN, r#"{"type":"t","type":"u"}"#, InvalidAttribute, Some("/type"), "there twice"),
        (PLAIN, r#"{"type":"t","data":1,"data":2}"#, InvalidAttribute, Some("/data"), "there twice"),
        (PLAIN, r#"{"type":"t","source":"a b"}"#, InvalidAttribute, Some("/source"), "without blanks"),
        (PLAIN, r#"{"type":"t","time":"yesterday"}"#, InvalidAttribute, Some("/time"), "RFC 3339"),
        (
            PLAIN,
            r#"{"type":"t","datacontenttype":"json"}"#,
            InvalidAttribute,
            Some("/datacontenttype"),
            "media type",
        ),
        (
            PLAIN,
            r#"{"type":"t","specversion":"0.3"}"#,
            InvalidAttribute,
            Some("/specversion"),
            "must be \"1.0\"",
        ),
        (PLAIN, r#"{"type":"t","specversion":1.0}"#, InvalidAttribute, Some("/specversion"), "is an integer"),
        (
            PLAIN,
            r#"{"type":"t","dataContentType":"x"}"#,
            InvalidAttribute,
            Some("/dataContentType"),
            "`datacontenttype`?",
        ),
        (PLAIN, r#"{"type":"t","a/b~":"x"}"#, InvalidAttribute, Some("/a~1b~0"), "belongs into `data`"),
        (
            PLAIN,
            r#"{"type":"t","abcdefghijklmnopqrstu":1}"#,
            InvalidAttribute,
            Some("/abcdefghijklmnopqrstu"),
            "1 to 20",
        ),
        (PLAIN, r#"{"type":"t","ext":[1]}"#, InvalidAttribute, Some("/ext"), "arrays and objects belong"),
        (PLAIN, r#"{"type":"t","ext":1.5}"#, InvalidAttribute, Some("/ext"), "is an integer"),
        (PLAIN, r#"{"type":"t","ext":2147483648}"#, InvalidAttribute, Some("/ext"), "is an integer"),
        (PLAIN, &many, InvalidAttribute, Some("/x32"), "at most 32 extension"),
        (PLAIN, &heavy, InvalidAttribute, Some("/ext"), "at most 16384 bytes"),
        (
            PLAIN,
            r#"[{"type":"t"},{"type":"t","cron":"@daily"}]"#,
            NotSupported,
            Some("/1/cron"),
            "published alone",
        ),
        (
            PLAIN,
            r#"{"type":"t","data":1,"data_base64":""}"#,
            InvalidAttribute,
            Some("/data_base64"),
            "not both",
        ),
        (
            PLAIN,
            r#"{"type":"t","dataBase64":"","data_base64":""}"#,
            InvalidAttribute,
            Some("/data_base64"),
            "the same",
        ),
        (PLAIN, r#"{"type":"t","data_base64":"!"}"#, InvalidData, Some("/data_base64"), "Base64"),
        (PLAIN, r#"{"type":"t","dataBase64":1}"#, InvalidData, Some("/dataBase64"), "Base64"),
        (PLAIN, r#"{"type":"t","data":1e999}"#, InvalidData, Some("/data"), "number out of range"),
        (PLAIN, r#"{"type":"t","data":["\ud800"]}"#, InvalidData, Some("/data"), "surrogate"),
        (PLAIN, r#"{"type":"t","data":{"\ud800":1}}"#, InvalidData, Some("/data"), "surrogate"),
        (PLAIN, &deep, InvalidData, Some("/data"), "nest at most 120 deep"),
        (
            PLAIN,
            r#"{"type":"t","datacontenttype":"text/plain","data":{}}"#,
            InvalidData,
            Some("/data"),
            "must be a string",
        ),
        (
            PLAIN,
            r#"{"type":"t","datacontenttype":"text/plain;charset=latin1","data":""}"#,
            InvalidData,
            Some("/datacontenttype"),
            "UTF-8",
        ),
        (
            PLAIN,
            r#"{"type":"t","datacontenttype":"a/json","data_base64":"ew=="}"#,
            InvalidData,
            Some("/data_base64"),
            "is not JSON",
        ),
        (
            STRUCTURED,
            r#"{"id":"1","source":"/","type":"t"}"#,
            InvalidAttribute,
            Some("/specversion"),
            "missing",
        ),
        (
            STRUCTURED,
            r#"{"specversion":"1.0","source":"/","type":"t"}"#,
            InvalidAttribute,
            Some("/id"),
            "missing",
        ),
        (
            STRUCTURED,
            r#"{"specversion":"1.0","id":"1","type":"t"}"#,
            InvalidAttribute,
            Some("/source"),
            "missing",
        ),
        (
            STRUCTURED,
            r#"{"specversion":"1.0","id":"1","source":"/","type":"t","dataBase64":""}"#,
            InvalidAttribute,
            Some("/dataBase64"),
            "`database64`?",
        ),
        (
            STRUCTURED,
            r#"{"specversion":"1.0","id":"1","source":"/","type":"t","deliverat":""}"#,
            InvalidAttribute,
            Some("/deliverat"),
            "RFC 3339",
        ),
        (
            STRUCTURED,
            r#"{"specversion":"1.0","id":"1","source":"/","type":"t","deliverAt":"2030-01-01T00:00:00Z"}"#,
            InvalidAttribute,
            Some("/deliverAt"),
            "did you mean `deliverat`?",
        ),
        (
            STRUCTURED,
            r#"{"specversion":"1.0","id":"1","source":"/","type":"t","cron":"@daily"}"#,
            NotSupported,
            Some("/cron"),
            "plain JSON",
        ),
        (
            BATCH,
            r#"[{"specversion":"1.0","id":"1","source":"/","type":"t","cron":"@daily"}]"#,
            NotSupported,
            Some("/0/cron"),
            "plain JSON",
        ),
        (
            BATCH,
            r#"[{"specversion":"1.0","id":"1","source":"/"}]"#,
            InvalidAttribute,
            Some("/0/type"),
            "missing",
        ),
    ] {
        let error = parse(content_type, body).expect_err(body);
        assert_eq!((error.kind, error.pointer.as_deref()), (kind, pointer), "{body}: {error}");
        assert!(error.to_string().contains(detail), "{body}: {error}");
        assert_eq!(error.header, None);
    }
    let fits = format!(r#"{{"type":"t","data":{}1{}}}"#, "[".repeat(120), "]".repeat(120));
    let draft = single(parse(PLAIN, &fits).unwrap());
    let event = draft.complete(|| "1".to_owned(), || "/s".to_owned(), Timestamp::UNIX_EPOCH).to_structured();
    assert!(serde_json::from_slice::<serde_json::Value>(&to_batch([&event[..]])).is_ok());
}

#[test]
fn headers_are_unquoted_and_decoded_once() {
    for (value, subject) in [
        ("plain", "plain"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("%e2%82%ac", "€"),
        ("100%2525", "100%25"),
        ("50%", "50%"),
        ("\"quoted \\\"text\\\" %C3%A9\"", "quoted \"text\" é"),
        ("a\"b c\"d", "ab cd"),
        ("back\\slash", "back\\slash"),
        ("é", "é"),
    ] {
        assert_eq!(
            binary(&[("ce-subject", value)], "").unwrap().subject.as_deref(),
            Some(subject),
            "{value}"
        );
    }
    let extensions = binary(&[("ce-flag", "true"), ("ce-count", "5")], "").unwrap().extensions;
    assert_eq!(extensions["flag"], ExtensionValue::String("true".to_owned()));
    assert_eq!(extensions["count"].to_string(), "5");
}

#[test]
fn errors_in_binary_mode_name_the_header() {
    for (name, value, body, header, detail) in [
        ("ce-subject", "%C0%A0", "", Some("ce-subject"), "not UTF-8"),
        ("ce-subject", "\"open", "", Some("ce-subject"), "quote is not closed"),
        ("ce-subject", "%07", "", Some("ce-subject"), "control characters"),
        ("ce-time", "now", "", Some("ce-time"), "RFC 3339"),
        ("ce-specversion", "0.3", "", Some("ce-specversion"), "must be \"1.0\""),
        ("ce-datacontenttype", "text/plain", "", Some("ce-datacontenttype"), "`Content-Type`"),
        ("ce-data", "1", "", Some("ce-data"), "the body"),
        ("ce-my-ext", "1", "", Some("ce-my-ext"), "did you mean `myext`?"),
        ("ce-deliverat", "tomorrow", "", Some("ce-deliverat"), "RFC 3339"),
        ("ce-deliverat", "2030-01-01T00:00:00", "", Some("ce-deliverat"), "RFC 3339"),
        ("ce-cron", "@daily", "", Some("ce-cron"), "plain JSON"),
        ("content-type", "application/json", "{", None, "not JSON"),
        ("content-type", "a/b+json", "1e999", None, "out of range"),
        ("ce-ext", "1", "not json", None, "not JSON"),
    ] {
        let error = binary(&[(name, value)], body).expect_err(name);
        assert_eq!((error.header.as_deref(), error.pointer.as_deref()), (header, None), "{error}");
        assert!(error.detail.contains(detail), "{error}");
    }
    for missing in ["ce-id", "ce-source", "ce-type", "ce-specversion"] {
        let mut all =
            headers(&[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")]);
        all.remove(missing);
        let error = parse_http(&all, &Bytes::new(), &Limits::default()).unwrap_err();
        assert_eq!(error.header.as_deref(), Some(missing));
        all.append("ce-x", HeaderValue::from_static("1"));
        all.append("ce-x", HeaderValue::from_static("2"));
        assert!(parse_http(&all, &Bytes::new(), &Limits::default()).is_err());
    }
}

#[test]
fn limits_are_errors_of_their_own() {
    let limits = Limits { max_batch: 2, max_event_bytes: 100, ..Limits::default() };
    let parse = |headers: &HeaderMap, body: String| parse_http(headers, &body.into(), &limits);
    let plain = headers(&[("content-type", PLAIN)]);
    let event = |bytes: usize| {
        let empty = r#"{"specversion":"1.0","type":"t","data":""}"#.len();
        format!(r#"{{ "type": "t", "data": "{}" }}"#, "x".repeat(bytes - empty))
    };
    assert!(parse(&plain, event(100)).is_ok());
    let error = parse(&plain, event(101)).unwrap_err();
    assert_eq!((error.kind, error.pointer.as_deref()), (EventErrorKind::TooLarge, None));
    assert!(error.detail.contains("at most 100 bytes") && error.detail.contains("has 101"), "{error}");
    let error = parse(&plain, format!("[{},{}]", event(100), event(101))).unwrap_err();
    assert_eq!((error.kind, error.pointer.as_deref()), (EventErrorKind::TooLarge, Some("/1")));
    // Bytes count as the Base64 that they become.
    let mut binary =
        headers(&[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/"), ("ce-type", "t")]);
    binary.insert(CONTENT_TYPE, HeaderValue::from_static("a/b"));
    let empty =
        r#"{"specversion":"1.0","id":"1","source":"/","type":"t","datacontenttype":"a/b","data_base64":""}"#
            .len();
    assert!(parse(&binary, "x".repeat((100 - empty) / 4 * 3)).is_ok());
    assert_eq!(
        parse(&binary, "x".repeat((100 - empty) / 4 * 3 + 1)).unwrap_err().kind,
        EventErrorKind::TooLarge
    );
    let error = parse(&plain, r#"[{"type":"t"},{"type":"t"},{}]"#.to_owned()).unwrap_err();
    assert_eq!(error.kind, EventErrorKind::TooMany);
    assert!(error.detail.contains("at most 2 events"));
}
