//! The whole bus: servers, a database of its own, and any number of each binary.

mod options;
mod servers;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::stream::RetentionPolicy;
use sqlx::{
    Connection, PgConnection,
    postgres::{PgPool, PgPoolOptions},
};

use self::servers::{Nats, Servers, delete_streams, own_servers, streams};
pub use self::{
    options::{Backend, ServerChoice, StackOptions},
    servers::Proxies,
};
use crate::{
    client::ApiClient,
    database::{self, Database},
    paths::RunDir,
    process::{Lifetime, Signal, describe_exit},
    processes::{Role, RoleOptions, RoleProcess, bin_dir},
    random_token,
    servers::{NatsCluster, NatsServer, PostgresServer, connect_nats, shared_servers},
};

/// A running bus. Its processes end with the value; [`shutdown`](Stack::shutdown) also checks that they
/// end well.
#[derive(Debug)]
pub struct Stack {
    options: StackOptions,
    processes: Vec<RoleProcess>,
    /// Ended after the processes, which would only complain, and before the servers.
    proxies: Option<Proxies>,
    servers: Servers,
    database: Database,
    prefix: String,
    admin_token: String,
    bin_dir: PathBuf,
    /// Removed after all that writes there has gone, since fields are dropped in order.
    run: RunDir,
}

impl Stack {
    /// Starts it, and waits until every binary is ready.
    ///
    /// # Errors
    /// If a server or a binary does not start; then with the end of its log.
    pub async fn start(options: StackOptions) -> Result<Self> {
        options.check()?;
        let servers = match options.servers {
            ServerChoice::Shared => Servers::Shared(shared_servers().await?),
            ServerChoice::Own(durability) => own_servers(&options, durability).await?,
        };
        let server_url = match &servers {
            Servers::Shared(shared) => shared.postgres_url().to_owned(),
            Servers::Own { postgres, .. } => postgres.url("postgres"),
        };
        let proxies = match &servers {
            Servers::Own { nats, postgres } if options.proxied => {
                Some(Proxies::before(nats.as_ref(), postgres).await?)
            }
            _ => None,
        };
        let database = Database::create(&server_url).await?;
        let bin_dir = match &options.bin_dir {
            Some(dir) => dir.clone(),
            None => bin_dir()?,
        };
        let mut stack = Self {
            processes: Vec::new(),
            proxies,
            servers,
            database,
            prefix: random_token(8),
            admin_token: random_token(16),
            bin_dir,
            run: RunDir::create()?,
            options,
        };
        for role in stack.options.backend.binaries() {
            for _ in 0..stack.options.replicas.get(role).copied().unwrap_or(1) {
                stack.spawn(*role, &[])?;
            }
        }
        for process in &mut stack.processes {
            process.wait_ready().await?;
        }
        Ok(stack)
    }

    /// The folder of its cold storage.
    #[must_use]
    pub fn cold_dir(&self) -> PathBuf {
        self.run.path().join("cold")
    }

    /// Starts one more process of a role, with further variables, and gives its index among those of its
    /// role. It is not ready yet.
    ///
    /// # Errors
    /// If there is no such binary.
    pub fn spawn(&mut self, role: Role, extra: &[(&str, &str)]) -> Result<usize> {
        let index = self.processes.iter().filter(|process| process.role() == role).count();
        let name = format!("{}-{index}", role.binary());
        let mut env = vec![
            ("EVENT_BUS_BACKEND".to_owned(), self.options.backend.name().to_owned()),
            ("EVENT_BUS_PREFIX".to_owned(), self.prefix.clone()),
            ("DATABASE_URL".to_owned(), self.database_url(role)?),
        ];
        if let Some(url) = self.nats_url() {
            let url = self.proxies.as_ref().map_or(Ok(url.clone()), |proxies| proxies.through(&url))?;
            env.push(("NATS_URL".to_owned(), url));
        }
        if self.options.cluster {
            env.push(("EVENT_BUS_NATS__REPLICAS".to_owned(), "3".to_owned()));
        }
        if matches!(role, Role::Archiver | Role::EventBus) {
            env.push(("EVENT_BUS_COLD__URL".to_owned(), format!("file://{}", self.cold_dir().display())));
        }
        if matches!(role, Role::Publisher | Role::DeliveryWorker | Role::EventBus) {
            env.push(("EVENT_BUS_SINK__ALLOW_CIDRS".to_owned(), LOOPBACK.to_owned()));
        }
        if matches!(role, Role::Publisher | Role::EventBus) {
            env.push(("EVENT_BUS_ADMIN_TOKEN".to_owned(), self.admin_token.clone()));
        }
        for (only, name, value) in &self.options.env {
            if only.is_none_or(|only| only == role || role == Role::EventBus) {
                env.push((name.clone(), value.clone()));
            }
        }
        env.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let log = self.run.path().join("logs").join(format!("{name}.log"));
        let dir = self.run.path().join("roles");
        let lifetime = Lifetime::Owned(Signal::KILL);
        let bin_dir = self.bin_dir.clone();
        self.processes.push(RoleProcess::spawn(RoleOptions {
            role,
            name,
            bin_dir,
            dir,
            log,
            env,
            lifetime,
        })?);
        Ok(index)
    }

