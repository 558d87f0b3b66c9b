//! Our ticks beside those of an implementation that shares nothing with ours: see
//! [`devkit::independent::ticks`].

use std::collections::{BTreeMap, BTreeSet};

use bus_core::schedule::tz_version;
use devkit::independent::ticks;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::{changes, recurrence, time, zone};

/// Clocks that change at night, by half an hour, at midnight, and never.
const ZONES: [&str; 6] =
    ["America/New_York", "America/Santiago", "Asia/Kathmandu", "Australia/Lord_Howe", "Europe/London", "UTC"];

/// Compared over four years.
const SPARSE: [&str; 26] = [
    "0 0 * * *",
    "30 0 * * *",
    "30 1 * * *",
    "0 2 * * *",
    "15 2 * * *",
    "30 2 * * *",
    "0,30 2 * * *",
    "30 1-23/6 * * *",
    "0 9 * * MON-FRI",
    "0 9 * * 1,3,5",
    "0 0 * * 7",
    "30 2 * * 6-7",
    "0 0 * * */2",
    "0 0 L * *",
    "30 2 LW * *",
    "0 12 * * 5L",
    "0 12 * * FRI#2",
    "30 2 * * SUN#2,SUN#4",
    "0 0 * 2 MON#5",
    "0 0 29 2 *",
    "0 0 31 * *",
    "0 0 13 * FRI",
    "30 4 1,15 JAN-JUN MON",
    "0 0 */10 * *",
    "59 23 31 DEC *",
    "5 4 10-20/5 */3 *",
];

/// Compared for two days around every change of the clocks.
const DENSE: [&str; 15] = [
    "0 1 * * *",
    "0 3 * * *",
    "0,30 1,2 * * *",
    "0-59/20 2 * * *",
    "*/30 2 * * *",
    "30 */8 * * *",
    "*/15 * * * *",
    "0 * * * *",
    "30 * * * *",
    "0 */2 * * *",
    "*/20 1 * * *",
    "15,45 0-3 * * *",
    "0 30 2 * * *",
    "5 30 1 * * *",
    "0,30 59 */2 * * *",
];

/// Compared for six hours around every change of the clocks.
const DENSEST: [&str; 3] = ["* * * * *", "*/30 * * * * *", "7 */3 * * * *"];

/// `*/10` restricts the day of the month as we read it, and not as the other does: compared for one month.
const BOTH_DAYS: &str = "0 0 */10 * MON";

const FROM: &str = "2025-01-01T00:00:00Z";
const UNTIL: &str = "2029-01-01T00:00:00Z";

/// Where the two differ: the expression, the time zone, our ticks that the other lacks, and the other's.
type Deviation = (&'static str, &'static str, &'static [&'static str], &'static [&'static str]);

const DEVIATIONS: [Deviation; 7] = [
    // The other knows fixed times in expressions of five fields only.
    (
        "0 30 2 * * *",
        "America/New_York",
        &[
            "2025-03-09T03:00:00-04:00",
            "2026-03-08T03:00:00-04:00",
            "2027-03-14T03:00:00-04:00",
            "2028-03-12T03:00:00-04:00",
        ],
        &[],
    ),
    (
        "5 30 1 * * *",
        "America/New_York",
        &[],
        &[
            "2025-11-02T01:30:05-05:00",
            "2026-11-01T01:30:05-05:00",
            "2027-11-07T01:30:05-05:00",
            "2028-11-05T01:30:05-05:00",
        ],
    ),
    (
        "5 30 1 * * *",
        "Europe/London",
        &[
            "2025-03-30T02:00:00+01:00",
            "2026-03-29T02:00:00+01:00",
            "2027-03-28T02:00:00+01:00",
            "2028-03-26T02:00:00+01:00",
        ],
        &[
            "2025-10-26T01:30:05+00:00",
            "2026-10-25T01:30:05+00:00",
            "2027-10-31T01:30:05+00:00",
            "2028-10-29T01:30:05+00:00",
        ],
    ),
    // The other goes on by whole hours, and passes by what is within the half hour of a change.
    (
        "*/30 2 * * *",
        "Australia/Lord_Howe",
        &[
            "2025-04-06T02:00:00+10:30",
            "2026-04-05T02:00:00+10:30",
            "2027-04-04T02:00:00+10:30",
            "2028-04-02T02:00:00+10:30",
        ],
        &[],
    ),
    (
        "30 * * * *",
        "Australia/Lord_Howe",
        &[
            "2025-04-06T01:30:00+10:30",
            "2025-10-05T02:30:00+11:00",
            "2026-04-05T01:30:00+10:30",
            "2026-10-04T02:30:00+11:00",
            "2027-04-04T01:30:00+10:30",
            "2027-10-03T02:30:00+11:00",
            "2028-04-02T01:30:00+10:30",
            "2028-10-01T02:30:00+11:00",
        ],
        &[],
    ),
    (
        "0 */2 * * *",
        "Australia/Lord_Howe",
        &[
            "2025-04-06T02:00:00+10:30",
            "2026-04-05T02:00:00+10:30",
            "2027-04-04T02:00:00+10:30",
            "2028-04-02T02:00:00+10:30",
        ],
        &[],
    ),
    // The other asks for both days where a field begins with `*`, as Debian's cron does. POSIX has either.
    (
        BOTH_DAYS,
        "UTC",
        &[
            "2025-01-01T00:00:00+00:00",
            "2025-01-06T00:00:00+00:00",
            "2025-01-11T00:00:00+00:00",
            "2025-01-13T00:00:00+00:00",
            "2025-01-20T00:00:00+00:00",
            "2025-01-21T00:00:00+00:00",
            "2025-01-27T00:00:00+00:00",
            "2025-01-31T00:00:00+00:00",
        ],
        &[],
    ),
];

