#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::answer::{Answer, HttpAnswer};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_hours(24);
const FRESH: Standing = Standing { attempts: 0, age: Duration::ZERO };

fn rules(policy: &RetryPolicy) -> Rules<'_> {
    Rules { policy, final_statuses: &[], defer_min: SECOND, defer_max: DAY, lifetime: DAY * 3 }
}

/// What an answer without a body means.
fn answered(status: u16, retry_after: Option<&'static str>) -> Outcome {
    let value = retry_after.map(|value| (RETRY_AFTER, HeaderValue::from_static(value)));
    let headers = HeaderMap::from_iter(value);
    let http = HttpAnswer { status, headers: &headers, body: Some(b""), at: Timestamp::UNIX_EPOCH };
    Answer::read(&http).about(b"{}").clone()
}

fn retry(seconds: u64, attempts: u32, reason: &str) -> Verdict {
    Verdict::Retry { wait: Duration::from_secs(seconds), attempts, reason: reason.into() }
}

fn deferred(seconds: u64) -> Outcome {
    Outcome::Deferred { wait: Duration::from_secs(seconds), why: "busy".into() }
}

#[test]
fn every_status_has_its_verdict() {
    let policy = RetryPolicy::default();
    let rules = Rules { final_statuses: &[400, 422, 599], ..rules(&policy) };
    for status in 100..=599 {
        let plain = verdict(&answered(status, None), &rules, &FRESH, 0.0);
        let asked = verdict(&answered(status, Some("90")), &rules, &FRESH, 0.0);
        let failed = format!("the endpoint answered {status}");
        let dead = Verdict::Dead { reason: DeadReason::FinalStatus, attempts: 1 };
        let expected = match status {
            200..=299 => (Verdict::Delivered, Verdict::Delivered),
            410 => (Verdict::Gone { attempts: 1 }, Verdict::Gone { attempts: 1 }),
            429 | 503 => (retry(1, 1, &failed), retry(90, 0, &format!("{failed} with Retry-After"))),
            400 | 422 | 599 => (dead.clone(), dead),
            _ => (retry(1, 1, &failed), retry(90, 1, &failed)),
        };
        assert_eq!((plain, asked), expected, "{status}");
    }
}

#[test]
fn every_other_failure_is_tried_again_and_counted() {
    let policy = RetryPolicy::default();
    let text = || "x".to_owned();
    let failures = [
        Failure::Reported(text()),
        Failure::Timeout(SECOND),
        Failure::Resolve(text()),
        Failure::AddressRefused(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        Failure::Connect(text()),
        Failure::Exchange(text()),
        Failure::Request(text()),
    ];
    for failure in failures {
        let reason = failure.to_string();
        let outcome = Outcome::from(failure);
        let standing = Standing { attempts: 2, ..FRESH };
        assert_eq!(verdict(&outcome, &rules(&policy), &standing, 0.0), retry(4, 3, &reason));
        let last = Standing { attempts: 19, ..FRESH };
        let exhausted = Verdict::Dead { reason: DeadReason::AttemptsExhausted, attempts: 20 };
        assert_eq!(verdict(&outcome, &rules(&policy), &last, 0.0), exhausted, "{reason}");
    }
}

#[test]
fn a_final_status_is_final_at_the_first_and_at_the_last_attempt() {
    let policy = RetryPolicy::default();
    let rules = Rules { final_statuses: &[422, 410, 503], ..rules(&policy) };
    let dead = |attempts| Verdict::Dead { reason: DeadReason::FinalStatus, attempts };
    for attempts in [0, 19, u32::MAX] {
        let standing = Standing { attempts, ..FRESH };
        let after = attempts.saturating_add(1);
        assert_eq!(verdict(&answered(422, None), &rules, &standing, 0.0), dead(after));
        assert_eq!(verdict(&answered(410, None), &rules, &standing, 0.0), Verdict::Gone { attempts: after });
    }
    assert_eq!(verdict(&answered(503, None), &rules, &FRESH, 0.0), dead(1));
    assert!(matches!(
        verdict(&answered(503, Some("5")), &rules, &FRESH, 0.0),
        Verdict::Retry { attempts: 0, .. }
    ));
}

#[test]
fn a_deferral_is_brought_within_its_bounds() {
    let policy = RetryPolicy::default();
    for (asked, granted) in [(0, 1), (1, 1), (77, 77), (86_400, 86_400), (86_401, 86_400), (u64::MAX, 86_400)]
    {
        assert_eq!(verdict(&deferred(asked), &rules(&policy), &FRESH, 0.0), retry(granted, 0, "busy"));
    }
}

#[test]
fn an_endpoint_that_asks_for_ages_with_a_failure_is_heeded_for_a_day() {
    let policy = RetryPolicy::default();
    let outcome = answered(500, Some("99999999999999999999999"));
    assert!(matches!(verdict(&outcome, &rules(&policy), &FRESH, 0.0), Verdict::Retry { wait: DAY, .. }));
}

#[test]
fn what_would_come_after_the_lifetime_is_dead() {
    let policy = RetryPolicy::default();
    let rules = Rules { lifetime: Duration::from_secs(100), ..rules(&policy) };
    let expired = |attempts| Verdict::Dead { reason: DeadReason::Expired, attempts };
    let aged = |seconds| Standing { attempts: 5, age: Duration::from_secs(seconds) };

    assert_eq!(verdict(&deferred(10), &rules, &aged(90), 0.0), retry(10, 5, "busy"));
    assert_eq!(verdict(&deferred(10), &rules, &aged(91), 0.0), expired(5));
    assert_eq!(verdict(&deferred(10), &rules, &aged(90), 0.5), expired(5), "the jitter counts");
    let failed = answered(500, None);
    assert_eq!(verdict(&failed, &rules, &aged(68), 0.0), retry(32, 6, "the endpoint answered 500"));
    assert_eq!(verdict(&failed, &rules, &aged(69), 0.0), expired(6));
}

#[test]
fn fifty_deferrals_leave_the_attempts_at_0() {
    let policy = RetryPolicy { max_attempts: 1, ..RetryPolicy::default() };
    let mut standing = FRESH;
    for _ in 0..50 {
        let Verdict::Retry { wait, attempts, .. } = verdict(&deferred(60), &rules(&policy), &standing, 0.9)
        else {
            panic!("a deferral is no failure")
        };
        standing = Standing { attempts, age: standing.age + wait };
    }
    assert_eq!(standing.attempts, 0);
    // Not for ever, though.
    standing.age = DAY * 3;
    let expired = Verdict::Dead { reason: DeadReason::Expired, attempts: 0 };
    assert_eq!(verdict(&deferred(60), &rules(&policy), &standing, 0.0), expired);
}

#[test]
fn the_words_are_those_that_are_stored() {
    for reason in DeadReason::ALL {
        assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{reason}\""));
    }
}

