//! Which deployment a command is about.

use std::{collections::HashMap, env, path::PathBuf};

use anyhow::{Result, anyhow};
use bus_core::{
    config::{self, Common},
    telemetry::Chain,
};
use clap::Args;

/// Where a deployment's database, broker and configuration are. Lanes, prefix and the section `[nats]` must be the
/// deployment's own: they are read from where the binaries read them.
#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// Configuration file of a binary (TOML); the environment overrides it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The database, with the user of the process of every role (bus_all) or the owner
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// The broker
    #[arg(long, env = "NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
}

impl Flags {
    /// The configuration of the deployment, as its binaries read it.
    pub(crate) fn common(&self) -> Result<Common> {
        self.common_with(None)
    }

    /// The same, with another backend than the configuration's.
    pub(crate) fn common_with(&self, backend: Option<&str>) -> Result<Common> {
        let mut environment: HashMap<String, String> = env::vars().collect();
        let flags = [("DATABASE_URL", &self.database_url), ("NATS_URL", &self.nats_url)];
        for (name, value) in flags {
            environment.extend(value.clone().map(|value| (name.to_owned(), value)));
        }
        environment.extend(backend.map(|backend| ("EVENT_BUS_BACKEND".to_owned(), backend.to_owned())));
        config::load_common(self.config.as_deref(), environment)
            .map_err(|refused| anyhow!("{}", Chain(&refused)))
    }
}
