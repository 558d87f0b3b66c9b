//! The domain and its statements, on real servers.

#![allow(clippy::unwrap_used, missing_docs)]

mod config;
mod delivery_page;
mod documents;
mod history;
mod hostile_input;
mod independent_readers;
mod jsonpath_cts;
mod lifecycle;
mod notify;
mod pattern_props;
mod receivers;
mod store;
