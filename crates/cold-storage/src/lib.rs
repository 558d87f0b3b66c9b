//! Cold storage: rows as Parquet in an object store, and what makes them an archive.
//!
//! A [`Batch`] goes through three steps, each a type of its own: [`Written`] (its objects are in the store),
//! [`Confirmed`] (they were read back, and are what was given), and a [`Manifest`] that the store created where none
//! was. Only what a manifest names is a part of the archive, and only who holds a manifest may remove anything from
//! the source. Of two writers who begin a batch at the same position one gets its manifest in; the other is told, and
//! what it wrote is removed. Whoever dies between two steps leaves a note, by which the next one finds what there is
//! to remove.

mod account;
mod batch;
mod config;
mod dataset;
mod error;
mod expire;
mod expunge;
mod listing;
mod manifest;
mod parquet_file;
mod pending;
mod query;
mod store;
mod verify;

pub use batch::{Batch, Confirmed, MAX_BATCH_BYTES, MAX_BATCH_OBJECTS, Written};
pub use config::Config;
pub use dataset::{
    AUDIT, Column, DATASETS, Dataset, EVENTS, Erasure, Kind, MESSAGES, OCCURRENCES, RECEIPTS, Row, TimeOf,
    Value,
};
pub use error::{Error, Fault};
pub use expire::Expired;
pub use expunge::Expunged;
pub use manifest::{Manifest, Object, Slot, Source};
pub use pending::Resumed;
pub use query::{Query, Record};
pub use store::{ColdStorage, MAX_MANIFEST_BYTES, MAX_OBJECT_BYTES};
pub use verify::{Problem, Report};
