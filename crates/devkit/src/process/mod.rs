//! Child processes that end with their owner, or that outlive it on purpose.

mod identity;

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
pub use rustix::process::Signal;

pub use self::identity::{ProcessId, children_of, processes_with_argument, processor_time, resident_memory};
use crate::poll;

/// Whether a process dies with the one that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It gets this signal when its [`Process`] is dropped, and also when the owner is killed.
    Owned(Signal),
    /// It goes on when the owner ends; whoever finds its [`ProcessId`] stops it.
    Detached,
}

/// A user to run as.
#[derive(Debug, Clone, Copy)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
}

impl User {
    /// The user `nobody`, for servers that refuse to run as root.
    ///
    /// # Errors
    /// If the system has no such user.
    pub fn nobody() -> Result<Self> {
        Ok(Self { uid: id_of_nobody("-u")?, gid: id_of_nobody("-g")? })
    }
}

fn id_of_nobody(flag: &str) -> Result<u32> {
    let output = Command::new("id").args([flag, "nobody"]).output().context("run `id`")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().context("this system has no user called nobody")
}

/// What to start.
#[derive(Debug, Clone)]
pub struct Launch {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    user: Option<User>,
    dir: Option<PathBuf>,
    log: PathBuf,
}

/// Variables that would change what a server or one of our binaries does: a child gets only those that
/// its launch names, whatever the shell of the developer holds.
const SCRUBBED: [&str; 5] = ["EVENT_BUS_", "DATABASE_URL", "NATS_URL", "PG", "LC_"];

impl Launch {
    /// Starts `program`, with its output appended to `log`.
    pub fn new(program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            user: None,
            dir: None,
            log: log.into(),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable; the last value of a name wins.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Runs as another user (only root can).
    #[must_use]
    pub fn user(mut self, user: Option<User>) -> Self {
        self.user = user;
        self
    }

    /// Runs in this folder.
    #[must_use]
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Starts it.
    ///
    /// # Errors
    /// If the program is not there, or the log cannot be written.
    pub fn spawn(&self, lifetime: Lifetime) -> Result<Process> {
        if !self.program.is_file() {
            bail!("{} does not exist", self.program.display());
        }
        let mut child = self.command(lifetime)?.spawn().with_context(|| self.what())?;
        let guard = child.stdin.take();
        Ok(Process { child, guard, lifetime, log: self.log.clone(), exit: None })
    }

    /// Runs it to its end, which must be a success.
    ///
    /// # Errors
    /// If it cannot be started or fails; then with the end of its log.
    pub fn run(&self) -> Result<()> {
        let status = self.command(Lifetime::Detached)?.status().with_context(|| self.what())?;
        if !status.success() {
            bail!("{} ended with {status}:\n{}", self.program.display(), tail(&self.log, LOG_TAIL));
        }
        Ok(())
    }

    fn what(&self) -> String {
        format!("start {}", self.program.display())
    }

    fn command(&self, lifetime: Lifetime) -> Result<Command> {
        let log = open_log(&self.log)?;
        let mut command = match lifetime {
            Lifetime::Owned(signal) => {
                let mut shell = Command::new("/bin/sh");
                shell.args(["-c", GUARD, signal_name(signal)?]).arg(&self.program);
                shell.stdin(Stdio::piped());
                shell
            }
            Lifetime::Detached => {
                let mut command = Command::new(&self.program);
                command.stdin(Stdio::null());
                command
            }
        };
        command.args(&self.args).stdout(log.try_clone()?).stderr(log);
        // A group of its own: Ctrl-C in the terminal is for the owner, which then cleans up.
        command.process_group(0);
        for (name, _) in std::env::vars_os() {
            let name_text = name.to_string_lossy();
            if SCRUBBED.iter().any(|prefix| name_text.starts_with(prefix)) {
                command.env_remove(&name);
            }
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        Ok(command)
    }
}

/// Becomes the program, and leaves behind a guard whose standard input is a pipe from the owner. A line
/// dismisses the guard; the pipe's end without a line means that the owner died, however that was.
const GUARD: &str =
    r#"exec 3<&0; { read -r _ <&3 || kill -s "$0" "$$"; } 2>/dev/null & exec "$@" </dev/null 3<&-"#;

fn signal_name(signal: Signal) -> Result<&'static str> {
    match signal {
        Signal::KILL => Ok("KILL"),
        Signal::QUIT => Ok("QUIT"),
        Signal::TERM => Ok("TERM"),
        other => bail!("{other:?} does not end an orphan"),
    }
}

fn open_log(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("open the log {}", path.display()))
}

/// How much of a log goes into an error, in bytes.
pub(crate) const LOG_TAIL: u64 = 4096;

