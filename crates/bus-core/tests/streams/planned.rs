//! The plan, without a server.

use std::{collections::BTreeSet, time::Duration};

use async_nats::jetstream::stream::{Config, DiscardPolicy, Placement, RetentionPolicy, StorageType};
use bus_core::streams::{
    Archive, Change, ChangeKind, Described, Effect, Existing, Field, Held, described, plan,
};

use super::configured;

const HOUR: Duration = Duration::from_secs(3600);

/// Messages of three hours.
const HELD: Held = Held { messages: 1_000, bytes: 1_000_000, oldest: HOUR.saturating_mul(3) };

/// A stream `jobs` with these settings beside the least that it needs.
fn jobs(settings: &[(&str, &str)]) -> Described {
    let needed = [("SUBJECTS", r#"["jobs.>"]"#), ("MAX_AGE_S", "86400"), ("MAX_BYTES", "1000000000")];
    let variables: Vec<(String, &str)> = needed
        .iter()
        .chain(settings)
        .map(|(key, value)| (format!("EVENT_BUS_STREAMS__JOBS__{key}"), *value))
        .collect();
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    described(&configured(&variables)).into_iter().find(|stream| stream.name == "jobs").unwrap()
}

/// What a server has that was told this.
fn on_server(described: &Described, held: Held) -> Existing {
    Existing { config: described.config.clone(), held }
}

fn fields(from: &Existing, to: &Described) -> Vec<Field> {
    let plan = plan(std::slice::from_ref(from), std::slice::from_ref(to));
    plan.changes.iter().flat_map(Change::fields).cloned().collect()
}

fn kind(effect: &Effect) -> &'static str {
    match effect {
        Effect::Harmless => "harmless",
        Effect::LosesData(_) => "loses data",
        Effect::Impossible(_) => "impossible",
    }
}

#[test]
fn each_field_is_judged_by_what_would_be_lost() {
    const LOSES: &str = "loses data";
    for (from, to, field, judged) in [
        (&[("MAX_AGE_S", "0")][..], &[][..], "max_age_s", "harmless"),
        (&[], &[("MAX_AGE_S", "10800")], "max_age_s", "harmless"),
        (&[], &[("MAX_AGE_S", "10799")], "max_age_s", LOSES),
        (&[], &[("MAX_AGE_S", "0")], "max_age_s", "harmless"),
        (&[], &[("MAX_BYTES", "1000000")], "max_bytes", "harmless"),
        (&[], &[("MAX_BYTES", "999999")], "max_bytes", LOSES),
        (&[], &[("MAX_BYTES", "-1")], "max_bytes", "harmless"),
        (&[("DISCARD", "new")], &[("DISCARD", "new"), ("MAX_BYTES", "999999")], "max_bytes", LOSES),
        (&[], &[("MAX_MESSAGES", "1000")], "max_messages", "harmless"),
        (&[], &[("MAX_MESSAGES", "999")], "max_messages", LOSES),
        (&[("MAX_MESSAGES", "1000")], &[], "max_messages", "harmless"),
        (&[], &[("DISCARD", "new")], "discard", "harmless"),
        (&[("DISCARD", "new")], &[], "discard", LOSES),
        (&[], &[("STORAGE", "memory")], "storage", "impossible"),
        (&[], &[("RETENTION", "workqueue"), ("DISCARD", "old")], "retention", "impossible"),
        (&[("RETENTION", "interest"), ("DISCARD", "old")], &[], "retention", "harmless"),
        (&[], &[("RETENTION", "interest"), ("DISCARD", "old")], "retention", LOSES),
        (&[], &[("SUBJECTS", r#"["jobs.>","more"]"#)], "subjects", "harmless"),
        (&[("SUBJECTS", r#"["jobs.a"]"#)], &[], "subjects", "harmless"),
        (&[], &[("SUBJECTS", r#"["jobs.*"]"#)], "subjects", LOSES),
        (&[], &[("REPLICAS", "3")], "replicas", "harmless"),
        (&[], &[("PLACEMENT", r#"{cluster="east"}"#)], "placement", "harmless"),
        (
            &[("PLACEMENT", r#"{cluster="east"}"#)],
            &[("PLACEMENT", r#"{tags=["ssd"]}"#)],
            "placement",
            "harmless",
        ),
        (&[], &[("DUPLICATE_WINDOW_S", "1")], "duplicate_window_s", "harmless"),
    ] {
        let changed = fields(&on_server(&jobs(from), HELD), &jobs(to));
        let judgements: Vec<_> =
            changed.iter().map(|changed| (changed.field, kind(&changed.effect))).collect();
        assert_eq!(judgements, [(field, judged)], "{from:?} to {to:?}");
    }
}

#[test]
fn an_empty_stream_has_nothing_to_lose_by_a_limit() {
    let smaller = jobs(&[("MAX_AGE_S", "3600"), ("MAX_BYTES", "1"), ("MAX_MESSAGES", "1")]);
    let empty = Held { oldest: HOUR.saturating_mul(24), ..Held::default() };
    let changed = fields(&on_server(&jobs(&[]), empty), &smaller);
    assert_eq!(changed.len(), 3);
    assert!(changed.iter().all(|field| field.effect == Effect::Harmless), "{changed:?}");
}

#[test]
fn an_archived_stream_loses_nothing_by_itself() {
    let archived = jobs(&[("ARCHIVE", "archive")]);
    assert_eq!((archived.archive, archived.keep), (Archive::Archive, HOUR.saturating_mul(24)));
    assert_eq!((archived.config.max_age, archived.config.discard), (Duration::ZERO, DiscardPolicy::New));
    let dropped = jobs(&[]);
    let judged = |from: &Described, to: &Described| -> BTreeSet<_> {
        fields(&on_server(from, HELD), to)
            .iter()
            .map(|changed| (changed.field, kind(&changed.effect)))
            .collect()
    };
    let to_archive = [("archive", "harmless"), ("discard", "harmless"), ("max_age_s", "harmless")];
    assert_eq!(judged(&dropped, &archived), BTreeSet::from(to_archive));
    let back = [("archive", "loses data"), ("discard", "loses data"), ("max_age_s", "harmless")];
    assert_eq!(judged(&archived, &dropped), BTreeSet::from(back));
}

#[test]
fn what_is_as_described_needs_nothing() {
    let existing: Vec<Existing> =
        described(&configured(&[])).iter().map(|stream| on_server(stream, HELD)).collect();
    let plan = plan(&existing, &described(&configured(&[])));
    assert!(plan.changes.is_empty() && plan.not_described.is_empty(), "{plan:?}");
}

#[test]
fn what_is_not_described_is_named_and_stays() {
    let wanted = described(&configured(&[]));
    let existing: Vec<Existing> =
        wanted.iter().chain([&jobs(&[])]).map(|stream| on_server(stream, HELD)).collect();
    let plan = plan(&existing, &wanted);
    assert!(plan.changes.is_empty(), "{plan:?}");
    assert_eq!(plan.not_described, ["BUS_JOBS"]);
}

#[test]
fn a_stream_without_subjects_is_not_wanted() {
    let wanted = described(&configured(&[("EVENT_BUS_STREAMS__API__SUBJECTS", "[]")]));
    assert!(wanted.iter().all(|stream| stream.name != "api"));
    assert_eq!(wanted.len(), described(&configured(&[])).len() - 1);
}

#[test]
fn what_the_configuration_does_not_speak_of_is_left_alone() {
    let by_hand = Config {
        description: Some("by hand".to_owned()),
        metadata: [("owner".to_owned(), "somebody".to_owned())].into(),
        max_messages_per_subject: 7,
        ..jobs(&[]).config
    };
    let existing = Existing { config: by_hand.clone(), held: HELD };
    let change = plan(&[existing], &[jobs(&[("ARCHIVE", "archive")])]).changes.remove(0);
    assert_eq!(change.config.description, by_hand.description);
    assert_eq!(change.config.max_messages_per_subject, 7);
    assert_eq!(change.config.metadata["owner"], "somebody");
    assert_eq!(change.config.discard, DiscardPolicy::New);
}

#[test]
fn a_stream_is_placed_as_it_says_or_else_as_all_are() {
    let all = ("EVENT_BUS_NATS__PLACEMENT", r#"{cluster="east", tags=["ssd"]}"#);
    let own = ("EVENT_BUS_STREAMS__DEAD__PLACEMENT", r#"{tags=["hdd"]}"#);
    let placed = |variables: &[(&str, &str)], name: &str| {
        let wanted = described(&configured(variables));
        wanted.into_iter().find(|stream| stream.name == name).unwrap().config.placement
    };
    let east = Placement { cluster: Some("east".to_owned()), tags: vec!["ssd".to_owned()] };
    assert_eq!(placed(&[all, own], "deliver"), Some(east.clone()));
    assert_eq!(
        placed(&[all, own], "dead"),
        Some(Placement { cluster: None, tags: vec!["hdd".to_owned()] }),
        "a stream's own stands for the whole"
    );
    assert_eq!(placed(&[], "deliver"), None);

    // Nothing is said, so nothing is to be done; and what else is changed leaves it where it is.
    let east_by_hand =
        Existing { config: Config { placement: Some(east.clone()), ..jobs(&[]).config }, held: HELD };
    assert!(fields(&east_by_hand, &jobs(&[])).is_empty());
    let change = plan(&[east_by_hand], &[jobs(&[("REPLICAS", "3")])]).changes.remove(0);
    assert_eq!(change.config.placement, Some(east));
}

#[test]
fn subjects_are_given_up_before_others_catch_them() {
    let wanted = described(&configured(&[
        ("EVENT_BUS_STREAMS__SYSTEM__SUBJECTS", r#"["events.system.here.>"]"#),
        ("EVENT_BUS_STREAMS__ALARMS__SUBJECTS", r#"["events.system.alarms.>"]"#),
        ("EVENT_BUS_STREAMS__ALARMS__MAX_AGE_S", "3600"),
        ("EVENT_BUS_STREAMS__ALARMS__MAX_BYTES", "1000"),
    ]));
    let existing: Vec<Existing> =
        described(&configured(&[])).iter().map(|stream| on_server(stream, HELD)).collect();
    let changes = plan(&existing, &wanted).changes;
    let streams: Vec<&str> = changes.iter().map(|change| change.stream.as_str()).collect();
    assert_eq!(streams, ["BUS_SYSTEM", "BUS_ALARMS"]);
    assert!(matches!(changes[1].kind, ChangeKind::Create { .. }), "{changes:?}");
}

#[test]
fn the_defaults_say_what_the_bus_needs() {
    let wanted = described(&configured(&[("EVENT_BUS_PREFIX", "p-1"), ("EVENT_BUS_NATS__REPLICAS", "3")]));
    let deliver = &wanted.iter().find(|stream| stream.name == "deliver").unwrap().config;
    assert_eq!((&*deliver.name, &deliver.subjects), ("P-1_DELIVER", &vec!["p-1.deliver.>".to_owned()]));
    assert_eq!(deliver.retention, RetentionPolicy::WorkQueue);
    assert_eq!((deliver.discard, deliver.storage), (DiscardPolicy::New, StorageType::File));
    assert_eq!((deliver.num_replicas, deliver.duplicate_window), (3, Duration::from_secs(120)));
    assert_eq!(deliver.max_age, Duration::ZERO);
}
