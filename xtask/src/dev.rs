//! What is known of the stack that `up` started: everything in `target/dev`.

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use devkit::{
    paths::{FileLock, is_root, server_dir, target_dir},
    poll,
    process::{ProcessId, Signal, children_of, processes_with_argument},
    processes::{Addresses, DRAIN, Role},
    random_token,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::ui;

/// How long a process that was killed may take to disappear.
const KILLED: Duration = Duration::from_secs(10);

/// What was asked of `up`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) backend: String,
    pub(crate) release: bool,
    pub(crate) workers: usize,
    pub(crate) external: bool,
}

/// One of the binaries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RoleState {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) process: ProcessId,
    /// Absent until it was ready.
    pub(crate) addresses: Option<Addresses>,
}

/// What runs. Written after each start, so that an interrupted `up` leaves nothing unknown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) nats: Option<ProcessId>,
    pub(crate) postgres: Option<ProcessId>,
    pub(crate) roles: Vec<RoleState>,
    /// Whether `up` came to its end.
    pub(crate) complete: bool,
}

/// Ports that were used, to be used again if they are free: a shell that has read the `env` file of the
/// last run still finds everything.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Ports {
    pub(crate) nats: Option<u16>,
    pub(crate) postgres: Option<u16>,
    pub(crate) http: Option<u16>,
}

/// An organization that `up` made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Organization {
    pub(crate) id: String,
    pub(crate) api_key: String,
}

/// What must stay the same from one `up` to the next, as long as the data stays.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Secrets {
    pub(crate) postgres_password: String,
    pub(crate) nats_password: String,
    pub(crate) admin_token: String,
    /// By database, since an external one has its own.
    pub(crate) organizations: BTreeMap<String, Organization>,
}

/// The folder of the stack, locked: one command at a time.
#[derive(Debug)]
pub(crate) struct Dev {
    dir: PathBuf,
    #[expect(dead_code, reason = "held for its lock")]
    lock: FileLock,
}

