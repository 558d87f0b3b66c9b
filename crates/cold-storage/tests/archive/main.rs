//! The archive in a folder and in an S3, whole and torn.
#![allow(clippy::unwrap_used, missing_docs)]

mod conformance;
mod crashes;
mod erasure;
mod faults;
mod independent_reader;
mod proxy;
mod support;
mod verification;
