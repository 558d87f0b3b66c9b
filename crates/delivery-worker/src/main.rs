//! The delivery worker's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    bus_core::launcher::main(delivery_worker::ROLE, delivery_worker::run)
}
