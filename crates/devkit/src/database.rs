//! Migrations, roles, and a database per test.

use std::{collections::HashMap, fs, path::PathBuf, str::FromStr};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection, migrate::Migrator,
    postgres::PgConnectOptions,
};
use url::Url;

use crate::{paths::workspace_root, processes::Role, random_token};

/// The advisory lock under which the template is made: roles are the whole cluster's, and two processes
/// that alter them at once fail.
const TEMPLATE_LOCK: i64 = 0x6275_735f_7465_6d70;

/// A migration and what a database knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationStatus {
    /// Its version, a number that sorts.
    pub version: i64,
    /// What it does, from its file's name.
    pub description: String,
    /// Where the database stands.
    pub state: MigrationState,
}

/// Where a database stands with one migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationState {
    /// Applied as the file is now.
    Applied,
    /// Not applied yet.
    Pending,
    /// Begun, and failed half way.
    Failed,
    /// Applied from a file that has been changed since.
    Changed,
    /// Applied, but there is no such file: the database is newer than this tree.
    Unknown,
}

async fn migrator() -> Result<Migrator> {
    let dir = workspace_root().join("migrations");
    Migrator::new(dir.as_path()).await.with_context(|| format!("read {}", dir.display()))
}

async fn connect(url: &str) -> Result<PgConnection> {
    let options = PgConnectOptions::from_str(url).context("read the URL of the database")?;
    let target = format!("{}:{}", options.get_host(), options.get_port());
    options.connect().await.with_context(|| format!("connect to Postgres at {target}"))
}

/// Applies the migrations that are missing.
///
/// # Errors
/// If one fails, or was changed after it had been applied.
pub async fn migrate(url: &str) -> Result<()> {
    let mut connection = connect(url).await?;
    migrator().await?.run_direct(None, &mut connection, false).await.context("apply the migrations")?;
    connection.close().await?;
    Ok(())
}

/// What the database knows of each migration, oldest first.
///
/// # Errors
/// If the database or the migrations cannot be read.
pub async fn migration_status(url: &str) -> Result<Vec<MigrationStatus>> {
    let mut connection = connect(url).await?;
    let table: Option<String> =
        sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations')::text").fetch_one(&mut connection).await?;
    let applied: Vec<(i64, String, bool, Vec<u8>)> = match table {
        None => Vec::new(),
        Some(_) => {
            sqlx::query_as("SELECT version, description, success, checksum FROM _sqlx_migrations")
                .fetch_all(&mut connection)
                .await?
        }
    };
    connection.close().await?;

    let mut applied: HashMap<i64, _> = applied.into_iter().map(|row| (row.0, row)).collect();
    let mut list: Vec<MigrationStatus> = Vec::new();
    for migration in
        migrator().await?.iter().filter(|migration| !migration.migration_type.is_down_migration())
    {
        let state = match applied.remove(&migration.version) {
            None => MigrationState::Pending,
            Some((_, _, false, _)) => MigrationState::Failed,
            Some((_, _, true, checksum)) if checksum != *migration.checksum => MigrationState::Changed,
            Some(_) => MigrationState::Applied,
        };
        list.push(MigrationStatus {
            version: migration.version,
            description: migration.description.to_string(),
            state,
        });
    }
    list.extend(applied.into_values().map(|(version, description, _, _)| MigrationStatus {
        version,
        description,
        state: MigrationState::Unknown,
    }));
    list.sort_by_key(|migration| migration.version);
    Ok(list)
}

/// Creates the binaries' roles with their grants, and gives them their passwords. Needs the migrations.
///
/// # Errors
/// If the owner may not create roles, or the grants do not fit the tables.
pub async fn apply_roles(owner_url: &str) -> Result<()> {
    let path = roles_file();
    let sql = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let mut connection = connect(owner_url).await?;
    connection.execute(sqlx::raw_sql(AssertSqlSafe(sql))).await.context("apply the roles and grants")?;
    for role in Role::ALL.into_iter().chain([Role::EventBus]) {
        let name = role.postgres_role();
        let password = role_password(owner_url, role)?;
        let statement = format!("ALTER ROLE {name} PASSWORD '{password}'");
        connection
            .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
            .await
            .with_context(|| format!("set the password of {name}"))?;
    }
    connection.close().await?;
    Ok(())
}

fn roles_file() -> PathBuf {
    workspace_root().join("deploy/sql/roles.sql")
}

