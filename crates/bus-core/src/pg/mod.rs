//! Postgres: the pool, the migrations, and one module per group of statements.
//!
//! "Due" and "expired" are always the database's time (`now()` in SQL), never a process's: the
//! clocks of two machines may disagree, and only the database's is shared.

/// A condition that is always true, and lets the statement's commit return before it is on disk
/// (`synchronous_commit`). For marks whose loss in a crash of the database repeats a step that the queue recognises; a
/// commit that waits for the disk slows down every other one.
macro_rules! unhurried {
    () => {
        "(SELECT set_config('synchronous_commit', 'off', true)) = 'off'"
    };
}

mod agenda;
mod archive;
pub mod audit;
mod brokers;
mod connections;
mod dead_letters;
mod deliveries;
mod erasures;
mod events;
mod history;
mod keys;
mod organizations;
mod outbox;
mod partitions;
mod publish;
mod receipts;
mod receivers;
mod reconcile;
mod replays;
mod restore;
mod scheduled;
mod schedules;
mod snapshot;
mod subscriptions;
mod usage;

use std::time::Duration;

use futures::FutureExt as _;
use jiff::Timestamp;
use sqlx::{
    Connection as _, PgConnection, PgPool, Postgres, Transaction,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub use self::{
    agenda::*, archive::*, brokers::*, connections::*, dead_letters::*, deliveries::*, erasures::*,
    events::*, history::*, keys::*, organizations::*, outbox::*, partitions::*, publish::*, receipts::*,
    receivers::*, reconcile::*, replays::*, restore::*, scheduled::*, schedules::*, snapshot::*,
    subscriptions::*, usage::*,
};
use crate::config::PostgresConfig;

/// Every migration, embedded. Add-only: a file that has been released is never edited.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../../migrations");

/// What went wrong in the database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The statement failed, or the database is away.
    #[error("{operation}")]
    Database {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: sqlx::Error,
    },
    /// The database did not answer in time; it is not known whether the operation took effect.
    #[error("{operation}: no answer in time")]
    TimedOut {
        /// What was being done.
        operation: &'static str,
    },
    /// A stored row does not fit its type; somebody wrote around the program.
    #[error("{table} {id}: {problem}")]
    Inconsistent {
        /// The table.
        table: &'static str,
        /// The row.
        id: String,
        /// What does not fit.
        problem: String,
    },
    /// The database's schema is not the one that this program was built for.
    #[error(
        "the database schema is at version {found:?}, this program needs {needed}: run `cargo xtask migrate run`"
    )]
    Schema {
        /// The newest applied migration.
        found: Option<i64>,
        /// The newest embedded migration.
        needed: i64,
    },
}

impl StoreError {
    /// Whether the database refused for want of a connection or because it is shutting down, or did not
    /// answer, so that the same call may succeed later.
    pub fn is_unavailable(&self) -> bool {
        let source = match self {
            Self::Database { source, .. } => source,
            Self::TimedOut { .. } => return true,
            Self::Inconsistent { .. } | Self::Schema { .. } => return false,
        };
        match source {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::Protocol(_) => true,
            // 08: connection exception, 53: insufficient resources, 57: operator intervention,
            // 40: transaction rollback (serialization, deadlock)
            sqlx::Error::Database(error) => error
                .code()
                .is_some_and(|code| ["08", "53", "57", "40"].iter().any(|class| code.starts_with(class))),
            _ => false,
        }
    }

    /// Whether the database broke the transaction off for the sake of another one (40001 serialization
    /// failure, 40P01 deadlock), so that the same transaction may succeed at once.
    pub fn is_conflict(&self) -> bool {
        match self {
            Self::Database { source: sqlx::Error::Database(error), .. } => {
                error.code().is_some_and(|code| code == "40001" || code == "40P01")
            }
            _ => false,
        }
    }

    /// Whether the database refused what it was given (22: data exception, 23: integrity constraint violation), so that
    /// the same call will never succeed.
    pub fn is_refused(&self) -> bool {
        match self {
            Self::Database { source: sqlx::Error::Database(error), .. } => {
                error.code().is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
            }
            _ => false,
        }
    }

    /// The name of the violated constraint, if one was.
    pub fn constraint(&self) -> Option<&str> {
        match self {
            Self::Database { source: sqlx::Error::Database(error), .. } => error.constraint(),
            _ => None,
        }
    }
}

/// How long a turn of a loop may wait for the database: longer than a statement may run by default, and shorter than the
/// loop may be without a sign of life.
const ANSWER: Duration = Duration::from_secs(45);

