//! A nats-server of our own.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use async_nats::{ConnectOptions, ServerAddr};
use serde::Deserialize;

use super::Tools;
use crate::{
    paths::RunDir,
    poll,
    process::{Launch, Lifetime, Process, ProcessId, Signal, describe_exit},
    random_token,
};

/// How long a start may take. A store with many messages is read first.
const START: Duration = Duration::from_secs(60);
/// How long an orderly stop may take.
const STOP: Duration = Duration::from_secs(20);

/// How to start a nats-server.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// The program.
    pub program: PathBuf,
    /// The folder for its configuration, store and log.
    pub dir: PathBuf,
    /// Whether it dies with its owner.
    pub lifetime: Lifetime,
    /// The password of its only user, `bus`.
    pub password: String,
    /// The port to listen on; a free one if absent.
    pub port: Option<u16>,
}

/// A running nats-server: loopback only, JetStream on file storage, one user with a password.
#[derive(Debug)]
pub struct NatsServer {
    options: NatsOptions,
    process: Process,
    port: u16,
    /// Removed after the process has gone, since fields are dropped in order.
    _run: Option<RunDir>,
}

impl NatsServer {
    /// Starts one that lives as long as the value, in a folder of its own.
    ///
    /// # Errors
    /// If there is no program, or if it does not start.
    pub async fn private(tools: &Tools) -> Result<Self> {
        let run = RunDir::create()?;
        let mut server = Self::start(NatsOptions {
            program: tools.nats_server.clone(),
            dir: run.path().join("nats"),
            lifetime: Lifetime::Owned(Signal::KILL),
            password: random_token(16),
            port: None,
        })
        .await?;
        server._run = Some(run);
        Ok(server)
    }

    /// Starts one on a folder, with the store that is there.
    ///
    /// # Errors
    /// If it does not start; then with the end of its log.
    pub async fn start(options: NatsOptions) -> Result<Self> {
        fs::create_dir_all(&options.dir).with_context(|| format!("create {}", options.dir.display()))?;
        let (process, port) = launch(&options, options.port).await?;
        Ok(Self { options, process, port, _run: None })
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How to connect, with user and password.
    #[must_use]
    pub fn url(&self) -> String {
        url(&self.options.password, self.port)
    }

    /// The folder of its store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.options.dir.join("store")
    }

    /// The process.
    #[must_use]
    pub fn id(&self) -> Option<ProcessId> {
        self.process.id()
    }

    /// Kills it as a crash would.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn kill(&mut self) -> Result<()> {
        self.process.kill().await
    }

    /// Stops it in order.
    ///
    /// # Errors
    /// If it does not end in time.
    pub async fn stop(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        self.process.wait_exit(STOP).await.context("stop nats-server")?;
        Ok(())
    }

    /// Starts it again on the same port and store, after [`kill`](Self::kill) or [`stop`](Self::stop).
    ///
    /// # Errors
    /// If it still runs, or does not start.
    pub async fn restart(&mut self) -> Result<()> {
        if self.process.is_running()? {
            bail!("nats-server still runs");
        }
        (self.process, self.port) = launch(&self.options, Some(self.port)).await?;
        Ok(())
    }
}

fn url(password: &str, port: u16) -> String {
    format!("nats://bus:{password}@127.0.0.1:{port}")
}

/// Starts it and waits until a client gets in.
async fn launch(options: &NatsOptions, port: Option<u16>) -> Result<(Process, u16)> {
    let dir = &options.dir;
    let ports = dir.join("ports");
    // A file that a killed server left would be taken for the new one's.
    if ports.exists() {
        fs::remove_dir_all(&ports)?;
    }
    fs::create_dir_all(&ports)?;
    let config = dir.join("nats.conf");
    write_config(&config, options, port)?;
    let launch = Launch::new(&options.program, dir.join("nats.log")).arg("--config").arg(&config);
    let mut process = launch.spawn(options.lifetime)?;
    let seen = poll("nats-server to be ready", START, || {
        let state = process.try_exit();
        let log = process.log_tail();
        let ports = &ports;
        async move {
            if let Some(status) = state.map_err(|error| error.to_string())? {
                return Ok(Err(anyhow!("nats-server ended with {}:\n{log}", describe_exit(status))));
            }
            let port = read_port(ports).ok_or("it has not written its port")?;
            connect(&url(&options.password, port)).await?;
            Ok::<_, String>(Ok(port))
        }
    })
    .await
    .with_context(|| format!("see {}", launch.log().display()))?;
    Ok((process, seen?))
}

/// Asks for an answer of JetStream.
async fn connect(url: &str) -> Result<(), String> {
    let client = connect_nats(url).await.map_err(|error| error.to_string())?;
    let jetstream = async_nats::jetstream::new(client);
    jetstream.query_account().await.map(drop).map_err(|error| error.to_string())
}

/// Connects to a nats-server with the user and password that its URL holds. The client library reads both
/// from a URL, but does not send them.
///
/// # Errors
/// If the URL is none, or the server is not there or refuses.
pub async fn connect_nats(url: &str) -> Result<async_nats::Client> {
    let server: ServerAddr = url.parse().context("read the URL of NATS")?;
    let mut options = ConnectOptions::new();
    if let (Some(user), Some(password)) = (server.username(), server.password()) {
        options = options.user_and_password(user.to_owned(), password.to_owned());
    }
    let client = options.connect(&server).await;
    client.with_context(|| format!("connect to NATS at {}:{}", server.host(), server.port()))
}

fn write_config(path: &Path, options: &NatsOptions, port: Option<u16>) -> Result<()> {
    let quote = |path: PathBuf| {
        let text = path.to_str().context("the path of the workspace is not UTF-8")?.to_owned();
        Ok::<_, anyhow::Error>(format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")))
    };
    // A stream reserves its limit when it is made, and each deployment on the server has one: the server's
    // own limit, three quarters of the free disk, would refuse the tenth deployment on a small machine.
    let text = format!(
        "host: 127.0.0.1\nport: {}\nports_file_dir: {}\njetstream {{ store_dir: {}, max_file_store: 1TB }}\n\
         authorization {{ user: bus, password: \"{}\" }}\n",
        port.map_or(-1, i32::from),
        quote(options.dir.join("ports"))?,
        quote(options.dir.join("store"))?,
        options.password,
    );
    // The file holds a password: never readable by others, also not for a moment.
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes()).with_context(|| format!("write {}", path.display()))
}

/// The port from the file that nats-server writes when it listens.
fn read_port(dir: &Path) -> Option<u16> {
    #[derive(Deserialize)]
    struct Ports {
        nats: Vec<String>,
    }
    let file = fs::read_dir(dir).ok()?.next()?.ok()?.path();
    let ports: Ports = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    ports.nats.first()?.rsplit_once(':')?.1.parse().ok()
}
