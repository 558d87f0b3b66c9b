//! What there is to do between the streams that the broker has and those that the configuration describes, and what it
//! would cost.

use std::{fmt, time::Duration};

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    check::covers,
    spec::{Archive, Described},
};

/// A stream on the broker.
#[derive(Debug, Clone)]
pub struct Existing {
    /// Its configuration, as the broker tells it: an old server ignores fields that it does not know.
    pub config: Config,
    /// What is in it.
    pub held: Held,
}

/// What is in a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// How many messages.
    pub messages: u64,
    /// How many bytes.
    pub bytes: u64,
    /// The age of the oldest message.
    pub oldest: Duration,
}

/// What there is to do.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Plan {
    /// In the order in which the broker can take them: subjects are given up before others catch them.
    pub changes: Vec<Change>,
    /// Streams of this deployment that the configuration does not describe. Nothing is done about them.
    pub not_described: Vec<String>,
}

/// What is to be done to one stream.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// The stream, as the broker calls it.
    pub stream: String,
    /// What is to be done.
    #[serde(flatten)]
    pub kind: ChangeKind,
    /// What the broker is to be told.
    #[serde(skip)]
    pub config: Config,
}

/// What is to be done to one stream.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is missing.
    Create {
        /// What it will catch.
        subjects: Vec<String>,
    },
    /// It is not as described.
    Update {
        /// In these fields.
        fields: Vec<Field>,
    },
}

/// One field in which a stream is not as described.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Field {
    /// The key of the configuration.
    pub field: &'static str,
    /// What the broker has.
    pub from: Value,
    /// What is described.
    pub to: Value,
    /// What the change would do.
    #[serde(flatten)]
    pub effect: Effect,
}

/// What a change would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "effect", content = "because", rename_all = "snake_case")]
pub enum Effect {
    /// Nothing is lost by it.
    Harmless,
    /// Messages that are kept would go, or some that are published later would not be kept.
    LosesData(String),
    /// The broker cannot do it to a stream that exists.
    Impossible(String),
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} → {}", self.field, self.from, self.to)
    }
}

impl Change {
    /// The fields that are to be changed; none of a stream that is to be created.
    pub fn fields(&self) -> &[Field] {
        match &self.kind {
            ChangeKind::Create { .. } => &[],
            ChangeKind::Update { fields } => fields,
        }
    }

    /// Which step of the order it belongs to.
    fn order(&self) -> u8 {
        match &self.kind {
            ChangeKind::Update { fields } if fields.iter().any(gives_subjects_up) => 0,
            ChangeKind::Update { .. } => 1,
            ChangeKind::Create { .. } => 2,
        }
    }
}

fn gives_subjects_up(field: &Field) -> bool {
    field.field == "subjects" && matches!(field.effect, Effect::LosesData(_))
}

impl Plan {
    /// The changed fields with their streams.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &Field)> {
        self.changes
            .iter()
            .flat_map(|change| change.fields().iter().map(move |field| (change.stream.as_str(), field)))
    }
}

/// What has to be done so that the broker has what is `wanted`. `existing` are the streams of this deployment.
pub fn plan(existing: &[Existing], wanted: &[Described]) -> Plan {
    let mut changes: Vec<Change> = wanted
        .iter()
        .filter_map(|wanted| {
            let stream = wanted.config.name.clone();
            let Some(found) = existing.iter().find(|found| found.config.name == stream) else {
                let kind = ChangeKind::Create { subjects: wanted.config.subjects.clone() };
                return Some(Change { stream, kind, config: wanted.config.clone() });
            };
            let fields = differences(&found.config, found.held, wanted);
            let config = wanted.over(&found.config);
            (!fields.is_empty()).then_some(Change { stream, kind: ChangeKind::Update { fields }, config })
        })
        .collect();
    changes.sort_by_key(Change::order);
    let not_described = existing
        .iter()
        .map(|found| found.config.name.clone())
        .filter(|name| wanted.iter().all(|wanted| wanted.config.name != *name))
        .collect();
    Plan { changes, not_described }
}

