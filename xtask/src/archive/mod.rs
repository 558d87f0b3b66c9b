//! `cargo xtask archive`.

mod expunge;
mod ls;
mod query;
mod restore;
mod verify;

use std::{collections::HashMap, env, fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use cold_storage::{ColdStorage, Config};
use figment::{
    Figment,
    providers::{Format as _, Serialized, Toml},
    value::{Dict, Value},
};
use url::Url;

/// The section of the configuration.
const SECTION: &str = "cold";

/// What the variables of the section begin with.
const VARIABLES: &str = "EVENT_BUS_COLD__";

/// The key that is never in a file that others may read.
const SECRET: &str = "secret_access_key";

/// Look into the cold storage: what is there, whether it is whole, and rows of it; put rows back, and empty payloads. Credentials are taken from the
/// configuration, from EVENT_BUS_COLD__ACCESS_KEY_ID and EVENT_BUS_COLD__SECRET_ACCESS_KEY, or from the usual sources
/// of AWS.
#[derive(Debug, Args)]
pub struct Archive {
    /// Where it is: file:///path or s3://bucket/prefix
    #[arg(long, global = true)]
    url: Option<Url>,
    /// Configuration file of the archiver (TOML), with a section [cold]; the environment overrides it
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List what is archived, by source, dataset and day
    Ls(ls::Ls),
    /// Read everything back; fails if anything is not as it was written
    Verify,
    /// Show rows
    Query(query::Query),
    /// Put rows back into the database that expired there
    Restore(restore::Restore),
    /// Empty payloads, in cold storage alone; no archiver may use it meanwhile
    Expunge(expunge::Expunge),
}

impl Archive {
    pub(crate) async fn run(self) -> Result<()> {
        devkit::install_tls_provider();
        let cold = ColdStorage::open(&self.configuration(env::vars().collect())?)?;
        match self.action {
            Action::Ls(ls) => ls.run(&cold).await,
            Action::Verify => verify::run(&cold).await,
            Action::Query(query) => query.run(&cold).await,
            Action::Restore(restore) => restore.run(&cold).await,
            Action::Expunge(expunge) => expunge.run(&cold).await,
        }
    }

    fn configuration(&self, environment: HashMap<String, String>) -> Result<Config> {
        let mut figment = Figment::new();
        if let Some(file) = &self.config {
            figment = figment.merge(Toml::file_exact(file));
        }
        let mut section: Dict = match figment.extract_inner(SECTION) {
            Ok(section) => section,
            Err(error) if error.missing() => Dict::new(),
            Err(error) => return Err(error).with_context(|| format!("read [{SECTION}]")),
        };
        for (name, value) in environment {
            if let Some(key) = name.strip_prefix(VARIABLES) {
                let key = key.to_ascii_lowercase();
                // A secret that looks like a number is still a text.
                let value = if key == SECRET { value.into() } else { parse(value) };
                section.insert(key, value);
            }
        }
        if let Some(file) = section.remove("secret_access_key_file") {
            let file = file.as_str().context("cold.secret_access_key_file is no path")?.to_owned();
            let secret = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
            section.insert(SECRET.to_owned(), secret.trim_end().into());
        }
        if let Some(url) = &self.url {
            section.insert("url".to_owned(), url.as_str().into());
        }
        if !section.contains_key("url") {
            bail!("give --url, or --config with a section [{SECTION}]");
        }
        Figment::from(Serialized::defaults(section)).extract().with_context(|| format!("read [{SECTION}]"))
    }
}

/// What a variable holds, as in a file.
fn parse(text: String) -> Value {
    if let Ok(truth) = text.parse::<bool>() {
        truth.into()
    } else if let Ok(number) = text.parse::<u64>() {
        number.into()
    } else {
        text.into()
    }
}

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024. {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use secrecy::ExposeSecret as _;

    use super::*;

    fn archive(config: Option<PathBuf>, url: Option<&str>) -> Archive {
        Archive { url: url.map(|url| url.parse().unwrap()), config, action: Action::Verify }
    }

    #[test]
    fn the_environment_overrides_the_file_and_a_flag_both() {
        let folder = devkit::paths::RunDir::create().unwrap();
        let file = folder.path().join("archiver.toml");
        let secret = folder.path().join("secret");
        fs::write(&secret, "from-a-file\n").unwrap();
        let text = format!(
            "[cold]\nurl = \"s3://one/\"\nregion = \"eu-west-1\"\naccess_key_id = \"id\"\n\
             secret_access_key_file = \"{}\"\n",
            secret.display()
        );
        fs::write(&file, text).unwrap();
        let read = archive(Some(file), None).configuration(HashMap::new()).unwrap();
        assert_eq!((read.url.as_str(), read.region.as_deref()), ("s3://one/", Some("eu-west-1")));
        assert_eq!(read.secret_access_key.unwrap().expose_secret(), "from-a-file");

        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let environment = HashMap::from([
            variable("EVENT_BUS_COLD__ALLOW_HTTP", "true"),
            variable("EVENT_BUS_COLD__REGION", "eu-west-2"),
            variable("EVENT_BUS_COLD__ACCESS_KEY_ID", "other"),
            variable("EVENT_BUS_COLD__SECRET_ACCESS_KEY", "12345"),
        ]);
        let read = archive(None, Some("s3://two/prefix")).configuration(environment).unwrap();
        assert_eq!((read.url.as_str(), read.region.as_deref()), ("s3://two/prefix", Some("eu-west-2")));
        assert_eq!(read.secret_access_key.unwrap().expose_secret(), "12345");
        assert!(read.allow_http);
        assert!(archive(None, None).configuration(HashMap::new()).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_passed_over() {
        let folder = devkit::paths::RunDir::create().unwrap();
        let file = folder.path().join("archiver.toml");
        let read = || archive(Some(file.clone()), Some("s3://two/")).configuration(HashMap::new());
        let refused = format!("{:#}", read().unwrap_err());
        assert!(refused.contains("archiver.toml"), "{refused}");
        for broken in ["[cold", "cold = 1", "[cold]\nallow_http = 'perhaps'"] {
            fs::write(&file, broken).unwrap();
            assert!(read().is_err(), "{broken}");
        }
        fs::write(&file, "[nats]\nreplicas = 3\n").unwrap();
        assert_eq!(read().unwrap().url.as_str(), "s3://two/");
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!([size(0), size(1023), size(1536), size(5 << 40)], ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]);
    }
}
