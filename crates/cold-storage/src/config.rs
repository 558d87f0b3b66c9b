//! Where the store is, and how to reach it.

use std::{sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, Checksum},
    local::LocalFileSystem,
    path::Path,
    prefix::PrefixStore,
};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use url::Url;

use crate::error::Error;

/// Where the store is, and how to reach it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `file:///path` or `s3://bucket/prefix`
    pub url: Url,
    /// The address of an S3 that is not Amazon's: `https://minio.example:9000`
    #[serde(default)]
    pub endpoint: Option<Url>,
    /// The region of the bucket.
    #[serde(default)]
    pub region: Option<String>,
    /// Without it, the usual sources are asked: the AWS variables of the environment, a web identity, the
    /// container's or the machine's role.
    #[serde(default)]
    pub access_key_id: Option<String>,
    /// Belongs to `access_key_id`.
    #[serde(default)]
    pub secret_access_key: Option<SecretString>,
    /// Whether an endpoint without TLS is accepted.
    #[serde(default)]
    pub allow_http: bool,
    /// How long a connection may take to be made, milliseconds.
    #[serde(default = "default_connect_timeout")]
    pub connect_timeout_ms: u64,
    /// How long one request may take, milliseconds; an object of a full batch has to fit.
    #[serde(default = "default_request_timeout")]
    pub request_timeout_ms: u64,
    /// How often a request is repeated that failed for no fault of ours.
    #[serde(default = "default_retries")]
    pub retries: usize,
    /// After this time a request is not repeated any more, milliseconds.
    #[serde(default = "default_retry_timeout")]
    pub retry_timeout_ms: u64,
}

fn default_connect_timeout() -> u64 {
    5_000
}

fn default_request_timeout() -> u64 {
    120_000
}

fn default_retries() -> usize {
    6
}

fn default_retry_timeout() -> u64 {
    180_000
}

/// The first pause before a request is repeated.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest one.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Config {
    /// A store at this address, everything else as it is by default.
    #[must_use]
    pub fn at(url: Url) -> Self {
        Self {
            url,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            allow_http: false,
            connect_timeout_ms: default_connect_timeout(),
            request_timeout_ms: default_request_timeout(),
            retries: default_retries(),
            retry_timeout_ms: default_retry_timeout(),
        }
    }

    /// What is wrong with it, if anything is.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.check().err().map(|error| error.to_string())
    }

    fn check(&self) -> Result<(), Error> {
        let refuse = |key, reason: &str| Err(Error::Config { key, reason: reason.to_owned() });
        match self.url.scheme() {
            "file" if self.url.to_file_path().is_err() => refuse("url", "file:///path is expected"),
            "s3" if self.url.host_str().is_none() => refuse("url", "s3://bucket/prefix is expected"),
            "file" | "s3" => Ok(()),
            _ => refuse("url", "file:///path or s3://bucket/prefix is expected"),
        }?;
        for (key, url) in [("url", Some(&self.url)), ("endpoint", self.endpoint.as_ref())] {
            if url.is_some_and(|url| !url.username().is_empty() || url.password().is_some()) {
                return refuse(key, "credentials belong in access_key_id and secret_access_key");
            }
        }
        if self.access_key_id.is_some() != self.secret_access_key.is_some() {
            return refuse("secret_access_key", "it and access_key_id belong together");
        }
        let durations = [self.connect_timeout_ms, self.request_timeout_ms, self.retry_timeout_ms];
        if durations.contains(&0) {
            return refuse("request_timeout_ms", "no timeout may be 0");
        }
        Ok(())
    }

    pub(crate) fn store(&self) -> Result<Arc<dyn ObjectStore>, Error> {
        self.check()?;
        match self.url.scheme() {
            "file" => self.folder(),
            _ => self.bucket(),
        }
    }

    fn folder(&self) -> Result<Arc<dyn ObjectStore>, Error> {
        let folder = self
            .url
            .to_file_path()
            .map_err(|()| Error::Config { key: "url", reason: "file:///path is expected".to_owned() })?;
        std::fs::create_dir_all(&folder).map_err(|cause| {
            self.not_opened(object_store::Error::Generic {
                store: "LocalFileSystem",
                source: Box::new(cause),
            })
        })?;
        let store = LocalFileSystem::new_with_prefix(folder).map_err(|source| self.not_opened(source))?;
        // Empty folders stay: removed beside a put, they could take the folder that it has just made and synced.
        Ok(Arc::new(store.with_fsync(true)))
    }

    fn bucket(&self) -> Result<Arc<dyn ObjectStore>, Error> {
        let mut builder = match (&self.access_key_id, &self.secret_access_key) {
            (Some(id), Some(secret)) => {
                AmazonS3Builder::new().with_access_key_id(id).with_secret_access_key(secret.expose_secret())
            }
            _ => AmazonS3Builder::from_env(),
        };
        builder = builder
            .with_bucket_name(self.url.host_str().unwrap_or_default())
            .with_checksum_algorithm(Checksum::SHA256)
            .with_retry(self.retry())
            .with_client_options(self.client());
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.as_str().trim_end_matches('/'));
        }
        if let Some(region) = &self.region {
            builder = builder.with_region(region);
        }
        let store = builder.build().map_err(|source| self.not_opened(source))?;
        let prefix = Path::from_url_path(self.url.path())
            .map_err(|cause| Error::Config { key: "url", reason: cause.to_string() })?;
        Ok(Arc::new(PrefixStore::new(store, prefix)))
    }

    fn not_opened(&self, source: object_store::Error) -> Error {
        Error::Open { url: self.url.to_string(), source }
    }

    fn retry(&self) -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig { init_backoff: FIRST_PAUSE, max_backoff: LONGEST_PAUSE, base: 2. },
            max_retries: self.retries,
            retry_timeout: Duration::from_millis(self.retry_timeout_ms),
        }
    }

    fn client(&self) -> ClientOptions {
        ClientOptions::new()
            .with_allow_http(self.allow_http)
            .with_connect_timeout(Duration::from_millis(self.connect_timeout_ms))
            .with_timeout(Duration::from_millis(self.request_timeout_ms))
    }
}
