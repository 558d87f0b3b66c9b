//! What a stack consists of.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Result, ensure};

use crate::{processes::Role, servers::Durability};

/// Where the deliveries wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// In NATS JetStream.
    Jetstream,
    /// In the database.
    Postgres,
    /// In the memory of one process, which has every role.
    Memory,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Jetstream, Self::Postgres, Self::Memory];

    /// The binaries that make a whole bus with it.
    #[must_use]
    pub fn binaries(self) -> &'static [Role] {
        match self {
            Self::Jetstream | Self::Postgres => &Role::ALL,
            Self::Memory => &[Role::EventBus],
        }
    }

    /// Its name in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Jetstream => "jetstream",
            Self::Postgres => "postgres",
            Self::Memory => "memory",
        }
    }
}

/// Whose servers a stack uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerChoice {
    /// Those of [`shared_servers`](crate::servers::shared_servers); the stack has a database and a subject prefix of its own.
    Shared,
    /// Its own, which the test may kill.
    Own(Durability),
}

/// What a stack consists of.
#[derive(Debug, Clone)]
pub struct StackOptions {
    /// How many of each binary. With [`Backend::Memory`] there is one process, and more than one of anything
    /// is refused.
    pub replicas: BTreeMap<Role, usize>,
    /// Where the deliveries wait.
    pub backend: Backend,
    /// Whose servers.
    pub servers: ServerChoice,
    /// Configuration for every binary of a role, or of all roles. The process of every role gets it all.
    pub env: Vec<(Option<Role>, String, String)>,
    /// The folder with the binaries; see [`bin_dir`](crate::processes::bin_dir).
    pub bin_dir: Option<PathBuf>,
    /// Whether its own NATS is a cluster of three nodes, and each stream has three copies.
    pub cluster: bool,
    /// Whether the binaries reach their own servers through proxies.
    pub proxied: bool,
}

impl Default for StackOptions {
    /// One of each binary on the shared servers, with JetStream.
    fn default() -> Self {
        Self {
            replicas: Role::ALL.into_iter().map(|role| (role, 1)).collect(),
            backend: Backend::Jetstream,
            servers: ServerChoice::Shared,
            env: Vec::new(),
            bin_dir: None,
            cluster: false,
            proxied: false,
        }
    }
}

impl StackOptions {
    /// With this many of one binary; none is a choice.
    #[must_use]
    pub fn replicas(mut self, role: Role, n: usize) -> Self {
        self.replicas.insert(role, n);
        self
    }

    /// With this backend.
    #[must_use]
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// On these servers.
    #[must_use]
    pub fn servers(mut self, servers: ServerChoice) -> Self {
        self.servers = servers;
        self
    }

    /// With a NATS that is a cluster of three nodes, and three copies of each stream.
    #[must_use]
    pub fn cluster(mut self) -> Self {
        self.cluster = true;
        self
    }

    /// With proxies between the binaries and the servers.
    #[must_use]
    pub fn proxied(mut self) -> Self {
        self.proxied = true;
        self
    }

    /// With a variable for every binary.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((None, name.to_owned(), value.to_string()));
        self
    }

    /// With a variable for every binary of one role.
    #[must_use]
    pub fn role_env(mut self, role: Role, name: &str, value: impl ToString) -> Self {
        self.env.push((Some(role), name.to_owned(), value.to_string()));
        self
    }

    /// Whether what is chosen goes together.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            self.backend != Backend::Memory || self.replicas.values().all(|n| *n <= 1),
            "memory is one process's: there can be no replicas"
        );
        ensure!(
            self.servers != ServerChoice::Shared || !(self.cluster || self.proxied),
            "what others use too is no cluster and has no proxies"
        );
        ensure!(self.backend == Backend::Jetstream || !self.cluster, "without JetStream there is no cluster");
        Ok(())
    }
}
