//! Which texts are expressions, and what they mean.

use std::time::Duration;

use bus_core::schedule::{Field, ItemError, MAX_CRON_BYTES, Recurrence, RecurrenceError, tz_version};

use crate::{recurrence, time};

fn refused(cron: &str) -> RecurrenceError {
    Recurrence::parse(cron, "UTC").expect_err(cron)
}

/// The days of 2026 on which an expression has its first ticks, one tick a day.
fn days(cron: &str, count: usize) -> String {
    let recurrence = recurrence(cron, "UTC");
    let ticks = recurrence.ticks_after(time("2025-12-31T23:59:59Z")).take(count);
    ticks.map(|tick| tick.strftime("%m-%d").to_string()).collect::<Vec<_>>().join(" ")
}

#[test]
fn spellings_of_one_text_are_one_schedule() {
    for (text, normalised) in [
        ("  0\t9 *  * mon-fri ", "0 9 * * MON-FRI"),
        ("0 0 1 jan,Jul *", "0 0 1 JAN,JUL *"),
        ("0 0 lw * *", "0 0 LW * *"),
        ("*/10 * * * * *", "*/10 * * * * *"),
        ("@hourly", "0 * * * *"),
        ("@DAILY", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        (" @weekly ", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
    ] {
        let parsed = recurrence(text, "europe/LONDON");
        assert_eq!((parsed.cron(), parsed.timezone()), (normalised, "Europe/London"));
        assert_eq!(parsed, recurrence(normalised, "Europe/London"));
    }
    assert_ne!(recurrence("1-2 * * * *", "UTC"), recurrence("1,2 * * * *", "UTC"));
    assert_ne!(recurrence("0 0 * * *", "UTC"), recurrence("0 0 * * *", "Europe/London"));
}

#[test]
fn days_of_the_calendar() {
    // 2026 begins on a Thursday.
    for (cron, expected) in [
        ("0 0 L * *", "01-31 02-28 03-31"),
        ("0 0 1,L * *", "01-01 01-31 02-01"),
        ("0 0 LW * *", "01-30 02-27 03-31"),
        ("0 0 15W * *", "01-15 02-16 03-16 04-15"),
        ("0 0 1W * *", "01-01 02-02 03-02"),
        ("0 0 31W * *", "01-30 03-31 05-29"),
        ("0 0 * * 5L", "01-30 02-27 03-27"),
        ("0 0 * * MONL", "01-26 02-23 03-30"),
        ("0 0 * * TUE#1", "01-06 02-03 03-03"),
        ("0 0 * * 4#5", "01-29 04-30 07-30"),
        ("0 0 * * SAT-SUN", "01-03 01-04 01-10"),
        ("0 0 * * 6-7", "01-03 01-04 01-10"),
        ("0 0 * * 0", "01-04 01-11"),
        ("0 0 * * 7", "01-04 01-11"),
        ("0 0 5 FEB-APR *", "02-05 03-05 04-05"),
        // Either day, if both fields have something other than `*`.
        ("0 0 10 * MON", "01-05 01-10 01-12"),
        ("0 0 */10 * MON", "01-01 01-05 01-11 01-12"),
        ("0 0 10 * *", "01-10 02-10"),
        ("0 0 * * MON", "01-05 01-12"),
    ] {
        assert_eq!(days(cron, expected.split(' ').count()), expected, "{cron}");
    }
}

#[test]
fn what_has_no_single_meaning_is_refused() {
    let item = |field, item: &str, reason| RecurrenceError::Item { field, item: item.to_owned(), reason };
    for (cron, error) in [
        ("", RecurrenceError::FieldCount(0)),
        ("0 0 * *", RecurrenceError::FieldCount(4)),
        ("0 0 0 1 1 * 2026", RecurrenceError::FieldCount(7)),
        ("@daily 5", RecurrenceError::FieldCount(2)),
        ("@reboot", RecurrenceError::Reboot),
        ("@every 5m", RecurrenceError::Every),
        ("@Fortnightly", RecurrenceError::Nickname("fortnightly".to_owned())),
        ("60 * * * *", item(Field::Minute, "60", ItemError::Number(0, 59))),
        ("61 * * * * *", item(Field::Second, "61", ItemError::Number(0, 59))),
        ("* 24 * * *", item(Field::Hour, "24", ItemError::Number(0, 23))),
        ("* * 0 * *", item(Field::DayOfMonth, "0", ItemError::Number(1, 31))),
        ("* * * 13 *", item(Field::Month, "13", ItemError::NumberOrName(1, 12))),
        ("* * * * 8", item(Field::DayOfWeek, "8", ItemError::NumberOrName(0, 7))),
        ("mon * * * *", item(Field::Minute, "MON", ItemError::Number(0, 59))),
        ("* * 1jan * *", item(Field::DayOfMonth, "1JAN", ItemError::Number(1, 31))),
        ("* * * * MONDAY", item(Field::DayOfWeek, "MONDAY", ItemError::NumberOrName(0, 7))),
        ("* * * * L", item(Field::DayOfWeek, "L", ItemError::NumberOrName(0, 7))),
        ("* * * * +MON", item(Field::DayOfWeek, "+MON", ItemError::NumberOrName(0, 7))),
        ("* * ? * *", item(Field::DayOfMonth, "?", ItemError::Number(1, 31))),
        ("+5 * * * *", item(Field::Minute, "+5", ItemError::Number(0, 59))),
        ("1,,2 * * * *", item(Field::Minute, "", ItemError::Empty)),
        ("1,* * * * *", item(Field::Minute, "*", ItemError::Wildcard)),
        ("* 22-6 * * *", item(Field::Hour, "22-6", ItemError::Reversed)),
        ("* * * * FRI-MON", item(Field::DayOfWeek, "FRI-MON", ItemError::Reversed)),
        ("5/5 * * * *", item(Field::Minute, "5/5", ItemError::StepOfValue)),
        ("/5 * * * *", item(Field::Minute, "/5", ItemError::StepOfValue)),
        ("*/0 * * * *", item(Field::Minute, "*/0", ItemError::Step(59))),
        ("*/60 * * * *", item(Field::Minute, "*/60", ItemError::Step(59))),
        ("* * * * MON#6", item(Field::DayOfWeek, "MON#6", ItemError::Nth)),
        ("* * L,LW * *", item(Field::DayOfMonth, "L", ItemError::LastTwice)),
        ("0 0 31 2 *", RecurrenceError::NeverOccurs),
        ("0 0 31 4,6,9,11 *", RecurrenceError::NeverOccurs),
        ("* * 30W 2 *", RecurrenceError::NeverOccurs),
        ("* * * * * 30 2 *", RecurrenceError::FieldCount(8)),
    ] {
        assert_eq!(refused(cron), error, "{cron}");
    }
    let longest = format!("0{} * * * *", ",0".repeat((MAX_CRON_BYTES - 9) / 2));
    assert_eq!(recurrence(&longest, "UTC").cron(), longest);
    let longer = format!("{longest},0,0");
    assert_eq!(refused(&longer), RecurrenceError::TooLong(longer.len()));
}

#[test]
fn an_error_says_where_and_why() {
    assert_eq!(
        refused("0 25 * * *").to_string(),
        "the hour `25` is refused: a value is a number from 0 to 23"
    );
}

#[test]
fn only_names_of_the_bundled_time_zones_are_taken() {
    for timezone in
        ["", " ", "+02:00", "EST5EDT,M3.2.0,M11.1.0", "Mars/Olympus", "Etc/Unknown", "Local", "CEST"]
    {
        let error = Recurrence::parse("@daily", timezone).expect_err(timezone);
        assert_eq!(error, RecurrenceError::UnknownTimezone(timezone.to_owned()));
        assert!(error.to_string().contains(tz_version()));
    }
    let Err(RecurrenceError::UnknownTimezone(shown)) = Recurrence::parse("@daily", &"ü".repeat(5000)) else {
        panic!("accepted")
    };
    assert_eq!(shown.chars().count(), 64);
    for (timezone, spelled) in [("utc", "UTC"), ("etc/utc", "Etc/UTC"), ("asia/CALCUTTA", "Asia/Calcutta")] {
        assert_eq!(recurrence("@daily", timezone).timezone(), spelled);
    }
}

#[test]
fn a_leap_day_is_found_across_a_year_that_is_none() {
    let leap_day = recurrence("0 0 29 2 *", "UTC");
    assert_eq!(leap_day.next_after(time("2096-03-01T00:00:00Z")), Some(time("2104-02-29T00:00:00Z")));
    assert_eq!(leap_day.last_before(time("2104-02-29T00:00:00Z")), Some(time("2096-02-29T00:00:00Z")));
}

#[test]
fn the_shortest_interval_is_between_neighbours() {
    let after = time("2026-01-01T00:00:00Z");
    for (cron, seconds) in [
        ("* * * * * *", 1),
        ("*/15 * * * *", 15 * 60),
        ("*/25 * * * *", 10 * 60),
        ("0 9,17 * * *", 8 * 3600),
        ("@daily", 23 * 3600),
        ("@yearly", 365 * 86400),
    ] {
        let interval = recurrence(cron, "Europe/London").shortest_interval(after);
        assert_eq!(interval, Some(Duration::from_secs(seconds)), "{cron}");
    }
    // Only one tick within four years.
    assert_eq!(recurrence("0 0 29 2 *", "UTC").shortest_interval(after), None);
}
