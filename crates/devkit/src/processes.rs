//! The binaries as processes.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::{
    poll,
    process::{Launch, Lifetime, Process, ProcessId, Signal, describe_exit},
};

/// How long a binary may take to be ready. Its servers run already.
pub const READY: Duration = Duration::from_secs(60);
/// How long a binary may take to drain: more than its own deadline, after which it gives up by itself.
pub const DRAIN: Duration = Duration::from_secs(60);
/// How long one request to a binary's admin port may take.
const REQUEST: Duration = Duration::from_secs(5);

/// One of the binaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The HTTP edge: stores, matches, fans out.
    Publisher,
    /// Delivers to subscribers.
    DeliveryWorker,
    /// What the clock drives.
    CronScheduler,
    /// What moves or expires data.
    Archiver,
    /// All four in one process.
    EventBus,
}

impl Role {
    /// Those that have one role each, in the order in which they start.
    pub const ALL: [Self; 4] = [Self::Publisher, Self::DeliveryWorker, Self::CronScheduler, Self::Archiver];

    /// The name of the binary.
    #[must_use]
    pub fn binary(self) -> &'static str {
        match self {
            Self::Publisher => "publisher",
            Self::DeliveryWorker => "delivery-worker",
            Self::CronScheduler => "cron-scheduler",
            Self::Archiver => "archiver",
            Self::EventBus => "event-bus",
        }
    }

    /// The database role that it logs in as.
    #[must_use]
    pub fn postgres_role(self) -> &'static str {
        match self {
            Self::Publisher => "bus_publisher",
            Self::DeliveryWorker => "bus_worker",
            Self::CronScheduler => "bus_scheduler",
            Self::Archiver => "bus_archiver",
            Self::EventBus => "bus_all",
        }
    }
}

/// The folder with the binaries: the one that `BUS_BIN_DIR` names, or else the one that this process's
/// program was built into.
///
/// # Errors
/// If the system does not say where this program lies.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("BUS_BIN_DIR") {
        return Ok(dir.into());
    }
    let program = env::current_exe().context("find this process's program")?;
    let dir = program.parent().context("this process's program lies in no folder")?;
    // Tests lie one folder deeper than the binaries.
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() })
}

/// Where a binary listens, as it writes it down.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Addresses {
    /// Probes and metrics.
    pub admin: String,
    /// The API (publisher, and the process of every role).
    pub http: Option<String>,
}

/// How to start one of the binaries.
#[derive(Debug, Clone)]
pub struct RoleOptions {
    /// Which one.
    pub role: Role,
    /// A name for its files, `publisher-0`.
    pub name: String,
    /// The folder with the binaries.
    pub bin_dir: PathBuf,
    /// The folder for its address file.
    pub dir: PathBuf,
    /// The file for its output.
    pub log: PathBuf,
    /// Its configuration.
    pub env: Vec<(String, String)>,
    /// Whether it dies with its owner.
    pub lifetime: Lifetime,
}

/// A started binary.
#[derive(Debug)]
pub struct RoleProcess {
    options: RoleOptions,
    process: Process,
    address_file: PathBuf,
    addresses: Option<Addresses>,
    http: reqwest::Client,
}

impl RoleProcess {
    /// Starts it. It is not ready yet.
    ///
    /// # Errors
    /// If there is no such binary.
    pub fn spawn(options: RoleOptions) -> Result<Self> {
        crate::install_tls_provider();
        fs::create_dir_all(&options.dir).with_context(|| format!("create {}", options.dir.display()))?;
        let address_file = options.dir.join(format!("{}.address.json", options.name));
        if address_file.exists() {
            fs::remove_file(&address_file)?;
        }
        let mut launch = Launch::new(options.bin_dir.join(options.role.binary()), &options.log)
            .env("EVENT_BUS_ADDRESS_FILE", &address_file)
            .env("EVENT_BUS_ADMIN__LISTEN", "127.0.0.1:0");
        if matches!(options.role, Role::Publisher | Role::EventBus) {
            launch = launch.env("EVENT_BUS_HTTP__LISTEN", "127.0.0.1:0");
        }
        for (name, value) in &options.env {
            launch = launch.env(name, value);
        }
        let process = launch.spawn(options.lifetime).context("have the binaries been built?")?;
        let http = reqwest::Client::builder().no_proxy().timeout(REQUEST).build()?;
        Ok(Self { options, process, address_file, addresses: None, http })
    }