impl Dev {
    /// Opens it, and waits for another command to finish with it.
    pub(crate) fn open() -> Result<Self> {
        let dir = target_dir().join("dev");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let path = dir.join("lock");
        let lock = match FileLock::try_acquire(&path)? {
            Some(lock) => lock,
            None => {
                ui::line("  Another `cargo xtask up` or `down` is at work; waiting for it.");
                FileLock::acquire(&path)?
            }
        };
        Ok(Self { dir, lock })
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Cold storage.
    pub(crate) fn cold(&self) -> PathBuf {
        self.dir.join("cold")
    }

    pub(crate) fn roles(&self) -> PathBuf {
        self.dir.join("roles")
    }

    pub(crate) fn env_file(&self) -> PathBuf {
        self.dir.join("env")
    }

    /// The folder of the servers' data.
    pub(crate) fn data(&self) -> Result<PathBuf> {
        Ok(if is_root() { server_dir()?.join("dev") } else { self.dir.join("data") })
    }

    pub(crate) fn state(&self) -> Result<Option<State>> {
        read(&self.dir.join("state.json"))
    }

    pub(crate) fn save_state(&self, state: &State) -> Result<()> {
        write_private(&self.dir.join("state.json"), &serde_json::to_string_pretty(state)?)
    }

    pub(crate) fn ports(&self) -> Result<Ports> {
        Ok(read(&self.dir.join("ports.json"))?.unwrap_or_default())
    }

    pub(crate) fn save_ports(&self, ports: &Ports) -> Result<()> {
        write_private(&self.dir.join("ports.json"), &serde_json::to_string_pretty(ports)?)
    }

    /// The secrets that belong to the data; new ones if there are none.
    ///
    /// They lie beside the data, so that one is never without the other.
    pub(crate) fn secrets(&self) -> Result<Secrets> {
        let path = self.data()?.join("secrets.json");
        if let Some(secrets) = read(&path)? {
            return Ok(secrets);
        }
        let secrets = Secrets {
            postgres_password: random_token(16),
            nats_password: random_token(16),
            admin_token: random_token(16),
            organizations: BTreeMap::new(),
        };
        self.save_secrets(&secrets)?;
        Ok(secrets)
    }

    pub(crate) fn save_secrets(&self, secrets: &Secrets) -> Result<()> {
        let data = self.data()?;
        fs::create_dir_all(&data).with_context(|| format!("create {}", data.display()))?;
        write_private(&data.join("secrets.json"), &serde_json::to_string_pretty(secrets)?)
    }

    /// Stops all that runs, and forgets it. Says whether there was anything.
    pub(crate) async fn stop(&self) -> Result<bool> {
        let state = self.state()?;
        let roles: Vec<ProcessId> =
            state.iter().flat_map(|state| &state.roles).map(|role| role.process.clone()).collect();
        // Servers that an `up` started and could not note any more give themselves away by their folders.
        let data = self.data()?;
        let argument = |path: &Path| path.to_string_lossy().into_owned();
        let mut nats = processes_with_argument(&argument(&nats_config(&data)))?;
        let mut postgres = processes_with_argument(&argument(&postgres_data(&data)))?;
        nats.extend(state.iter().filter_map(|state| state.nats.clone()));
        postgres.extend(state.iter().filter_map(|state| state.postgres.clone()));

        let any = roles.iter().chain(&nats).chain(&postgres).any(ProcessId::is_running);
        stop_all("the binaries", &roles, &[(Signal::TERM, DRAIN)]).await?;
        stop_all("nats-server", &nats, &[(Signal::TERM, Duration::from_secs(20))]).await?;
        let postgres_children: Vec<ProcessId> = postgres
            .iter()
            .filter(|process| process.is_running())
            .map(|process| children_of(process.pid))
            .collect::<Result<Vec<_>>>()?
            .concat();
        // Fast shutdown, then immediate shutdown.
        let signals = [(Signal::INT, Duration::from_secs(30)), (Signal::QUIT, Duration::from_secs(10))];
        stop_all("Postgres", &postgres, &signals).await?;
        stop_all("the processes of Postgres", &postgres_children, &[]).await?;

        for file in ["state.json", "env"] {
            match fs::remove_file(self.dir.join(file)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(any)
    }

    /// Removes the data, the logs and all that is remembered. Nothing may run.
    pub(crate) fn wipe(&self) -> Result<()> {
        for path in [self.data()?, self.logs(), self.roles(), self.cold(), self.dir.join("ports.json")] {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// nats-server's configuration, its one argument.
fn nats_config(data: &Path) -> PathBuf {
    data.join("nats/nats.conf")
}

/// Postgres' data folder, an argument of its first process.
fn postgres_data(data: &Path) -> PathBuf {
    data.join("postgres/data")
}

/// Sends each signal in turn and waits; what is left at the end is killed.
async fn stop_all(what: &str, processes: &[ProcessId], signals: &[(Signal, Duration)]) -> Result<()> {
    for (signal, patience) in signals.iter().copied().chain([(Signal::KILL, KILLED)]) {
        let running: Vec<_> = processes.iter().filter(|process| process.is_running()).collect();
        if running.is_empty() {
            break;
        }
        for process in &running {
            process.signal(signal)?;
        }
        let ended = poll(what, patience, || async {
            let left = running.iter().filter(|process| process.is_running()).count();
            if left == 0 { Ok(()) } else { Err(left) }
        })
        .await;
        if signal == Signal::KILL {
            ended.with_context(|| format!("kill {what}"))?;
        } else if ended.is_err() {
            ui::line(format!("  {what}: no end within {} after {signal:?}", ui::elapsed(patience)));
        }
    }
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(text) => {
            let value = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
            Ok(Some(value))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Replaces a file by one that only this user can read, at no moment half written.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    let write = || {
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&fresh, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}
