//! The archiver's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    bus_core::launcher::main(archiver::ROLE, archiver::run)
}
