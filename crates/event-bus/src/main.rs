//! The process of every role.

use std::process::ExitCode;

fn main() -> ExitCode {
    bus_core::launcher::main(event_bus::ROLE, event_bus::run)
}
