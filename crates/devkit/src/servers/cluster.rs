//! A cluster of three nats-servers.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream;
use futures::future::try_join_all;

use super::{ClusterPlace, NatsOptions, NatsServer, Tools, connect_nats, free_port, nats::CLUSTER};
use crate::{
    paths::RunDir,
    poll,
    process::{Lifetime, Signal},
    random_token,
};

/// How many nodes there are.
const NODES: usize = 3;
/// How often free ports may be snatched before we give up.
const ATTEMPTS: usize = 3;
/// How long the nodes may take to choose a leader.
const ELECTION: Duration = Duration::from_secs(60);

/// Three nats-servers that keep copies of each other's streams; each has a folder of its own.
#[derive(Debug)]
pub struct NatsCluster {
    nodes: Vec<NatsServer>,
    /// Removed after the nodes have gone, since fields are dropped in order.
    _run: RunDir,
}

impl NatsCluster {
    /// Starts one that lives as long as the value, and waits until it can make streams.
    ///
    /// # Errors
    /// If there is no program, or if a node does not start.
    pub async fn private(tools: &Tools) -> Result<Self> {
        let mut attempt = 1;
        loop {
            match Self::start(tools).await {
                // Somebody may have taken a port between the asking and the listening.
                Err(_) if attempt < ATTEMPTS => attempt += 1,
                started => return started.context("start a cluster of nats-servers"),
            }
        }
    }

    async fn start(tools: &Tools) -> Result<Self> {
        let run = RunDir::create()?;
        let password = random_token(16);
        let mut routes: Vec<u16> = Vec::new();
        while routes.len() < NODES {
            let port = free_port()?;
            if !routes.contains(&port) {
                routes.push(port);
            }
        }
        let options = |node: usize| NatsOptions {
            program: tools.nats_server.clone(),
            dir: run.path().join(format!("nats-{node}")),
            lifetime: Lifetime::Owned(Signal::KILL),
            password: password.clone(),
            port: None,
            cluster: Some(ClusterPlace {
                node: name(node),
                route_port: routes[node],
                routes: routes.clone(),
            }),
        };
        // Together: none is ready before it has found another.
        let nodes = try_join_all((0..NODES).map(|node| NatsServer::start(options(node)))).await?;
        let cluster = Self { nodes, _run: run };
        cluster.wait_for_leader().await?;
        Ok(cluster)
    }

    /// What it is called, for the placement of a stream.
    #[must_use]
    pub fn name(&self) -> &'static str {
        CLUSTER
    }

    /// The nodes. Each has a tag, `node:n0` and so on.
    #[must_use]
    pub fn nodes(&self) -> &[NatsServer] {
        &self.nodes
    }

    /// One node, to be killed, stopped and restarted.
    ///
    /// # Panics
    /// If there is none of this number.
    pub fn node(&mut self, node: usize) -> &mut NatsServer {
        &mut self.nodes[node]
    }

    /// How to connect to all nodes: their URLs, with commas between.
    #[must_use]
    pub fn url(&self) -> String {
        self.nodes.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// Which node leads a stream.
    ///
    /// # Errors
    /// If none does at this moment, or there is no such stream.
    pub async fn leader(&self, stream: &str) -> Result<usize> {
        let context = jetstream::new(connect_nats(&self.url()).await?);
        let mut stream = context.get_stream(stream).await.context("look at a stream")?;
        let info = stream.info().await.context("look at a stream")?;
        let leader = info.cluster.as_ref().and_then(|cluster| cluster.leader.as_deref());
        let leader = leader.context("no node leads the stream")?;
        (0..self.nodes.len()).find(|node| name(*node) == leader).context("a stranger leads the stream")
    }

    /// Restarts a node after it was killed or stopped, and waits until it has all that it is to hold.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn restart(&mut self, node: usize) -> Result<()> {
        self.nodes[node].restart().await
    }

    /// Waits until the nodes agree on who decides about streams.
    async fn wait_for_leader(&self) -> Result<()> {
        poll("the nodes to choose a leader", ELECTION, || async {
            let client = connect_nats(&self.url()).await.map_err(|error| format!("{error:#}"))?;
            let account = jetstream::new(client).query_account().await;
            account.map(drop).map_err(|error| error.to_string())
        })
        .await
    }
}

fn name(node: usize) -> String {
    format!("n{node}")
}
