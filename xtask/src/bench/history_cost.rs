//! What receipts cost the database on their way into history: one statement for each, or many at a time.

use anyhow::{Context, Result, ensure};
use bus_core::{
    clock::{Clock as _, SystemClock},
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    pg,
    receipt::{Receipt, ReceiptOutcome},
};
use clap::Args;
use devkit::{
    database::Database,
    process::processor_time,
    servers::{Durability, PostgresServer, Tools},
};
use sqlx::{Connection as _, PgConnection, postgres::PgPoolOptions};
use tokio::task::JoinSet;

use super::statistics::{median, spread};
use crate::ui::{self, STRONG, Step, paint};

/// Connections of those that write row by row.
const WRITERS: usize = 8;
/// Receipts of one INSERT.
const INSERT: usize = 500;
/// Receipts of one COPY.
const COPY: usize = 5_000;
/// Bulk has to cost less than this share of what single rows cost.
const LIMIT: f64 = 0.25;

/// How many.
#[derive(Debug, Args)]
pub(super) struct HistoryCost {
    /// Receipts that are written in each way
    #[arg(long, default_value_t = 100_000)]
    receipts: usize,
    /// How often each way is measured, in turn with the others
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Do not wait for the disk, so that only the work itself counts
    #[arg(long)]
    no_fsync: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As workers would without the archiver: each row is a transaction.
    Single,
    /// [`pg::insert_attempts`].
    Insert,
    /// [`pg::copy_attempts`], as the archiver does.
    Copy,
}

impl Way {
    const ALL: [Self; 3] = [Self::Single, Self::Insert, Self::Copy];

    fn name(self) -> String {
        match self {
            Self::Single => format!("an INSERT for each, {WRITERS} connections"),
            Self::Insert => format!("INSERT, {INSERT} at a time"),
            Self::Copy => format!("COPY, {COPY} at a time"),
        }
    }
}

/// What one receipt cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    processor_us: f64,
    wal_bytes: f64,
}

impl HistoryCost {
    pub(super) async fn run(self) -> Result<()> {
        let step = Step::begin("Starting Postgres");
        let tools = tokio::task::spawn_blocking(Tools::locate).await??;
        let durability = if self.no_fsync { Durability::Fast } else { Durability::Full };
        let mut server = PostgresServer::private(&tools, durability).await?;
        let mut superuser = PgConnection::connect(&server.superuser_url("postgres")).await?;
        // It would strike one way and not another.
        sqlx::query("ALTER SYSTEM SET autovacuum = off").execute(&mut superuser).await?;
        sqlx::query("SELECT pg_reload_conf()").execute(&mut superuser).await?;
        let receipts = receipts(self.receipts);
        // The template of the databases is made before anything is measured.
        Database::create(&server.url("postgres")).await?.drop().await?;
        step.done();

        let mut costs: Vec<(Way, Vec<Cost>)> = Way::ALL.map(|way| (way, Vec::new())).into();
        for round in 1..=self.rounds {
            let step = Step::begin(&format!("Round {round} of {}", self.rounds));
            for (way, costs) in &mut costs {
                costs.push(measure(&server, &mut superuser, *way, &receipts).await?);
            }
            step.done();
        }
        superuser.close().await?;
        server.stop().await?;

        let single: Vec<f64> = costs[0].1.iter().map(|cost| cost.processor_us).collect();
        let mut shares = Vec::new();
        for (way, costs) in &costs {
            let processor: Vec<f64> = costs.iter().map(|cost| cost.processor_us).collect();
            let wal: Vec<f64> = costs.iter().map(|cost| cost.wal_bytes).collect();
            // Of the same round, so that a machine that is busy meanwhile weighs on both.
            let share: Vec<f64> = processor.iter().zip(&single).map(|(this, single)| this / single).collect();
            ui::line(format!(
                "{:<36} processor {} µs, WAL {} bytes, share {}",
                way.name(),
                spread(&processor, 1),
                spread(&wal, 0),
                spread(&share, 3)
            ));
            shares.push(median(&share));
        }
        let [_, insert, copy] = shares[..] else { anyhow::bail!("there are three ways") };
        if insert < copy {
            ui::line("COPY is not the cheapest of them.");
        }
        ui::line(paint(
            STRONG,
            format!(
                "history-cost: receipts {}, rounds {}, a COPY's share of what single rows cost {copy:.3}, limit {LIMIT}",
                self.receipts, self.rounds
            ),
        ));
        ensure!(copy < LIMIT, "history in bulk costs {copy:.3} of what single rows cost");
        Ok(())
    }
}

