//! One pair of servers for many tests.

use std::{env, sync::Arc};

use anyhow::Result;
use tokio::sync::OnceCell;

use super::{Durability, NatsServer, PostgresServer, Tools};

/// Names a Postgres for the tests to share: the URL of a role that may create databases and roles.
pub const TEST_POSTGRES_URL: &str = "BUS_TEST_POSTGRES_URL";
/// Names a nats-server with JetStream for the tests to share.
pub const TEST_NATS_URL: &str = "BUS_TEST_NATS_URL";

/// Servers that nobody may stop: others use them too.
#[derive(Debug)]
pub struct SharedServers {
    nats_url: String,
    postgres_url: String,
    /// Held while the process runs, when they are its own.
    _own: Option<(NatsServer, PostgresServer)>,
}

impl SharedServers {
    /// Starts servers for the tests that this process will run or start.
    ///
    /// # Errors
    /// If they cannot be found or started.
    pub async fn start() -> Result<Self> {
        let tools = tokio::task::spawn_blocking(Tools::locate).await??;
        let (nats, postgres) =
            tokio::try_join!(NatsServer::private(&tools), PostgresServer::private(&tools, Durability::Fast))?;
        let (nats_url, postgres_url) = (nats.url(), postgres.url("postgres"));
        Ok(Self { nats_url, postgres_url, _own: Some((nats, postgres)) })
    }

    /// How to connect to NATS.
    #[must_use]
    pub fn nats_url(&self) -> &str {
        &self.nats_url
    }

    /// How to connect to Postgres as a role that may create databases and roles.
    #[must_use]
    pub fn postgres_url(&self) -> &str {
        &self.postgres_url
    }
}

/// The servers that the tests of this process share: those that [`TEST_NATS_URL`] and
/// [`TEST_POSTGRES_URL`] name, or else private ones, started on the first call and gone with the process.
///
/// # Errors
/// If they cannot be found or started.
pub async fn shared_servers() -> Result<Arc<SharedServers>> {
    static SERVERS: OnceCell<Arc<SharedServers>> = OnceCell::const_new();
    let servers = SERVERS.get_or_try_init(|| async {
        let given = env::var(TEST_NATS_URL).ok().zip(env::var(TEST_POSTGRES_URL).ok());
        let servers = match given {
            Some((nats_url, postgres_url)) => SharedServers { nats_url, postgres_url, _own: None },
            None => SharedServers::start().await?,
        };
        Ok::<_, anyhow::Error>(Arc::new(servers))
    });
    Ok(servers.await?.clone())
}
