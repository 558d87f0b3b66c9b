//! Real servers, real processes and real receivers for the tests and for `cargo xtask`.
//!
//! Nothing in here is a mock: [`servers`] runs a private nats-server and Postgres, [`processes`] runs the
//! binaries, [`proxy`] is a bad network between them, [`stack`] puts them together on a database of its own, [`receiver`] is an HTTP server
//! that answers as a script says, and [`client`] speaks the HTTP API. What a test owns dies with the test,
//! also when the test is killed.

pub mod attempts;
pub mod client;
pub mod database;
pub mod independent;
pub mod paths;
pub mod process;
pub mod processes;
pub mod proxy;
mod python;
pub mod receiver;
pub mod s3;
pub mod servers;
pub mod stack;
mod wait;

pub use wait::{poll, wait_until};

/// Installs the TLS provider that HTTP clients need; any number of calls do no harm.
///
/// `reqwest` is built without a provider of its own, so that the whole build has exactly one.
pub fn install_tls_provider() {
    // An error means that one is installed already, which is all that is asked for.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A random token of `bytes` bytes in hexadecimal, for passwords and names.
///
/// It starts with a letter, so that it is a string wherever it is written (a number in an environment
/// variable would be read as a number).
#[must_use]
pub fn random_token(bytes: usize) -> String {
    let mut token = String::with_capacity(1 + 2 * bytes);
    token.push('t');
    for _ in 0..bytes {
        token.push_str(&format!("{:02x}", rand::random::<u8>()));
    }
    token
}