/// Deliveries that succeed at once, a hundred connections' of ten organizations.
fn receipts(count: usize) -> Vec<Receipt> {
    let organizations = [(); 10].map(|()| OrganizationId(SystemIds.next()));
    let receivers = [(); 100].map(|()| (SubscriptionId(SystemIds.next()), ConnectionId(SystemIds.next())));
    let receivers = organizations.into_iter().cycle().zip(receivers).cycle();
    let receipt = |(organization, (subscription, connection))| {
        let event = EventUid(SystemIds.next());
        Receipt {
            delivery: DeliveryId::derive(event, subscription),
            attempt: 1,
            turn: 0,
            event,
            organization,
            subscription,
            connection,
            outcome: ReceiptOutcome::Delivered,
            status: Some(200),
            error: None,
            at: SystemClock.now(),
            duration_ms: 12,
        }
    };
    receivers.take(count).map(receipt).collect()
}

/// Into the fresh tables of a database of its own. What is written later, the dirty pages, is in it too.
async fn measure(
    server: &PostgresServer,
    superuser: &mut PgConnection,
    way: Way,
    receipts: &[Receipt],
) -> Result<Cost> {
    let database = Database::create(&server.url("postgres")).await?;
    let pid = server.id().context("Postgres has ended")?.pid;
    let pool = PgPoolOptions::new().max_connections(1).connect(database.url()).await?;
    let mut writers = Vec::new();
    if way == Way::Single {
        for _ in 0..WRITERS {
            writers.push(PgConnection::connect(database.url()).await?);
        }
    }
    checkpoint(superuser).await?;
    let (processor, wal) = (processor_time(pid)?, wal_position(superuser).await?);
    match way {
        Way::Single => write_single(&mut writers, receipts).await?,
        Way::Insert => {
            for part in receipts.chunks(INSERT) {
                pg::insert_attempts(&pool, part).await?;
            }
        }
        Way::Copy => {
            for part in receipts.chunks(COPY) {
                pg::copy_attempts(&pool, part).await?;
            }
        }
    }
    let wal = wal_position(superuser).await? - wal;
    checkpoint(superuser).await?;
    let processor = processor_time(pid)?.saturating_sub(processor);
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM delivery_attempts").fetch_one(&pool).await?;
    ensure!(usize::try_from(rows)? == receipts.len(), "{way:?} wrote {rows} rows");
    for writer in writers {
        writer.close().await?;
    }
    pool.close().await;
    database.drop().await?;
    let each = |total: f64| total / receipts.len() as f64;
    Ok(Cost { processor_us: each(processor.as_secs_f64() * 1e6), wal_bytes: each(wal) })
}

/// Each connection writes its part of them.
async fn write_single(writers: &mut Vec<PgConnection>, receipts: &[Receipt]) -> Result<()> {
    let mut parts = JoinSet::new();
    for (n, mut writer) in writers.drain(..).enumerate() {
        let part: Vec<Receipt> = receipts.iter().skip(n).step_by(WRITERS).cloned().collect();
        parts.spawn(async move {
            for receipt in &part {
                insert(&mut writer, receipt).await?;
            }
            Ok::<_, sqlx::Error>(writer)
        });
    }
    while let Some(written) = parts.join_next().await {
        writers.push(written??);
    }
    Ok(())
}

async fn insert(writer: &mut PgConnection, receipt: &Receipt) -> Result<(), sqlx::Error> {
    let int = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    sqlx::query(
        "INSERT INTO delivery_attempts (delivery_id, attempt, event_uid, organization_id, subscription_id, connection_id,
                                        outcome, status, error, at, duration_ms, turn)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
         ON CONFLICT DO NOTHING",
    )
    .bind(receipt.delivery.0)
    .bind(int(receipt.attempt))
    .bind(receipt.event.0)
    .bind(receipt.organization.0)
    .bind(receipt.subscription.0)
    .bind(receipt.connection.0)
    .bind(receipt.outcome.as_str())
    .bind(receipt.status.map(i32::from))
    .bind(receipt.error.as_deref())
    .bind(jiff_sqlx::Timestamp::from(receipt.at))
    .bind(int(receipt.duration_ms))
    .bind(receipt.turn)
    .execute(writer)
    .await?;
    Ok(())
}

async fn checkpoint(superuser: &mut PgConnection) -> Result<()> {
    sqlx::query("CHECKPOINT").execute(superuser).await.context("write what is dirty")?;
    Ok(())
}

/// How many bytes of WAL there have ever been.
async fn wal_position(superuser: &mut PgConnection) -> Result<f64> {
    let position = sqlx::query_scalar("SELECT (pg_current_wal_insert_lsn() - '0/0')::float8");
    Ok(position.fetch_one(superuser).await?)
}
