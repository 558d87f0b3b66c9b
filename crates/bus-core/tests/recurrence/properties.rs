//! What holds for every expression, zone and time.

use bus_core::schedule::{Recurrence, RecurrenceError};
use jiff::{SignedDuration, Timestamp};
use proptest::{prelude::*, sample::select};

use crate::{changes, recurrence, time};

/// Beside the usual ones: a day that was skipped (Apia), changes at midnight (Beirut, Santiago) and twice a
/// year beside the usual half (Casablanca), by half an hour (Lord Howe), and late on the day before (Nuuk).
const ZONES: [&str; 10] = [
    "Africa/Casablanca",
    "America/New_York",
    "America/Nuuk",
    "America/Santiago",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Europe/London",
    "Pacific/Apia",
    "UTC",
];

/// Expressions that name some time: no month lacks the days that are chosen from.
fn crons() -> impl Strategy<Value = String> {
    let clock = || select(vec!["*", "0", "30", "*/15", "0,30", "10-50/20", "59"]);
    let hour = select(vec!["*", "0", "1", "2", "23", "*/2", "1,2", "0-4", "20-23/3"]);
    let day = select(vec!["*", "1", "15", "L", "LW", "5W", "*/10", "28,29", "10-20"]);
    let month = select(vec!["*", "1", "*/3", "MAR,OCT", "9-11"]);
    let weekday = select(vec!["*", "SUN", "1-5", "SAT-SUN", "5L", "SUN#1", "0,3", "*/2"]);
    (prop::option::of(clock()), clock(), hour, day, month, weekday).prop_map(
        |(second, minute, hour, day, month, weekday)| {
            let second = second.map(|second| format!("{second} ")).unwrap_or_default();
            format!("{second}{minute} {hour} {day} {month} {weekday}")
        },
    )
}

/// Any time, or one near a change of the zone's clocks.
fn zones_and_times() -> impl Strategy<Value = (&'static str, Timestamp)> {
    let near = |timezone: &'static str| {
        let mut around = changes(timezone, time("1980-01-01T00:00:00Z"), time("2040-01-01T00:00:00Z"));
        around.push(time("2000-01-01T00:00:00Z"));
        (select(around), -7200..7200_i64, -999_999_999..=999_999_999_i32).prop_map(
            |(change, seconds, nanos)| {
                change + SignedDuration::new(seconds, 0) + SignedDuration::new(0, nanos)
            },
        )
    };
    let any = (400_000_000..90_000_000_000_i64).prop_map(|second| Timestamp::from_second(second).unwrap());
    select(&ZONES[..])
        .prop_flat_map(move |timezone| (Just(timezone), prop_oneof![3 => near(timezone), 1 => any.clone()]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_two_directions_agree(cron in crons(), (timezone, time) in zones_and_times()) {
        let recurrence = recurrence(&cron, timezone);
        let next = recurrence.next_after(time).unwrap();
        let last = recurrence.last_before(time).unwrap();
        prop_assert!(last < time && time < next);
        // At most one tick is between the two: the time itself.
        let between = recurrence.next_after(last).unwrap();
        prop_assert!(between == next || between == time, "{between}");
        let between = recurrence.last_before(next).unwrap();
        prop_assert!(between == last || between == time, "{between}");
    }

    #[test]
    fn ticks_are_the_next_ones_in_order(cron in crons(), (timezone, time) in zones_and_times()) {
        let recurrence = recurrence(&cron, timezone);
        let ticks: Vec<_> = recurrence.ticks_after(time).take(20).collect();
        let mut from = time;
        for tick in ticks {
            prop_assert!(tick > from);
            prop_assert_eq!(Some(tick), recurrence.next_after(from));
            from = tick;
        }
    }

    #[test]
    fn no_time_is_too_far(cron in crons(), timezone in select(&ZONES[..]), second in -377_705_023_201..=253_402_207_200_i64) {
        let (recurrence, time) = (recurrence(&cron, timezone), Timestamp::from_second(second).unwrap());
        prop_assert!(recurrence.next_after(time).is_none_or(|tick| tick > time));
        prop_assert!(recurrence.last_before(time).is_none_or(|tick| tick < time));
    }

    #[test]
    fn what_is_accepted_is_its_own_normal_form(
        cron in prop_oneof!["\\PC{0,40}", "(([0-9]{1,2}|[*LW#,/-]|MON|jan){1,4}[ \t]){4}[0-9*/LW#,-]{1,4}"],
        timezone in "UTC|\\PC{0,20}",
    ) {
        match Recurrence::parse(&cron, &timezone) {
            Ok(recurrence) => {
                let again = Recurrence::parse(recurrence.cron(), recurrence.timezone()).unwrap();
                prop_assert_eq!(again, recurrence);
            }
            Err(RecurrenceError::Refused(reason)) => prop_assert!(false, "unexplained: {}", reason),
            Err(_) => {}
        }
    }
}

#[test]
fn ticks_are_from_1970_to_4999() {
    for timezone in ["UTC", "America/New_York"] {
        for cron in ["0 0 * * * *", "0 * * * *"] {
            let hourly = recurrence(cron, timezone);
            for (outside, first) in [(Timestamp::MIN, Some("1970-01-01T01:00:00Z")), (Timestamp::MAX, None)] {
                assert_eq!(hourly.next_after(outside), first.map(time));
            }
            for (outside, last) in [(Timestamp::MIN, None), (Timestamp::MAX, Some("4999-12-31T23:00:00Z"))] {
                assert_eq!(hourly.last_before(outside), last.map(time));
            }
            assert_eq!(hourly.next_after(time("4999-12-31T23:00:00Z")), None);
            assert_eq!(hourly.last_before(time("1970-01-01T01:00:00Z")), None);
        }
    }
}
