//! Streams: what follows from the configuration, what a plan says about it, and that a real server takes it.

#![allow(clippy::unwrap_used, missing_docs)]

mod planned;
mod served;

use bus_core::config::{Common, load_common};

/// A configuration of the bus with these variables.
fn configured(variables: &[(&str, &str)]) -> Common {
    let always = [("DATABASE_URL", "postgres://not.used/"), ("NATS_URL", "nats://not.used")];
    let environment = always.iter().chain(variables);
    load_common(None, environment.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))).unwrap()
}
