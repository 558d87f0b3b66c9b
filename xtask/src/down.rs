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
        let external = dev.state()?.is_some_and(|state| state.settings.external);
        let step = ui::Step::begin("Stopping");
        let any = dev.stop().await?;
        if self.wipe {
            dev.wipe()?;
        }
        step.done();
        ui::line(match (any, self.wipe) {
            (true, false) => "  The bus is down; its data stays (remove it with `cargo xtask down --wipe`).",
            (false, false) => "  Nothing was running.",
            (_, true) if external => "  The bus is down; what it wrote to the external servers stays there.",
            (_, true) => "  The bus is down, and its data is gone.",
        });
        Ok(())
    }
}
