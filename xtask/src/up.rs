//! `cargo xtask up`.

use std::{collections::BTreeMap, env, fmt::Write as _, path::Path};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use devkit::{
    client::ApiClient,
    database,
    process::Lifetime,
    processes::{Role, RoleOptions, RoleProcess, is_ready},
    servers::{Durability, NatsOptions, NatsServer, PostgresOptions, PostgresServer, Tools, is_port_free},
};
use serde_json::json;
use url::Url;

use crate::{
    Backend,
    cargo::build_binaries,
    dev::{Dev, Organization, Ports, RoleState, Secrets, Settings, State, write_private},
    streams,
    ui::{self, FAINT, GOOD, STRONG, Step, paint},
};

/// The database of the stack, and its organization.
const DATABASE: &str = "event_bus";
const ORGANIZATION: &str = "dev";

/// What the development stack may deliver to besides public addresses.
const ALLOW_CIDRS: &str = r#"["127.0.0.0/8","::1/128"]"#;

/// Start the bus on this machine.
#[derive(Debug, Args)]
pub struct Up {
    /// Build with optimizations
    #[arg(long)]
    release: bool,
    /// Where the deliveries wait
    #[arg(long, value_enum, default_value = "jetstream")]
    backend: Backend,
    /// How many delivery workers; one with `--backend memory`
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    workers: u16,
    /// Use the servers that NATS_URL and DATABASE_URL name, and start none. DATABASE_URL must be the
    /// owner's; every binary uses it
    #[arg(long)]
    external: bool,
}

/// How the binaries reach the servers.
struct Connections {
    owner_url: String,
    nats_url: Option<String>,
    /// Whether each binary logs in as its own role.
    own_roles: bool,
}

impl Up {
    pub(crate) async fn run(self) -> Result<()> {
        ensure!(
            self.workers == 1 || self.backend != Backend::Memory,
            "the memory backend is one process: leave --workers out"
        );
        let dev = Dev::open()?;
        let settings = Settings {
            backend: devkit::stack::Backend::from(self.backend).name().to_owned(),
            release: self.release,
            workers: self.workers.into(),
            external: self.external,
        };
        if let Some(state) = dev.state()?
            && is_healthy(&state).await
        {
            ensure!(
                state.settings == settings,
                "the bus is up with other options ({:?}); stop it first: cargo xtask down",
                state.settings
            );
            ui::line(format!("  {}", paint(GOOD, "The bus is already up.")));
            show(&dev, &state);
            return Ok(());
        }
        if dev.stop().await? {
            ui::line("  Stopped what was left of an earlier run.");
        }
        ui::line("  Building the binaries");
        let bin_dir = build_binaries(self.release)?;

        let mut state = State { settings, nats: None, postgres: None, roles: Vec::new(), complete: false };
        let started = tokio::select! {
            started = self.start(&dev, &mut state, &bin_dir) => started,
            _ = tokio::signal::ctrl_c() => bail_interrupted(),
        };
        if let Err(error) = started {
            dev.stop().await.context("stop what had been started")?;
            return Err(error);
        }
        ui::line(format!("\n  {}", paint(GOOD, "The bus is up.")));
        show(&dev, &state);
        Ok(())
    }

    async fn start(&self, dev: &Dev, state: &mut State, bin_dir: &Path) -> Result<()> {
        let mut secrets = dev.secrets()?;
        let mut ports = dev.ports()?;
        let connections = if self.external {
            external(self.backend)?
        } else {
            self.start_servers(dev, state, &secrets, &mut ports).await?
        };

        let step = Step::begin("Migrating the database");
        database::migrate(&connections.owner_url).await?;
        if connections.own_roles {
            database::apply_roles(&connections.owner_url).await?;
        }
        step.done();

        if let Some(nats_url) = &connections.nats_url {
            let step = Step::begin("Creating the streams");
            streams::ensure(nats_url.clone()).await?;
            step.done();
        }

        let step = Step::begin("Starting the binaries");
        let http_url = self.start_roles(dev, state, bin_dir, &connections, &secrets, &mut ports).await?;
        step.done();
        dev.save_ports(&ports)?;

        let organization = ensure_organization(dev, &mut secrets, &connections, &http_url).await?;
        write_env(dev, &http_url, &secrets, &organization, &connections)?;
        state.complete = true;
        dev.save_state(state)
    }

