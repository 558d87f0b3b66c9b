//! A judge that finds nothing is worth nothing: each kind of harm is found, and its excuse is heard.

#![allow(clippy::unwrap_used)]

use super::{
    super::{
        case::delivery_id,
        ledger::{Dead, Phase, Seen, Want},
    },
    *,
};

const START: i64 = 1_800_000_000;
/// What the endpoint asks for, by which its deliveries are named.
const ORDERS: &str = "order.*";
const LENIENT: Bounds = Bounds { memory: 1_000, proof: 0 };

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
                subscription: uid(pattern),
                pattern: (*pattern).to_owned(),
                at_least: None,
            })
            .collect(),
        batched: false,
        good: true,
        takes_all: false,
        visible: true,
        attempts: 2,
        wait_ms: 500,
    })
}

/// An id for a name, always the same.
fn uid(name: &str) -> String {
    let number = name.bytes().fold(7, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    format!("01980000-0000-7000-8000-{:012x}", number & 0xffff_ffff_ffff)
}

fn delivery(id: &str, pattern: &str) -> String {
    delivery_id(&uid(id), &uid(pattern)).unwrap()
}

fn accepted(id: &str, deliver_at: Option<i64>) -> Entry {
    Entry::Accepted(Accepted {
        organization: "a".to_owned(),
        id: id.to_owned(),
        uid: uid(id),
        kind: "order.paid".to_owned(),
        number: 1,
        sent: at(0),
        deliver_at: deliver_at.map(at),
        tries: 1,
    })
}

fn request(path: &str, pattern: &str, id: &str, status: u16) -> Request {
    Request {
        organization: "a".to_owned(),
        path: path.to_owned(),
        delivery: delivery(id, pattern),
        events: vec![Seen { id: id.to_owned(), organization: "a".to_owned() }],
        status,
        after_ms: None,
        signed: true,
    }
}

fn came(ms: i64, status: u16) -> Line {
    line(ms, Entry::Request(request("/x", ORDERS, "e", status)))
}

fn letter(attempts: u32) -> Dead {
    Dead {
        connection: "connection /x".to_owned(),
        delivery: delivery("e", ORDERS),
        uid: uid("e"),
        reason: "attempts_exhausted".to_owned(),
        attempts,
    }
}

fn dead(ms: i64, attempts: u32) -> Line {
    line(ms, Entry::Dead(letter(attempts)))
}

/// From one time to the other; what repeats something does so for 15 s more.
fn fault(from: i64, to: i64, repeats: bool) -> [Line; 2] {
    [(from, Phase::Begins), (to, Phase::Over)].map(|(ms, phase)| {
        let (kind, target) = ("kill".to_owned(), "worker".to_owned());
        line(ms, Entry::Fault { number: 0, kind, target, phase, aftermath_s: repeats.then_some(15) })
    })
}

/// Faults with their aftermath, none of which touches the time from 0 to 90 s.
fn elsewhere() -> impl Iterator<Item = Line> {
    fault(-60_000, -16_000, true).into_iter().chain(fault(90_000, 91_000, true))
}

/// One event for one endpoint, and what came of it, with faults elsewhere.
fn judged(more: impl IntoIterator<Item = Line>) -> Judgement {
    let lines = [line(0, endpoint("/x", &[ORDERS])), line(0, accepted("e", None))];
    judge(&lines.into_iter().chain(elsewhere()).chain(more).collect::<Vec<_>>(), LENIENT)
}

/// The same at an endpoint that takes everything in the end.
fn judged_where_all_is_taken(more: impl IntoIterator<Item = Line>) -> Judgement {
    let Entry::Endpoint(endpoint) = endpoint("/x", &[ORDERS]) else { unreachable!("it is one") };
    let endpoint = Entry::Endpoint(Endpoint { takes_all: true, ..endpoint });
    let lines = [line(0, endpoint), line(0, accepted("e", None))];
    judge(&lines.into_iter().chain(more).collect::<Vec<_>>(), LENIENT)
}

fn kinds(judgement: &Judgement) -> Vec<Kind> {
    judgement.findings.iter().map(|finding| finding.kind).collect()
}

fn comparisons(judgement: &Judgement, compared: Compared) -> (usize, usize) {
    let Comparisons { undisturbed, disturbed } = judgement.comparisons[&compared];
    (undisturbed, disturbed)
}

#[test]
fn what_arrives_is_well() {
    let judgement = judged([came(10, 200)]);
    assert_eq!(kinds(&judgement), []);
    assert_eq!((judgement.events, judgement.expected, judgement.delivered), (1, 1, 1));
}

#[test]
fn what_neither_arrives_nor_dies_is_lost() {
    assert_eq!(kinds(&judged([])), [Kind::Lost]);
    assert_eq!(kinds(&judged([came(10, 500)])), [Kind::Lost]);
    let both = [line(0, endpoint("/x", &[ORDERS, "*.paid"])), line(0, accepted("e", None))];
    let one = both.into_iter().chain([came(10, 200)]).collect::<Vec<_>>();
    assert_eq!(kinds(&judge(&one, LENIENT)), [Kind::Lost], "one of two subscriptions");
    let other = line(10, Entry::Request(request("/x", "*.paid", "e", 200)));
    let two = one.into_iter().chain([other]).collect::<Vec<_>>();
    assert_eq!(kinds(&judge(&two, LENIENT)), []);
}

#[test]
fn what_dies_after_its_attempts_is_well_and_must_have_had_them() {
    let failed = |n: i64| (0..n).map(|n| came(30_000 + 1_000 * n, 500)).collect::<Vec<_>>();
    let buried = |n: i64, attempts: u32, around: Option<[Line; 2]>| {
        judged(failed(n).into_iter().chain(around.into_iter().flatten()).chain([dead(35_000, attempts)]))
    };
    let honest = buried(2, 2, None);
    assert_eq!((kinds(&honest), comparisons(&honest, Compared::Attempts)), (vec![], (1, 0)));
    assert_eq!(kinds(&buried(1, 2, None)), [Kind::Dishonest], "one was not made");
    assert_eq!(kinds(&buried(3, 2, None)), [Kind::Dishonest], "one was not counted");
    assert_eq!(kinds(&buried(1, 1, None)), [Kind::Dishonest], "the policy allows two");

    let between = buried(3, 2, Some(fault(31_500, 31_600, true)));
    assert_eq!((kinds(&between), comparisons(&between, Compared::Attempts)), (vec![], (0, 1)));
    assert_eq!(kinds(&buried(1, 2, Some(fault(30_500, 30_600, true)))), []);
    assert_eq!(kinds(&buried(1, 1, Some(fault(30_500, 30_600, true)))), [Kind::Dishonest], "a policy is one");
    // It touches the last of them only, and there are two too many.
    let once = buried(4, 2, Some(fault(33_500, 33_600, true)));
    assert_eq!(kinds(&once), [Kind::Dishonest], "a fault excuses one attempt");
    let after = buried(3, 2, Some(fault(35_001, 35_100, true)));
    assert_eq!(kinds(&after), [Kind::Dishonest], "what comes later excuses nothing");
}

#[test]
fn what_comes_again_is_doubled_unless_something_was_broken_there() {
    let twice = || [came(1_000, 200), came(9_000, 200)];
    let with = |fault: [Line; 2]| judged(twice().into_iter().chain(fault));
    let doubled = judged(twice());
    assert_eq!(kinds(&doubled), [Kind::Doubled]);
    assert_eq!(comparisons(&doubled, Compared::Repeats), (2, 0));
    assert_eq!(kinds(&with(fault(2_000, 3_000, false))), [Kind::Doubled], "a drain repeats nothing");
    assert_eq!(kinds(&with(fault(9_001, 9_500, true))), [Kind::Doubled], "what comes later");
    assert_eq!(kinds(&with(fault(-15_000, -14_001, true))), [Kind::Doubled], "its aftermath is over");
    let excused = with(fault(2_000, 3_000, true));
    assert_eq!((kinds(&excused), excused.repeats), (vec![], 1));
    assert_eq!(comparisons(&excused, Compared::Repeats), (0, 2));
    assert_eq!(kinds(&with(fault(-15_000, -14_000, true))), [], "its aftermath");
}

#[test]
fn what_happened_at_the_first_attempt_excuses_no_repeat_later() {
    // Failed within a fault and taken long after it; and so after a second failure.
    let since_the_first =
        |more: [Line; 3]| judged(fault(500, 600, true).into_iter().chain([came(1_000, 500)]).chain(more));
    let doubled = since_the_first([came(17_000, 500), came(20_000, 200), came(30_000, 200)]);
    assert_eq!(kinds(&doubled), [Kind::Doubled]);
    let early = since_the_first([came(17_000, 500), came(17_400, 500), came(20_000, 200)]);
    assert_eq!(kinds(&early), [Kind::Early]);
    // Two hands had it when it was taken: the one that failed comes back after its wait.
    let two_hands = since_the_first([came(1_100, 200), came(17_000, 500), came(20_000, 200)]);
    assert_eq!(kinds(&two_hands), []);
}

#[test]
fn a_delivery_bears_the_name_that_follows_from_event_and_subscription() {
    let other = Request { delivery: uid("another"), ..request("/x", ORDERS, "e", 200) };
    assert_eq!(kinds(&judged([line(10, Entry::Request(other.clone()))])), [Kind::Misnamed]);
    let both = judged([came(10, 200), line(20, Entry::Request(other))]);
    assert_eq!(kinds(&both), [Kind::Unwanted, Kind::Misnamed], "one subscription, two deliveries");
    let misnamed = Dead { delivery: uid("another"), ..letter(2) };
    let misnamed = judged([came(10, 500), came(1_000, 500), line(1_100, Entry::Dead(misnamed))]);
    assert!(kinds(&misnamed).contains(&Kind::Misnamed), "{misnamed:?}");
}

#[test]
fn nothing_is_given_up_where_everything_is_taken() {
    let lines = |around: Option<[Line; 2]>| {
        let failed = [came(10, 500), came(1_000, 500)];
        judged_where_all_is_taken(
            failed.into_iter().chain(around.into_iter().flatten()).chain([dead(1_100, 2)]),
        )
    };
    assert_eq!(kinds(&lines(None)), [Kind::Buried]);
    assert_eq!(kinds(&lines(Some(fault(0, 500, true)))), [Kind::Buried], "no fault excuses it");
}

#[test]
fn nothing_is_given_up_but_for_its_attempts() {
    let expired = Dead { reason: "expired".to_owned(), ..letter(1) };
    assert_eq!(kinds(&judged([came(10, 500), line(600, Entry::Dead(expired))])), [Kind::Buried]);
}

#[test]
fn what_was_taken_is_not_given_up_unless_something_was_broken_there() {
    let lines = |around: Option<[Line; 2]>| {
        let attempts = [came(30_000, 500), came(31_000, 200), came(41_000, 500)];
        judged(attempts.into_iter().chain(around.into_iter().flatten()).chain([dead(42_000, 2)]))
    };
    assert_eq!(kinds(&lines(None)), [Kind::Doubled, Kind::Buried]);
    assert_eq!(kinds(&lines(Some(fault(41_500, 41_600, true)))), [Kind::Doubled, Kind::Buried]);
    assert_eq!(kinds(&lines(Some(fault(32_000, 32_100, true)))), []);
    let at_once = judged([came(30_000, 500), came(31_000, 200), dead(31_100, 2)]);
    assert!(kinds(&at_once).contains(&Kind::Buried), "{at_once:?}");
}

#[test]
fn nothing_is_early() {
    let lines = |ms: i64| {
        let promised = [line(0, endpoint("/x", &[ORDERS])), line(0, accepted("e", Some(2_000)))];
        let around = fault(0, 10_000, true);
        promised.into_iter().chain(around).chain([came(ms, 200)]).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&judge(&lines(1_999), LENIENT)), [Kind::Early], "no fault excuses it");
    let in_time = judge(&lines(2_000), LENIENT);
    assert_eq!((kinds(&in_time), comparisons(&in_time, Compared::Times)), (vec![], (1, 0)));
    let retried = |ms: i64, around: Option<[Line; 2]>| {
        let attempts = [came(30_000, 500), came(30_000 + ms, 200)];
        judged(attempts.into_iter().chain(around.into_iter().flatten()))
    };
    let early = retried(499, None);
    assert_eq!(kinds(&early), [Kind::Early], "before the policy's wait");
    assert_eq!(comparisons(&early, Compared::Waits), (1, 0));
    assert_eq!(kinds(&retried(500, None)), []);
    let excused = retried(499, Some(fault(30_100, 30_200, true)));
    assert_eq!((kinds(&excused), comparisons(&excused, Compared::Waits)), (vec![], (0, 1)));
    assert_eq!(kinds(&retried(499, Some(fault(30_500, 30_600, true)))), [Kind::Early]);
    let asked = |ms: i64| {
        let busy = Request { after_ms: Some(2_000), ..request("/x", ORDERS, "e", 429) };
        judged([line(1_000, Entry::Request(busy)), came(1_000 + ms, 200)])
    };
    assert_eq!(kinds(&asked(1_999)), [Kind::Early], "before the wait that was asked for");
    assert_eq!(kinds(&asked(2_000)), []);
}