    /// One process. With [`Backend::Memory`] the only one is that of each role.
    ///
    /// # Panics
    /// If there are not that many of its role.
    pub fn process(&mut self, role: Role, index: usize) -> &mut RoleProcess {
        let role = if self.options.backend == Backend::Memory { Role::EventBus } else { role };
        let mut of_role = self.processes.iter_mut().filter(|process| process.role() == role);
        of_role.nth(index).unwrap_or_else(|| panic!("this stack has no {}-{index}", role.binary()))
    }

    /// All processes, in the order in which they were started.
    pub fn processes(&mut self) -> impl Iterator<Item = &mut RoleProcess> {
        self.processes.iter_mut()
    }

    /// One publisher.
    ///
    /// # Panics
    /// If there are not that many.
    pub fn publisher(&mut self, index: usize) -> &mut RoleProcess {
        self.process(Role::Publisher, index)
    }

    /// One delivery worker.
    ///
    /// # Panics
    /// If there are not that many.
    pub fn worker(&mut self, index: usize) -> &mut RoleProcess {
        self.process(Role::DeliveryWorker, index)
    }

    /// A client without a credential at one publisher.
    ///
    /// # Errors
    /// If the HTTP client cannot be set up.
    ///
    /// # Panics
    /// If there are not that many publishers.
    pub fn client(&mut self, publisher: usize) -> Result<ApiClient> {
        ApiClient::new(self.publisher(publisher).http_url())
    }

    /// A client with the admin token at one publisher.
    ///
    /// # Errors
    /// If the HTTP client cannot be set up.
    ///
    /// # Panics
    /// If there are not that many publishers.
    pub fn admin(&mut self, publisher: usize) -> Result<ApiClient> {
        Ok(self.client(publisher)?.with_token(&self.admin_token))
    }

    /// The publishers' admin token.
    #[must_use]
    pub fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// The first token of its subjects.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// How a binary connects to the database.
    ///
    /// # Errors
    /// If the owner's URL is none.
    pub fn database_url(&self, role: Role) -> Result<String> {
        let url = database::role_url(self.database.url(), role)?;
        self.proxies.as_ref().map_or(Ok(url.clone()), |proxies| proxies.through(&url))
    }

    /// How the owner connects to the database.
    #[must_use]
    pub fn owner_url(&self) -> &str {
        self.database.url()
    }

    /// A pool of connections as the owner.
    ///
    /// # Errors
    /// If it cannot connect.
    pub async fn owner_pool(&self) -> Result<PgPool> {
        Ok(PgPoolOptions::new().max_connections(4).connect(self.database.url()).await?)
    }

    /// How to connect to NATS, if this stack has one: directly, whatever lies between it and the binaries.
    #[must_use]
    pub fn nats_url(&self) -> Option<String> {
        match &self.servers {
            _ if self.options.backend != Backend::Jetstream => None,
            Servers::Shared(shared) => Some(shared.nats_url().to_owned()),
            Servers::Own { nats, .. } => nats.as_ref().map(Nats::url),
        }
    }

