//! Copies receipts from the audit stream to history, many at a time.
//!
//! The rows are committed before the messages are acknowledged, and a repeated receipt changes nothing:
//! whatever dies in between, history has each attempt once.

use std::time::Duration;

use async_nats::jetstream::{AckKind, Message, consumer::PullConsumer};
use bus_core::{
    launcher::{BoxError, Heartbeat},
    nats::Nats,
    pg,
    receipt::Receipt,
    telemetry::Chain,
};
use futures::StreamExt as _;
use metrics::counter;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// How long one pull gathers; also how long a stop takes when idle, and most of history's lag.
pub(crate) const PULL_WAIT: Duration = Duration::from_secs(1);

/// After an error.
const AGAIN: Duration = Duration::from_secs(1);

/// Messages of one transaction; each holds at most 500 receipts.
const MESSAGES: usize = 20;

pub(crate) async fn run(
    pool: PgPool,
    nats: Nats,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    let mut consumer: Option<PullConsumer> = None;
    while !stop.is_cancelled() {
        beat.beat();
        if let Err(failed) = copy_once(&pool, &nats, &mut consumer).await {
            warn!(error = %Chain(failed.as_ref()), "History lags behind");
            // It may have been deleted; the next round looks it up, and creates it if it is gone.
            consumer = None;
            stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await;
        }
    }
    Ok(())
}

async fn copy_once(pool: &PgPool, nats: &Nats, consumer: &mut Option<PullConsumer>) -> Result<(), BoxError> {
    let consumer = match consumer {
        Some(consumer) => consumer,
        None => consumer.insert(nats.receipt_consumer().await?),
    };
    let mut batch = consumer.batch().max_messages(MESSAGES).expires(PULL_WAIT).messages().await?;
    let (mut messages, mut receipts) = (Vec::with_capacity(MESSAGES), Vec::new());
    while let Some(message) = batch.next().await {
        let message = message?;
        match serde_json::from_slice::<Vec<Receipt>>(&message.payload) {
            Ok(read) => {
                receipts.extend(read);
                messages.push(message);
            }
            Err(problem) => set_aside(nats, &message, &problem).await?,
        }
    }
    if receipts.is_empty() && messages.is_empty() {
        return Ok(());
    }
    pg::insert_attempts(pool, &receipts).await?;
    for message in &messages {
        message.ack().await?;
    }
    counter!("bus_receipts_archived").increment(receipts.len() as u64);
    Ok(())
}

/// Moves a message that is not a list of receipts to the dead-letter stream, so that it blocks nothing.
async fn set_aside(nats: &Nats, message: &Message, problem: &serde_json::Error) -> Result<(), BoxError> {
    error!(subject = %message.subject, error = %problem, "A message in the audit stream cannot be read");
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Bus-Reason", problem.to_string());
    headers.insert("Bus-Subject", message.subject.as_str());
    let subject = nats.names.malformed();
    nats.jetstream.publish_with_headers(subject, headers, message.payload.clone()).await?.await?;
    message.ack_with(AckKind::Term).await?;
    Ok(())
}
