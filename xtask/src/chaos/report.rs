//! What is told at the end: figures, how long the bus took to go on after each fault, and the story of what went wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use jiff::Timestamp;

use super::{
    judge::{Comparisons, Finding, Judgement},
    ledger::{Entry, Ledger, Line, Phase},
};
use crate::ui::{self, BAD, FAINT, GOOD, STRONG, paint};

/// So many findings are told, and so many lines of the story of the first one.
const TOLD: usize = 12;
const STORY: usize = 80;

/// From the end of each fault to the first event that was published after it and has reached a good endpoint, by the
/// fault's kind; what is not reached any more is left out.
pub(super) fn recoveries(lines: &[Line]) -> BTreeMap<String, Vec<Duration>> {
    let good: BTreeSet<&str> = lines
        .iter()
        .filter_map(|line| match &line.entry {
            Entry::Endpoint(endpoint) if endpoint.good => Some(&*endpoint.path),
            _ => None,
        })
        .collect();
    let sent: BTreeMap<(&str, &str), Timestamp> = lines
        .iter()
        .filter_map(|line| match &line.entry {
            Entry::Accepted(event) if event.deliver_at.is_none() => {
                Some(((&*event.organization, &*event.id), event.sent))
            }
            _ => None,
        })
        .collect();
    // When each event reached a good endpoint first: it was sent, and arrived.
    let mut arrived: BTreeMap<(&str, &str), (Timestamp, Timestamp)> = BTreeMap::new();
    for line in lines {
        let Entry::Request(request) = &line.entry else { continue };
        if !good.contains(&*request.path) {
            continue;
        }
        for event in &request.events {
            let key = (&*request.organization, &*event.id);
            if let Some(sent) = sent.get(&key) {
                let first = arrived.entry(key).or_insert((*sent, line.at));
                first.1 = first.1.min(line.at);
            }
        }
    }
    let mut recoveries: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for line in lines {
        let Entry::Fault { kind, phase: Phase::Over, .. } = &line.entry else { continue };
        let after = arrived.values().filter(|(sent, _)| *sent >= line.at).map(|(_, arrived)| *arrived).min();
        let took = after.and_then(|at| Duration::try_from(at.duration_since(line.at)).ok());
        let all = recoveries.entry(kind.clone()).or_default();
        all.extend(took);
    }
    for all in recoveries.values_mut() {
        all.sort_unstable();
    }
    recoveries
}

/// Shows the figures.
pub(super) fn show(judgement: &Judgement, lines: &[Line], seed: u64) {
    let Judgement {
        events, resent, expected, delivered, requests, repeats, ticks_fired, ticks_skipped, ..
    } = judgement;
    let dead: usize = judgement.dead.values().sum();
    ui::line(paint(
        STRONG,
        format!(
            "\n  chaos: events {events} ({resent} sent again), deliveries {expected}, delivered {delivered}, dead {dead}, \
             requests {requests}, repeats {repeats}, ticks {ticks_fired} fired and {ticks_skipped} skipped"
        ),
    ));
    for (reason, n) in &judgement.dead {
        ui::line(paint(FAINT, format!("    dead, {reason}: {n}")));
    }
    for (compared, comparisons) in &judgement.comparisons {
        let Comparisons { undisturbed, disturbed } = comparisons;
        let told =
            format!("    compared, {compared:?}: {undisturbed} without an excuse, {disturbed} around faults");
        ui::line(paint(FAINT, told));
    }
    ui::line(format!("\n  {:18} {:>5} {:>11} {:>11}", "fault", "times", "again, p50", "max"));
    for (kind, all) in recoveries(lines) {
        let at = |index: usize| all.get(index).map_or_else(|| "—".to_owned(), |took| ui::elapsed(*took));
        let times = lines.iter().filter(|line| is_end_of(line, &kind)).count();
        let (median, max) = (at(all.len().saturating_sub(1) / 2), at(all.len().saturating_sub(1)));
        ui::line(format!("  {kind:18} {times:>5} {median:>11} {max:>11}"));
    }
    let mut memory: BTreeMap<&str, u64> = BTreeMap::new();
    for line in lines {
        if let Entry::Memory { process, bytes } = &line.entry {
            let role = process.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('-');
            let most = memory.entry(role).or_default();
            *most = (*most).max(*bytes);
        }
    }
    let memory: Vec<String> =
        memory.iter().map(|(role, bytes)| format!("{role} {} MiB", bytes >> 20)).collect();
    ui::line(format!("\n  memory at most: {}", memory.join(", ")));
    if judgement.findings.is_empty() {
        ui::line(format!(
            "  {} nothing lost, early, misdelivered or doubled  (seed {seed})",
            paint(GOOD, "✓")
        ));
        return;
    }
    let n = judgement.findings.len();
    ui::line(format!("  {} {n} findings  (seed {seed})", paint(BAD, "✗")));
    for finding in judgement.findings.iter().take(TOLD) {
        ui::line(format!("    {:?}: {}", finding.kind, finding.told));
    }
}

