//! A judge that finds nothing is worth nothing: each kind of harm is found, and its excuse is heard.

use super::{
    super::ledger::{Seen, Want},
    *,
};

const START: i64 = 1_800_000_000;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(START * 1_000 + ms).unwrap_or_default()
}

fn line(ms: i64, entry: Entry) -> Line {
    Line { at: at(ms), entry }
}

fn endpoint(path: &str, patterns: &[&str]) -> Entry {
    Entry::Endpoint(Endpoint {
        organization: "a".to_owned(),
        path: path.to_owned(),
        connection: format!("connection {path}"),
        wants: patterns
            .iter()
            .map(|pattern| Want {
                subscription: String::new(),
                pattern: (*pattern).to_owned(),
                at_least: None,
            })
            .collect(),
        batched: false,
        good: true,
        visible: true,
        attempts: 2,
        wait_ms: 500,
    })
}

fn accepted(id: &str, deliver_at: Option<i64>) -> Entry {
    Entry::Accepted(Accepted {
        organization: "a".to_owned(),
        id: id.to_owned(),
        uid: format!("uid {id}"),
        kind: "order.paid".to_owned(),
        number: 1,
        sent: at(0),
        deliver_at: deliver_at.map(at),
        tries: 1,
    })
}

fn request(path: &str, delivery: &str, id: &str, status: u16) -> Request {
    Request {
        organization: "a".to_owned(),
        path: path.to_owned(),
        delivery: delivery.to_owned(),
        events: vec![Seen { id: id.to_owned(), organization: "a".to_owned() }],
        status,
        after_ms: None,
        signed: true,
    }
}

fn came(ms: i64, delivery: &str, id: &str, status: u16) -> Line {
    line(ms, Entry::Request(request("/x", delivery, id, status)))
}

fn dead(attempts: u32) -> Line {
    let dead = Dead {
        connection: "connection /x".to_owned(),
        delivery: "d".to_owned(),
        uid: "uid e".to_owned(),
        reason: "attempts_exhausted".to_owned(),
        attempts,
    };
    line(5_000, Entry::Dead(dead))
}

fn fault(ms: i64, phase: Phase, repeats: bool) -> Line {
    let (kind, target) = ("kill".to_owned(), "worker".to_owned());
    line(ms, Entry::Fault { number: 0, kind, target, phase, aftermath_s: repeats.then_some(15) })
}

/// One event for one endpoint, and what came of it.
fn judged(more: impl IntoIterator<Item = Line>) -> Judgement {
    let lines = [line(0, endpoint("/x", &["order.*"])), line(0, accepted("e", None))];
    judge(&lines.into_iter().chain(more).collect::<Vec<_>>(), 1_000)
}

fn kinds(judgement: &Judgement) -> Vec<Kind> {
    judgement.findings.iter().map(|finding| finding.kind).collect()
}

#[test]
fn what_arrives_is_well() {
    let judgement = judged([came(10, "d", "e", 200)]);
    assert_eq!(kinds(&judgement), []);
    assert_eq!((judgement.events, judgement.expected, judgement.delivered), (1, 1, 1));
}

#[test]
fn what_neither_arrives_nor_dies_is_lost() {
    assert_eq!(kinds(&judged([])), [Kind::Lost]);
    assert_eq!(kinds(&judged([came(10, "d", "e", 500)])), [Kind::Lost]);
    let both = [line(0, endpoint("/x", &["order.*", "*.paid"])), line(0, accepted("e", None))];
    let one = both.into_iter().chain([came(10, "d", "e", 200)]).collect::<Vec<_>>();
    assert_eq!(kinds(&judge(&one, 1_000)), [Kind::Lost], "one of two subscriptions");
    let two = one.into_iter().chain([came(10, "d2", "e", 200)]).collect::<Vec<_>>();
    assert_eq!(kinds(&judge(&two, 1_000)), []);
}

#[test]
fn what_dies_after_its_attempts_is_well_and_must_have_had_them() {
    let failed = |n: i64| (0..n).map(|n| came(1_000 * n, "d", "e", 500)).collect::<Vec<_>>();
    assert_eq!(kinds(&judged(failed(2).into_iter().chain([dead(2)]))), []);
    assert_eq!(kinds(&judged(failed(1).into_iter().chain([dead(2)]))), [Kind::Dishonest], "one was not made");
    assert_eq!(
        kinds(&judged(failed(3).into_iter().chain([dead(2)]))),
        [Kind::Dishonest],
        "one was not counted"
    );
    assert_eq!(
        kinds(&judged(failed(1).into_iter().chain([dead(1)]))),
        [Kind::Dishonest],
        "the policy allows two"
    );
    let around = [fault(500, Phase::Begins, true), fault(600, Phase::Over, true)];
    assert_eq!(kinds(&judged(failed(3).into_iter().chain(around).chain([dead(2)]))), []);
}

#[test]
fn what_comes_again_is_doubled_unless_something_was_broken() {
    let twice = || [came(1_000, "d", "e", 200), came(9_000, "d", "e", 200)];
    assert_eq!(kinds(&judged(twice())), [Kind::Doubled]);
    let harmless = [fault(2_000, Phase::Begins, false), fault(3_000, Phase::Over, false)];
    assert_eq!(
        kinds(&judged(twice().into_iter().chain(harmless))),
        [Kind::Doubled],
        "a drain repeats nothing"
    );
    let later = [fault(9_001, Phase::Begins, true), fault(9_500, Phase::Over, true)];
    assert_eq!(kinds(&judged(twice().into_iter().chain(later))), [Kind::Doubled]);
    let between = [fault(2_000, Phase::Begins, true), fault(3_000, Phase::Over, true)];
    let excused = judged(twice().into_iter().chain(between));
    assert_eq!((kinds(&excused), excused.repeats), (vec![], 1));
    let other_name = [came(1_000, "d", "e", 200), came(1_100, "another", "e", 200)];
    assert_eq!(kinds(&judged(other_name)), [Kind::Unwanted], "one subscription, two deliveries");
}

