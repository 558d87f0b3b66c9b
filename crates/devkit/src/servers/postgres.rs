//! A Postgres of our own.

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::timeout;

use super::{Tools, free_port, is_port_free, tools::version};
use crate::{
    paths::{self, RunDir},
    poll,
    process::{
        Launch, Lifetime, Process, ProcessId, Signal, User, children_of, describe_exit,
        processes_with_argument,
    },
    random_token,
};

/// The role that owns the databases: it may create databases and roles, but is no superuser.
pub const OWNER: &str = "bus_owner";
/// The cluster's superuser.
const SUPERUSER: &str = "postgres";
/// How long a start may take; after a crash the log is replayed first.
const START: Duration = Duration::from_secs(60);
/// How long one attempt to connect may take while it starts.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an orderly stop may take.
const STOP: Duration = Duration::from_secs(30);
/// A number that no process has: systems give much smaller ones.
const NOBODY: i32 = i32::MAX - 1;
/// How often a free port may be snatched before we give up.
const PORT_ATTEMPTS: usize = 5;

/// Whether a commit survives the crash of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// As in production.
    Full,
    /// Without waiting for the disk: a crash of the machine may lose all; a crash of Postgres loses
    /// nothing, since the system still holds what was written. For ordinary tests.
    Fast,
}

/// How to start a Postgres.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// The folder with its programs.
    pub bin: PathBuf,
    /// The folder for its data and log; below [`paths::server_dir`], so that `nobody` can reach it.
    pub dir: PathBuf,
    /// Whether it dies with its owner.
    pub lifetime: Lifetime,
    /// Whether it waits for the disk.
    pub durability: Durability,
    /// The password of the superuser and of [`OWNER`]. It counts when the data folder is made.
    pub password: String,
    /// The port to listen on if it is free; else any free one.
    pub port: Option<u16>,
}

/// A running Postgres: loopback only, passwords by SCRAM, `pg_stat_statements` in every database.
#[derive(Debug)]
pub struct PostgresServer {
    options: PostgresOptions,
    user: Option<User>,
    process: Process,
    port: u16,
    /// Removed after the process has gone, since fields are dropped in order.
    _run: Option<RunDir>,
}

impl PostgresServer {
    /// Starts one that lives as long as the value, in a folder of its own.
    ///
    /// # Errors
    /// If there is no program, or if it does not start.
    pub async fn private(tools: &Tools, durability: Durability) -> Result<Self> {
        let run = RunDir::create()?;
        let mut server = Self::start(PostgresOptions {
            bin: tools.postgres_bin.clone(),
            dir: run.path().join("postgres"),
            lifetime: Lifetime::Owned(Signal::QUIT),
            durability,
            password: random_token(16),
            port: None,
        })
        .await?;
        server._run = Some(run);
        Ok(server)
    }

    /// Starts one on a folder, with the data that is there.
    ///
    /// # Errors
    /// If the data folder cannot be made, or if it does not start; then with the end of its log.
    pub async fn start(options: PostgresOptions) -> Result<Self> {
        let user = if paths::is_root() { Some(User::nobody()?) } else { None };
        let fresh = initialise(&options, user)?;
        let (process, port) = launch_somewhere(&options, user).await?;
        let server = Self { options, user, process, port, _run: None };
        if fresh {
            server.create_owner().await.context("set up the new Postgres")?;
        }
        Ok(server)
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How [`OWNER`] connects to a database; `postgres` always exists.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        url(OWNER, &self.options.password, self.port, database)
    }

    /// How the superuser connects to a database.
    #[must_use]
    pub fn superuser_url(&self, database: &str) -> String {
        url(SUPERUSER, &self.options.password, self.port, database)
    }