    async fn start_servers(
        &self,
        dev: &Dev,
        state: &mut State,
        secrets: &Secrets,
        ports: &mut Ports,
    ) -> Result<Connections> {
        let tools = tokio::task::spawn_blocking(Tools::locate).await??;
        let data = dev.data()?;
        let with_nats = self.backend == Backend::Jetstream;
        let step =
            Step::begin(if with_nats { "Starting nats-server and Postgres" } else { "Starting Postgres" });
        let postgres = PostgresServer::start(PostgresOptions {
            bin: tools.postgres_bin,
            dir: data.join("postgres"),
            lifetime: Lifetime::Detached,
            durability: Durability::Full,
            password: secrets.postgres_password.clone(),
            port: ports.postgres,
        })
        .await?;
        state.postgres = postgres.id();
        dev.save_state(state)?;
        ports.postgres = Some(postgres.port());

        let mut nats_url = None;
        if with_nats {
            let nats = NatsServer::start(NatsOptions {
                program: tools.nats_server,
                dir: data.join("nats"),
                lifetime: Lifetime::Detached,
                password: secrets.nats_password.clone(),
                port: ports.nats.filter(|port| is_port_free(*port)),
                cluster: None,
            })
            .await?;
            state.nats = nats.id();
            dev.save_state(state)?;
            ports.nats = Some(nats.port());
            nats_url = Some(nats.url());
        }
        let owner_url = database::ensure_database(&postgres.url("postgres"), DATABASE).await?;
        step.done();
        Ok(Connections { owner_url, nats_url, own_roles: true })
    }

    /// Starts every binary, waits until all are ready, and gives the URL of the API.
    async fn start_roles(
        &self,
        dev: &Dev,
        state: &mut State,
        bin_dir: &Path,
        connections: &Connections,
        secrets: &Secrets,
        ports: &mut Ports,
    ) -> Result<String> {
        let mut processes = Vec::new();
        for role in devkit::stack::Backend::from(self.backend).binaries().iter().copied() {
            let replicas = if role == Role::DeliveryWorker { self.workers } else { 1 };
            for index in 0..replicas {
                let mut env = vec![
                    ("EVENT_BUS_BACKEND".to_owned(), state.settings.backend.clone()),
                    ("DATABASE_URL".to_owned(), connections.url_of(role)?),
                ];
                env.extend(connections.nats_url.iter().map(|url| ("NATS_URL".to_owned(), url.clone())));
                if matches!(role, Role::Archiver | Role::EventBus) {
                    env.push(("EVENT_BUS_COLD__URL".to_owned(), format!("file://{}", dev.cold().display())));
                }
                if matches!(role, Role::Publisher | Role::DeliveryWorker | Role::EventBus) {
                    env.push(("EVENT_BUS_SINK__ALLOW_CIDRS".to_owned(), ALLOW_CIDRS.to_owned()));
                }
                if matches!(role, Role::Publisher | Role::EventBus) {
                    env.push(("EVENT_BUS_ADMIN_TOKEN".to_owned(), secrets.admin_token.clone()));
                    if let Some(port) = ports.http.filter(|port| is_port_free(*port)) {
                        env.push(("EVENT_BUS_HTTP__LISTEN".to_owned(), format!("127.0.0.1:{port}")));
                    }
                }
                let name = match role {
                    Role::DeliveryWorker => format!("{}-{index}", role.binary()),
                    _ => role.binary().to_owned(),
                };
                let process = RoleProcess::spawn(RoleOptions {
                    role,
                    log: dev.logs().join(format!("{name}.log")),
                    name: name.clone(),
                    bin_dir: bin_dir.to_owned(),
                    dir: dev.roles(),
                    env,
                    lifetime: Lifetime::Detached,
                })?;
                // Without one it has ended already, and waiting for it tells why.
                if let Some(process) = process.id() {
                    state.roles.push(RoleState { name, role, process, addresses: None });
                    dev.save_state(state)?;
                }
                processes.push(process);
            }
        }
        for process in &mut processes {
            let addresses = process.wait_ready().await?.clone();
            let known = state.roles.iter_mut().find(|known| known.name == process.name());
            known.context("a ready process was not noted")?.addresses = Some(addresses);
        }
        dev.save_state(state)?;
        let publisher = processes.first().context("no publisher was started")?;
        let http_url = publisher.http_url();
        ports.http = Url::parse(&http_url)?.port();
        Ok(http_url)
    }
}

fn bail_interrupted() -> Result<()> {
    bail!("interrupted")
}

impl Connections {
    fn url_of(&self, role: Role) -> Result<String> {
        if self.own_roles { database::role_url(&self.owner_url, role) } else { Ok(self.owner_url.clone()) }
    }
}

/// The servers that the environment names.
fn external(backend: Backend) -> Result<Connections> {
    let owner_url = env::var("DATABASE_URL").context("--external needs DATABASE_URL")?;
    let nats_url = match backend {
        Backend::Jetstream => Some(env::var("NATS_URL").context("--external needs NATS_URL")?),
        Backend::Postgres | Backend::Memory => None,
    };
    Ok(Connections { owner_url, nats_url, own_roles: false })
}

async fn is_healthy(state: &State) -> bool {
    let servers = state.nats.iter().chain(&state.postgres);
    if state.roles.is_empty()
        || !servers.chain(state.roles.iter().map(|role| &role.process)).all(|id| id.is_running())
    {
        return false;
    }
    for role in &state.roles {
        match &role.addresses {
            Some(addresses) if is_ready(addresses).await => {}
            _ => return false,
        }
    }
    true
}