#[test]
fn what_is_not_asked_for_is_found_wherever_it_comes() {
    let arrived = || came(10, 200);
    let foreign = Request {
        events: vec![Seen { id: "e".to_owned(), organization: "b".to_owned() }],
        ..request("/x", "*.paid", "e", 200)
    };
    assert_eq!(kinds(&judged([arrived(), line(20, Entry::Request(foreign))])), [Kind::Misdelivered]);
    let forged = Request { signed: false, ..request("/x", ORDERS, "e", 200) };
    assert_eq!(kinds(&judged([line(20, Entry::Request(forged))])), [Kind::Forged]);
    let unknown = request("/elsewhere", ORDERS, "e", 200);
    assert_eq!(kinds(&judged([arrived(), line(20, Entry::Request(unknown))])), [Kind::Unwanted]);
    let never = line(20, Entry::Request(request("/x", ORDERS, "never", 200)));
    assert_eq!(kinds(&judged([arrived(), never])), [Kind::Unwanted]);
    let filtered = line(0, endpoint("/y", &["stock.*"]));
    let unwanted = request("/y", "stock.*", "e", 200);
    assert_eq!(kinds(&judged([arrived(), filtered, line(20, Entry::Request(unwanted))])), [Kind::Unwanted]);
}

#[test]
fn an_event_that_may_have_been_taken_may_come_and_its_answer_is_missed() {
    let unresolved = Entry::Unresolved { organization: "a".to_owned(), id: "maybe".to_owned() };
    let maybe = line(30, Entry::Request(request("/x", ORDERS, "maybe", 200)));
    assert_eq!(kinds(&judged([came(10, 200), line(20, unresolved), maybe])), [Kind::Unresolved]);
}

