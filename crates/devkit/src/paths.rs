//! Where things lie: the workspace, its `target` folder, and folders that vanish with their owner.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// The top folder of the workspace.
#[must_use]
pub fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("the crate lies two folders below the workspace")
}

/// The workspace's `target` folder: everything that is made lies below it, but for what
/// [`server_dir`] says.
#[must_use]
pub fn target_dir() -> PathBuf {
    workspace_root().join("target")
}

/// Whether this process is root, so that Postgres must be started as somebody else.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A short name for a text: the first 12 hexadecimal digits of its SHA-256.
#[must_use]
pub fn short_hash(text: &[u8]) -> String {
    Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// The folder for the servers' data and sockets, created if need be.
///
/// For an ordinary user this is `target/servers`. Root cannot run Postgres as itself, and the user that
/// runs it instead may be unable to enter the folder above the workspace; so for root it is a folder of
/// root's below the system's temporary one.
///
/// # Errors
/// If it cannot be created, or exists and belongs to somebody else.
pub fn server_dir() -> Result<PathBuf> {
    if !is_root() {
        let dir = target_dir().join("servers");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        return Ok(dir);
    }
    let temporary = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
    let parent = temporary.iter().find(|dir| everyone_can_enter(dir)).with_context(|| {
        format!("no folder that every user may enter among {temporary:?}; set TMPDIR to one")
    })?;
    let workspace = short_hash(workspace_root().as_os_str().as_encoded_bytes());
    let dir = parent.join(format!("event-bus-0-{workspace}"));
    match fs::DirBuilder::new().mode(0o755).create(&dir) {
        Ok(()) => {
            // The umask may have taken bits away.
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).with_context(|| format!("create {}", dir.display())),
    }
    // The parent is everybody's: a folder, or a link, that somebody else left there must not be trusted.
    let found = fs::symlink_metadata(&dir)?;
    ensure!(
        found.is_dir() && found.uid() == 0 && found.mode() & 0o022 == 0,
        "{} is not a folder that only root can write to; remove it",
        dir.display()
    );
    Ok(dir)
}

/// Whether any user can reach what lies in `dir`.
fn everyone_can_enter(dir: &Path) -> bool {
    let Ok(dir) = dir.canonicalize() else { return false };
    dir.ancestors().all(|part| fs::metadata(part).is_ok_and(|found| found.mode() & 0o001 != 0))
}

/// An exclusive lock on a file, held until dropped. Locks die with their process.
#[derive(Debug)]
pub struct FileLock(#[expect(dead_code, reason = "held for its lock")] File);

impl FileLock {
    /// Waits for the lock on `path`, creating the file.
    ///
    /// # Errors
    /// If the file cannot be created or locked.
    pub fn acquire(path: &Path) -> Result<Self> {
        let file = Self::open(path)?;
        file.lock().with_context(|| format!("lock {}", path.display()))?;
        Ok(Self(file))
    }

    /// Takes the lock on `path` if nobody holds it.
    ///
    /// # Errors
    /// If the file cannot be created or locked.
    pub fn try_acquire(path: &Path) -> Result<Option<Self>> {
        let file = Self::open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }

    fn open(path: &Path) -> Result<File> {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .with_context(|| format!("open {}", path.display()))
    }
}

/// A folder that belongs to one process and is removed with the value.
///
/// A process that is killed cannot remove anything, so each creation also sweeps the folders whose owners
/// are gone: an owner holds a lock, and the system gives it back whatever the owner's end was.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    #[expect(dead_code, reason = "held for its lock")]
    lock: FileLock,
}

impl RunDir {
    /// Creates a folder below [`server_dir`], and removes those that dead owners left.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn create() -> Result<Self> {
        Self::create_in(&server_dir()?.join("runs"))
    }

    fn create_in(runs: &Path) -> Result<Self> {
        fs::create_dir_all(runs).with_context(|| format!("create {}", runs.display()))?;
        // A folder is born and swept under this lock: no sweeper may see it before its own lock is held.
        let _births = FileLock::acquire(&runs.join("lock"))?;
        sweep(runs)?;
        let path = runs.join(crate::random_token(6));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        let Some(lock) = FileLock::try_acquire(&path.join("lock"))? else {
            bail!("somebody else holds the lock of the new folder {}", path.display());
        };
        Ok(Self { path, lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What cannot be removed now is swept later.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn sweep(runs: &Path) -> Result<()> {
    for entry in fs::read_dir(runs).with_context(|| format!("list {}", runs.display()))? {
        let path = entry?.path();
        let lock = path.join("lock");
        if path.is_dir() && (!lock.exists() || FileLock::try_acquire(&lock)?.is_some()) {
            // A server that is just dying may still be writing there: the next sweep gets it.
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    #[test]
    fn the_workspace_is_found() {
        assert!(workspace_root().join("crates/devkit/Cargo.toml").is_file());
    }

    #[test]
    fn run_folders_of_dead_owners_are_swept_and_others_are_kept() {
        let runs = RunDir::create().unwrap();
        let area = runs.path().join("area");
        let alive = RunDir::create_in(&area).unwrap();
        let orphan = area.join("orphan");
        fs::create_dir(&orphan).unwrap();
        fs::write(orphan.join("lock"), "").unwrap();

        let second = RunDir::create_in(&area).unwrap();

        assert!(alive.path().is_dir());
        assert!(!orphan.exists());
        let gone = second.path().to_owned();
        drop(second);
        assert!(!gone.exists());
    }
}