/// One turn of a loop that works with the database. A network that swallows an answer would else keep the loop for ever:
/// the driver waits as long as the connection seems to be there.
pub fn answered<T, E: From<StoreError>>(
    operation: &'static str,
    turn: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    // An `async fn` would keep `turn` twice: as it was given, and as it is waited for.
    let answered = tokio::time::timeout(ANSWER, turn);
    answered.map(move |answered| answered.unwrap_or_else(|_| Err(StoreError::TimedOut { operation }.into())))
}

/// Adds the operation's name to an error of sqlx.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, StoreError>;
}

impl<T> During<T> for Result<T, sqlx::Error> {
    fn during(self, operation: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Database { operation, source })
    }
}

/// Makes the pool. It connects when first used, so that a database that is away delays readiness
/// and nothing else.
pub fn pool(config: &PostgresConfig, role: &'static str) -> Result<PgPool, StoreError> {
    use secrecy::ExposeSecret as _;
    let options: PgConnectOptions = config.url.expose_secret().parse().during("read the database URL")?;
    let options = options
        .application_name(role)
        .options([("statement_timeout", format!("{}ms", config.statement_timeout_ms))])
        .statement_cache_capacity(256);
    Ok(PgPoolOptions::new()
        .max_connections(config.max_connections)
        .acquire_timeout(Duration::from_millis(config.acquire_timeout_ms))
        .max_lifetime(Duration::from_secs(1_800))
        .connect_lazy_with(options))
}

/// Text that came from outside, without the one character that Postgres does not store. A statement that is
/// refused for it would be repeated for ever.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// A lane as it is stored.
fn stored_lane(lane: i16) -> Option<u16> {
    u16::try_from(lane).ok()
}

/// Which of these roles (see [`pool`]) have a connection to this database now. One that connects through a
/// pooler may be missing.
pub async fn connected_roles(pool: &PgPool, roles: &[&str]) -> Result<Vec<String>, StoreError> {
    sqlx::query_scalar(
        "SELECT DISTINCT application_name FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = ANY($1) ORDER BY 1",
    )
    .bind(roles)
    .fetch_all(pool)
    .await
    .during("look who is connected to the database")
}

/// A connection of the pool, for several statements in a row.
pub async fn acquire(pool: &PgPool) -> Result<PoolConnection<Postgres>, StoreError> {
    pool.acquire().await.during("get a database connection")
}

/// A transaction; rolled back when dropped without a commit.
pub async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, StoreError> {
    pool.begin().await.during("begin a transaction")
}

/// A transaction on a connection that the caller keeps; rolled back when dropped without a commit.
pub async fn begin_on(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, StoreError> {
    connection.begin().await.during("begin a transaction")
}

/// When this transaction began, by the database's clock: what `now()` is in all its statements.
pub async fn transaction_time(transaction: &mut PgConnection) -> Result<Timestamp, StoreError> {
    let now: jiff_sqlx::Timestamp =
        sqlx::query_scalar("SELECT now()").fetch_one(transaction).await.during("read the database's time")?;
    Ok(now.to_jiff())
}

/// The time by the database's clock.
pub async fn database_time(pool: &PgPool) -> Result<Timestamp, StoreError> {
    let mut connection = acquire(pool).await?;
    transaction_time(&mut connection).await
}

/// Should this process be cut off from the database in the middle of the transaction, the database ends it after so
/// many seconds, and what it has locked is free for others.
pub(crate) async fn hold_transaction(transaction: &mut PgConnection, seconds: u64) -> Result<(), StoreError> {
    sqlx::query("SELECT set_config('idle_in_transaction_session_timeout', $1, true)")
        .bind(format!("{seconds}s"))
        .execute(transaction)
        .await
        .during("bound a transaction")?;
    Ok(())
}

/// Commits. After an error it is not known whether the transaction took place.
pub async fn commit(transaction: Transaction<'_, Postgres>) -> Result<(), StoreError> {
    transaction.commit().await.during("commit a transaction")
}

/// Checks that every embedded migration has been applied. A newer database is accepted: migrations
/// only add (expand, then contract), so an older program runs beside a newer one.
pub async fn check_schema(pool: &PgPool) -> Result<(), StoreError> {
    let needed = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
    let applied: Result<Option<i64>, sqlx::Error> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success").fetch_one(pool).await;
    let found = match applied {
        // 42P01: undefined_table, a database that was never migrated
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => None,
        other => other.during("read the schema version")?,
    };
    if found.is_some_and(|found| found >= needed) {
        Ok(())
    } else {
        Err(StoreError::Schema { found, needed })
    }
}
