//! The publisher's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    bus_core::launcher::main(publisher::ROLE, publisher::run)
}