    /// Which binary it is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.options.role
    }

    /// The name of its files.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// The process.
    #[must_use]
    pub fn id(&self) -> Option<ProcessId> {
        self.process.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        self.process.log()
    }

    /// All that it has written so far.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn log_text(&self) -> Result<String> {
        fs::read_to_string(self.log()).with_context(|| format!("read {}", self.log().display()))
    }

    /// Waits until `/readyz` says so.
    ///
    /// # Errors
    /// As soon as the process ends, with the end of its log; after a minute, with what it waits for.
    pub async fn wait_ready(&mut self) -> Result<&Addresses> {
        let what = format!("{} to be ready", self.options.name);
        let (process, http, address_file) = (&mut self.process, &self.http, &self.address_file);
        let log = process.log().to_owned();
        let addresses = poll(&what, READY, || {
            let exit = process.try_exit();
            let log = process.log_tail();
            async move {
                match exit {
                    Ok(None) => {}
                    Ok(Some(status)) => {
                        return Ok(Err(anyhow!("it ended with {}:\n{log}", describe_exit(status))));
                    }
                    Err(error) => return Ok(Err(error)),
                }
                let addresses = read_addresses(address_file).ok_or("it listens nowhere yet")?;
                ready(http, &addresses).await?;
                Ok::<_, String>(Ok(addresses))
            }
        })
        .await
        .and_then(|ended| ended)
        .with_context(|| format!("start {} (log: {})", self.options.name, log.display()))?;
        Ok(self.addresses.insert(addresses))
    }

    /// Where it listens.
    ///
    /// # Panics
    /// Before [`wait_ready`](Self::wait_ready).
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        self.addresses.as_ref().expect("addresses are known when the process is ready")
    }

    /// The base of `/healthz`, `/readyz` and `/metrics`.
    ///
    /// # Panics
    /// Before [`wait_ready`](Self::wait_ready).
    #[must_use]
    pub fn admin_url(&self) -> String {
        format!("http://{}", self.addresses().admin)
    }

    /// The base of the API.
    ///
    /// # Panics
    /// Before [`wait_ready`](Self::wait_ready), and for a binary that does not serve the API.
    #[must_use]
    pub fn http_url(&self) -> String {
        let http = self.addresses().http.as_ref().expect("this binary serves the API");
        format!("http://{http}")
    }

    /// Fetches a page of the admin port.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn admin_get(&self, path: &str) -> Result<(u16, String)> {
        let answer = self.http.get(format!("{}{path}", self.admin_url())).send().await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    }

    /// A counter or gauge of `/metrics`, summed over its labels; 0 if it has not been counted yet.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let (_, page) = self.admin_get("/metrics").await?;
        Ok(sum_metric(&page, name))
    }

    /// Asks it to drain.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn sigterm(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM)
    }

    /// Kills it, and waits until it is gone.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn sigkill(&mut self) -> Result<()> {
        self.process.kill().await
    }

    /// Sends any signal.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// If the system cannot say.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after [`DRAIN`]; then with the end of its log.
    pub async fn wait_exit(&mut self) -> Result<ExitStatus> {
        let ended = self.process.wait_exit(DRAIN).await;
        ended.with_context(|| format!("end of {}:\n{}", self.options.name, self.process.log_tail()))
    }

    /// Sets a variable for the next [`respawn`](Self::respawn); `None` takes it away.
    pub fn set_env(&mut self, name: &str, value: Option<&str>) {
        self.options.env.retain(|(known, _)| known != name);
        self.options.env.extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// Starts it anew with its configuration, after it ended. It is not ready yet.
    ///
    /// # Errors
    /// If there is no such binary.
    pub fn respawn(&mut self) -> Result<()> {
        anyhow::ensure!(!self.is_running()?, "{} still runs", self.options.name);
        *self = Self::spawn(self.options.clone())?;
        Ok(())
    }
}

/// Sums a metric in the Prometheus text format.
fn sum_metric(page: &str, name: &str) -> f64 {
    let samples = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Without labels a space follows; anything else is the start of a longer name.
        rest.starts_with([' ', '{']).then(|| rest.rsplit_once(' ')?.1.parse::<f64>().ok()).flatten()
    });
    samples.sum()
}

fn read_addresses(file: &Path) -> Option<Addresses> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// Asks once whether a binary is ready.
async fn ready(http: &reqwest::Client, addresses: &Addresses) -> Result<(), String> {
    let url = format!("http://{}/readyz", addresses.admin);
    let answer = http.get(url).send().await.map_err(|error| error.to_string())?;
    let ready = answer.status().is_success();
    let body = answer.text().await.map_err(|error| error.to_string())?;
    if ready { Ok(()) } else { Err(body) }
}

/// Asks once whether a binary that another process started is ready.
pub async fn is_ready(addresses: &Addresses) -> bool {
    crate::install_tls_provider();
    let Ok(http) = reqwest::Client::builder().no_proxy().timeout(REQUEST).build() else { return false };
    ready(&http, addresses).await.is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::paths::RunDir;

    #[tokio::test]
    async fn a_binary_that_ends_at_once_is_not_waited_for() {
        let run = RunDir::create().unwrap();
        let binary = run.path().join("publisher");
        fs::write(&binary, "#!/bin/sh\necho \"no database for $EVENT_BUS_PREFIX\" >&2\nexit 64\n").unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        let mut process = RoleProcess::spawn(RoleOptions {
            role: Role::Publisher,
            name: "publisher-0".to_owned(),
            bin_dir: run.path().to_owned(),
            dir: run.path().join("roles"),
            log: run.path().join("publisher-0.log"),
            env: vec![("EVENT_BUS_PREFIX".to_owned(), "me".to_owned())],
            lifetime: Lifetime::Owned(Signal::KILL),
        })
        .unwrap();
        let error = format!("{:#}", process.wait_ready().await.unwrap_err());
        assert!(error.contains("exit code 64") && error.contains("no database for me"), "{error}");
    }

    #[test]
    fn a_metric_is_summed_over_its_labels() {
        let page = "# TYPE attempts_total counter\nattempts_total{outcome=\"a b\"} 2\n\
                    attempts_total{outcome=\"c\"} 3\nattempts_total_x 9\nup 1\n";
        assert_eq!((sum_metric(page, "attempts_total"), sum_metric(page, "up")), (5.0, 1.0));
        assert_eq!(sum_metric(page, "down"), 0.0);
    }
}