/// The last `bytes` bytes of a file, from the start of a line; empty if it cannot be read.
#[must_use]
pub fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let skipped = file.metadata()?.len().saturating_sub(bytes);
        file.seek(SeekFrom::Start(skipped))?;
        let mut text = Vec::new();
        file.take(bytes).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(match text.split_once('\n') {
            Some((_, whole_lines)) if skipped > 0 => whole_lines.to_owned(),
            _ => text,
        })
    };
    read().unwrap_or_default()
}

/// A started process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The pipe to the guard of an owned process.
    guard: Option<ChildStdin>,
    lifetime: Lifetime,
    log: PathBuf,
    exit: Option<ExitStatus>,
}

impl Process {
    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its number and start time, which name it for as long as the machine runs.
    #[must_use]
    pub fn id(&self) -> Option<ProcessId> {
        ProcessId::of(self.pid())
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log, for an error message.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, LOG_TAIL)
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// If the system cannot say.
    pub fn try_exit(&mut self) -> Result<Option<ExitStatus>> {
        if self.exit.is_none() {
            self.exit = self.child.try_wait().context("ask for the state of a child")?;
            if self.exit.is_some() {
                self.dismiss_guard();
            }
        }
        Ok(self.exit)
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// If the system cannot say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.try_exit()?.is_none())
    }

    /// Sends a signal; one that has ended does not mind.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // An ended child keeps its number until it is waited for, which only `try_exit` does.
        if self.try_exit()?.is_none() {
            identity::send(self.pid(), signal)?;
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `deadline`.
    pub async fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("process {} to end", self.pid());
        poll(&what, deadline, || {
            let seen = self.try_exit();
            async move {
                match seen {
                    Ok(Some(status)) => Ok(status),
                    Ok(None) => Err("running".to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            }
        })
        .await
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.wait_exit(GRACE).await?;
        Ok(())
    }

    fn dismiss_guard(&mut self) {
        if let Some(mut pipe) = self.guard.take() {
            // The guard is gone already if its whole group was killed.
            let _ = pipe.write_all(b"done\n");
        }
    }
}

/// How long a killed process may take to disappear.
const GRACE: Duration = Duration::from_secs(10);

impl Drop for Process {
    fn drop(&mut self) {
        let Lifetime::Owned(signal) = self.lifetime else { return };
        if self.signal(signal).is_err() {
            return;
        }
        let until = Instant::now() + GRACE;
        while matches!(self.try_exit(), Ok(None)) {
            if Instant::now() > until {
                let _ = self.signal(Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Describes an end for people: "exit code 1", "signal 9".
#[must_use]
pub fn describe_exit(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;
    use crate::paths::RunDir;

    fn sh(dir: &RunDir, script: &str) -> Launch {
        Launch::new("/bin/sh", dir.path().join("a log")).args(["-c", script])
    }

    #[tokio::test]
    async fn the_exit_code_and_the_output_are_the_programs_own() {
        let dir = RunDir::create().unwrap();
        let mut process = sh(&dir, "echo hello; exit 64").spawn(Lifetime::Owned(Signal::KILL)).unwrap();
        let status = process.wait_exit(GRACE).await.unwrap();
        assert_eq!(describe_exit(status), "exit code 64");
        assert_eq!(process.log_tail(), "hello\n");
    }

    #[tokio::test]
    async fn an_owned_process_goes_with_its_value() {
        let dir = RunDir::create().unwrap();
        let process = sh(&dir, "while :; do sleep 1; done").spawn(Lifetime::Owned(Signal::KILL)).unwrap();
        let id = process.id().unwrap();
        assert!(id.is_running());
        drop(process);
        assert!(!id.is_running());
    }

    #[tokio::test]
    async fn an_owned_process_goes_when_its_owner_is_killed() {
        let dir = RunDir::create().unwrap();
        let mut process = sh(&dir, "while :; do sleep 1; done").spawn(Lifetime::Owned(Signal::KILL)).unwrap();
        let id = process.id().unwrap();
        // What the system does to the pipe when the owner dies.
        drop(process.guard.take());
        poll("the guard to act", GRACE, || async { if id.is_running() { Err("running") } else { Ok(()) } })
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn what_the_developers_shell_holds_does_not_leak_in() {
        let dir = RunDir::create().unwrap();
        let launch = sh(&dir, "echo \"$EVENT_BUS_LANES.$PATH_KEPT\"")
            .env("EVENT_BUS_LANES", "8")
            .env("PATH_KEPT", "yes");
        launch.run().unwrap();
        assert_eq!(tail(launch.log(), LOG_TAIL), "8.yes\n");
    }

    #[test]
    fn a_tail_starts_at_a_line() {
        let dir = RunDir::create().unwrap();
        let path = dir.path().join("lines");
        fs::write(&path, "first\nsecond\nthird\n").unwrap();
        assert_eq!(tail(&path, 9), "third\n");
        assert_eq!(tail(&path, 1000), "first\nsecond\nthird\n");
        assert_eq!(tail(&dir.path().join("none"), 10), "");
    }
}