/// The password of a binary's role, derived from the owner's: every process that knows the owner's URL
/// comes to the same one, and none has to be kept.
fn role_password(owner_url: &str, role: Role) -> Result<String> {
    let url = Url::parse(owner_url).context("read the URL of the database")?;
    let secret = url.password().unwrap_or_default();
    let digest = Sha256::digest(format!("{}\n{secret}", role.postgres_role()));
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The URL with which a binary connects, given the owner's.
///
/// # Errors
/// If the owner's is not a URL.
pub fn role_url(owner_url: &str, role: Role) -> Result<String> {
    let mut url = Url::parse(owner_url).context("read the URL of the database")?;
    let password = role_password(owner_url, role)?;
    if url.set_username(role.postgres_role()).is_err() || url.set_password(Some(&password)).is_err() {
        bail!("the URL of the database names no host");
    }
    Ok(url.into())
}

/// Creates a database if it is not there, and gives its URL.
///
/// # Errors
/// If the owner may not.
pub async fn ensure_database(server_url: &str, name: &str) -> Result<String> {
    let mut connection = connect(server_url).await?;
    if !exists(&mut connection, name).await? {
        create(&mut connection, name, "template1").await?;
    }
    connection.close().await?;
    database_url(server_url, name)
}

fn database_url(server_url: &str, name: &str) -> Result<String> {
    let mut url = Url::parse(server_url).context("read the URL of the database")?;
    url.set_path(name);
    Ok(url.into())
}

async fn exists(connection: &mut PgConnection, name: &str) -> Result<bool> {
    let found = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(name)
        .fetch_one(connection)
        .await?;
    Ok(found)
}

async fn create(connection: &mut PgConnection, name: &str, template: &str) -> Result<()> {
    let statement = format!("CREATE DATABASE \"{name}\" TEMPLATE \"{template}\"");
    connection
        .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await
        .with_context(|| format!("create the database {name}"))?;
    Ok(())
}

/// A migrated database of its own on a server that others use too.
#[derive(Debug)]
pub struct Database {
    server_url: String,
    name: String,
    url: String,
}

impl Database {
    /// Clones the migrated template, which is made first if this server has none for the present
    /// migrations and roles.
    ///
    /// # Errors
    /// If the role of `server_url` may not create databases and roles, or a migration fails.
    pub async fn create(server_url: &str) -> Result<Self> {
        let template = ensure_template(server_url).await?;
        let name = format!("bus_{}", random_token(6));
        let mut connection = connect(server_url).await?;
        create(&mut connection, &name, &template).await?;
        connection.close().await?;
        let url = database_url(server_url, &name)?;
        Ok(Self { server_url: server_url.to_owned(), name, url })
    }

    /// How its owner connects.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Removes it, and cuts the connections that are left.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn drop(self) -> Result<()> {
        let mut connection = connect(&self.server_url).await?;
        let statement = format!("DROP DATABASE \"{}\" WITH (FORCE)", self.name);
        connection
            .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
            .await
            .context("drop the database of a test")?;
        connection.close().await?;
        Ok(())
    }
}

async fn ensure_template(server_url: &str) -> Result<String> {
    let name = format!("bus_template_{}", schema_hash()?);
    let mut connection = connect(server_url).await?;
    sqlx::query("SELECT pg_advisory_lock($1)").bind(TEMPLATE_LOCK).execute(&mut connection).await?;
    if !exists(&mut connection, &name).await? {
        // It gets its name when it is finished: an interrupted run leaves no half-made template.
        let unfinished = format!("bus_unfinished_{}", random_token(6));
        create(&mut connection, &unfinished, "template1").await?;
        let url = database_url(server_url, &unfinished)?;
        migrate(&url).await?;
        apply_roles(&url).await?;
        let statement = format!("ALTER DATABASE \"{unfinished}\" RENAME TO \"{name}\"");
        connection.execute(sqlx::raw_sql(AssertSqlSafe(statement))).await.context("name the template")?;
    }
    // Closing the session gives the lock back.
    connection.close().await?;
    Ok(name)
}

/// Names the present migrations and roles.
fn schema_hash() -> Result<String> {
    let mut files = vec![roles_file()];
    let dir = workspace_root().join("migrations");
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        files.push(entry?.path());
    }
    files.sort();
    let mut content = Vec::new();
    for file in files {
        content.extend(fs::read(&file).with_context(|| format!("read {}", file.display()))?);
        content.push(0);
    }
    Ok(crate::paths::short_hash(&content))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    #[test]
    fn each_role_has_its_own_password_and_the_same_in_every_process() {
        let owner = "postgres://owner:secret@127.0.0.1:5433/bus?application_name=x";
        let url = Url::parse(&role_url(owner, Role::Publisher).unwrap()).unwrap();
        assert_eq!(
            (url.username(), url.path(), url.query()),
            ("bus_publisher", "/bus", Some("application_name=x"))
        );
        assert_eq!(role_url(owner, Role::Publisher).unwrap(), url.as_str());
        let worker = Url::parse(&role_url(owner, Role::DeliveryWorker).unwrap()).unwrap();
        assert_ne!(url.password(), worker.password());
    }
}
