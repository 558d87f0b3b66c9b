//! Configuration: precedence, secrets, and what is refused.

use std::io::Write as _;

use bus_core::{
    config::{Backend, Common, ConfigError, Loaded, NotifyStrategy, RoleConfig, load},
    telemetry::Chain,
};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Role {
    #[serde(default)]
    admin_token: Option<SecretString>,
}

impl RoleConfig for Role {
    fn defaults() -> Vec<&'static str> {
        Vec::new()
    }

    fn problem(&self, _: &Common) -> Option<String> {
        None
    }
}

/// The role of the one process that has every role, which alone may keep its queue in memory.
#[derive(Debug, Deserialize)]
struct EveryRole {}

impl RoleConfig for EveryRole {
    const EVERY_ROLE: bool = true;

    fn defaults() -> Vec<&'static str> {
        Vec::new()
    }

    fn problem(&self, _: &Common) -> Option<String> {
        None
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn try_load(toml: Option<&str>, environment: &[(&str, &str)]) -> Result<Loaded<Role>, ConfigError> {
    let file = toml.map(file);
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load(file.as_ref().map(|file| file.path()), environment)
}

const URLS: [(&str, &str); 2] =
    [("DATABASE_URL", "postgres://u:secret@db/bus"), ("NATS_URL", "nats://u:secret@nats")];

fn with(toml: Option<&str>, more: &[(&str, &str)]) -> Loaded<Role> {
    try_load(toml, &[&URLS, more].concat()).unwrap_or_else(|refused| panic!("{}", Chain(&refused)))
}

fn refusal(toml: Option<&str>, environment: &[(&str, &str)]) -> String {
    Chain(&try_load(toml, environment).expect_err("refused")).to_string()
}

#[test]
fn the_environment_beats_the_file_and_the_file_the_defaults() {
    let toml = "lanes = 8\nprefix = \"file\"";
    let loaded = with(Some(toml), &[("EVENT_BUS_LANES", "16"), ("EVENT_BUS_BACKEND", "postgres")]);
    assert_eq!((loaded.common.lanes, &*loaded.common.prefix), (16, "file"));
    assert_eq!(loaded.common.backend, Backend::Postgres);
    assert_eq!(loaded.common.postgres.max_connections, 10);
}

#[test]
fn nested_keys_come_from_the_environment() {
    let loaded = with(None, &[("EVENT_BUS_POSTGRES__MAX_CONNECTIONS", "7")]);
    assert_eq!(loaded.common.postgres.max_connections, 7);
}

#[test]
fn secrets_are_text_whatever_they_look_like() {
    for token in ["123456", "true", "007", "{a=1}", "1e9", " x "] {
        let loaded = with(None, &[("EVENT_BUS_ADMIN_TOKEN", token)]);
        assert_eq!(loaded.config.admin_token.unwrap().expose_secret(), token);
    }
}

#[test]
fn secrets_come_from_files_without_their_last_line_break() {
    let token = file("from-a-file\n");
    let url = file("postgres://db/from-a-file\r\n");
    let toml = format!("admin_token_file = {:?}\n[postgres]\nurl_file = {:?}", token.path(), url.path());
    let loaded = try_load(Some(&toml), &[("NATS_URL", "nats://nats")]).unwrap();
    assert_eq!(loaded.config.admin_token.unwrap().expose_secret(), "from-a-file");
    assert_eq!(loaded.common.postgres.url.expose_secret(), "postgres://db/from-a-file");
    let by_environment =
        with(None, &[("EVENT_BUS_ADMIN_TOKEN_FILE", token.path().to_str().unwrap())]).config.admin_token;
    assert_eq!(by_environment.unwrap().expose_secret(), "from-a-file");
}

#[test]
fn what_is_shown_has_no_secret() {
    let loaded = with(None, &[("EVENT_BUS_ADMIN_TOKEN", "hush")]);
    assert_eq!(loaded.shown["postgres.url"], "[redacted]");
    assert_eq!(loaded.shown["lanes"], "4");
    let all = format!("{:?} {loaded:?}", loaded.shown);
    assert!(!all.contains("hush") && !all.contains("secret@"), "{all}");
}

#[test]
fn a_name_that_nobody_has_is_refused_and_named() {
    assert!(refusal(None, &[&URLS[..], &[("EVENT_BUS_LNAES", "4")]].concat()).contains("lnaes"));
    let nested = refusal(None, &[&URLS[..], &[("EVENT_BUS_POSTGRES__POOL", "4")]].concat());
    assert!(nested.contains("pool"), "{nested}");
    assert!(refusal(Some("[postgress]\nurl = 'x'"), &URLS).contains("postgress"));
}

#[test]
fn sections_of_other_roles_and_the_variables_of_clients_do_no_harm() {
    let others = [
        ("EVENT_BUS_URL", "http://127.0.0.1:8080"),
        ("EVENT_BUS_API_KEY", "ebk_x"),
        ("EVENT_BUS_HTTP__LISTEN", "127.0.0.1:0"),
    ];
    with(None, &others);
}

#[test]
fn what_does_not_go_together_is_refused_with_the_reason() {
    let no_nats = refusal(None, &URLS[..1]);
    assert!(no_nats.contains("NATS_URL"), "{no_nats}");
    with(None, &[("EVENT_BUS_BACKEND", "postgres")]);
    for (name, value, complaint) in [
        ("EVENT_BUS_PREFIX", "a.b", "prefix"),
        ("EVENT_BUS_LANES", "0", "lanes"),
        ("EVENT_BUS_LANES", "many", "lanes"),
        ("EVENT_BUS_NATS__REPLICAS", "6", "nats.replicas"),
        ("EVENT_BUS_NOTIFY__POLL_MS", "0", "notify.poll_ms"),
        ("EVENT_BUS_NOTIFY__STRATEGY", "memory", "notify.strategy"),
        ("EVENT_BUS_NOTIFY__STRATEGY", "pigeons", "pigeons"),
        ("EVENT_BUS_ADMIN_TOKEN_FILE", "/no/such/file", "/no/such/file"),
    ] {
        let refused = refusal(None, &[&URLS[..], &[(name, value)]].concat());
        assert!(refused.contains(complaint), "{name}={value}: {refused}");
    }
}

#[test]
fn the_strategy_of_hints_follows_what_is_configured() {
    let strategy = |with_nats: bool, backend: &str, strategy: &str| {
        let (backend, strategy) = (("EVENT_BUS_BACKEND", backend), ("EVENT_BUS_NOTIFY__STRATEGY", strategy));
        let urls = if with_nats { &URLS[..] } else { &URLS[..1] };
        let environment = [urls, &[backend, strategy]].concat();
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        load::<EveryRole>(None, environment)
            .map(|loaded| loaded.common.notify_strategy())
            .map_err(|refused| Chain(&refused).to_string())
    };
    for (with_nats, backend, asked, got) in [
        (true, "jetstream", "auto", NotifyStrategy::Nats),
        (true, "postgres", "auto", NotifyStrategy::Compose),
        (false, "postgres", "auto", NotifyStrategy::Postgres),
        (false, "memory", "auto", NotifyStrategy::Memory),
        (true, "jetstream", "postgres", NotifyStrategy::Postgres),
        (true, "jetstream", "compose", NotifyStrategy::Compose),
        (true, "postgres", "nats", NotifyStrategy::Nats),
        (false, "postgres", "polling", NotifyStrategy::Polling),
        (false, "memory", "memory", NotifyStrategy::Memory),
    ] {
        assert_eq!(strategy(with_nats, backend, asked), Ok(got), "{backend}, {asked}");
    }
    for asked in ["nats", "compose"] {
        let refused = strategy(false, "postgres", asked).unwrap_err();
        assert!(refused.contains("NATS_URL") && refused.contains("notify.strategy"), "{refused}");
    }
}

/// Each with the least that is said about one more stream.
const JOBS: &str = "[streams.jobs]\nsubjects = ['jobs.>']\nmax_age_s = 3600\nmax_bytes = 1000000\n";

#[test]
fn streams_come_from_the_defaults_the_file_and_the_environment() {
    let toml = format!("{JOBS}[streams.dead]\nmax_age_s = 86400");
    let loaded = with(Some(&toml), &[("EVENT_BUS_STREAMS__DELIVER__MAX_BYTES", "1000")]);
    let streams = &loaded.common.streams;
    assert_eq!((streams["dead"].max_age_s, streams["dead"].max_bytes), (86_400, 1 << 30));
    assert_eq!(streams["deliver"].max_bytes, 1_000);
    assert_eq!(streams["jobs"].subjects, ["jobs.>"]);
    assert_eq!(loaded.shown["streams.jobs.max_age_s"], "3600");
}

#[test]
fn streams_that_the_broker_or_the_bus_cannot_use_are_refused_with_the_reason() {
    for (toml, complaint) in [
        ("[streams.jobs]\nmax_age_s = 1\nmax_bytes = 1", "subjects"),
        ("[streams.jobs]\nsubjects = ['jobs']\nmax_bytes = 1", "max_age_s"),
        ("[streams.jobs]\nsubjects = ['jobs']\nmax_age_s = 1", "max_bytes"),
        ("[streams.api]\nmax_age = 1", "max_age"),
        ("[streams.api]\nretention = 'queue'", "queue"),
        ("[streams.api]\narchive = 'maybe'", "maybe"),
        (
            "[streams.Jobs]\nsubjects = ['jobs']\nmax_age_s = 1000\nmax_bytes = 1",
            "streams.Jobs: a stream's name",
        ),
        (
            "[streams.a__b]\nsubjects = ['jobs']\nmax_age_s = 1000\nmax_bytes = 1",
            "streams.a__b: a stream's name",
        ),
        ("[streams.api]\nsubjects = ['events..api']", "is no subject"),
        ("[streams.api]\nsubjects = ['events.>.api']", "is no subject"),
        ("[streams.api]\nmax_bytes = 0", "max_bytes (0) must be positive"),
        ("[streams.api]\nmax_messages = -2", "max_messages (-2) must be positive"),
        ("[streams.api]\nreplicas = 6", "streams.api: replicas"),
        ("[nats]\nplacement = { cluster = 'a b' }", "nats.placement.cluster"),
        ("[streams.api]\nplacement = { tags = [''] }", "streams.api: placement.tags"),
        ("[streams.api]\nmax_age_s = 60", "duplicate_window_s (120)"),
        ("[streams.api]\nduplicate_window_s = 0", "duplicate_window_s (0)"),
        ("[streams.api]\nsubjects = ['events.*.x']", "catches what streams."),
        ("[streams.api]\nsubjects = ['a.*', 'a.b']", "catches what streams.api does"),
        ("[streams.api]\nsubjects = ['wake.>']", "never kept"),
        ("[streams.api]\narchive = 'archive'\nretention = 'interest'", "needs retention \"limits\""),
        ("[streams.audit]\nstorage = 'memory'", "needs storage \"file\""),
        ("[streams.audit]\ndiscard = 'old'", "needs discard \"new\""),
        ("[streams.deliver]\nsubjects = ['deliver.1.>']", "streams.deliver: subjects must cover"),
        ("[streams.dead]\nsubjects = []", "streams.dead: subjects must cover"),
        ("[streams.audit]\nsubjects = ['events.audit.receipt.>']", "streams.audit: subjects must cover"),
        ("[streams.deliver]\nretention = 'limits'", "streams.deliver: retention"),
        ("[streams.deliver]\ndiscard = 'old'", "streams.deliver: retention"),
        ("[streams.deliver]\nstorage = 'memory'", "streams.deliver: storage"),
        ("[streams.deliver]\nmax_age_s = 3600", "streams.deliver: max_age_s"),
        ("[streams.deliver]\nduplicate_window_s = 60", "streams.deliver: duplicate_window_s"),
        ("[streams.dead]\narchive = 'archive'", "streams.dead: discard"),
        ("[streams.dead]\nretention = 'interest'", "streams.dead: retention"),
    ] {
        let refused = refusal(Some(toml), &URLS);
        assert!(refused.contains(complaint), "{toml}: {refused}");
    }
    for accepted in [
        JOBS,
        "[streams.audit]\narchive = 'drop'",
        "[streams.deliver]\nsubjects = ['deliver.>', 'more.*']",
        "[streams.api]\nsubjects = []",
        "[streams.api]\nmax_bytes = -1\nstorage = 'memory'\nreplicas = 5",
    ] {
        with(Some(accepted), &[]);
    }
}

#[test]
fn a_variable_that_cannot_be_parsed_is_text_and_no_panic() {
    // figment's parser cuts the one in the middle of a character, and runs out of stack in the other.
    for odd in ["[\"110.0.0.0/\u{fffd}\u{0}\"".to_owned(), "[".repeat(10_000)] {
        let refused =
            try_load(None, &[&URLS[..], &[("EVENT_BUS_LANES", odd.as_str())]].concat()).unwrap_err();
        assert!(Chain(&refused).to_string().contains("lanes"), "{}", Chain(&refused));
    }
}
