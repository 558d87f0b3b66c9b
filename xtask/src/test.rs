//! `cargo xtask test`: the whole gate.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use devkit::{
    paths::{FileLock, target_dir},
    servers::{SharedServers, TEST_NATS_URL, TEST_POSTGRES_URL},
    stack::Backend,
};

use crate::{
    cargo::{build_binaries, cargo, run},
    chaos::Chaos,
    demo::{DemoOptions, demo},
    ui::{self, FAINT, GOOD, STRONG, paint},
};

/// The version of cargo-deny that is installed where there is none.
const DENY_VERSION: &str = "0.20.2";
/// How long fetching the list of known vulnerabilities may take.
const ADVISORIES: Duration = Duration::from_secs(60);
/// What builds the places where a test can make a binary crash.
const FAULT_POINTS: [&str; 2] = ["--features", "publisher/fault-points"];

/// Run the whole gate, or with arguments only the tests that they select.
#[derive(Debug, Args)]
pub struct Test {
    /// Passed to `cargo nextest run --workspace` (`cargo test` where nextest is not installed): part of a
    /// name, or `-E 'package(devkit)'`
    #[arg(last = true)]
    filter: Vec<String>,
}

impl Test {
    pub(crate) async fn run(self) -> Result<()> {
        let mut gate = Gate::default();
        if !self.filter.is_empty() {
            gate.step("build the binaries", || run(build()))?;
            return gate.tests(&self.filter).await;
        }
        gate.step("format", || run(cargo(&["fmt", "--all", "--check"])))?;
        gate.step("clippy", || {
            let mut clippy = cargo(&["clippy", "--workspace", "--all-targets"]);
            clippy.args(FAULT_POINTS).args(["--", "--deny", "warnings"]);
            run(clippy)
        })?;
        gate.step("documentation", || {
            let mut doc = cargo(&["doc", "--no-deps", "--workspace"]);
            doc.args(FAULT_POINTS).env("RUSTDOCFLAGS", "-D warnings");
            run(doc)
        })?;
        gate.step("licences, bans, sources", check_dependencies)?;
        gate.step("build the binaries", || run(build()))?;
        gate.tests(&[]).await?;
        gate.step("documentation tests", || {
            let mut tests = cargo(&["test", "--doc", "--workspace"]);
            tests.args(FAULT_POINTS);
            run(tests)
        })?;
        let mut shipped = None;
        gate.step("build the binaries as they ship", || {
            shipped = Some(build_binaries(false)?);
            Ok(())
        })?;
        for backend in Backend::ALL {
            gate.demo(backend).await?;
        }
        if let Some(bin_dir) = shipped {
            gate.chaos(bin_dir).await?;
        }
        gate.summary();
        Ok(())
    }
}

fn build() -> Command {
    let mut build = cargo(&["build", "--workspace", "--bins"]);
    build.args(FAULT_POINTS);
    build
}

/// The steps so far, with their times.
#[derive(Debug, Default)]
struct Gate {
    done: Vec<(&'static str, Duration)>,
}

impl Gate {
    fn step(&mut self, name: &'static str, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = heading(name);
        let result = body();
        self.finish(name, start, result)
    }

    /// All tests, or those that the filter selects, on servers that are started once.
    async fn tests(&mut self, filter: &[String]) -> Result<()> {
        let name = "tests";
        let start = heading(name);
        let servers = SharedServers::start().await?;
        let mut tests = test_command(filter);
        tests.env(TEST_POSTGRES_URL, servers.postgres_url()).env(TEST_NATS_URL, servers.nats_url());
        let result = run(tests);
        self.finish(name, start, result)
    }

    async fn demo(&mut self, backend: Backend) -> Result<()> {
        let name = match backend {
            Backend::Jetstream => "demo with jetstream",
            Backend::Postgres => "demo with postgres",
            Backend::Memory => "demo with memory",
        };
        let start = heading(name);
        let result = demo(&DemoOptions { backend, ..DemoOptions::default() }).await.and_then(|outcome| {
            ui::line(outcome);
            ensure!(outcome.is_success(), "the demo did not end as promised");
            Ok(())
        });
        self.finish(name, start, result)
    }

