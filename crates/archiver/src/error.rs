//! What goes wrong while something is moved to cold storage.

use bus_core::pg::StoreError;

/// What went wrong. Nothing is lost by any of it: what is not archived stays where it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// Cold storage.
    #[error(transparent)]
    Cold(#[from] cold_storage::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The broker.
    #[error("{operation}")]
    Broker {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: async_nats::Error,
    },
    /// A row of a table does not fit its columns in cold storage.
    #[error("read a row of {table}")]
    Row {
        /// The table.
        table: &'static str,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// Another archiver has taken over; what this one had begun is left to it.
    #[error("another archiver works on {0} now")]
    LeaseLost(String),
    /// The stream was deleted and created again meanwhile; the next round looks at the new one.
    #[error("the stream {0} is another one now")]
    Replaced(String),
    /// Cold storage no longer has what it was read back from; nothing is trimmed before somebody has looked.
    #[error(
        "cold storage no longer has the batch of {source_name} that begins at {first}: run `cargo xtask archive verify`"
    )]
    Vanished {
        /// The stream.
        source_name: String,
        /// Where the batch begins.
        first: u64,
    },
}

/// Adds the operation's name to an error of async-nats.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, ArchiveError>;
}

impl<T, E: Into<async_nats::Error>> During<T> for Result<T, E> {
    fn during(self, operation: &'static str) -> Result<T, ArchiveError> {
        self.map_err(|source| ArchiveError::Broker { operation, source: source.into() })
    }
}