    /// What lies between the binaries and the servers.
    ///
    /// # Panics
    /// If the stack was started without.
    #[must_use]
    pub fn proxies(&self) -> &Proxies {
        self.proxies.as_ref().expect("this stack has no proxies")
    }

    /// Its own nats-server, to be killed and restarted.
    ///
    /// # Panics
    /// If the stack does not have a single one of its own.
    pub fn nats(&mut self) -> &mut NatsServer {
        match &mut self.servers {
            Servers::Own { nats: Some(Nats::Single(nats)), .. } => nats,
            _ => panic!("this stack has no nats-server of its own"),
        }
    }

    /// Its own cluster, whose nodes are to be killed and restarted.
    ///
    /// # Panics
    /// If the stack has none.
    pub fn nats_cluster(&mut self) -> &mut NatsCluster {
        match &mut self.servers {
            Servers::Own { nats: Some(Nats::Cluster(cluster)), .. } => cluster,
            _ => panic!("this stack has no cluster"),
        }
    }

    /// Its own Postgres, to be killed and restarted.
    ///
    /// # Panics
    /// If the stack does not have one of its own.
    pub fn postgres(&mut self) -> &mut PostgresServer {
        match &mut self.servers {
            Servers::Own { postgres, .. } => postgres,
            Servers::Shared(_) => panic!("this stack has no Postgres of its own"),
        }
    }

    /// How many deliveries are queued or parked: with 0, and nothing being published, none will come.
    ///
    /// # Errors
    /// If the queue cannot be read.
    pub async fn undelivered(&self) -> Result<u64> {
        let mut owner = PgConnection::connect(self.database.url()).await?;
        let rows: i64 = sqlx::query_scalar(
            "SELECT (SELECT count(*) FROM delivery_queue) + (SELECT count(*) FROM delivery_states WHERE state = 'waiting') \
             + (SELECT count(*) FROM outbox WHERE finished_at IS NULL)",
        )
        .fetch_one(&mut owner)
        .await
        .context("count the deliveries in the database")?;
        owner.close().await?;
        let mut waiting = u64::try_from(rows)?;
        if let Some(url) = self.nats_url() {
            let streams = streams(&connect_nats(&url).await?, &self.prefix).await?;
            let queues =
                streams.iter().filter(|stream| stream.config.retention == RetentionPolicy::WorkQueue);
            waiting += queues.map(|stream| stream.state.messages).sum::<u64>();
        }
        for process in self.processes.iter().filter(|process| process.role() == Role::EventBus) {
            // A number of deliveries, which a gauge holds exactly.
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a whole number, not negative"
            )]
            let queued = process.metric("bus_memory_queue_deliveries").await? as u64;
            waiting += queued;
        }
        Ok(waiting)
    }

    /// Where the processes write.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.run.path().join("logs")
    }

    /// What every process has written, for a message after a failure.
    #[must_use]
    pub fn all_logs(&self) -> String {
        let sections = self.processes.iter().map(|process| {
            let text = fs::read_to_string(process.log()).unwrap_or_else(|error| error.to_string());
            format!("── {}\n{text}", process.name())
        });
        sections.collect::<Vec<_>>().join("\n")
    }

    /// Ends it: every binary that runs must drain and exit with 0. Then the database and the streams go.
    ///
    /// # Errors
    /// If a binary ends otherwise; then with the end of its log.
    pub async fn shutdown(mut self) -> Result<()> {
        let mut draining = Vec::new();
        for (index, process) in self.processes.iter_mut().enumerate() {
            if process.is_running()? {
                process.sigterm()?;
                draining.push(index);
            }
        }
        for index in draining {
            let process = &mut self.processes[index];
            let status = process.wait_exit().await?;
            ensure!(
                status.success(),
                "{} did not drain, but ended with {}:\n{}",
                process.name(),
                describe_exit(status),
                process.log_text()?
            );
        }
        if let Servers::Shared(shared) = &self.servers {
            delete_streams(shared.nats_url(), &self.prefix).await?;
            self.database.drop().await?;
        }
        Ok(())
    }
}

/// What the binaries may connect to besides public addresses: the receivers of a test.
const LOOPBACK: &str = r#"["127.0.0.0/8","::1/128"]"#;
