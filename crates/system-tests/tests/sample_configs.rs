//! The sample configurations of `deploy/config` are read by the loaders that the binaries use.

use std::{collections::BTreeMap, path::Path};

use bus_core::{
    config::{RoleConfig, load},
    telemetry::Chain,
};

/// The secret files of a sample (`…_file = "/run/secrets/…"`) do not exist here; each is replaced by one
/// that does.
fn check<C: RoleConfig>(name: &str) {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/config").join(name);
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(sample).unwrap();
    let (mut replaced, mut section) = (String::new(), "");
    for line in text.lines() {
        if line.starts_with('[') {
            section = line;
        }
        match line.split_once("_file = ") {
            Some((key, _)) => {
                let secret = dir.path().join(format!("{section}{key}"));
                let scheme = if section == "[nats]" { "nats" } else { "postgres" };
                std::fs::write(&secret, format!("{scheme}://nobody@localhost/\n")).unwrap();
                replaced += &format!("{key}_file = {secret:?}\n");
            }
            None => replaced += &format!("{line}\n"),
        }
    }
    let file = dir.path().join(name);
    std::fs::write(&file, replaced).unwrap();
    if let Err(refused) = load::<C>(Some(&file), BTreeMap::new()) {
        panic!("{name}: {}", Chain(&refused));
    }
}

#[test]
fn the_shipped_samples_are_accepted() {
    check::<publisher::config::PublisherConfig>("publisher.toml");
    check::<delivery_worker::config::WorkerConfig>("delivery-worker.toml");
    check::<cron_scheduler::SchedulerConfig>("cron-scheduler.toml");
    check::<archiver::ArchiverConfig>("archiver.toml");
}