#[test]
fn a_bus_that_does_not_come_to_rest_is_a_finding() {
    let restless = line(20, Entry::Restless { open: "3 deliveries wait".to_owned() });
    assert_eq!(kinds(&judged([came(10, 200), restless])), [Kind::Restless]);
}

#[test]
fn a_run_in_which_too_little_happened_proves_nothing() {
    let strict = |lines: &[Line]| judge(lines, Bounds { proof: 1, ..LENIENT });
    // Events, deliveries, and each of the four comparisons.
    assert_eq!(kinds(&strict(&[])), [Kind::Unproven; 6]);
    // One that is due, one that is taken after a wait, and one that dies.
    let lines = |around: [Line; 2]| {
        let (second, third) = (endpoint("/y", &["*.paid"]), accepted("e", Some(1_000)));
        let failed = |ms| line(ms, Entry::Request(request("/y", "*.paid", "e", 500)));
        let letter =
            Dead { connection: "connection /y".to_owned(), delivery: delivery("e", "*.paid"), ..letter(2) };
        let setting = [line(0, endpoint("/x", &[ORDERS])), line(0, second), line(0, third)];
        let ends = [came(1_000, 200), failed(2_000), failed(3_000), line(3_100, Entry::Dead(letter))];
        setting.into_iter().chain(around).chain(ends).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&strict(&lines(fault(20_000, 20_100, true)))), []);
    let disturbed = strict(&lines(fault(500, 4_000, true)));
    let told: Vec<_> = disturbed.findings.iter().map(|finding| &*finding.told).collect();
    assert_eq!(kinds(&disturbed), [Kind::Unproven; 3], "{told:?}");
    assert!(
        ["Waits", "Repeats", "Attempts"].iter().zip(&told).all(|(kind, told)| told.contains(kind)),
        "{told:?}"
    );
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
    let fired = uid("the first tick");
    let arrived = Request {
        delivery: delivery("the first tick", "tick.*"),
        ..request("/ticks", "tick.*", &fired, 200)
    };
    let arrived = |ms| line(ms, Entry::Request(arrived.clone()));
    let all =
        [schedule(), ticks, tick("fired", 0, 0, Some(&fired)), tick("skipped", 1, 3, None), arrived(10)];
    let judgement = judge(&all, LENIENT);
    assert_eq!((kinds(&judgement), judgement.ticks_fired, judgement.ticks_skipped), (vec![], 1, 3));
    assert_eq!(kinds(&judge(&all[..4], LENIENT)), [Kind::Lost], "it was fired, and came nowhere");
    let early = all[..4].iter().cloned().chain([arrived(-1)]).collect::<Vec<_>>();
    assert_eq!(kinds(&judge(&early, LENIENT)), [Kind::Early]);
    let missing = [schedule(), tick("skipped", 1, 3, None)];
    assert_eq!(kinds(&judge(&missing, LENIENT)), [Kind::Tick]);
    let doubled = [schedule(), tick("skipped", 0, 2, None), tick("skipped", 2, 3, None)];
    assert_eq!(kinds(&judge(&doubled, LENIENT)), [Kind::Tick]);
}

#[test]
fn memory_is_bounded_and_a_refusal_is_a_finding() {
    let memory = |bytes| line(0, Entry::Memory { process: "publisher-0".to_owned(), bytes });
    assert_eq!(kinds(&judged([came(10, 200), memory(1_000)])), []);
    assert_eq!(kinds(&judged([came(10, 200), memory(1_001)])), [Kind::Memory]);
    let (organization, id, answer) = ("a".to_owned(), "x".to_owned(), "422".to_owned());
    let refused = line(0, Entry::Refused { organization, id, answer });
    assert_eq!(kinds(&judged([came(10, 200), refused])), [Kind::Refused]);
}
