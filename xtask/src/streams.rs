//! `cargo xtask streams`.

use std::{collections::HashMap, env, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use bus_core::{
    audit::{self as records, TargetKind},
    clock::{Clock as _, SystemClock},
    config::{self, Common},
    nats::Nats,
    streams::{Change, ChangeKind, Effect, Loss, Plan, StreamsError, apply, existing, plan},
    telemetry::Chain,
};
use clap::{Args, Subcommand};

use crate::{
    audit,
    ui::{self, BAD, FAINT, GOOD, STRONG, paint},
};

/// How long the broker may take to be there.
const PATIENCE: Duration = Duration::from_secs(30);

/// What `plan` ends with when there is something to do.
const TO_DO: u8 = 2;

/// Bring the streams on the broker to what the configuration describes. Prefix, replicas and streams are read from
/// where the binaries read them: defaults, a file, the environment.
#[derive(Debug, Args)]
pub struct Streams {
    /// Configuration file (TOML); the environment overrides it
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// The broker
    #[arg(long, env = "NATS_URL", hide_env_values = true, global = true)]
    nats_url: Option<String>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show what there is to do. Ends with 0 if that is nothing, and with 2 if it is something
    Plan {
        /// As JSON, for machines
        #[arg(long)]
        json: bool,
    },
    /// Show it, and do it. What would lose data is refused
    Apply {
        /// Do also what loses data
        #[arg(long)]
        allow_data_loss: bool,
    },
}

impl Streams {
    pub(crate) async fn run(self) -> Result<ExitCode> {
        devkit::install_tls_provider();
        let common = common(self.config, self.nats_url, env::vars().collect())?;
        let nats = connect(&common).await?;
        let plan = planned(&nats).await?;
        match self.action {
            Action::Plan { json } => {
                if json {
                    ui::line(serde_json::to_string_pretty(&plan)?);
                } else {
                    show(&plan);
                }
                Ok(if plan.changes.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(TO_DO) })
            }
            Action::Apply { allow_data_loss } => {
                show(&plan);
                if !plan.changes.is_empty() {
                    let loss = if allow_data_loss { Loss::Accepted } else { Loss::Refused };
                    carry_out(&nats, &plan, loss).await?;
                    // Not before: the audit stream itself may be among them.
                    let change = records::Change::new(
                        records::Action::StreamsApplied,
                        TargetKind::Deployment,
                        &common.prefix,
                    );
                    audit::publish(&nats, change.after(serde_json::to_value(&plan)?)).await?;
                    ui::line(paint(GOOD, "  Done; the broker has what is described."));
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// Makes sure that the broker has all streams of the defaults, beyond those that the processes create by themselves.
pub(crate) async fn ensure(nats_url: String) -> Result<()> {
    // As the processes of `up`, it takes nothing from the shell's environment.
    let nats = connect(&common(None, Some(nats_url), HashMap::new())?).await?;
    let plan = planned(&nats).await?;
    carry_out(&nats, &plan, Loss::Refused).await
}

/// The configuration as the binaries read it. No database is used, so that its URL may be missing.
fn common(
    file: Option<PathBuf>,
    nats_url: Option<String>,
    mut environment: HashMap<String, String>,
) -> Result<Common> {
    environment.extend(nats_url.map(|url| ("NATS_URL".to_owned(), url)));
    environment.entry("DATABASE_URL".to_owned()).or_insert_with(|| "postgres://not.used/".to_owned());
    environment.insert("EVENT_BUS_BACKEND".to_owned(), "jetstream".to_owned());
    config::load_common(file.as_deref(), environment).map_err(|refused| anyhow!("{}", Chain(&refused)))
}

async fn connect(common: &Common) -> Result<Nats> {
    let nats = Nats::connect(common, "streams").await?;
    tokio::time::timeout(PATIENCE, nats.wait_for_server()).await.context("no connection to NATS")??;
    Ok(nats)
}

async fn planned(nats: &Nats) -> Result<Plan> {
    Ok(plan(&existing(nats, SystemClock.now()).await?, &nats.streams))
}

async fn carry_out(nats: &Nats, plan: &Plan, loss: Loss) -> Result<()> {
    let applied = apply(nats, plan, loss, SystemClock.now()).await;
    applied.map_err(|refused| match refused {
        StreamsError::LosesData(_) => anyhow!(refused)
            .context("nothing was changed; `cargo xtask streams apply --allow-data-loss` accepts the loss"),
        refused => anyhow!(refused),
    })
}

fn show(plan: &Plan) {
    for change in &plan.changes {
        show_change(change);
    }
    for stream in &plan.not_described {
        ui::line(paint(FAINT, format!("  {stream} is not described; it stays as it is")));
    }
    if plan.changes.is_empty() {
        ui::line(paint(GOOD, "  The broker has what is described."));
    }
}

fn show_change(change: &Change) {
    match &change.kind {
        ChangeKind::Create { subjects } => {
            let stream = paint(STRONG, &change.stream);
            ui::line(format!("  {} {stream}  {}", paint(GOOD, "create"), subjects.join(", ")));
        }
        ChangeKind::Update { fields } => {
            ui::line(format!("  {} {}", paint(STRONG, "change"), paint(STRONG, &change.stream)));
            for field in fields {
                let effect = match &field.effect {
                    Effect::Harmless => String::new(),
                    Effect::LosesData(because) => paint(BAD, format!("  loses data: {because}")),
                    Effect::Impossible(because) => paint(BAD, format!("  impossible: {because}")),
                };
                ui::line(format!("      {field}{effect}"));
            }
        }
    }
}
