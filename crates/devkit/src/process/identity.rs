//! Naming processes so that a recycled number is never taken for the process that once had it.

#[cfg(target_os = "linux")]
use std::fs;
#[cfg(not(target_os = "linux"))]
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::{
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use serde::{Deserialize, Serialize};

/// A process, named by its number and the moment of its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in the system's own words.
    started: String,
}

impl ProcessId {
    /// The process that has this number now, unless it has ended.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        look(pid).filter(|seen| !seen.ended).map(|seen| Self { pid, started: seen.started })
    }

    /// Whether this very process runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Sends a signal to this very process; one that has ended does not mind.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.is_running() { send(self.pid, signal) } else { Ok(()) }
    }
}

/// Sends a signal to whoever has this number.
pub(super) fn send(pid: u32, signal: Signal) -> Result<()> {
    let target = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process number")?;
    match kill_process(target, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("send {signal:?} to process {pid}")),
    }
}

/// The children of a process that have not ended.
///
/// # Errors
/// If the system's table of processes cannot be read.
pub fn children_of(parent: u32) -> Result<Vec<ProcessId>> {
    let children = all()?.into_iter().filter(|(_, seen)| seen.parent == parent);
    Ok(running(children))
}

/// The running processes that have `argument` as one whole argument of their command line.
///
/// # Errors
/// If the system's table of processes cannot be read.
pub fn processes_with_argument(argument: &str) -> Result<Vec<ProcessId>> {
    Ok(running(all()?.into_iter().filter(|(pid, _)| has_argument(*pid, argument))))
}

/// The time that processors have given to a process and its children so far, in steps of 10 ms; those that have ended
/// are in it. Ask while none of them ends, or it may be left out or counted twice.
///
/// # Errors
/// If the system's table of processes cannot be read, or is not Linux's.
#[cfg(target_os = "linux")]
pub fn processor_time(parent: u32) -> Result<Duration> {
    let children = all()?.into_iter().filter(|(_, seen)| seen.parent == parent).map(|(pid, _)| pid);
    let own = ticks(parent).with_context(|| format!("process {parent} has ended"))?;
    let ticks = own + children.filter_map(ticks).sum::<u64>();
    Ok(Duration::from_millis(ticks * TICK_MS))
}

/// See the other one.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub fn processor_time(_: u32) -> Result<Duration> {
    anyhow::bail!("only Linux says how much processor time the children of a process took")
}

/// The memory that a process has in use, bytes.
///
/// # Errors
/// If it has ended, or the system is not Linux.
#[cfg(target_os = "linux")]
pub fn resident_memory(pid: u32) -> Result<u64> {
    // proc_pid_status(5)
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read the state of a process")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.map(|n| n * 1024).with_context(|| format!("process {pid} has ended"))
}

/// See the other one.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub fn resident_memory(_: u32) -> Result<u64> {
    anyhow::bail!("only Linux says how much memory a process has in use")
}

fn running(found: impl Iterator<Item = (u32, Seen)>) -> Vec<ProcessId> {
    found
        .filter(|(_, seen)| !seen.ended)
        .map(|(pid, seen)| ProcessId { pid, started: seen.started })
        .collect()
}

/// What the system says of a process.
struct Seen {
    parent: u32,
    started: String,
    /// It has ended, and waits for its parent to notice. A container's first process may never do so.
    ended: bool,
}

#[cfg(target_os = "linux")]
fn look(pid: u32) -> Option<Seen> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): "pid (name) state ppid …"; the name may hold anything, so the fields count from
    // its closing bracket: state is 0, the parent 1, the start time (in ticks since boot) 19.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Some(Seen {
        parent: fields.get(1)?.parse().ok()?,
        started: format!("{} {}", boot.trim(), fields.get(19)?),
        ended: matches!(*fields.first()?, "Z" | "X"),
    })
}

/// The unit of times in `/proc`: what Linux shows to programs does not depend on the kernel's own clock.
#[cfg(target_os = "linux")]
const TICK_MS: u64 = 10;

