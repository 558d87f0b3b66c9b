//! `cargo xtask down`.

use anyhow::Result;
use clap::Args;

use crate::{dev::Dev, ui};

/// Stop what `up` started.
#[derive(Debug, Args)]
pub struct Down {
    /// Remove the data too: events, subscriptions, keys, logs
    #[arg(long)]
    wipe: bool,
}

impl Down {
    pub(crate) async fn run(self) -> Result<()> {
        let dev = Dev::open()?;
        let step = ui::Step::begin("Stopping");
        let any = dev.stop().await?;
        if self.wipe {
            dev.wipe()?;
        }
        step.done();
        ui::line(match (any, self.wipe) {
            (true, false) => "  The bus is down; its data stays (remove it with `cargo xtask down --wipe`).",
            (false, false) => "  Nothing was running.",
            (_, true) => "  The bus is down, and its data is gone.",
        });
        Ok(())
    }
}
