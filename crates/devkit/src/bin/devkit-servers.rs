//! Runs a private nats-server and Postgres until its standard input ends or it is killed.
//!
//! Prints one line of JSON with their URLs and process numbers, for tests by hand and for the test of
//! what happens to servers whose owner is killed.

use anyhow::{Context, Result};
use devkit::servers::{Durability, NatsServer, PostgresServer, Tools};
use serde_json::json;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let tools = Tools::locate()?;
    let (nats, postgres) =
        tokio::try_join!(NatsServer::private(&tools), PostgresServer::private(&tools, Durability::Full))?;
    let line = json!({
        "nats": { "url": nats.url(), "process": nats.id() },
        "postgres": { "url": postgres.url("postgres"), "process": postgres.id() },
    });
    println!("{line}");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).context("read standard input")?;
    Ok(())
}
