//! `cargo xtask`: how people run, test and watch the bus.

use std::process::ExitCode;

use clap::Parser;
use xtask::{Command, ui};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Runs, tests and demonstrates the bus", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[tokio::main]
async fn main() -> ExitCode {
    match Arguments::parse().command.run().await {
        Ok(code) => code,
        Err(error) => {
            ui::failure(&error);
            ExitCode::FAILURE
        }
    }
}