#[test]
fn nothing_is_early() {
    let lines = |ms: i64| {
        let promised = [line(0, endpoint("/x", &["order.*"])), line(0, accepted("e", Some(2_000)))];
        promised.into_iter().chain([came(ms, "d", "e", 200)]).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&judge(&lines(1_999), 1_000)), [Kind::Early]);
    assert_eq!(kinds(&judge(&lines(2_000), 1_000)), []);
    let retried = |ms: i64| judged([came(1_000, "d", "e", 500), came(1_000 + ms, "d", "e", 200)]);
    assert_eq!(kinds(&retried(499)), [Kind::Early], "before the policy's wait");
    assert_eq!(kinds(&retried(500)), []);
    let asked = |ms: i64| {
        let busy = Request { after_ms: Some(2_000), ..request("/x", "d", "e", 429) };
        judged([line(1_000, Entry::Request(busy)), came(1_000 + ms, "d", "e", 200)])
    };
    assert_eq!(kinds(&asked(1_999)), [Kind::Early], "before the wait that was asked for");
    assert_eq!(kinds(&asked(2_000)), []);
}

#[test]
fn what_is_not_asked_for_is_found_wherever_it_comes() {
    let arrived = || came(10, "d", "e", 200);
    let foreign = Request {
        events: vec![Seen { id: "e".to_owned(), organization: "b".to_owned() }],
        ..request("/x", "d2", "e", 200)
    };
    assert_eq!(kinds(&judged([arrived(), line(20, Entry::Request(foreign))])), [Kind::Misdelivered]);
    let forged = Request { signed: false, ..request("/x", "d", "e", 200) };
    assert_eq!(kinds(&judged([line(20, Entry::Request(forged))])), [Kind::Forged]);
    let unknown = request("/elsewhere", "d", "e", 200);
    assert_eq!(kinds(&judged([arrived(), line(20, Entry::Request(unknown))])), [Kind::Unwanted]);
    assert_eq!(kinds(&judged([arrived(), came(20, "d3", "never", 200)])), [Kind::Unwanted]);
    let filtered = line(0, endpoint("/y", &["stock.*"]));
    let unwanted = request("/y", "d4", "e", 200);
    assert_eq!(kinds(&judged([arrived(), filtered, line(20, Entry::Request(unwanted))])), [Kind::Unwanted]);
}

#[test]
fn an_event_that_may_have_been_taken_may_come() {
    let unresolved = Entry::Unresolved { organization: "a".to_owned(), id: "maybe".to_owned() };
    let lines = [came(10, "d", "e", 200), line(20, unresolved), came(30, "d5", "maybe", 200)];
    assert_eq!(kinds(&judged(lines)), []);
}

#[test]
fn every_tick_is_on_record_once_and_arrives() {
    let schedule = || {
        line(
            0,
            Entry::Schedule {
                organization: "a".to_owned(),
                schedule: "s".to_owned(),
                kind: "tick.second".to_owned(),
                first: START,
                last: START + 3,
                every: 1,
            },
        )
    };
    let tick = |state: &str, first: i64, last: i64, uid: Option<&str>| {
        let (schedule, state, uid) = ("s".to_owned(), state.to_owned(), uid.map(str::to_owned));
        line(0, Entry::Tick { schedule, state, first: START + first, last: START + last, uid })
    };
    let ticks = line(0, endpoint("/ticks", &["tick.*"]));
    let arrived = line(10, Entry::Request(request("/ticks", "t", "uid 0", 200)));
    let all = [schedule(), ticks, tick("fired", 0, 0, Some("uid 0")), tick("skipped", 1, 3, None), arrived];
    let judgement = judge(&all, 1_000);
    assert_eq!((kinds(&judgement), judgement.ticks_fired, judgement.ticks_skipped), (vec![], 1, 3));
    assert_eq!(kinds(&judge(&all[..4], 1_000)), [Kind::Lost], "it was fired, and came nowhere");
    let missing = [schedule(), tick("skipped", 1, 3, None)];
    assert_eq!(kinds(&judge(&missing, 1_000)), [Kind::Tick]);
    let doubled = [schedule(), tick("skipped", 0, 2, None), tick("skipped", 2, 3, None)];
    assert_eq!(kinds(&judge(&doubled, 1_000)), [Kind::Tick]);
}

#[test]
fn memory_is_bounded_and_a_refusal_is_a_finding() {
    let memory = |bytes| line(0, Entry::Memory { process: "publisher-0".to_owned(), bytes });
    assert_eq!(kinds(&judged([came(10, "d", "e", 200), memory(1_000)])), []);
    assert_eq!(kinds(&judged([came(10, "d", "e", 200), memory(1_001)])), [Kind::Memory]);
    let (organization, id, answer) = ("a".to_owned(), "x".to_owned(), "422".to_owned());
    let refused = line(0, Entry::Refused { organization, id, answer });
    assert_eq!(kinds(&judged([came(10, "d", "e", 200), refused])), [Kind::Refused]);
}
