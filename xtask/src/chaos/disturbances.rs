//! When something was broken: what may be excused by it.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use super::ledger::{Entry, Line, Phase};

/// The times in which a fault may have repeated something. What it disturbs comes out a little later: what was held is
/// handed out again, and what was buffered arrives.
#[derive(Debug)]
pub(super) struct Disturbances(Vec<(Timestamp, Timestamp)>);

impl Disturbances {
    pub(super) fn of(lines: &[Line]) -> Self {
        let mut begun: BTreeMap<usize, Timestamp> = BTreeMap::new();
        let mut all = Vec::new();
        for line in lines {
            match &line.entry {
                Entry::Fault { number, phase: Phase::Begins, aftermath_s: Some(_), .. } => {
                    begun.insert(*number, line.at);
                }
                Entry::Fault { number, phase: Phase::Over, aftermath_s: Some(aftermath), .. } => {
                    let from = begun.remove(number).unwrap_or(line.at);
                    all.push((from, line.at + SignedDuration::from_secs(*aftermath)));
                }
                _ => {}
            }
        }
        all.extend(begun.into_values().map(|from| (from, Timestamp::MAX)));
        Self(all)
    }

    /// Whether one of them touches the time between.
    pub(super) fn between(&self, from: Timestamp, to: Timestamp) -> bool {
        self.0.iter().any(|(begin, end)| *begin <= to && *end >= from)
    }
}