/// The organization `dev` with a key for everything: the one of an earlier run if the key still works.
async fn ensure_organization(
    dev: &Dev,
    secrets: &mut Secrets,
    connections: &Connections,
    http_url: &str,
) -> Result<Organization> {
    let client = ApiClient::new(http_url)?;
    let database = shown_url(&connections.owner_url)?;
    if let Some(known) = secrets.organizations.get(&database) {
        let answer = client.with_token(&known.api_key).get("/v1/connections?limit=1").await?;
        if answer.status == 200 {
            return Ok(known.clone());
        }
    }
    let step = Step::begin("Creating the organization `dev`");
    let admin = client.with_token(&secrets.admin_token);
    let created = admin.create_organization(ORGANIZATION).await?;
    let id = match created.status {
        // An external database may hold it from the time before this folder was made.
        409 => find_organization(&admin).await?,
        _ => created.require(201)?.string("/id")?.to_owned(),
    };
    let key = json!({ "name": "dev", "scopes": ["publish", "subscribe", "read", "admin"] });
    let created = admin.create_key(&id, &key).await?.require(201)?;
    let organization = Organization { id, api_key: created.string("/key")?.to_owned() };
    secrets.organizations.insert(database, organization.clone());
    dev.save_secrets(secrets)?;
    step.done();
    Ok(organization)
}

/// The id of the organization `dev`.
async fn find_organization(admin: &ApiClient) -> Result<String> {
    let mut page = "/v1/admin/organizations?limit=200".to_owned();
    loop {
        let list = admin.get(&page).await?.require(200)?;
        let items = list.body["items"].as_array().into_iter().flatten();
        if let Some(id) =
            items.filter(|item| item["name"] == ORGANIZATION).find_map(|item| item["id"].as_str())
        {
            return Ok(id.to_owned());
        }
        let cursor = list
            .string("/nextCursor")
            .with_context(|| format!("no organization is called {ORGANIZATION}"))?;
        page = format!("/v1/admin/organizations?limit=200&cursor={cursor}");
    }
}

/// Writes `target/dev/env`.
fn write_env(
    dev: &Dev,
    http_url: &str,
    secrets: &Secrets,
    organization: &Organization,
    connections: &Connections,
) -> Result<()> {
    let variables = BTreeMap::from([
        ("EVENT_BUS_URL", Some(http_url)),
        ("EVENT_BUS_ADMIN_TOKEN", Some(secrets.admin_token.as_str())),
        ("EVENT_BUS_API_KEY", Some(organization.api_key.as_str())),
        ("DATABASE_URL", Some(connections.owner_url.as_str())),
        ("NATS_URL", connections.nats_url.as_deref()),
    ]);
    let mut text = String::from("# Written by `cargo xtask up`; read it with `source target/dev/env`.\n");
    for (name, value) in variables {
        match value {
            Some(value) => writeln!(text, "export {name}={}", shell_quote(value))?,
            // The shell may still hold that of a stack with NATS.
            None => writeln!(text, "unset {name}")?,
        }
    }
    write_private(&dev.env_file(), &text)
}

fn shell_quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// A URL without its password and query, to be shown.
fn shown_url(url: &str) -> Result<String> {
    let mut url = Url::parse(url).context("read the URL of a server")?;
    if url.password().is_some() && url.set_password(None).is_err() {
        bail!("a server's URL names no host");
    }
    url.set_query(None);
    Ok(url.into())
}

fn show(dev: &Dev, state: &State) {
    let row = |name: &str, url: String, note: &str| {
        ui::line(format!("    {name:20} {}  {}", paint(STRONG, format!("{url:28}")), paint(FAINT, note)));
    };
    ui::line("");
    for role in &state.roles {
        let Some(addresses) = &role.addresses else { continue };
        if let Some(http) = &addresses.http {
            row("HTTP API", format!("http://{http}"), "/openapi.json describes it");
        }
    }
    for role in &state.roles {
        let Some(addresses) = &role.addresses else { continue };
        row(&role.name, format!("http://{}", addresses.admin), "/readyz /healthz /metrics");
    }
    ui::line(format!(
        "\n    Everything a client needs:  {}\n    Logs:                       {}\n    Stop it:                    {}\n",
        paint(STRONG, format!("source {}", shown_path(&dev.env_file()))),
        shown_path(&dev.logs()),
        paint(STRONG, "cargo xtask down"),
    ));
}

/// A path from where the user stands, if that is shorter.
fn shown_path(path: &Path) -> String {
    let here = env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_written() {
        for value in ["plain", "it's", "$HOME `x` \\ \"", ""] {
            let script = format!("printf %s {}", shell_quote(value));
            let output = std::process::Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), value);
        }
    }

    #[test]
    fn no_password_is_shown() {
        let shown = shown_url("postgres://owner:secret@127.0.0.1:5433/bus?sslmode=disable").unwrap();
        assert_eq!(shown, "postgres://owner@127.0.0.1:5433/bus");
    }
}
