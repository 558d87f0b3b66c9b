//! What makes the description of the streams unusable.

use std::collections::BTreeMap;

use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy, StorageType};

use super::{AUDIT, Archive, DEAD, DELIVER, Placement, StreamSpec};
use crate::config::NatsConfig;

/// What the bus sends over core NATS; a stream that caught it would only fill.
const NEVER_KEPT: [&str; 3] = ["live.>", "wake.>", "inbox.>"];

/// The first thing that is wrong with the sections `[streams.…]`, if anything.
pub(crate) fn problem(streams: &BTreeMap<String, StreamSpec>, nats: &NatsConfig) -> Option<String> {
    if let Some(problem) = placement_problem(&nats.placement) {
        return Some(format!("nats.{problem}"));
    }
    let each = streams.iter().find_map(|(name, spec)| {
        stream_problem(name, spec, nats).map(|problem| format!("streams.{name}: {problem}"))
    });
    each.or_else(|| overlap_problem(streams)).or_else(|| own_problem(streams))
}

fn stream_problem(name: &str, spec: &StreamSpec, nats: &NatsConfig) -> Option<String> {
    // Two underscores separate the parts of an environment variable.
    let is_name = name.len() <= 32
        && !name.contains("__")
        && name.bytes().enumerate().all(|(at, byte)| match byte {
            b'a'..=b'z' => true,
            b'0'..=b'9' | b'_' => at > 0,
            _ => false,
        });
    if !is_name {
        return Some("a stream's name is 1–32 of a-z, 0-9 and single '_', and begins with a letter".into());
    }
    if let Some(subject) = spec.subjects.iter().find(|subject| !is_subject(subject)) {
        return Some(format!(
            "{subject:?} is no subject: tokens with dots between, `*` for one of them, `>` for all that follow"
        ));
    }
    for (key, value) in [("max_bytes", spec.max_bytes), ("max_messages", spec.max_messages)] {
        if value != -1 && value < 1 {
            return Some(format!("{key} ({value}) must be positive, or -1 for no limit"));
        }
    }
    if spec.replicas.is_some_and(|replicas| !(1..=5).contains(&replicas)) {
        return Some("replicas must be between 1 and 5".into());
    }
    if let Some(problem) = spec.placement.as_ref().and_then(placement_problem) {
        return Some(problem);
    }
    if spec.archive == Archive::Archive && spec.retention != RetentionPolicy::Limits {
        return Some(
            "archive \"archive\" needs retention \"limits\": what is acknowledged would be gone".into(),
        );
    }
    if spec.archive == Archive::Archive && spec.discard() != DiscardPolicy::New {
        return Some(
            "archive \"archive\" needs discard \"new\": what is not archived yet must not be pushed out"
                .into(),
        );
    }
    if spec.archive == Archive::Archive && spec.storage != StorageType::File {
        return Some(
            "archive \"archive\" needs storage \"file\": what is not archived yet must outlast the broker"
                .into(),
        );
    }
    let (window, age) = (spec.duplicate_window_s(nats), spec.broker_max_age_s());
    if window == 0 || (age > 0 && window > age) {
        return Some(format!(
            "duplicate_window_s ({window}) must be at least 1, and at most max_age_s ({age}) if that is not 0"
        ));
    }
    None
}

fn placement_problem(placement: &Placement) -> Option<String> {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_graphic());
    if !placement.cluster.is_empty() && !is_name(&placement.cluster) {
        return Some(format!("placement.cluster: {:?} is no name of a cluster", placement.cluster));
    }
    let bad = placement.tags.iter().find(|tag| !is_name(tag));
    bad.map(|tag| format!("placement.tags: {tag:?} is no tag of a server"))
}

/// The broker refuses two streams with a subject in common, and one that names a subject twice.
fn overlap_problem(streams: &BTreeMap<String, StreamSpec>) -> Option<String> {
    let subjects: Vec<(&str, &str)> = streams
        .iter()
        .flat_map(|(name, spec)| spec.subjects.iter().map(move |subject| (name.as_str(), subject.as_str())))
        .collect();
    for (at, (name, subject)) in subjects.iter().enumerate() {
        if let Some(core) = NEVER_KEPT.iter().find(|core| overlap(core, subject)) {
            return Some(format!("streams.{name}: {subject:?} catches {core:?}, which is never kept"));
        }
        let earlier = &subjects[..at];
        if let Some((other, theirs)) = earlier.iter().find(|(_, theirs)| overlap(theirs, subject)) {
            return Some(format!(
                "streams.{name}: {subject:?} catches what streams.{other} does ({theirs:?})"
            ));
        }
    }
    None
}

