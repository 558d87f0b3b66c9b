//! What can go wrong.

use parquet::errors::ParquetError;

use crate::manifest::{Manifest, Slot};

/// Why an operation on the cold storage failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration names no store that can be used.
    #[error("cold.{key}: {reason}")]
    Config {
        /// The key of the section.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The store could not be set up.
    #[error("open the store {url}")]
    Open {
        /// Where it is.
        url: String,
        /// The cause.
        #[source]
        source: object_store::Error,
    },
    /// The store refused, or could not be reached.
    #[error("{operation} {path}")]
    Store {
        /// What was to be done.
        operation: &'static str,
        /// With which object.
        path: String,
        /// The cause.
        #[source]
        source: object_store::Error,
    },
    /// The store overwrites what is to be created: it does not know `If-None-Match`, so that two writers could both
    /// believe that they archived the same range.
    #[error("the store ignores that an object is only to be created (If-None-Match)")]
    NoConditionalPut,
    /// A name, or a part of a path, with characters that a path may not have.
    #[error("{what} {name:?} is not made of 1 to 100 letters, digits, '.', '_' and '-'")]
    Name {
        /// Of what.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A range that holds nothing, or more messages than numbers.
    #[error("the range {first} to {last} cannot hold {messages} messages")]
    Range {
        /// The first sequence.
        first: u64,
        /// The last one.
        last: u64,
        /// The messages that it is said to hold.
        messages: u64,
    },
    /// A row that does not fit its dataset.
    #[error("a row of {domain}: {reason}")]
    Row {
        /// The dataset.
        domain: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// The batch has no room for the row: write what is in it first.
    #[error("the batch holds {limit} {what}, and no more fit")]
    BatchFull {
        /// Bytes or objects.
        what: &'static str,
        /// How many it may hold.
        limit: usize,
    },
    /// The range was archived already, by this writer or by another one.
    #[error("{} is archived already, by {}", .0.slot(), .0.writer)]
    AlreadyArchived(Box<Manifest>),
    /// Another writer archived the range in the meantime. What this one wrote has been removed.
    #[error("{slot} was archived by {winner} in the meantime")]
    Fenced {
        /// The range.
        slot: Slot,
        /// Who archived it.
        winner: String,
    },
    /// An object is not what was written.
    #[error("{path} {fault}")]
    Refused {
        /// The object.
        path: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// Something in the store is not written as this version writes it.
    #[error("read {path}: {reason}")]
    Unreadable {
        /// The object.
        path: String,
        /// Why.
        reason: String,
    },
    /// Rows cannot be made a Parquet file.
    #[error("write rows of {domain} as Parquet")]
    Encode {
        /// The dataset.
        domain: String,
        /// The cause.
        #[source]
        source: ParquetError,
    },
    /// A Parquet file that is as it was written cannot be read.
    #[error("read the rows of {path}")]
    Decode {
        /// The object.
        path: String,
        /// The cause.
        #[source]
        source: ParquetError,
    },
    /// A file has a column that this version does not know, and would be written anew without it.
    #[error(
        "{path} has the column {column:?}, which this version does not know: a later one has to rewrite it"
    )]
    UnknownColumn {
        /// The object.
        path: String,
        /// The column.
        column: String,
    },
    /// No dataset has this name.
    #[error("there is no dataset {0:?}")]
    UnknownDomain(String),
    /// The rows of this dataset belong to no event.
    #[error("the rows of {0} name no event")]
    NoEvent(&'static str),
    /// A computation ended before its result.
    #[error("{operation}: the computation was ended")]
    Ended {
        /// What was computed.
        operation: &'static str,
        /// The cause.
        #[source]
        source: tokio::task::JoinError,
    },
}

impl Error {
    /// Whether the same may succeed later with nothing changed: an outage, and not a fault of ours.
    ///
    /// What did not answer, answered too late, or with a status that promises nothing, is all of this kind.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store { source, .. } => {
                matches!(source, object_store::Error::Generic { .. } | object_store::Error::JoinError { .. })
            }
            _ => false,
        }
    }
}

/// What is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It is not there.
    #[error("is missing")]
    Missing,
    /// It is shorter or longer than it was written.
    #[error("has {found} bytes instead of {expected}")]
    Length {
        /// As written.
        expected: u64,
        /// As it is.
        found: u64,
    },
    /// Its bytes are not those that were written.
    #[error("has other bytes than were written (SHA-256)")]
    Bytes,
    /// It is no Parquet file.
    #[error("is not readable as Parquet: {0}")]
    Unreadable(String),
    /// It has more or fewer rows than were given.
    #[error("has {found} rows instead of {expected}")]
    Rows {
        /// As given.
        expected: u64,
        /// As they are.
        found: u64,
    },
    /// Its rows are not those that were given.
    #[error("has other rows than were given")]
    OtherRows,
}