struct Question {
    cron: &'static str,
    timezone: &'static str,
    after: Timestamp,
    until: Timestamp,
}

fn questions() -> Vec<Question> {
    let (from, until) = (time(FROM), time(UNTIL));
    let mut questions = Vec::new();
    for timezone in ZONES {
        questions.extend(SPARSE.map(|cron| Question { cron, timezone, after: from, until }));
        // One time without a change is for the zones that have none.
        let changes = changes(timezone, from, until).into_iter();
        for change in changes.chain([time("2026-07-01T00:00:00Z")]) {
            let around = |cron, hours| {
                let distance = SignedDuration::from_hours(hours);
                Question { cron, timezone, after: change - distance, until: change + distance }
            };
            questions.extend(DENSE.map(|cron| around(cron, 24)));
            questions.extend(DENSEST.map(|cron| around(cron, 3)));
        }
    }
    let month = time("2025-01-31T12:00:00Z");
    questions.push(Question {
        cron: BOTH_DAYS,
        timezone: "UTC",
        after: from - SignedDuration::from_secs(1),
        until: month,
    });
    questions
}

#[test]
fn an_independent_implementation_finds_the_same_ticks() {
    let questions = questions();
    let asked: Vec<_> = questions
        .iter()
        .map(|Question { cron, timezone, after, until }| {
            json!({"cron": cron, "timezone": timezone, "after": after.as_second(), "until": until.as_second()})
        })
        .collect();

    let mut found: BTreeMap<_, (Vec<String>, Vec<String>)> = BTreeMap::new();
    for (Question { cron, timezone, after, until }, answer) in
        questions.into_iter().zip(ticks(&asked).unwrap())
    {
        assert_eq!(answer["tz_version"], tz_version());
        let recurrence = recurrence(cron, timezone);
        let ours = recurrence.ticks_after(after).take_while(|tick| *tick <= until);
        let ours: BTreeSet<i64> = ours.map(Timestamp::as_second).collect();
        let theirs: BTreeSet<i64> = serde_json::from_value(answer["ticks"].clone()).unwrap();
        assert!(
            !theirs.is_empty() || cron == BOTH_DAYS || recurrence.next_after(after).unwrap() > until,
            "{cron}"
        );
        if ours != theirs {
            let zone = zone(timezone);
            let local = |second: &i64| {
                let tick = Timestamp::from_second(*second).unwrap().to_zoned(zone.clone());
                tick.strftime("%FT%T%:z").to_string()
            };
            let (only_ours, only_theirs) = found.entry((cron, timezone)).or_default();
            only_ours.extend(ours.difference(&theirs).map(local));
            only_theirs.extend(theirs.difference(&ours).map(local));
        }
    }
    let owned = |ticks: &[&str]| ticks.iter().map(|tick| (*tick).to_owned()).collect();
    let listed = DEVIATIONS.map(|(cron, zone, ours, theirs)| ((cron, zone), (owned(ours), owned(theirs))));
    assert_eq!(found, BTreeMap::from(listed));
}
