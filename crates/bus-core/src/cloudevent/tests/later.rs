//! Events that are due later, and events that recur.

use super::*;
use crate::schedule::{Missed, Overlap, Rules};

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// What a plain event with these members says about its recurrence.
fn recurring(members: &str) -> Result<ScheduleDraft, EventError> {
    let draft = parse(PLAIN, &format!(r#"{{"type":"t",{members}}}"#)).map(single)?;
    Ok(*draft.schedule.unwrap())
}

#[test]
fn every_mode_says_when_an_event_is_due() {
    let due = Some(time("2030-01-01T08:00:00.25Z"));
    let text = "2030-01-01T09:30:00.25+01:30";
    let cloud = format!(r#"{{"specversion":"1.0","id":"1","source":"/","type":"t","deliverat":"{text}"}}"#);
    let mut drafts = vec![single(parse(STRUCTURED, &cloud).unwrap())];
    drafts.extend(batch(parse(BATCH, &format!("[{cloud}]")).unwrap()));
    for name in ["deliverAt", "deliverat"] {
        let plain = format!(r#"{{"type":"t","{name}":"{text}"}}"#);
        drafts.push(single(parse(PLAIN, &plain).unwrap()));
        drafts.extend(batch(parse(PLAIN, &format!("[{plain}]")).unwrap()));
    }
    drafts.push(binary(&[("ce-deliverat", text)], "").unwrap());
    assert_eq!(drafts.len(), 7);
    for draft in drafts {
        assert_eq!(draft.deliver_at, due, "{draft:?}");
        // Subscribers are told, too, as it was written.
        let told = ExtensionValue::String(text.to_owned());
        assert_eq!(draft.extensions, BTreeMap::from([("deliverat".to_owned(), told)]));
        let event = draft.complete(|| "1".into(), || "/".into(), Timestamp::UNIX_EPOCH);
        assert!(CloudEvent::from_structured(&event.to_structured()).is_ok());
    }
    let none = single(parse(PLAIN, r#"{"type":"t","deliverAt":null}"#).unwrap());
    assert_eq!((none.deliver_at, none.extensions.len()), (None, 0));
}

#[test]
fn what_is_due_too_late_is_refused_where_it_stands() {
    let bound = time("2030-01-01T00:00:00Z");
    let limits = Limits { deliver_before: Some(bound), ..Limits::default() };
    let at = |content_type: &str, text: &str, json: bool| {
        let headers = if json {
            headers(&[("content-type", content_type)])
        } else {
            let required = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/"), ("ce-type", "t")];
            let mut all = headers(&required);
            all.insert("ce-deliverat", HeaderValue::from_str(text).unwrap());
            all
        };
        let body = if json { text.to_owned() } else { String::new() };
        parse_http(&headers, &body.into(), &limits)
    };
    let cloud = |text: &str| {
        format!(r#"{{"specversion":"1.0","id":"1","source":"/","type":"t","deliverat":"{text}"}}"#)
    };
    let plain = |name: &str, text: &str| format!(r#"{{"type":"t","{name}":"{text}"}}"#);
    for (text, ok) in [
        ("2029-12-31T23:59:59.999Z", true),
        ("2030-01-01T01:29:59+01:30", true),
        ("2030-01-01T00:00:00Z", false),
        ("2029-12-31T23:00:00-01:30", false),
        ("9999-12-30T00:00:00Z", false),
    ] {
        for (content_type, body, pointer) in [
            (PLAIN, plain("deliverAt", text), Some("/deliverAt")),
            (PLAIN, plain("deliverat", text), Some("/deliverat")),
            (PLAIN, format!(r#"[{{"type":"t"}},{}]"#, plain("deliverAt", text)), Some("/1/deliverAt")),
            (STRUCTURED, cloud(text), Some("/deliverat")),
            (BATCH, format!("[{}]", cloud(text)), Some("/0/deliverat")),
            ("", text.to_owned(), None),
        ] {
            let parsed = at(content_type, &body, pointer.is_some());
            if ok {
                assert!(parsed.is_ok(), "{body}: {parsed:?}");
                continue;
            }
            let error = parsed.expect_err(&body);
            assert_eq!(error.kind, EventErrorKind::InvalidAttribute);
            assert_eq!(error.pointer.as_deref(), pointer, "{error}");
            assert_eq!(error.header.as_deref(), pointer.is_none().then_some("ce-deliverat"));
            assert!(error.detail.contains("must be before 2030-01-01T00:00:00Z"), "{error}");
        }
    }
}

#[test]
fn an_event_with_cron_recurs_by_its_defaults_or_as_it_says() {
    let plain = recurring(r#""cron":" @daily ""#).unwrap();
    let expected =
        ScheduleDraft { cron: " @daily ".into(), timezone: "UTC".into(), rules: Rules::DEFAULT.clone() };
    assert_eq!(plain, expected);
    let all = recurring(
        r#""cron":"0 9 * * 1","timezone":"Europe/London","startsAt":"2030-01-01T00:00:00Z",
           "endsAt":"2031-01-01T00:00:00+01:00","jitterMs":1500,"missed":"catch_up","catchUpLimit":7,"overlap":"skip""#,
    );
    let rules = Rules {
        starts_at: Some(time("2030-01-01T00:00:00Z")),
        ends_at: Some(time("2030-12-31T23:00:00Z")),
        jitter_ms: 1_500,
        missed: Missed::CatchUp,
        catch_up_limit: 7,
        overlap: Overlap::Skip,
    };
    let expected = ScheduleDraft { cron: "0 9 * * 1".into(), timezone: "Europe/London".into(), rules };
    assert_eq!(all.unwrap(), expected);
    for (word, missed) in [("skip", Missed::Skip), ("fire_once", Missed::FireOnce)] {
        let draft = recurring(&format!(r#""cron":"@daily","missed":"{word}","endsAt":null,"jitterMs":0"#));
        assert_eq!(draft.unwrap().rules.missed, missed);
    }
    // What is about recurrence is no attribute of the occurrences.
    let draft = single(
        parse(
            PLAIN,
            r#"{"type":"t","cron":"@daily","timezone":"UTC","missed":"skip","partner":"x","data":1}"#,
        )
        .unwrap(),
    );
    assert_eq!(draft.extensions.keys().collect::<Vec<_>>(), ["partner"]);
    assert_eq!((draft.deliver_at, draft.schedule.is_some()), (None, true));
}

#[test]
fn without_cron_the_short_names_are_ordinary_attributes() {
    let draft = single(
        parse(PLAIN, r#"{"type":"t","timezone":"UTC","missed":"x","overlap":true,"cron":null}"#).unwrap(),
    );
    assert_eq!(draft.extensions.len(), 3);
    assert_eq!(draft.schedule, None);
    for name in ["startsAt", "endsAt", "jitterMs", "catchUpLimit"] {
        let error = parse(PLAIN, &format!(r#"{{"type":"t","{name}":1}}"#)).unwrap_err();
        assert_eq!(error.pointer, Some(format!("/{name}")));
        assert!(error.detail.contains("give `cron` too"), "{error}");
        let null = format!(r#"{{"type":"t","{name}":null}}"#);
        assert!(parse(PLAIN, &null).is_ok(), "{null}");
    }
}

#[test]
fn mistakes_about_recurrence_are_pointed_at() {
    let long = format!(r#""cron":"{}""#, "*".repeat(257));
    for (members, pointer, detail) in [
        (r#""cron":5"#, "/cron", "must be a string"),
        (long.as_str(), "/cron", "at most 256 bytes"),
        (r#""cron":"@daily","cron":"@hourly""#, "/cron", "there twice"),
        (r#""cron":"@daily","timezone":1"#, "/timezone", "must be a string"),
        (r#""cron":"@daily","timezone":"UTC","timezone":"UTC""#, "/timezone", "there twice"),
        (r#""cron":"@daily","startsAt":"tomorrow""#, "/startsAt", "RFC 3339"),
        (r#""cron":"@daily","endsAt":"2030-01-01""#, "/endsAt", "RFC 3339"),
        (
            r#""cron":"@daily","startsAt":"2030-01-02T00:00:00Z","endsAt":"2030-01-01T00:00:00Z""#,
            "/endsAt",
            "before `startsAt`",
        ),
        (r#""cron":"@daily","jitterMs":-1"#, "/jitterMs", "between 0 and 86400000"),
        (r#""cron":"@daily","jitterMs":86400001"#, "/jitterMs", "between 0 and 86400000"),
        (r#""cron":"@daily","jitterMs":"5""#, "/jitterMs", "whole number"),
        (r#""cron":"@daily","missed":"never""#, "/missed", r#""skip", "fire_once", "catch_up""#),
        (r#""cron":"@daily","missed":true"#, "/missed", "must be one of"),
        (r#""cron":"@daily","overlap":"queue""#, "/overlap", r#""allow", "skip""#),
        (r#""cron":"@daily","catchUpLimit":5"#, "/catchUpLimit", "belongs to"),
        (r#""cron":"@daily","missed":"skip","catchUpLimit":5"#, "/catchUpLimit", "belongs to"),
        (r#""cron":"@daily","missed":"catch_up","catchUpLimit":0"#, "/catchUpLimit", "between 1 and 1000"),
        (r#""cron":"@daily","missed":"catch_up","catchUpLimit":1001"#, "/catchUpLimit", "between 1 and 1000"),
        (r#""cron":"@daily","deliverAt":"2030-01-01T00:00:00Z""#, "/deliverAt", "either recurs"),
        (r#""deliverat":"2030-01-01T00:00:00Z","cron":"@daily""#, "/deliverat", "either recurs"),
    ] {
        let error = recurring(members).expect_err(members);
        assert_eq!(error.kind, EventErrorKind::InvalidAttribute, "{members}");
        assert_eq!(error.pointer.as_deref(), Some(pointer), "{members}: {error}");
        assert!(error.detail.contains(detail), "{members}: {error}");
    }
    for members in [
        r#""cron":"@daily","missed":"catch_up","catchUpLimit":1000,"jitterMs":86400000"#,
        r#""cron":"@daily","startsAt":"2030-01-01T00:00:00Z","endsAt":"2030-01-01T01:00:00+01:00""#,
    ] {
        assert!(recurring(members).is_ok(), "{members}");
    }
}