    /// Where its data lies.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        data(&self.options)
    }

    /// The process that all others of the server come from.
    #[must_use]
    pub fn id(&self) -> Option<ProcessId> {
        self.process.id()
    }

    /// Kills it with all its processes, as a crash would.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn kill(&mut self) -> Result<()> {
        // Stopped first, so that none is born between the listing and the killing.
        self.process.signal(Signal::STOP)?;
        let children = children_of(self.process.pid())?;
        self.process.signal(Signal::KILL)?;
        for child in &children {
            child.signal(Signal::KILL)?;
        }
        self.process.kill().await?;
        // One that lives would still hold the shared memory, and keep the next start from its data.
        poll("the processes of Postgres to end", STOP, || async {
            let left = children.iter().filter(|child| child.is_running()).count();
            if left == 0 { Ok(()) } else { Err(left) }
        })
        .await
    }

    /// Halts all its processes where they are, until [`resume`](Self::resume): a server that hangs.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn pause(&mut self) -> Result<()> {
        // First, so that none is born between the listing and the halting.
        self.process.signal(Signal::STOP)?;
        for child in children_of(self.process.pid())? {
            child.signal(Signal::STOP)?;
        }
        Ok(())
    }

    /// Lets a halted server go on.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn resume(&mut self) -> Result<()> {
        for child in children_of(self.process.pid())? {
            child.signal(Signal::CONT)?;
        }
        self.process.signal(Signal::CONT)
    }

    /// Stops it in order; open connections are cut.
    ///
    /// # Errors
    /// If it does not end in time.
    pub async fn stop(&mut self) -> Result<()> {
        self.process.signal(Signal::INT)?;
        self.process.wait_exit(STOP).await.context("stop Postgres")?;
        Ok(())
    }

    /// Starts it again on the same port and data, after [`kill`](Self::kill) or [`stop`](Self::stop).
    ///
    /// # Errors
    /// If it still runs, or does not start.
    pub async fn restart(&mut self) -> Result<()> {
        if self.process.is_running()? {
            bail!("Postgres still runs");
        }
        self.process = launch(&self.options, self.user, self.port).await?;
        Ok(())
    }

    /// The owner of the databases, and what every later database is to have.
    async fn create_owner(&self) -> Result<()> {
        let mut superuser = PgConnection::connect(&self.superuser_url("template1")).await?;
        // The password is one of our own random tokens: it holds no quote.
        let statements = format!(
            "CREATE ROLE {OWNER} LOGIN CREATEDB CREATEROLE PASSWORD '{}';
             GRANT pg_read_all_stats TO {OWNER};
             CREATE EXTENSION pg_stat_statements;
             GRANT EXECUTE ON FUNCTION pg_stat_statements_reset TO {OWNER};",
            self.options.password
        );
        sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut superuser).await?;
        superuser.close().await?;
        Ok(())
    }
}

fn url(user: &str, password: &str, port: u16, database: &str) -> String {
    format!("postgres://{user}:{password}@127.0.0.1:{port}/{database}")
}

fn data(options: &PostgresOptions) -> PathBuf {
    options.dir.join("data")
}

fn log(options: &PostgresOptions) -> PathBuf {
    options.dir.join("postgres.log")
}

/// Makes the data folder, unless there is one. Says whether it made one.
fn initialise(options: &PostgresOptions, user: Option<User>) -> Result<bool> {
    let data = data(options);
    if data.join("PG_VERSION").is_file() {
        return Ok(false);
    }
    let create = |dir: &Path| -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        if let Some(user) = user {
            chown(dir, Some(user.uid), Some(user.gid))
                .with_context(|| format!("give away {}", dir.display()))?;
        }
        Ok(())
    };
    create(&options.dir)?;
    if user.is_some() {
        // A strict umask would keep that user from its own folder.
        let base = paths::server_dir()?;
        for dir in options.dir.ancestors().take_while(|dir| *dir != base) {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        }
    }
    // Finished only when it has its final name, so that an interrupted start is not taken for one.
    let unfinished = options.dir.join("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    create(&unfinished)?;
    let password = options.dir.join("password");
    let _ = fs::remove_file(&password);
    {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&password)?;
        std::io::Write::write_all(&mut file, options.password.as_bytes())?;
    }
    if let Some(user) = user {
        chown(&password, Some(user.uid), Some(user.gid))?;
    }
    let mut initdb = program(options, user, "initdb")
        .arg("-D")
        .arg(&unfinished)
        .args(["-U", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "-N", "--pwfile"])
        .arg(&password);
    // The same sort order on every machine. Before 17 there was only the C library's.
    initdb = if version(&options.bin.join("postgres"))?.0 >= 17 {
        initdb.args(["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"])
    } else {
        initdb.args(["--locale=C"])
    };
    let made = initdb.run().context("create the data folder of Postgres");
    fs::remove_file(&password)?;
    made?;
    fs::rename(&unfinished, &data)?;
    Ok(true)
}

