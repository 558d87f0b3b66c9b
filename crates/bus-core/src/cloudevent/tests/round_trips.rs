//! Properties over many events.

use proptest::{collection::btree_map, collection::vec, option, prelude::*};

use super::*;

/// Text as attributes may have it.
fn text(most: usize) -> impl Strategy<Value = String> {
    vec(
        prop_oneof![4 => proptest::char::range('!', '~'), 1 => Just(' '), 1 => Just('%'), 1 => any::<char>()],
        1..most,
    )
    .prop_map(|characters| {
        characters
            .into_iter()
            .filter(|character| !character.is_control() && u32::from(*character) & 0xFFFE != 0xFFFE)
            .filter(|character| !(0xFDD0..=0xFDEF).contains(&u32::from(*character)))
            .collect::<String>()
    })
    .prop_filter("not empty", |text| !text.is_empty())
}

fn uri() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9/:?#@!$&'()*+,;=%._~é-]{1,40}"
}

/// JSON as people write it: any spelling of numbers, blanks, duplicate names.
fn json_text() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "null|true|false|0|-0|1e5|1E-3|0\\.10|123456789012345678901234567890|\"\"",
        any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
        Just("\"\\u00e9\\ud83d\\ude00\\/\"".to_owned()),
    ];
    leaf.prop_recursive(4, 30, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(|items| format!("[{}]", items.join(" , "))),
            vec(("[abé]", inner), 0..4).prop_map(|members| {
                let members: Vec<_> =
                    members.into_iter().map(|(name, value)| format!("\"{name}\":\n{value}")).collect();
                format!("{{ {} }}", members.join(",\t"))
            }),
        ]
    })
}

fn payloads() -> impl Strategy<Value = (Option<String>, Option<Data>)> {
    let of_json = option::of("application/json|application/vnd\\.x\\+json; charset=utf-8|text/json");
    let of_bytes = option::of("text/plain|application/octet-stream|image/png; q=\"a b\"");
    prop_oneof![
        (of_json, json_text())
            .prop_map(|(kind, text)| (kind, Some(Data::Json(RawValue::from_string(text).unwrap())))),
        // Binary mode cannot tell no bytes from no payload.
        (of_bytes, vec(any::<u8>(), 1..200))
            .prop_map(|(kind, bytes)| (kind, Some(Data::Bytes(bytes.into())))),
        option::of("text/plain|application/json").prop_map(|kind| (kind, None)),
    ]
}

fn events() -> impl Strategy<Value = CloudEvent> {
    let value = prop_oneof![
        any::<bool>().prop_map(ExtensionValue::Bool),
        any::<i32>().prop_map(ExtensionValue::Integer),
        text(30).prop_map(ExtensionValue::String),
        Just(ExtensionValue::String(String::new())),
    ];
    // All of them start with a letter that no attribute and no reserved name starts with.
    let extensions = btree_map("[x-z][a-z0-9]{0,19}", value, 0..5);
    let time = (-62_167_219_200_i64..253_402_207_200, 0..1_000_000_000_i32)
        .prop_map(|(seconds, nanos)| Timestamp::new(seconds, if seconds < 0 { 0 } else { nanos }).unwrap());
    (
        (text(60), uri(), text(60)),
        (option::of(text(60)), option::of(time), option::of(uri())),
        (extensions, payloads()),
    )
        .prop_map(
            |((id, source, r#type), (subject, time, dataschema), (extensions, (datacontenttype, data)))| {
                CloudEvent {
                    id,
                    source,
                    r#type,
                    subject,
                    time,
                    datacontenttype,
                    dataschema,
                    extensions,
                    data,
                }
            },
        )
}

/// What binary mode makes of an event: the implied content type is explicit, and extensions are text.
fn as_in_binary_mode(mut event: CloudEvent) -> CloudEvent {
    let implied = match event.data {
        Some(Data::Json(_)) => Some("application/json"),
        Some(Data::Bytes(_)) => Some("application/octet-stream"),
        None => None,
    };
    event.datacontenttype = event.datacontenttype.or(implied.map(str::to_owned));
    for value in event.extensions.values_mut() {
        *value = ExtensionValue::String(value.to_string());
    }
    event
}

fn read(headers: &HeaderMap, body: &Bytes) -> CloudEvent {
    let missing = || -> String { panic!("is there") };
    let draft = single(parse_http(headers, body, &Limits::default()).unwrap());
    let time = draft.time;
    CloudEvent { time, ..draft.complete(missing, missing, Timestamp::UNIX_EPOCH) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn structured_binary_structured_keeps_every_attribute_and_byte(event in events()) {
        let structured = event.to_structured();
        prop_assert_eq!(&CloudEvent::from_structured(&structured).unwrap(), &event);
        prop_assert_eq!(&read(&headers(&[("content-type", STRUCTURED)]), &structured), &event);

        let (headers, body) = event.to_binary();
        prop_assert!(headers.values().all(|value| value.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~'))));
        let received = read(&headers, &body);
        let expected = as_in_binary_mode(event);
        prop_assert_eq!(&received, &expected);
        prop_assert_eq!(CloudEvent::from_structured(&received.to_structured()).unwrap(), expected);
    }

    #[test]
    fn a_batch_holds_its_events(events in vec(events(), 0..5)) {
        let bodies: Vec<Bytes> = events.iter().map(CloudEvent::to_structured).collect();
        let body = to_batch(bodies.iter().map(|body| &body[..]));
        let drafts = batch(parse_http(&headers(&[("content-type", BATCH_CONTENT_TYPE)]), &body, &Limits::default()).unwrap());
        prop_assert_eq!(drafts.len(), events.len());
        for (draft, event) in drafts.iter().zip(&events) {
            prop_assert_eq!((draft.id.as_deref(), &draft.data), (Some(&*event.id), &event.data));
        }
    }

    /// Whatever is accepted can be read again, and a filter can read its payload.
    #[test]
    fn any_body_is_read_or_refused(
        content_type in prop::sample::select(vec![PLAIN, STRUCTURED, BATCH, "text/plain", ""]),
        has_headers in any::<bool>(),
        body in prop_oneof![
            vec(any::<u8>(), 0..60),
            any::<String>().prop_map(String::into_bytes),
            json_text().prop_map(String::into_bytes),
            ("\\{(\"(type|id|source|time|data|data_base64|x|specversion)\":(\"1.0\"|\"\"|null|1|1e999|\\{\\}),?){0,4}\\}")
                .prop_map(String::into_bytes),
            json_text().prop_map(|data| {
                format!(r#"{{"specversion":"1.0","id":"1","source":"/","type":"t","data":{data}}}"#).into_bytes()
            }),
        ],
    ) {
        let mut given = headers(&[("content-type", content_type)]);
        if content_type.is_empty() {
            given.remove(CONTENT_TYPE);
        }
        if has_headers {
            given.extend(headers(&[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")]));
        }
        let drafts = match parse_http(&given, &body.into(), &Limits::default()) {
            Ok(Submission::Single(draft)) => vec![draft],
            Ok(Submission::Batch(drafts)) => drafts,
            Err(error) => {
                prop_assert!(!error.detail.is_empty());
                return Ok(());
            }
        };
        for draft in drafts {
            let event = draft.complete(|| "made".to_owned(), || "/made".to_owned(), Timestamp::UNIX_EPOCH);
            prop_assert_eq!(&CloudEvent::from_structured(&event.to_structured()).unwrap(), &event);
            if let Some(payload) = event.json_payload() {
                prop_assert!(serde_json::from_str::<serde_json::Value>(payload.get()).is_ok());
            }
        }
    }
}
