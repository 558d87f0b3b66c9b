//! The servers of a stack, and what lies between them and the binaries.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, stream::Info as StreamInfo};
use futures::TryStreamExt;
use url::Url;

use super::{Backend, StackOptions};
use crate::{
    proxy::Proxy,
    servers::{Durability, NatsCluster, NatsServer, PostgresServer, SharedServers, Tools, connect_nats},
};

/// Whose servers.
#[derive(Debug)]
pub(super) enum Servers {
    Shared(Arc<SharedServers>),
    Own { nats: Option<Nats>, postgres: Box<PostgresServer> },
}

/// A NATS of the stack's own.
#[derive(Debug)]
pub(super) enum Nats {
    Single(Box<NatsServer>),
    Cluster(NatsCluster),
}

impl Nats {
    pub(super) fn url(&self) -> String {
        match self {
            Self::Single(server) => server.url(),
            Self::Cluster(cluster) => cluster.url(),
        }
    }

    fn ports(&self) -> Vec<u16> {
        match self {
            Self::Single(server) => vec![server.port()],
            Self::Cluster(cluster) => cluster.nodes().iter().map(NatsServer::port).collect(),
        }
    }
}

/// What lies between the binaries and the servers.
#[derive(Debug)]
pub struct Proxies {
    /// Before Postgres.
    pub postgres: Proxy,
    /// Before each node of NATS.
    pub nats: Vec<Proxy>,
    /// The ports of what they lie before, each with the proxy's.
    ports: Vec<(u16, u16)>,
}

impl Proxies {
    pub(super) async fn before(nats: Option<&Nats>, postgres: &PostgresServer) -> Result<Self> {
        let before_postgres = Proxy::before(postgres.port()).await?;
        let mut ports = vec![(postgres.port(), before_postgres.port())];
        let mut before_nats = Vec::new();
        for port in nats.map(Nats::ports).unwrap_or_default() {
            let proxy = Proxy::before(port).await?;
            ports.push((port, proxy.port()));
            before_nats.push(proxy);
        }
        Ok(Self { postgres: before_postgres, nats: before_nats, ports })
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Proxy> {
        self.nats.iter().chain([&self.postgres])
    }

    /// The URL, or URLs, with the proxies in place of the servers.
    pub(super) fn through(&self, urls: &str) -> Result<String> {
        let one = |url: &str| {
            let mut url: Url = url.parse().context("read the URL of a server")?;
            let proxy = self.ports.iter().find(|(server, _)| url.port() == Some(*server));
            if let Some((_, proxy)) = proxy {
                let set = url.set_port(Some(*proxy));
                ensure!(set.is_ok(), "the URL of a server has no port");
            }
            Ok(url.to_string())
        };
        Ok(urls.split(',').map(one).collect::<Result<Vec<_>>>()?.join(","))
    }
}

/// Starts them.
pub(super) async fn own_servers(options: &StackOptions, durability: Durability) -> Result<Servers> {
    let tools = tokio::task::spawn_blocking(Tools::locate).await??;
    let nats = async {
        Ok(match options.backend {
            Backend::Jetstream if options.cluster => Some(Nats::Cluster(NatsCluster::private(&tools).await?)),
            Backend::Jetstream => Some(Nats::Single(Box::new(NatsServer::private(&tools).await?))),
            Backend::Postgres | Backend::Memory => None,
        })
    };
    let (nats, postgres) = tokio::try_join!(nats, PostgresServer::private(&tools, durability))?;
    Ok(Servers::Own { nats, postgres: Box::new(postgres) })
}

/// Removes the streams of one deployment from a server that others use too.
pub(super) async fn delete_streams(nats_url: &str, prefix: &str) -> Result<()> {
    let client = connect_nats(nats_url).await?;
    for stream in streams(&client, prefix).await? {
        let deleted = jetstream::new(client.clone()).delete_stream(&stream.config.name).await;
        deleted.context("delete a stream of a test")?;
    }
    Ok(())
}

/// The streams with subjects of one deployment.
pub(super) async fn streams(client: &async_nats::Client, prefix: &str) -> Result<Vec<StreamInfo>> {
    let streams: Vec<StreamInfo> =
        jetstream::new(client.clone()).streams().try_collect().await.context("list the streams")?;
    let ours = |stream: &StreamInfo| {
        stream.config.subjects.iter().any(|subject| subject.split('.').next() == Some(prefix))
    };
    Ok(streams.into_iter().filter(ours).collect())
}
