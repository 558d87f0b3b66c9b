//! `docs/delivery.md` says what the code does: the reasons, the default waits, and the states.

use std::{collections::BTreeSet, time::Duration};

use bus_core::{
    lifecycle::{State, Step},
    retry::{DeadReason, RetryPolicy},
};

const PAGE: &str = include_str!("../../../docs/delivery.md");

/// The cells of the table that begins with this header.
fn table(header: &str) -> Vec<Vec<&'static str>> {
    let start = PAGE.find(header).unwrap_or_else(|| panic!("no table {header}"));
    let rows = PAGE[start..].lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

#[test]
fn the_page_has_every_reason() {
    let written: Vec<String> =
        table("| `reason` |").iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    assert_eq!(written, DeadReason::ALL.map(|reason| reason.as_str().to_owned()));
}

#[test]
fn the_page_has_the_default_waits() {
    let policy = RetryPolicy::default();
    let seconds = |text: &str| text.strip_suffix(" s").map(|n| Duration::from_secs(n.parse().unwrap()));
    let rows = table("| failed attempts | wait |");
    assert_eq!(rows.last().unwrap()[1], "dead");
    for row in &rows {
        let attempts: u32 = row[0].parse().unwrap();
        let since: Option<Duration> = (1..=attempts).map(|n| policy.wait(n)).sum();
        assert_eq!((seconds(row[1]), seconds(row[2])), (policy.wait(attempts), since), "after {attempts}");
    }
}

/// As the API calls it.
fn shown(state: State) -> &'static str {
    if state == State::Queued { "pending" } else { state.as_str() }
}

#[test]
fn the_page_has_the_transitions_of_the_state_machine() {
    let diagram = PAGE.split("stateDiagram-v2").nth(1).unwrap().split("```").next().unwrap();
    let mut written = BTreeSet::new();
    for line in diagram.lines().filter(|line| line.contains("-->") && line.contains(':')) {
        let (from, to) = line.split_once("-->").unwrap();
        let (to, step) = to.split_once(':').unwrap();
        let (from, to) = (from.trim(), to.trim());
        let from = if from == "open" { vec!["pending", "waiting"] } else { vec![from] };
        let each = from.into_iter().filter(|from| *from != to).map(|from| (from, to, step.trim()));
        written.extend(each);
    }

    let steps = [
        (Step::Succeeded, "succeeded"),
        (Step::Postponed, "postponed"),
        (Step::GivenUp, "given up"),
        (Step::Returned, "due"),
        (Step::Ack, "acknowledged"),
        (Step::Cancel, "cancelled"),
        (Step::Replay, "replayed"),
        (Step::Discard, "discarded"),
    ];
    let mut coded = BTreeSet::new();
    for from in State::ALL {
        for (step, name) in steps {
            let to = from.after(step, false);
            if to != from {
                coded.insert((shown(from), shown(to), name));
            }
        }
    }
    assert_eq!(written, coded);
}
