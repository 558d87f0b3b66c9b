//! What every binary does around its work: flags, exit codes, probes, signals.

use std::{
    net::TcpListener,
    process::{Command, Output},
    time::Duration,
};

use devkit::{
    processes::{Role, bin_dir},
    receiver::{Answer, Receiver},
    servers::Durability,
    stack::{ServerChoice, Stack, StackOptions},
    wait_until,
};
use serde_json::{Value, json};
use system_tests::Tenant;

const DEADLINE: Duration = Duration::from_secs(30);

/// Runs a binary to its end, with nothing in the environment but this.
fn output(role: Role, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(bin_dir().unwrap().join(role.binary()))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const URLS: [(&str, &str); 2] =
    [("DATABASE_URL", "postgres://bus:hush@127.0.0.1:1/bus"), ("NATS_URL", "nats://bus:hush@127.0.0.1:1")];

#[test]
fn check_config_shows_what_is_in_force_without_secrets_and_touches_nothing() {
    for role in Role::ALL {
        let checked = output(role, &["--check-config"], &[&URLS[..], &[("EVENT_BUS_LANES", "7")]].concat());
        let shown = text(&checked.stdout);
        assert_eq!(checked.status.code(), Some(0), "{}: {}", role.binary(), text(&checked.stderr));
        assert!(shown.contains("lanes = 7\n") && shown.contains("postgres.url = [redacted]\n"), "{shown}");
        assert!(!shown.contains("hush"), "{shown}");
    }
}

#[test]
fn a_configuration_that_cannot_be_used_ends_with_64_and_the_reason() {
    let cases = [
        (&["--check-config"][..], ("EVENT_BUS_LANES", "0"), "lanes"),
        (&[], ("EVENT_BUS_BACKEND", "kafka"), "backend"),
        (&[], ("EVENT_BUS_TELEMETRY__FILTER", "bus=loud"), "telemetry.filter"),
        (&[], ("DATABASE_URL", "hush"), "postgres.url"),
        (&[], ("NATS_URL", "nats://a:hush@b:port"), "nats.url"),
        (&["--config", "/no/such/file.toml"], ("PATH", "/"), "/no/such/file.toml"),
        (&["--no-such-flag"], ("PATH", "/"), "--no-such-flag"),
    ];
    for role in Role::ALL {
        for (arguments, variable, complaint) in cases {
            let refused = output(role, arguments, &[URLS[0], URLS[1], variable]);
            let reason = text(&refused.stderr);
            assert_eq!(refused.status.code(), Some(64), "{} {arguments:?}: {reason}", role.binary());
            assert!(reason.contains(complaint), "{} {arguments:?}: {reason}", role.binary());
            assert!(!reason.contains("hush"), "{reason}");
        }
    }
}

#[test]
fn memory_is_for_the_process_of_every_role_alone() {
    let environment = [URLS[0], ("EVENT_BUS_BACKEND", "memory")];
    for role in Role::ALL {
        let refused = output(role, &[], &environment);
        let reason = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(64), "{}: {reason}", role.binary());
        assert!(reason.contains("memory") && reason.contains("event-bus"), "{reason}");
    }
    let checked = output(Role::EventBus, &["--check-config"], &environment);
    let shown = text(&checked.stdout);
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked.stderr));
    for section in ["publish.max_batch", "worker.in_flight", "maintenance.partitions_ahead_days"] {
        assert!(shown.contains(section), "no {section} in {shown}");
    }
    let refused =
        output(Role::EventBus, &[], &[&environment[..], &[("EVENT_BUS_WORKER__IN_FLIHGT", "3")]].concat());
    let reason = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(64), "{reason}");
    assert!(reason.contains("in_flihgt"), "{reason}");
}

#[test]
fn version_and_help_are_answered() {
    for role in Role::ALL {
        let version = output(role, &["--version"], &[]);
        assert_eq!(text(&version.stdout), format!("{} {}\n", role.binary(), env!("CARGO_PKG_VERSION")));
        let help = text(&output(role, &["--help"], &[]).stdout);
        assert!(help.contains("--check-config") && help.contains("--config <FILE>"), "{help}");
    }
}

