//! `docs/scheduling.md` shows the ticks that there are around a change of the clocks.

use jiff::{SignedDuration, civil::Date, tz::TimeZone};

use crate::{changes, recurrence, zone};

const PAGE: &str = include_str!("../../../../docs/scheduling.md");

/// The rows below the header that begins so: time zone, day, change, expression and ticks.
fn rows() -> Vec<[&'static str; 5]> {
    let start = PAGE.find("| time zone |").unwrap();
    let rows = PAGE[start..].lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells =
        |row: &'static str| row.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`'));
    rows.map(|row| cells(row).collect::<Vec<_>>().try_into().unwrap()).collect()
}

#[test]
fn the_page_has_the_ticks_around_a_change() {
    let rows = rows();
    assert!(rows.len() >= 30, "{} rows", rows.len());
    for row @ [timezone, day, change, cron, ticks] in rows {
        let zone = zone(timezone);
        let day: Date = day.parse().unwrap();
        let noon = |day: Date| day.at(12, 0, 0, 0).to_zoned(TimeZone::UTC).unwrap().timestamp();
        let changed = changes(timezone, noon(day.yesterday().unwrap()), noon(day));
        let [changed] = changed[..] else { panic!("{row:?} {changed:?}") };
        let clock =
            |time: jiff::Timestamp, format: &str| time.to_zoned(zone.clone()).strftime(format).to_string();
        let second = SignedDuration::from_secs(1);
        let before = (changed - second).to_zoned(zone.clone()).datetime() + second;
        assert_eq!(change, format!("{} → {}", before.strftime("%H:%M"), clock(changed, "%H:%M")), "{row:?}");

        let (from, until) =
            (changed - SignedDuration::from_hours(1), changed + SignedDuration::from_hours(2));
        let recurrence = recurrence(cron, timezone);
        let forward: Vec<_> =
            recurrence.ticks_after(from - second).take_while(|tick| *tick < until).collect();
        let shown: Vec<_> = forward.iter().map(|tick| clock(*tick, "%H:%M%:z")).collect();
        let shown = if shown.is_empty() { "none".to_owned() } else { shown.join(", ") };
        assert_eq!(ticks, shown, "{row:?}");

        let back = std::iter::successors(recurrence.last_before(until), |tick| recurrence.last_before(*tick));
        let mut back: Vec<_> = back.take_while(|tick| *tick >= from).collect();
        back.reverse();
        assert_eq!(forward, back, "{row:?}");
    }
}