/// The fields in which a stream that holds this much is not as described.
pub(super) fn differences(is: &Config, held: Held, wanted: &Described) -> Vec<Field> {
    let to = &wanted.config;
    let mut fields = Vec::new();
    let mut note = |field, from: Value, to: Value, effect| {
        if from != to {
            fields.push(Field { field, from, to, effect });
        }
    };
    note("subjects", sorted(&is.subjects), sorted(&to.subjects), subjects_effect(is, to));
    note("retention", json!(is.retention), json!(to.retention), retention_effect(is, to));
    note("storage", json!(is.storage), json!(to.storage), impossible("moved to another storage"));
    note("archive", json!(Archive::of(is)), json!(wanted.archive), archive_effect(wanted));
    note("max_age_s", seconds(is.max_age), seconds(to.max_age), age_effect(held, to));
    note("max_bytes", json!(is.max_bytes), json!(to.max_bytes), size_effect(held.bytes, to.max_bytes, to));
    note(
        "max_messages",
        json!(is.max_messages),
        json!(to.max_messages),
        size_effect(held.messages, to.max_messages, to),
    );
    note("discard", json!(is.discard), json!(to.discard), discard_effect(to));
    note("replicas", json!(is.num_replicas), json!(to.num_replicas), Effect::Harmless);
    if to.placement.is_some() {
        note("placement", json!(is.placement), json!(to.placement), Effect::Harmless);
    }
    note("duplicate_window_s", seconds(is.duplicate_window), seconds(to.duplicate_window), Effect::Harmless);
    fields
}

fn subjects_effect(is: &Config, to: &Config) -> Effect {
    let caught = |subject: &str| to.subjects.iter().any(|wide| covers(wide, subject));
    let lost: Vec<&str> = is.subjects.iter().map(String::as_str).filter(|subject| !caught(subject)).collect();
    if lost.is_empty() {
        Effect::Harmless
    } else {
        Effect::LosesData(format!("what is published to {} is no longer kept here", lost.join(", ")))
    }
}

fn retention_effect(is: &Config, to: &Config) -> Effect {
    match (is.retention, to.retention) {
        (RetentionPolicy::WorkQueue, _) | (_, RetentionPolicy::WorkQueue) => {
            impossible("made a work queue, or no longer one")
        }
        (_, RetentionPolicy::Interest) => {
            Effect::LosesData("what no consumer waits for is removed".to_owned())
        }
        _ => Effect::Harmless,
    }
}

fn impossible(what: &str) -> Effect {
    Effect::Impossible(format!(
        "a stream cannot be {what}: describe one of another name, or take out what it holds, delete it and apply again"
    ))
}

fn archive_effect(wanted: &Described) -> Effect {
    match wanted.archive {
        Archive::Archive => Effect::Harmless,
        Archive::Drop => Effect::LosesData("what is not archived yet is removed without it".to_owned()),
    }
}

fn age_effect(held: Held, to: &Config) -> Effect {
    if to.max_age.is_zero() || held.messages == 0 || held.oldest <= to.max_age {
        Effect::Harmless
    } else {
        let oldest = held.oldest.as_secs();
        Effect::LosesData(format!(
            "its oldest message is {oldest} s old, and what is older than that is removed"
        ))
    }
}

fn size_effect(held: u64, limit: i64, to: &Config) -> Effect {
    // -1 is no limit.
    if u64::try_from(limit).is_ok_and(|limit| held > limit) {
        Effect::LosesData(match to.discard {
            DiscardPolicy::Old => format!("it holds {held}, and the oldest are removed"),
            DiscardPolicy::New => format!("it holds {held}, and refuses all that comes until it holds less"),
        })
    } else {
        Effect::Harmless
    }
}

fn discard_effect(to: &Config) -> Effect {
    match to.discard {
        DiscardPolicy::New => Effect::Harmless,
        DiscardPolicy::Old => Effect::LosesData("when it is full, the oldest are removed".to_owned()),
    }
}

fn sorted(subjects: &[String]) -> Value {
    let mut subjects = subjects.to_vec();
    subjects.sort_unstable();
    json!(subjects)
}

fn seconds(duration: Duration) -> Value {
    if duration.subsec_nanos() == 0 { json!(duration.as_secs()) } else { json!(duration.as_secs_f64()) }
}