#[test]
fn a_port_that_is_taken_ends_the_start_and_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for role in Role::ALL {
        let failed = output(role, &[], &[&URLS[..], &[("EVENT_BUS_ADMIN__LISTEN", &address)]].concat());
        let log = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(1), "{}: {log}", role.binary());
        assert!(log.contains(&address) && log.contains("admin.listen"), "{log}");
    }
}

#[tokio::test]
async fn the_first_line_says_what_was_started_and_no_secret() {
    let mut stack = Stack::start(StackOptions::default()).await.unwrap();
    let token = stack.admin_token().to_owned();
    for role in Role::ALL {
        let log = stack.process(role, 0).log_text().unwrap();
        let first = log.lines().next().unwrap();
        for part in ["Starting", role.binary(), env!("CARGO_PKG_VERSION"), "[redacted]", "2026"] {
            assert!(first.contains(part), "no {part} in {first}");
        }
        assert!(!log.contains(&token) && !log.contains("postgres://"), "{log}");
    }
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn readiness_follows_an_outage_and_liveness_does_not() {
    let options = StackOptions::default().servers(ServerChoice::Own(Durability::Fast));
    let mut stack = Stack::start(options).await.unwrap();
    stack.nats().kill().await.unwrap();
    stack.postgres().kill().await.unwrap();
    for role in Role::ALL {
        let process = stack.process(role, 0);
        // Publishers accept events without the broker.
        let expected =
            if role == Role::Publisher { json!(["postgres"]) } else { json!(["nats", "postgres"]) };
        wait_until("a process that says what it misses", DEADLINE, || async {
            let (status, body) = process.admin_get("/readyz").await.unwrap();
            let body: Value = serde_json::from_str(&body).unwrap();
            if status == 503 && body["waiting"] == expected { Ok(()) } else { Err(body) }
        })
        .await;
        assert_eq!(process.admin_get("/healthz").await.unwrap().0, 200);
    }
    stack.nats().restart().await.unwrap();
    stack.postgres().restart().await.unwrap();
    for role in Role::ALL {
        let process = stack.process(role, 0);
        wait_until("a process that is ready again", DEADLINE, || async {
            let (status, body) = process.admin_get("/readyz").await.unwrap();
            if status == 200 { Ok(()) } else { Err(body) }
        })
        .await;
    }
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_binary_starts_before_its_database_and_its_broker() {
    let options = StackOptions::default().servers(ServerChoice::Own(Durability::Fast));
    let mut stack = Stack::start(options).await.unwrap();
    stack.nats().kill().await.unwrap();
    stack.postgres().kill().await.unwrap();
    for role in Role::ALL {
        stack.process(role, 0).sigkill().await.unwrap();
        stack.process(role, 0).respawn().unwrap();
    }
    stack.postgres().restart().await.unwrap();
    stack.nats().restart().await.unwrap();
    for role in Role::ALL {
        stack.process(role, 0).wait_ready().await.unwrap();
    }
    stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_cut_off_and_is_no_success() {
    let options = StackOptions::default()
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", 30_000)
        .role_env(Role::DeliveryWorker, "EVENT_BUS_SHUTDOWN__DRAIN_MS", 32_500);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    receiver.script("/hangs", Answer::hang());
    let tenant = Tenant::create(&mut stack, "acme").await.unwrap();
    tenant.receive(&receiver, "/hangs", "hang").await.unwrap();
    tenant.publish_number("hang", 1).await.unwrap();
    receiver.wait_for("/hangs", 1).await;
    let worker = stack.worker(0);
    worker.sigterm().unwrap();
    wait_until("the drain", DEADLINE, || async {
        let (status, body) = worker.admin_get("/readyz").await.unwrap();
        if status == 503 && body.contains("stopping") { Ok(()) } else { Err(body) }
    })
    .await;
    // The delivery in flight holds the drain; a second signal ends it.
    worker.sigterm().unwrap();
    let status = worker.wait_exit().await.unwrap();
    assert_eq!(status.code(), Some(1), "{}", worker.log_text().unwrap());
    assert!(worker.log_text().unwrap().contains("a second SIGTERM cut the drain short"));
    stack.shutdown().await.unwrap();
}
