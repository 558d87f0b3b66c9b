//! The shell that every binary runs in: configuration, logs, metrics, probes, signals, drain.
//!
//! Exit codes: 0 drained after a signal, 1 a crash or a drain that took too long, 64 a configuration
//! that cannot be used (`EX_USAGE`).

mod admin;
mod health;

use std::{
    collections::BTreeMap, error::Error, future::Future, net::SocketAddr, path::PathBuf, process::ExitCode,
    sync::Arc, time::Duration,
};

use clap::Parser;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info};

pub use self::health::{Condition, Health, Heartbeat};
use crate::{
    clock::{Clock, SystemClock},
    config::{self, Common, Loaded, RoleConfig},
    ids::{Ids, SystemIds},
    queue::Transport,
    telemetry::{self, Chain},
};

/// Any error, at the level where it only ends the process.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What a binary is.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    /// The binary's name.
    pub name: &'static str,
    /// One sentence for `--help`.
    pub about: &'static str,
}

/// What the body of a binary works with.
#[derive(Debug)]
pub struct Ctx<C> {
    /// What it is.
    pub role: Role,
    /// What is common to all binaries.
    pub common: Common,
    /// Its own configuration.
    pub config: C,
    /// Cancelled at the first signal: take nothing new, finish what is in flight.
    pub stop: CancellationToken,
    /// Waited for during the drain.
    pub tasks: TaskTracker,
    /// Readiness and liveness.
    pub health: Health,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// New ids.
    pub ids: Arc<dyn Ids>,
    /// The queue and the hints, where several roles share one process; a role alone makes its own.
    pub transport: Option<Transport>,
    listeners: BTreeMap<&'static str, TcpListener>,
    crashed: mpsc::Sender<BoxError>,
}

impl<C> Ctx<C> {
    /// The context of one of several roles of this process: it stops with the others, and they with it. It
    /// gets the ports that its configuration names, and waits for its own tasks.
    pub fn part<D: RoleConfig>(&mut self, role: Role, config: D, transport: &Transport) -> Ctx<D> {
        let names = config.listen().into_iter().map(|(name, _)| name);
        let listeners = names.filter_map(|name| self.listeners.remove_entry(name)).collect();
        Ctx {
            role,
            common: self.common.clone(),
            config,
            stop: self.stop.clone(),
            tasks: TaskTracker::new(),
            health: self.health.of(role.name),
            clock: Arc::clone(&self.clock),
            ids: Arc::clone(&self.ids),
            transport: Some(transport.clone()),
            listeners,
            crashed: self.crashed.clone(),
        }
    }

    /// The bound port of that name (see [`RoleConfig::listen`]).
    ///
    /// # Panics
    /// If the role does not listen on such a port, or it was taken before.
    pub fn listener(&mut self, name: &'static str) -> TcpListener {
        self.listeners.remove(name).expect("a role takes each port that it declares once")
    }

    /// Runs a loop beside the body. It must not end before [`Ctx::stop`] is cancelled: if it does, or
    /// fails, the process ends with exit code 1 instead of living on without it.
    pub fn spawn<F>(&self, name: &'static str, body: F)
    where
        F: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        let (stop, crashed) = (self.stop.clone(), self.crashed.clone());
        self.tasks.spawn(async move {
            let result = tokio::spawn(body).await;
            let crash: BoxError = match result {
                Ok(Ok(())) if stop.is_cancelled() => return,
                Ok(Ok(())) => format!("{name} ended by itself").into(),
                Ok(Err(error)) => error,
                Err(panic) => format!("{name}: {panic}").into(),
            };
            // Full or closed: another crash is being handled already.
            let _ = crashed.try_send(crash);
        });
    }
}

#[derive(Parser)]
struct Flags {
    /// Configuration file (TOML); the environment overrides it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the effective configuration, secrets redacted, and exit: 0 if it can be used, 64 if not
    #[arg(long)]
    check_config: bool,
}

/// The version with the git revision, if the build was told it (`GIT_REVISION`).
pub const VERSION: &str = match option_env!("GIT_REVISION") {
    Some(_) => concat!(env!("CARGO_PKG_VERSION"), "+git"),
    None => env!("CARGO_PKG_VERSION"),
};

