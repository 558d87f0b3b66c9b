//! `cargo xtask drain`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bus_core::{
    audit::{Action, Change, TargetKind},
    config::{Backend, Common},
    pg,
    queue::{Drained, Transport, drain},
};
use clap::{Args, ValueEnum};
use serde_json::json;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{
    audit, deployment,
    ui::{self, FAINT, GOOD, paint},
};

/// Who would take from the queue, or put into it, while it is drained. Publishers with the old backend would
/// too, but those with the new one may run.
const TAKERS: [&str; 3] = ["delivery-worker", "cron-scheduler", "event-bus"];

/// The connections of a process that has just ended are seen for a moment longer.
const GONE: Duration = Duration::from_secs(5);

/// Between two lines about how far it is.
const TELL: Duration = Duration::from_secs(1);

/// A queue that outlives its processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Queue {
    /// NATS JetStream
    Jetstream,
    /// The database
    Postgres,
}

impl Queue {
    fn name(self) -> &'static str {
        match self {
            Self::Jetstream => "jetstream",
            Self::Postgres => "postgres",
        }
    }
}

impl From<Queue> for Backend {
    fn from(queue: Queue) -> Self {
        match queue {
            Queue::Jetstream => Self::Jetstream,
            Queue::Postgres => Self::Postgres,
        }
    }
}

/// Move everything that is pending from one queue into the other, for a deployment that changes its backend.
/// First stop the workers and schedulers, and give the publishers the new backend; start the others with it
/// afterwards. It may be interrupted and repeated. Lanes, prefix and the section [nats] must be
/// the deployment's: they are read from where the binaries read them.
#[derive(Debug, Args)]
pub struct Drain {
    /// Where the deliveries wait now
    #[arg(long, value_enum)]
    from: Queue,
    /// Where they are to wait
    #[arg(long, value_enum)]
    to: Queue,
    #[command(flatten)]
    deployment: deployment::Flags,
}

impl Drain {
    pub(crate) async fn run(self) -> Result<()> {
        ensure!(self.from != self.to, "--from and --to name the same queue");
        devkit::install_tls_provider();
        // One of the two queues is JetStream, so the broker's URL is asked for in any case.
        let common = self.deployment.common_with(Some("jetstream"))?;
        let pool = pg::pool(&common.postgres, "drain")?;
        pg::check_schema(&pool).await?;
        nobody_takes(&pool).await?;

        let stop = CancellationToken::new();
        let connect = async |queue: Queue| {
            let common = Common { backend: queue.into(), ..common.clone() };
            let transport = Transport::connect(&common, &pool, "drain", stop.clone()).await?;
            transport.queue.prepare().await?;
            anyhow::Ok(transport)
        };
        ui::line("  Connecting to both queues");
        let (from, to) = tokio::try_join!(connect(self.from), connect(self.to))?;
        if let Some(nats) = from.nats.as_ref().or(to.nats.as_ref()) {
            let queues = json!({ "from": self.from.name(), "to": self.to.name() });
            let change = Change::new(Action::QueueDrained, TargetKind::Deployment, &common.prefix);
            audit::publish(nats, change.after(queues)).await?;
        }
        let mut told: Option<Instant> = None;
        let tell = |Drained { moved, left }: Drained| {
            if left == 0 || told.is_none_or(|at| at.elapsed() >= TELL) {
                ui::line(format!("  {moved} moved, {left} left"));
                told = Some(Instant::now());
            }
        };
        let moved = drain(from.queue.as_ref(), to.queue.as_ref(), tell).await?;
        to.flush().await;
        stop.cancel();
        ui::line(paint(GOOD, format!("  {moved} deliveries were moved, and none is left behind.")));
        if let Some(nats) = &from.nats {
            let info = nats.receipt_consumer().await?.get_info().await.context("count the receipts")?;
            let receipts = info.num_pending + info.num_ack_pending as u64;
            if receipts > 0 {
                ui::line(paint(
                    FAINT,
                    format!(
                        "  {receipts} messages are not in history yet: let an archiver run with jetstream until they are."
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Refuses while a worker or a scheduler runs.
async fn nobody_takes(pool: &PgPool) -> Result<()> {
    let until = Instant::now() + GONE;
    loop {
        let connected = pg::connected_roles(pool, &TAKERS).await?;
        if connected.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("still connected to the database: {}. Stop them first", connected.join(", "));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
