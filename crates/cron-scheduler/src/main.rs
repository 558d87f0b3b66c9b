//! The cron scheduler's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    bus_core::launcher::main(cron_scheduler::ROLE, cron_scheduler::run)
}