const REVISION: &str = match option_env!("GIT_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

const EX_USAGE: u8 = 64;

/// A delivery makes and frees some two hundred small pieces of memory, often on another thread than the one that made
/// them, for which the allocator of glibc takes locks.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs a binary from the command line to its exit code.
pub fn main<C, F, Fut>(role: Role, body: F) -> ExitCode
where
    C: RoleConfig,
    F: FnOnce(Ctx<C>) -> Fut,
    Fut: Future<Output = Result<(), BoxError>>,
{
    let command =
        <Flags as clap::CommandFactory>::command().name(role.name).about(role.about).version(VERSION);
    let flags = match command
        .try_get_matches()
        .and_then(|matches| <Flags as clap::FromArgMatches>::from_arg_matches(&matches))
    {
        Ok(flags) => flags,
        Err(message) => {
            let code = if message.use_stderr() { EX_USAGE } else { 0 };
            // Nothing can be said if the terminal is gone.
            let _ = message.print();
            return ExitCode::from(code);
        }
    };
    let loaded = match config::load::<C>(flags.config.as_deref(), std::env::vars()) {
        Ok(loaded) => loaded,
        Err(refused) => {
            eprintln!("{}: {}", role.name, Chain(&refused));
            return ExitCode::from(EX_USAGE);
        }
    };
    if flags.check_config {
        for (key, value) in &loaded.shown {
            println!("{key} = {value}");
        }
        return ExitCode::SUCCESS;
    }
    if let Err(refused) = telemetry::init_logs(&loaded.common.telemetry) {
        eprintln!("{}: telemetry.filter: {refused}", role.name);
        return ExitCode::from(EX_USAGE);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(failed) => {
            error!(error = %failed, "No runtime");
            return ExitCode::FAILURE;
        }
    };
    let code = match runtime.block_on(run(role, loaded, body)) {
        Ok(()) => {
            info!("Drained");
            ExitCode::SUCCESS
        }
        Err(failed) => {
            error!(error = %Chain(failed.as_ref()), "Ended by an error");
            ExitCode::FAILURE
        }
    };
    // What the drain did not wait for (a lookup in the blocking pool) must not hold the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

async fn run<C, F, Fut>(role: Role, loaded: Loaded<C>, body: F) -> Result<(), BoxError>
where
    C: RoleConfig,
    F: FnOnce(Ctx<C>) -> Fut,
    Fut: Future<Output = Result<(), BoxError>>,
{
    let Loaded { common, config, shown } = loaded;
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| "a TLS provider was installed before the launcher's")?;
    let metrics = telemetry::init_metrics()?;
    // A worker holds a socket per attempt and per idle connection; the usual soft limit of 1,024 would run
    // out and look like the subscribers' fault.
    let files = rlimit::increase_nofile_limit(u64::MAX)?;
    let health = Health::default();

    // Every port before any work, so that a port that is taken is a start that failed.
    let mut addresses = BTreeMap::new();
    let admin = bind("admin", common.admin.listen, &mut addresses).await?;
    let mut listeners = BTreeMap::new();
    for (name, address) in config.listen() {
        listeners.insert(name, bind(name, address, &mut addresses).await?);
    }
    if let Some(path) = &common.address_file {
        publish_addresses(path, &addresses)?;
    }
    info!(
        role = role.name,
        version = VERSION,
        revision = REVISION,
        schema = crate::pg::MIGRATOR.iter().map(|migration| migration.version).max(),
        addresses = ?addresses,
        files,
        config = ?shown,
        "Starting"
    );

    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let (crashed, mut crashes) = mpsc::channel(1);
    let drain_deadline = Duration::from_millis(common.shutdown.drain_ms);
    // The admin port stays open during the drain: probes must be able to see it.
    let admin = tokio::spawn(admin::serve(admin, health.clone(), metrics));
    let ctx = Ctx {
        role,
        common,
        config,
        stop: stop.clone(),
        tasks: tasks.clone(),
        health: health.clone(),
        clock: Arc::new(SystemClock),
        ids: Arc::new(SystemIds),
        transport: None,
        listeners,
        crashed,
    };
    let worker = body(ctx);
    tokio::pin!(worker);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hang_up = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };

    let ended = tokio::select! {
        result = &mut worker => Some(result),
        Some(crash) = crashes.recv() => return Err(crash),
        name = hang_up() => {
            info!(signal = name, deadline_ms = drain_deadline.as_millis(), "Draining");
            None
        }
    };
    health.stopping();
    stop.cancel();
    tasks.close();
    let drain = async {
        let result = match ended {
            Some(result) => result,
            None => worker.await,
        };
        tasks.wait().await;
        result
    };
    let result = tokio::select! {
        result = tokio::time::timeout(drain_deadline, drain) => match result {
            Ok(result) => result,
            Err(_) => Err(format!("the drain took longer than {drain_deadline:?}").into()),
        },
        Some(crash) = crashes.recv() => Err(crash),
        name = hang_up() => Err(format!("a second {name} cut the drain short").into()),
    };
    admin.abort();
    result
}

async fn bind(
    name: &'static str,
    address: SocketAddr,
    addresses: &mut BTreeMap<&'static str, SocketAddr>,
) -> Result<TcpListener, BoxError> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| format!("listen on {address} ({name}.listen): {error}"))?;
    addresses.insert(name, listener.local_addr()?);
    Ok(listener)
}

/// Written beside and renamed, so that a reader sees the whole file or none.
fn publish_addresses(
    path: &std::path::Path,
    addresses: &BTreeMap<&'static str, SocketAddr>,
) -> Result<(), BoxError> {
    let beside = path.with_extension("part");
    std::fs::write(&beside, serde_json::to_vec(addresses)?)
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(|error| format!("write address_file {}: {error}", path.display()).into())
}
