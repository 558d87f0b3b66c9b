//! Running cargo from within cargo.

use std::{
    env,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use devkit::{paths::workspace_root, processes};

/// Variables that `cargo run` sets for this program, of which build scripts of other crates must not
/// hear: they would be built anew each time.
const OURS: [&str; 6] =
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_", "OUT_DIR"];

/// A cargo command in the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace_root()).stdin(Stdio::null());
    for (name, _) in env::vars_os() {
        if OURS.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs it with its output on the terminal.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| part.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ");
    let status = command.status().with_context(|| format!("start `{shown}`"))?;
    ensure!(status.success(), "`{shown}` failed");
    Ok(())
}

/// Builds the binaries and gives the folder with them.
pub(crate) fn build_binaries(release: bool) -> Result<PathBuf> {
    let mut command = cargo(&["build", "--workspace", "--bins"]);
    if release {
        command.arg("--release");
    }
    run(command)?;
    profile_dir(release)
}

/// Builds this program in release, and runs that with the arguments of this one.
pub(crate) fn run_in_release() -> Result<()> {
    // As part of the workspace, which has the dependencies' features in common with the binaries.
    run(cargo(&["build", "--workspace", "--bin", "xtask", "--release"]))?;
    let mut command = Command::new(profile_dir(true)?.join("xtask"));
    command.args(env::args_os().skip(1));
    run(command)
}

/// The folder with the binaries of a profile.
fn profile_dir(release: bool) -> Result<PathBuf> {
    // They lie beside this program, or in the folder of the other profile.
    let own = processes::bin_dir()?;
    let profiles = own.parent().context("the folder of the binaries has no parent")?;
    Ok(profiles.join(if release { "release" } else { "debug" }))
}