/// What a process, and its children that it has waited for, have used.
#[cfg(target_os = "linux")]
fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // As in `look`: utime, stime, cutime, cstime are 11 to 14.
    let fields = stat.rsplit_once(')')?.1.split_whitespace();
    fields.skip(11).take(4).map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(target_os = "linux")]
fn all() -> Result<Vec<(u32, Seen)>> {
    let entries = fs::read_dir("/proc").context("list /proc")?;
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    Ok(numbers.filter_map(|pid| Some((pid, look(pid)?))).collect())
}

#[cfg(target_os = "linux")]
fn has_argument(pid: u32, argument: &str) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|found| found == argument.as_bytes())
}

#[cfg(not(target_os = "linux"))]
fn look(pid: u32) -> Option<Seen> {
    parse(&ps(&["-p", &pid.to_string(), "-o", "pid=,ppid=,stat=,lstart="]).ok()?).pop().map(|(_, seen)| seen)
}

#[cfg(not(target_os = "linux"))]
fn all() -> Result<Vec<(u32, Seen)>> {
    Ok(parse(&ps(&["-A", "-o", "pid=,ppid=,stat=,lstart="])?))
}

#[cfg(not(target_os = "linux"))]
fn has_argument(pid: u32, argument: &str) -> bool {
    ps(&["-p", &pid.to_string(), "-ww", "-o", "args="]).is_ok_and(|line| line.contains(argument))
}

#[cfg(not(target_os = "linux"))]
fn ps(args: &[&str]) -> Result<String> {
    let output = Command::new("ps").args(args).output().context("run `ps`")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(not(target_os = "linux"))]
fn parse(table: &str) -> Vec<(u32, Seen)> {
    let row = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (&[pid, parent, state], started) = fields.split_first_chunk::<3>()?;
        let ended = state.starts_with('Z');
        Some((pid.parse().ok()?, Seen { parent: parent.parse().ok()?, started: started.join(" "), ended }))
    };
    table.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use std::process::{Command, Stdio};

    use super::*;
    use crate::poll;

    #[test]
    fn this_process_runs_and_another_of_its_number_does_not() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.is_running());
        let other = ProcessId { started: "before".to_owned(), ..own };
        assert!(!other.is_running());
    }

    #[tokio::test]
    async fn an_ended_child_that_nobody_waited_for_is_not_running() {
        let mut child =
            Command::new("/bin/sh").args(["-c", "read -r _"]).stdin(Stdio::piped()).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(children_of(std::process::id()).unwrap().contains(&id));
        drop(child.stdin.take());
        poll("the child to end", Duration::from_secs(10), || async {
            if id.is_running() { Err("running") } else { Ok(()) }
        })
        .await
        .unwrap();
        assert!(!children_of(std::process::id()).unwrap().contains(&id));
        child.wait().unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_time_of_a_child_counts_while_it_runs_and_when_it_has_ended() {
        use std::io::{Read as _, Write as _};

        // The parent is a shell, and not this process, whose children come and go with other tests.
        let count = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo; read -r _";
        let parent = r#"read -r _; /bin/sh -c "$0"; echo; read -r _"#;
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", parent, count]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        let (mut told, mut says) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
        // Lets the shell go on until it says something.
        let mut go_on = || {
            told.write_all(b"\n").unwrap();
            says.read_exact(&mut [0]).unwrap();
            processor_time(shell.id()).unwrap()
        };
        let before = processor_time(shell.id()).unwrap();
        let counted = go_on();
        assert!(counted >= before + Duration::from_millis(TICK_MS), "{before:?}, {counted:?}");
        let ended = go_on();
        assert!(ended >= counted, "{counted:?}, {ended:?}");
        drop(told);
        shell.wait().unwrap();
    }

    #[test]
    fn a_process_is_found_by_a_whole_argument() {
        let mark = crate::random_token(8);
        let mut child =
            Command::new("/bin/sh").args(["-c", "read -r _", &mark]).stdin(Stdio::piped()).spawn().unwrap();
        let found = processes_with_argument(&mark).unwrap();
        assert_eq!(found.iter().map(|id| id.pid).collect::<Vec<_>>(), [child.id()]);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
