//! `cargo xtask migrate`.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use devkit::database::{MigrationState, migrate, migration_status};

use crate::ui::{self, BAD, FAINT, GOOD, paint};

/// Apply or list the database migrations.
#[derive(Debug, Args)]
pub struct Migrate {
    /// The database, with a user that owns it
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true)]
    database_url: Option<String>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Apply those that are missing
    Run,
    /// List them all; fails unless all are applied
    Status,
}

impl Migrate {
    pub(crate) async fn run(self) -> Result<()> {
        let Some(url) = self.database_url else { bail!("give --database-url, or set DATABASE_URL") };
        if matches!(self.action, Action::Run) {
            migrate(&url).await?;
        }
        let list = migration_status(&url).await?;
        for migration in &list {
            let state = match migration.state {
                MigrationState::Applied => paint(GOOD, "applied"),
                MigrationState::Pending => paint(FAINT, "pending"),
                MigrationState::Failed => paint(BAD, "failed half way"),
                MigrationState::Changed => paint(BAD, "applied, but the file was changed since"),
                MigrationState::Unknown => paint(BAD, "applied by a newer version"),
            };
            ui::line(format!("  {}  {:40}  {state}", migration.version, migration.description));
        }
        let missing = list.iter().filter(|migration| migration.state != MigrationState::Applied).count();
        if missing > 0 {
            bail!("{missing} of {} migrations are not as they should be", list.len());
        }
        Ok(())
    }
}
