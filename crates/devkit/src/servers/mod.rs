//! A private nats-server, or three that are a cluster, and a private Postgres.

mod cluster;
mod nats;
mod postgres;
mod shared;
mod tools;

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result};

pub use self::{
    cluster::NatsCluster,
    nats::{ClusterPlace, NatsOptions, NatsServer, connect_nats},
    postgres::{Durability, OWNER, PostgresOptions, PostgresServer},
    shared::{SharedServers, TEST_NATS_URL, TEST_POSTGRES_URL, shared_servers},
    tools::Tools,
};

/// A port of the loopback interface that nobody listens on at this moment.
///
/// Somebody may take it before the caller does, so whoever uses it must be ready to try again.
///
/// # Errors
/// If the system has none left.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

/// Whether nobody listens on this port of the loopback interface.
#[must_use]
pub fn is_port_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
