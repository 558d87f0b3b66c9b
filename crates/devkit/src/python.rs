//! Packages of the Python index, pinned with hashes and installed once into `target/tools`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::paths::{self, FileLock};

/// The folder with `requirements`, for `PYTHONPATH`: installed if need be. Compiled packages are made for one version
/// of Python, so each has a folder of its own.
///
/// # Errors
/// As [`install`].
pub(crate) fn packages(name: &str, requirements: &str) -> Result<PathBuf> {
    let version = Command::new("python3").arg("--version").output().context("run python3")?;
    let identity = [requirements.as_bytes(), &version.stdout].concat();
    let tools = paths::target_dir().join("tools");
    let home = tools.join(format!("{name}-{}", paths::short_hash(&identity)));
    install(&tools, &home, requirements, |_| Ok(()))?;
    Ok(home)
}

/// Installs `requirements` into a fresh folder, which becomes `home` only when it is complete and `check`
/// has accepted it: an interrupted run leaves nothing that looks installed. Nothing happens if `home` is
/// there, or somebody else makes it while we wait.
///
/// # Errors
/// If there is no Python with pip, the packages cannot be had, or `check` refuses.
pub(crate) fn install(
    tools: &Path,
    home: &Path,
    requirements: &str,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    fs::create_dir_all(tools).with_context(|| format!("create {}", tools.display()))?;
    let _lock = FileLock::acquire(&tools.join("lock"))?;
    if home.is_dir() {
        return Ok(());
    }
    let fresh = tools.join("fetching");
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    fs::create_dir_all(&fresh)?;
    let file = fresh.join("requirements.txt");
    fs::write(&file, requirements)?;
    let content = fresh.join("content");
    let output = pip(&fresh)?
        .args(["install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"])
        .args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--target"])
        .arg(&content)
        .arg("-r")
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .context("run pip")?;
    ensure!(output.status.success(), "pip: {}", String::from_utf8_lossy(&output.stderr).trim());
    check(&content)?;
    fs::rename(&content, home).with_context(|| format!("rename to {}", home.display()))?;
    fs::remove_dir_all(&fresh)?;
    Ok(())
}

/// The pip of the system's Python, or that of a virtual environment where Python comes without.
fn pip(fresh: &Path) -> Result<Command> {
    let works = |program: &Path| {
        let mut probe = Command::new(program);
        probe.args(["-m", "pip", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    };
    let mut python = PathBuf::from("python3");
    if !works(&python) {
        let environment = fresh.join("python");
        let made = Command::new(&python).args(["-m", "venv"]).arg(&environment).output();
        python = environment.join("bin/python3");
        if !made.is_ok_and(|output| output.status.success()) || !works(&python) {
            bail!("Python 3 with pip is needed to fetch packages; install it (Debian: python3-pip)");
        }
    }
    let mut command = Command::new(python);
    command.args(["-m", "pip"]);
    Ok(command)
}