fn is_end_of(line: &Line, fault: &str) -> bool {
    matches!(&line.entry, Entry::Fault { kind, phase: Phase::Over, .. } if kind == fault)
}

/// Tells all that is known of one finding, from the ledger and the logs, in the order of time, and keeps both.
pub(super) fn tell_story(finding: &Finding, ledger: &Ledger, logs: &Path) -> Result<()> {
    let keep = ledger.path().with_extension("logs");
    fs::create_dir_all(&keep).with_context(|| format!("create {}", keep.display()))?;
    let mut story: Vec<String> = Vec::new();
    let text = fs::read_to_string(ledger.path()).context("read the ledger")?;
    let mut ids: Vec<String> = finding.ids.clone();
    ids.retain(|id| !id.is_empty());
    let about = |line: &str| ids.iter().any(|id| mentions(line, id));
    for line in text.lines().filter(|line| about(line)) {
        let at = line.split('"').nth(3).unwrap_or_default();
        story.push(format!("{at} ledger: {line}"));
    }
    for entry in fs::read_dir(logs).context("list the logs")? {
        let path = entry?.path();
        let name = path.file_name().context("a log has a name")?.to_owned();
        fs::copy(&path, keep.join(&name)).context("keep a log")?;
        let text = fs::read_to_string(&path).unwrap_or_default();
        for line in text.lines().filter(|line| about(line)) {
            let (at, said) = line.split_once(' ').unwrap_or(("", line));
            story.push(format!("{at} {}: {}", name.to_string_lossy(), said.trim()));
        }
    }
    // What was broken from its first line to its last.
    let (first, last) = (story.iter().min().cloned(), story.iter().max().cloned());
    for line in text.lines().filter(|line| line.contains("\"what\":\"fault\"")) {
        let told = format!("{} ledger: {line}", line.split('"').nth(3).unwrap_or_default());
        if first.as_ref().is_some_and(|first| *first <= told)
            && last.as_ref().is_some_and(|last| told <= *last)
        {
            story.push(told);
        }
    }
    story.sort();
    ui::line(paint(STRONG, format!("\n  The story of the first: {}", finding.told)));
    for line in story.iter().take(STORY) {
        ui::line(paint(FAINT, format!("    {}", line.chars().take(300).collect::<String>())));
    }
    ui::line(format!("\n  The ledger is {}, the logs are in {}.", ledger.path().display(), keep.display()));
    Ok(())
}

/// Whether a line has the id as a whole word: `e-1` is not in `e-12`.
fn mentions(line: &str, id: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    line.match_indices(id)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + id.len()..].starts_with(is_part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_found_as_a_whole() {
        assert!(mentions(r#"{"id":"e-1-0"}"#, "e-1-0"));
        assert!(!mentions(r#"{"id":"e-1-01"}"#, "e-1-0"));
        assert!(!mentions(r#"{"id":"he-1-0"}"#, "e-1-0"));
        assert!(mentions("delivery.id=ab-c", "ab-c"));
    }
}