    async fn chaos(&mut self, bin_dir: PathBuf) -> Result<()> {
        let name = "chaos";
        let start = heading(name);
        let result = Chaos::short(bin_dir).run().await;
        self.finish(name, start, result)
    }

    fn finish(&mut self, name: &'static str, start: Instant, result: Result<()>) -> Result<()> {
        let took = start.elapsed();
        result.with_context(|| format!("{name}, after {}", ui::elapsed(took)))?;
        ui::line(format!("{} {}", paint(GOOD, "✓"), paint(FAINT, format!("{name}: {}", ui::elapsed(took)))));
        self.done.push((name, took));
        Ok(())
    }

    fn summary(&self) {
        ui::line(format!("\n{}", paint(STRONG, "All is well.")));
        for (name, took) in &self.done {
            ui::line(format!("  {} {name:34} {:>14}", paint(GOOD, "✓"), ui::elapsed(*took)));
        }
        let total = self.done.iter().map(|(_, took)| *took).sum();
        ui::line(format!("    {:34} {:>14}", "together", ui::elapsed(total)));
    }
}

fn heading(name: &str) -> Instant {
    ui::line(format!("\n{}", paint(STRONG, format!("▶ {name}"))));
    Instant::now()
}

fn works(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn test_command(filter: &[String]) -> Command {
    let nextest = works(&mut cargo(&["nextest", "--version"]));
    let mut tests = if nextest {
        cargo(&["nextest", "run", "--workspace"])
    } else {
        cargo(&["test", "--workspace", "--lib", "--bins", "--tests"])
    };
    tests.args(FAULT_POINTS).args(filter);
    if !nextest && !filter.iter().any(|argument| argument == "--") {
        // Each system test runs half a dozen processes.
        tests.args(["--", "--test-threads", "2"]);
    }
    tests
}

/// Licences, banned crates, sources; and known vulnerabilities if their list can be had.
fn check_dependencies() -> Result<()> {
    let deny = |arguments: &[&str]| -> Result<Command> {
        let mut command = match deny_program()? {
            Some(program) => Command::new(program),
            None => Command::new("cargo-deny"),
        };
        command.args(["--workspace", "--all-features"]).args(arguments);
        command.current_dir(devkit::paths::workspace_root()).stdin(Stdio::null());
        Ok(command)
    };
    run(deny(&["check", "--hide-inclusion-graph", "bans", "licenses", "sources"])?)?;

    let mut fetch = deny(&["fetch", "db"])?;
    let mut fetching =
        fetch.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("start cargo-deny")?;
    let until = Instant::now() + ADVISORIES;
    let fetched = loop {
        match fetching.try_wait()? {
            Some(status) => break status.success(),
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            None => {
                fetching.kill()?;
                fetching.wait()?;
                break false;
            }
        }
    };
    if !fetched {
        ui::line("Skipped: known vulnerabilities. Their list cannot be fetched from here.");
        return Ok(());
    }
    run(deny(&["check", "--disable-fetch", "advisories"])?)
}

/// Where cargo-deny lies, if not on the PATH; installed into `target/tools` if it is nowhere.
fn deny_program() -> Result<Option<std::path::PathBuf>> {
    if works(Command::new("cargo-deny").arg("--version")) {
        return Ok(None);
    }
    let tools = target_dir().join("tools");
    let program = tools.join("bin/cargo-deny");
    if !program.is_file() {
        std::fs::create_dir_all(&tools)?;
        let _lock = FileLock::acquire(&tools.join("lock"))?;
        let mut install =
            cargo(&["install", "cargo-deny", "--version", DENY_VERSION, "--locked", "--debug", "--root"]);
        install.arg(&tools);
        run(install)?;
    }
    if !program.is_file() {
        bail!("cargo install left no {}", program.display());
    }
    Ok(Some(program))
}