/// The bus relies on its own streams: on what they catch, and on how they treat it.
fn own_problem(streams: &BTreeMap<String, StreamSpec>) -> Option<String> {
    for (name, needed) in [(DELIVER, "deliver.>"), (DEAD, "dead.events.>"), (AUDIT, "events.audit.>")] {
        let caught = |spec: &StreamSpec| spec.subjects.iter().any(|subject| covers(subject, needed));
        match streams.get(name) {
            Some(spec) if !caught(spec) => {
                return Some(format!(
                    "streams.{name}: subjects must cover {needed:?}, which the bus publishes to"
                ));
            }
            Some(spec) if name != DELIVER && spec.retention != RetentionPolicy::Limits => {
                return Some(format!("streams.{name}: retention must be \"limits\""));
            }
            Some(_) => {}
            None => return Some(format!("streams.{name} is missing, and the bus publishes to it")),
        }
    }
    if streams.get(DEAD).is_some_and(|dead| dead.discard() != DiscardPolicy::Old) {
        return Some(
            "streams.dead: discard must be \"old\": a full one would keep deliveries from ending".into(),
        );
    }
    let deliver = streams.get(DELIVER)?;
    if deliver.retention != RetentionPolicy::WorkQueue || deliver.discard() != DiscardPolicy::New {
        return Some(
            "streams.deliver: retention must be \"workqueue\" and discard \"new\": a delivery leaves it when it is \
             done, and no other way"
                .into(),
        );
    }
    if deliver.storage != StorageType::File {
        return Some("streams.deliver: storage must be \"file\": deliveries must outlast the broker".into());
    }
    if deliver.max_age_s != 0 {
        return Some("streams.deliver: max_age_s must be 0: deliveries end by worker.lifetime_s".into());
    }
    if deliver.duplicate_window_s.is_some() {
        return Some(
            "streams.deliver: duplicate_window_s must be absent: leases are measured against nats.duplicate_window_s"
                .into(),
        );
    }
    None
}

fn is_subject(subject: &str) -> bool {
    let tokens: Vec<&str> = subject.split('.').collect();
    subject.len() <= 200
        && tokens.iter().enumerate().all(|(at, token)| match *token {
            "" => false,
            "*" => true,
            ">" => at + 1 == tokens.len(),
            token => token.chars().all(|c| c.is_ascii_graphic() && c != '*' && c != '>'),
        })
}

/// Whether a subject can match both.
fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// Whether all that `narrow` matches is matched by `wide`.
pub(super) fn covers(wide: &str, narrow: &str) -> bool {
    let (mut wide, mut narrow) = (wide.split('.'), narrow.split('.'));
    loop {
        match (wide.next(), narrow.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) => return true,
            (Some("*"), Some(token)) if token != ">" => {}
            (Some(a), Some(b)) if a == b => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::missing_docs_in_private_items)]

    use super::*;

    #[test]
    fn subjects_are_compared_by_what_they_match() {
        for (one, other, both, covered) in [
            ("a.>", "a.b", true, true),
            ("a.>", "a", false, false),
            ("a.>", "a.>", true, true),
            ("a.*", "a.>", true, false),
            ("a.b.>", "a.>", true, false),
            ("a.*.c", "a.b.*", true, false),
            ("a.*.c", "a.b.c", true, true),
            ("a.*", "a.*", true, true),
            ("a.*", "a.b.c", false, false),
            ("tasks.*.queue", "tasks.*.progress", false, false),
            (">", "a.*", true, true),
        ] {
            assert_eq!(overlap(one, other), both, "{one} and {other}");
            assert_eq!(overlap(other, one), both, "{other} and {one}");
            assert_eq!(covers(one, other), covered, "{one} over {other}");
        }
    }

    #[test]
    fn subjects_are_well_formed() {
        for good in ["a", "a.b", "a.*.c", "a.>", ">", "a-b.c_d"] {
            assert!(is_subject(good), "{good}");
        }
        for bad in ["", ".", "a.", "a..b", "a.>.b", "a b", "a.b*", "a.\n", "ü"] {
            assert!(!is_subject(bad), "{bad}");
        }
    }
}