fn durations() -> impl Strategy<Value = Duration> {
    prop_oneof![
        any::<Duration>(),
        (0u64..100_000_000).prop_map(Duration::from_millis),
        Just(Duration::ZERO),
        Just(Duration::MAX)
    ]
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        Just(Outcome::Delivered),
        durations().prop_map(|wait| Outcome::Deferred { wait, why: String::new() }),
        (any::<u16>(), proptest::option::of(durations())).prop_map(|(status, not_before)| Outcome::Failed {
            failure: Failure::Status(status),
            not_before
        }),
    ]
}

/// Policies that no check has seen.
fn policies() -> impl Strategy<Value = RetryPolicy> {
    let numbers = (any::<u32>(), any::<u64>(), any::<f64>(), any::<u64>(), any::<f64>());
    let delays = proptest::collection::vec(any::<u64>(), 0..5);
    (numbers, delays).prop_map(|((max_attempts, base_ms, factor, cap_ms, jitter), delays_ms)| RetryPolicy {
        max_attempts,
        base_ms,
        factor,
        cap_ms,
        jitter,
        delays_ms,
    })
}

proptest! {
    #[test]
    fn no_input_panics_and_no_retry_outlives_the_delivery(
        outcome in outcomes(), policy in policies(), (defer_min, defer_max) in (durations(), durations()),
        lifetime in durations(), age in durations(), attempts: u32, random: f64,
    ) {
        let rules = Rules { policy: &policy, final_statuses: &[404], defer_min, defer_max, lifetime };
        match verdict(&outcome, &rules, &Standing { attempts, age }, random) {
            Verdict::Delivered => prop_assert_eq!(outcome, Outcome::Delivered),
            Verdict::Retry { wait, attempts: after, .. } => {
                prop_assert!(age.saturating_add(wait) <= lifetime);
                prop_assert_eq!(after, attempts + u32::from(!matches!(outcome, Outcome::Deferred { .. })));
            }
            Verdict::Dead { .. } | Verdict::Gone { .. } => prop_assert_ne!(outcome, Outcome::Delivered),
        }
    }

    #[test]
    fn jitter_is_only_added_and_stays_within_its_share(attempts in 0u32..99, random in 0.0f64..1.0) {
        let policy = RetryPolicy { max_attempts: 100, ..RetryPolicy::default() };
        let standing = Standing { attempts, ..FRESH };
        let failed = Outcome::from(Failure::Timeout(SECOND));
        let (Verdict::Retry { wait: plain, .. }, Verdict::Retry { wait: jittered, .. }) = (
            verdict(&failed, &rules(&policy), &standing, 0.0),
            verdict(&failed, &rules(&policy), &standing, random),
        ) else {
            panic!("there are attempts left")
        };
        prop_assert!(jittered >= plain && jittered <= plain.mul_f64(1.1001));
    }

    #[test]
    fn a_promised_time_is_never_undercut(
        asked in 0u64..=86_400_000, counted: bool, attempts in 0u32..19, random in 0.0f64..1.0,
    ) {
        let policy = RetryPolicy::default();
        let asked = Duration::from_millis(asked);
        let outcome = if counted {
            Outcome::Failed { failure: Failure::Status(500), not_before: Some(asked) }
        } else {
            Outcome::Deferred { wait: asked, why: String::new() }
        };
        let standing = Standing { attempts, ..FRESH };
        let Verdict::Retry { wait, .. } = verdict(&outcome, &rules(&policy), &standing, random) else {
            panic!("there are attempts left")
        };
        prop_assert!(wait >= asked);
    }
}
