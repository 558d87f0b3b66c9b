//! `cargo xtask reconcile`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bus_core::{
    audit::{Action, Change, TargetKind},
    clock::{Clock as _, SystemClock},
    config::Backend,
    pg,
    queue::Transport,
    reconcile::{Reconciled, Reconciler},
};
use clap::Args;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    audit, deployment,
    ui::{self, GOOD, paint},
};

/// Between two lines about how far it is.
const TELL: Duration = Duration::from_secs(1);

/// Put back what the queue has lost: deliveries that have neither receipt nor failure nor message. For a broker that was
/// restored from a copy, whose disk failed, or whose stream was deleted. Runs beside everything else, may be interrupted and
/// repeated; needs a running archiver, since a delivery whose receipt is not in history yet looks lost.
#[derive(Debug, Args)]
pub struct Reconcile {
    /// From when on: an RFC 3339 time, or how long ago (for example 10m, 3h, 48h)
    #[arg(long, value_name = "TIME")]
    since: Since,
    /// Only say what is lost
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    deployment: deployment::Flags,
}

/// When, or how long ago.
#[derive(Debug, Clone, Copy)]
enum Since {
    At(Timestamp),
    Ago(SignedDuration),
}

impl std::str::FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(at) = text.parse() {
            return Ok(Self::At(at));
        }
        match text.parse::<SignedDuration>() {
            Ok(ago) if ago.is_positive() => Ok(Self::Ago(ago)),
            _ => Err("is neither an RFC 3339 time nor a span like 10m, 3h or 48h".to_owned()),
        }
    }
}

impl Reconcile {
    pub(crate) async fn run(self) -> Result<()> {
        devkit::install_tls_provider();
        let common = self.deployment.common()?;
        if common.backend == Backend::Memory {
            bail!("the queue of backend = \"memory\" is in its process alone");
        }
        let since = match self.since {
            Since::At(at) => at,
            Since::Ago(ago) => {
                SystemClock.now().saturating_sub(ago).context("so long ago there was nothing")?
            }
        };
        let pool = pg::pool(&common.postgres, "reconcile")?;
        pg::check_schema(&pool).await?;
        let stop = CancellationToken::new();
        let transport = Transport::connect(&common, &pool, "reconcile", stop.clone()).await?;
        if let Some(nats) = &transport.nats {
            nats.wait_for_server().await?;
        }

        let mut told: Option<Instant> = None;
        let tell = |found: &Reconciled| {
            if told.is_none_or(|at| at.elapsed() >= TELL) {
                ui::line(format!("  {}", figures(found)));
                told = Some(Instant::now());
            }
        };
        let reconciler = Reconciler {
            pool: &pool,
            queue: transport.queue.as_ref(),
            hints: transport.hints.as_ref(),
            nats: transport.nats.as_ref(),
            settled_after: Duration::from_millis(common.nats.ack_wait_ms),
            dry_run: self.dry_run,
        };
        let found = reconciler.run(since, tell).await?;
        if let (false, Some(nats)) = (self.dry_run, &transport.nats) {
            let done = json!({ "since": since, "lost": found.lost, "putBack": found.put_back });
            let change = Change::new(Action::QueueReconciled, TargetKind::Deployment, &common.prefix);
            audit::publish(nats, change.after(done)).await?;
        }
        transport.flush().await;
        stop.cancel();
        ui::line(paint(GOOD, format!("reconcile: {}", figures(&found))));
        Ok(())
    }
}

fn figures(found: &Reconciled) -> String {
    let Reconciled { events, deliveries, queued, lost, put_back } = found;
    format!(
        "events {events}, deliveries {deliveries}, in the queue {queued}, lost {lost}, put back {put_back}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_or_a_span() {
        let at = |text: &str| text.parse::<Since>();
        assert!(matches!(at("2026-01-02T03:04:05Z"), Ok(Since::At(_))));
        for (text, seconds) in [("90s", 90), ("10m", 600), ("3h", 10_800), ("48h", 172_800)] {
            assert!(matches!(at(text), Ok(Since::Ago(ago)) if ago.as_secs() == seconds), "{text}");
        }
        for text in ["", "yesterday", "-10m", "10"] {
            assert!(at(text).is_err(), "{text}");
        }
    }
}
