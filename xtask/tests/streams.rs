//! `cargo xtask streams`, as its user sees it.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Output;

use devkit::servers::{NatsServer, Tools};
use serde_json::Value;
use tokio::process::Command;

/// A broker, and a file that is given to the command.
struct Setup {
    nats: NatsServer,
    file: tempfile::NamedTempFile,
}

impl Setup {
    async fn new() -> Self {
        let tools = tokio::task::spawn_blocking(Tools::locate).await.unwrap().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        Self { nats: NatsServer::private(&tools).await.unwrap(), file }
    }

    fn describe(&self, toml: &str) {
        std::fs::write(self.file.path(), toml).unwrap();
    }

    async fn streams(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["streams", "--config"])
            .arg(self.file.path())
            .args(arguments)
            .env("NATS_URL", self.nats.url())
            .output()
            .await
            .unwrap()
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test]
async fn plan_tells_by_its_exit_code_what_apply_will_do() {
    let setup = Setup::new().await;
    let planned = setup.streams(&["plan"]).await;
    assert_eq!(code(&planned), 2, "{}", told(&planned));
    assert!(told(&planned).contains("create BUS_DELIVER  bus.deliver.>"), "{}", told(&planned));
    assert_eq!(code(&setup.streams(&["apply"]).await), 0);
    assert_eq!(code(&setup.streams(&["plan"]).await), 0);

    setup.describe("[streams.billing]\nsubjects = ['billing.>']\nmax_age_s = 3600\nmax_bytes = 1000000");
    let planned = setup.streams(&["plan", "--json"]).await;
    assert_eq!(code(&planned), 2);
    let plan: Value = serde_json::from_slice(&planned.stdout).unwrap();
    assert_eq!(plan["changes"].as_array().unwrap().len(), 1);
    assert_eq!(plan["changes"][0]["stream"], "BUS_BILLING");
    assert_eq!(plan["changes"][0]["change"], "create");
}

#[tokio::test]
async fn apply_names_the_flag_that_accepts_a_loss() {
    let setup = Setup::new().await;
    assert_eq!(code(&setup.streams(&["apply"]).await), 0);
    setup.describe("[streams.audit]\narchive = 'drop'");
    let refused = setup.streams(&["apply"]).await;
    assert_eq!(code(&refused), 1);
    assert!(told(&refused).contains("--allow-data-loss"), "{}", told(&refused));
    assert_eq!(code(&setup.streams(&["plan"]).await), 2, "nothing was changed");
    assert_eq!(code(&setup.streams(&["apply", "--allow-data-loss"]).await), 0);
    assert_eq!(code(&setup.streams(&["plan"]).await), 0);
}

#[tokio::test]
async fn a_configuration_that_cannot_be_used_is_refused_before_anything_is_looked_at() {
    let setup = Setup::new().await;
    setup.describe("[streams.more]\nsubjects = ['deliver.x']\nmax_age_s = 3600\nmax_bytes = 1");
    let refused = setup.streams(&["apply"]).await;
    assert_eq!(code(&refused), 1);
    assert!(told(&refused).contains("streams.more"), "{}", told(&refused));
}
