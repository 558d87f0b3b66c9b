//! `cargo xtask archive expunge`.

use anyhow::Result;
use bus_core::clock::{Clock as _, SystemClock};
use clap::Args;
use cold_storage::{ColdStorage, Expunged};
use uuid::Uuid;

use crate::ui::{self, GOOD, paint};

#[derive(Debug, Args)]
pub(super) struct Expunge {
    /// Whose payloads
    #[arg(long)]
    organization: Uuid,
    /// Only that of this event (its uid)
    #[arg(long)]
    event: Option<Uuid>,
}

impl Expunge {
    pub(super) async fn run(self, cold: &ColdStorage) -> Result<()> {
        let Expunged { rows, objects, batches } =
            cold.expunge(self.organization, self.event, SystemClock.now()).await?;
        if rows == 0 {
            ui::line("  There was nothing to empty.");
        } else {
            let done = format!("  {rows} rows emptied, in {objects} objects of {batches} batches.");
            ui::line(paint(GOOD, done));
        }
        Ok(())
    }
}
