//! A server that speaks the protocol of S3, for tests of what is kept in an object store: the Python packages of
//! `independent/s3.txt`, run by `independent/s3.py`. What it holds is in its memory, and gone with it.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use url::Url;

use crate::{
    paths::RunDir,
    poll,
    process::{Launch, Lifetime, Process, Signal},
    python,
};

const REQUIREMENTS: &str = include_str!("../independent/s3.txt");

/// How long it may take to listen; a busy machine reads Python slowly.
const START: Duration = Duration::from_secs(60);

/// The bucket that every server has.
pub const BUCKET: &str = "archive";

/// A private server with one empty bucket; it ends with its value, and with its owner.
#[derive(Debug)]
pub struct S3 {
    endpoint: Url,
    #[expect(dead_code, reason = "stopped with its value")]
    process: Process,
    #[expect(dead_code, reason = "removed with its value")]
    dir: RunDir,
}

impl S3 {
    /// Starts one.
    ///
    /// # Errors
    /// If the packages cannot be had, or it does not start.
    pub async fn start() -> Result<Self> {
        let packages = tokio::task::spawn_blocking(|| python::packages("s3", REQUIREMENTS))
            .await
            .context("install")??;
        let dir = RunDir::create()?;
        let port_file = dir.path().join("port");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("independent/s3.py");
        let mut process = Launch::new("/usr/bin/env", dir.path().join("log"))
            .arg("python3")
            .arg(script)
            .arg(BUCKET)
            .arg(&port_file)
            .env("PYTHONPATH", packages)
            // Thousands of lines that are not to be compiled at every start.
            .env("PYTHONDONTWRITEBYTECODE", "")
            .spawn(Lifetime::Owned(Signal::KILL))?;
        let port: u16 = poll("the S3 server to listen", START, || {
            let seen = match process.try_exit() {
                Ok(Some(_)) => Ok(None),
                _ => std::fs::read_to_string(&port_file).map(Some),
            };
            async { seen }
        })
        .await?
        .with_context(|| format!("the S3 server ended:\n{}", process.log_tail()))?
        .parse()
        .context("read its port")?;
        let endpoint = Url::parse(&format!("http://127.0.0.1:{port}"))?;
        Ok(Self { endpoint, process, dir })
    }

    /// Where it listens. It takes any credentials.
    #[must_use]
    pub fn endpoint(&self) -> &Url {
        &self.endpoint
    }
}