fn program(options: &PostgresOptions, user: Option<User>, name: &str) -> Launch {
    Launch::new(options.bin.join(name), log(options))
        .user(user)
        // The folder of the caller may be closed to that user.
        .dir(&options.dir)
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
}

/// Starts it on the wished port, or else on a free one: Postgres cannot choose by itself.
async fn launch_somewhere(options: &PostgresOptions, user: Option<User>) -> Result<(Process, u16)> {
    let mut port = match options.port.filter(|port| is_port_free(*port)) {
        Some(port) => port,
        None => free_port()?,
    };
    for _ in 1..PORT_ATTEMPTS {
        match launch(options, user, port).await {
            Ok(process) => return Ok((process, port)),
            Err(_) if !is_port_free(port) => port = free_port()?,
            Err(error) => return Err(error),
        }
    }
    Ok((launch(options, user, port).await?, port))
}

/// Makes the lock file of a server that is gone name nobody.
///
/// Postgres looks for a process of the number in it, and refuses to start if there is one: also a dead one
/// that its parent has not noticed, as the first process of a container may never do, or another program
/// that got the number since. The rest of the file stays, so that Postgres still finds out by the shared
/// memory whether a part of the old server lives.
fn release_lock_file(data: &Path) -> Result<()> {
    let path = data.join("postmaster.pid");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let (Some(data), Some((number, rest))) = (data.to_str(), text.split_once('\n')) else { return Ok(()) };
    if processes_with_argument(data)?.iter().all(|process| process.pid.to_string() != number.trim()) {
        fs::write(&path, format!("{NOBODY}\n{rest}")).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Starts it and waits until a client gets in.
async fn launch(options: &PostgresOptions, user: Option<User>, port: u16) -> Result<Process> {
    release_lock_file(&data(options))?;
    let mut launch = program(options, user, "postgres")
        .arg("-D")
        .arg(data(options))
        .args(["-p", &port.to_string()])
        .args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
        .args(["-c", "shared_preload_libraries=pg_stat_statements", "-c", "max_connections=200"]);
    if options.durability == Durability::Fast {
        launch = launch.args(["-c", "fsync=off", "-c", "full_page_writes=off"]);
        // A database that a vacuum worker is in cannot be dropped by its owner, who may not end a process
        // of the superuser.
        launch = launch.args(["-c", "autovacuum=off"]);
    }
    let mut process = launch.spawn(options.lifetime)?;
    let address = url(SUPERUSER, &options.password, port, "postgres");
    poll("Postgres to be ready", START, || {
        let state = process.try_exit();
        let log = process.log_tail();
        let address = &address;
        async move {
            if let Some(status) = state.map_err(|error| error.to_string())? {
                return Ok(Err(anyhow!("Postgres ended with {}:\n{log}", describe_exit(status))));
            }
            let connected = timeout(CONNECT, PgConnection::connect(address)).await;
            let connection = connected.map_err(|_| "no answer")?.map_err(|error| error.to_string())?;
            connection.close().await.map_err(|error| error.to_string())?;
            Ok::<_, String>(Ok(()))
        }
    })
    .await
    .with_context(|| format!("see {}", launch.log().display()))??;
    Ok(process)
}
