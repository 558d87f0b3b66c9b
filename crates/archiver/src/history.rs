//! Copies receipts from the audit stream to history, many at a time.
//!
//! The rows are committed before the messages are acknowledged, and a repeated receipt changes nothing:
//! whatever dies in between, history has each attempt once.

use std::time::{Duration, Instant};

use async_nats::jetstream::{AckKind, Message, consumer::PullConsumer, stream::RawMessageErrorKind};
use bus_core::{
    launcher::{BoxError, Heartbeat},
    nats::Nats,
    pg::{self, Through},
    receipt::Receipt,
    telemetry::Chain,
};
use futures::StreamExt as _;
use jiff::Timestamp;
use metrics::{counter, gauge};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// How long one pull gathers; also how long a stop takes when idle, and most of history's lag.
pub(crate) const PULL_WAIT: Duration = Duration::from_secs(1);

/// After an error.
const AGAIN: Duration = Duration::from_secs(1);

/// Between two looks at how far history goes.
const LOOK: Duration = Duration::from_secs(1);

/// Messages of one COPY. Each holds at most 500 receipts, and few as long as the workers keep up.
const MESSAGES: usize = 100;

pub(crate) async fn run(
    pool: PgPool,
    nats: Nats,
    beat: Heartbeat,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    let mut copier = Copier { pool, nats, consumer: None, looked: None };
    while !stop.is_cancelled() {
        beat.beat();
        if let Err(failed) = pg::answered("bring receipts to history", copier.copy_once()).await {
            warn!(error = %Chain(failed.as_ref()), "History lags behind");
            // It may have been deleted; the next round looks it up, and creates it if it is gone.
            copier.consumer = None;
            stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await;
        }
    }
    Ok(())
}

struct Copier {
    pool: PgPool,
    nats: Nats,
    consumer: Option<PullConsumer>,
    /// When it was found out last how far history goes.
    looked: Option<Instant>,
}

impl Copier {
    async fn copy_once(&mut self) -> Result<(), BoxError> {
        let consumer = match self.consumer.take() {
            Some(consumer) => consumer,
            None => self.nats.receipt_consumer().await?,
        };
        let mut batch = consumer.batch().max_messages(MESSAGES).expires(PULL_WAIT).messages().await?;
        let (mut messages, mut receipts) = (Vec::with_capacity(MESSAGES), Vec::new());
        while let Some(message) = batch.next().await {
            let message = message?;
            match read(&message) {
                Ok(read) => {
                    receipts.extend(read);
                    messages.push(message);
                }
                Err(problem) => self.set_aside(&message, &problem.to_string()).await?,
            }
        }
        if !receipts.is_empty() {
            match pg::copy_attempts(&self.pool, &receipts).await {
                // One message must not keep all others from history.
                Err(refused) if refused.is_refused() => messages = self.copy_one_by_one(messages).await?,
                other => other?,
            }
        }
        for message in &messages {
            message.ack().await?;
        }
        counter!("bus_receipts_archived").increment(receipts.len() as u64);
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.note_progress(&consumer).await?;
            self.looked = Some(Instant::now());
        }
        self.consumer = Some(consumer);
        Ok(())
    }

    /// Sets aside what the database refuses, and gives back the others.
    async fn copy_one_by_one(&self, messages: Vec<Message>) -> Result<Vec<Message>, BoxError> {
        let mut copied = Vec::with_capacity(messages.len());
        for message in messages {
            match pg::insert_attempts(&self.pool, &read(&message)?).await {
                Err(refused) if refused.is_refused() => {
                    let problem = Chain(&refused).to_string();
                    self.set_aside(&message, &problem).await?;
                }
                Err(error) => return Err(error.into()),
                Ok(()) => copied.push(message),
            }
        }
        Ok(copied)
    }

    /// Notes up to when history has everything: now, if nothing waits, or else when the oldest message that waits
    /// came to the stream.
    async fn note_progress(&self, consumer: &PullConsumer) -> Result<(), BoxError> {
        let asked = Instant::now();
        let info = consumer.get_info().await?;
        let waiting = info.num_pending + info.num_ack_pending as u64;
        gauge!("bus_history_waiting").set(waiting as f64);
        let through = if waiting == 0 {
            Through::Ago(asked.elapsed())
        } else {
            let stream = self.nats.jetstream.get_stream_no_info(&self.nats.names.audit_stream).await?;
            let first = info.ack_floor.stream_sequence + 1;
            match stream.get_first_raw_message_by_subject(self.nats.names.receipts(), first).await {
                Ok(oldest) => Through::Time(Timestamp::from_nanosecond(oldest.time.unix_timestamp_nanos())?),
                // The acknowledgements arrived meanwhile; the next look is soon.
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        };
        pg::note_history_through(&self.pool, through).await?;
        Ok(())
    }

    /// Copies a message that is no list of receipts, or of such as the database refuses, to the dead-letter stream, so that
    /// it blocks nothing.
    async fn set_aside(&self, message: &Message, problem: &str) -> Result<(), BoxError> {
        error!(subject = %message.subject, error = problem, "A message in the audit stream cannot become history");
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Bus-Reason", problem.replace(['\r', '\n'], " "));
        headers.insert("Bus-Subject", message.subject.as_str());
        let subject = self.nats.names.malformed();
        self.nats.jetstream.publish_with_headers(subject, headers, message.payload.clone()).await?.await?;
        message.ack_with(AckKind::Term).await?;
        Ok(())
    }
}

fn read(message: &Message) -> Result<Vec<Receipt>, serde_json::Error> {
    serde_json::from_slice(&message.payload)
}
