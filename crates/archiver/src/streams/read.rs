//! What is in a stream.

use std::time::Duration;

use async_nats::{
    datetime::DateTime,
    jetstream::{
        Message,
        consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
        stream::{RawMessageErrorKind, Stream},
    },
};
use futures::StreamExt as _;
use jiff::{Timestamp, tz::TimeZone};

use super::StreamArchiver;
use crate::error::{ArchiveError, During as _};

/// How long one pull may take.
const PULL_WAIT: Duration = Duration::from_secs(5);

/// Messages of one pull.
const PULL: usize = 200;

/// A consumer that nobody pulls from any more is gone after this time.
const INACTIVE: Duration = Duration::from_secs(30);

/// A consumer that reads a stream in passing: nothing is acknowledged, and nothing of it stays.
pub(crate) fn passing_reader() -> pull::Config {
    pull::Config {
        ack_policy: AckPolicy::None,
        inactive_threshold: INACTIVE,
        memory_storage: true,
        num_replicas: 1,
        ..pull::Config::default()
    }
}

/// What the broker says of a stream.
#[derive(Debug, Clone)]
pub(super) struct StreamState {
    /// When it was created; tells it from one of the same name.
    pub(super) created: String,
    /// The first message that is there, or the next one if none is.
    pub(super) first: u64,
    /// The last message that ever came; 0 for none.
    pub(super) last: u64,
    pub(super) messages: u64,
    pub(super) bytes: u64,
    /// The most bytes and the most messages that it takes.
    pub(super) limit: Option<u64>,
    pub(super) most_messages: Option<u64>,
}

/// A part of a stream.
pub(super) struct Range {
    pub(super) messages: Vec<Stored>,
    /// Everything up to here was looked at.
    pub(super) last: u64,
}

/// A message as it is in the stream.
pub(super) struct Stored {
    pub(super) sequence: u64,
    pub(super) time: Timestamp,
    pub(super) message: async_nats::Message,
}

impl StreamArchiver {
    async fn handle(&self) -> Result<Stream<()>, ArchiveError> {
        self.nats.jetstream.get_stream_no_info(&self.stream.config.name).await.during("look up a stream")
    }

    pub(super) async fn state(&self) -> Result<StreamState, ArchiveError> {
        const OPERATION: &str = "ask for the state of a stream";
        let info = self.handle().await?.get_info().await.during(OPERATION)?;
        let created = Timestamp::from_nanosecond(info.created.unix_timestamp_nanos()).during(OPERATION)?;
        Ok(StreamState {
            created: created.to_zoned(TimeZone::UTC).strftime("%Y%m%dT%H%M%S.%9fZ").to_string(),
            first: info.state.first_sequence.max(1),
            last: info.state.last_sequence,
            messages: info.state.messages,
            bytes: info.state.bytes,
            limit: u64::try_from(info.config.max_bytes).ok().filter(|bytes| *bytes > 0),
            most_messages: u64::try_from(info.config.max_messages).ok().filter(|messages| *messages > 0),
        })
    }

    /// When a message came to the stream; `None` if it is not there.
    pub(super) async fn time_of(&self, sequence: u64) -> Result<Option<Timestamp>, ArchiveError> {
        const OPERATION: &str = "look at a message of a stream";
        match self.handle().await?.get_raw_message(sequence).await {
            Ok(message) => {
                Timestamp::from_nanosecond(message.time.unix_timestamp_nanos()).during(OPERATION).map(Some)
            }
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(error).during(OPERATION),
        }
    }

    /// The first message from this number on, as the stream's leader has it.
    async fn next_in(&self, stream: &Stream<()>, from: u64) -> Result<Option<u64>, ArchiveError> {
        match stream.get_first_raw_message_by_subject(">", from).await {
            Ok(message) => Ok(Some(message.sequence)),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(error).during("look for the next message of a stream"),
        }
    }

    /// The first message that came to the stream later than this.
    pub(super) async fn first_after(&self, time: Timestamp) -> Result<Option<u64>, ArchiveError> {
        const OPERATION: &str = "look for what came to a stream later";
        let start = time.as_nanosecond() + 1_000;
        let start_time = DateTime::from_unix_timestamp_nanos(start).during(OPERATION)?;
        let config = pull::Config {
            deliver_policy: DeliverPolicy::ByStartTime { start_time },
            headers_only: true,
            ..passing_reader()
        };
        let consumer: PullConsumer = self.handle().await?.create_consumer(config).await.during(OPERATION)?;
        if consumer.cached_info().num_pending == 0 {
            return Ok(None);
        }
        let mut pulled =
            consumer.batch().max_messages(1).expires(PULL_WAIT).messages().await.during(OPERATION)?;
        match pulled.next().await {
            Some(message) => read(message.during(OPERATION)?).map(|(stored, ..)| Some(stored.sequence)),
            None => Err("the broker sends nothing").during(OPERATION),
        }
    }

    /// The messages from `first` to `last`, or as many of them as make a batch.
    pub(super) async fn read(&self, first: u64, last: u64) -> Result<Range, ArchiveError> {
        const OPERATION: &str = "read a range of a stream";
        let stream = self.handle().await?;
        let config = pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: first },
            ..passing_reader()
        };
        let consumer: PullConsumer = stream.create_consumer(config).await.during(OPERATION)?;
        let mut range = Range { messages: Vec::new(), last: first - 1 };
        let (mut bytes, mut delivered) = (0, 0);
        while range.last < last {
            let room = self.config.batch_messages.saturating_sub(range.messages.len() as u64);
            if room == 0 || bytes >= self.config.batch_bytes {
                break;
            }
            let pull = usize::try_from(room).unwrap_or(PULL).min(PULL);
            let mut pulled =
                consumer.batch().max_messages(pull).expires(PULL_WAIT).messages().await.during(OPERATION)?;
            let before = delivered;
            let mut exhausted = false;
            while let Some(message) = pulled.next().await {
                let (stored, pending, nth) = read(message.during(OPERATION)?)?;
                delivered += 1;
                if nth != delivered {
                    // What was sent over a connection that broke is not sent again.
                    return Err("messages were lost on the way").during(OPERATION);
                }
                bytes += stored.message.length as u64;
                let sequence = stored.sequence;
                if sequence <= last {
                    range.messages.push(stored);
                }
                range.last = sequence;
                exhausted = pending == 0;
                if sequence >= last || exhausted || bytes >= self.config.batch_bytes {
                    break;
                }
            }
            let silent = delivered == before;
            if (silent || exhausted) && range.last < last {
                // The consumer may be on a replica that does not have it all yet: the stream's leader decides.
                if self.next_in(&stream, range.last + 1).await?.is_some_and(|next| next <= last) {
                    return Err("the broker sends less than the stream has").during(OPERATION);
                }
                // Nothing from here on: all of it was deleted.
                range.last = last;
            }
        }
        range.last = range.last.min(last);
        // It would be gone soon anyway.
        let _ = stream.delete_consumer(&consumer.cached_info().name).await;
        Ok(range)
    }
}

/// The message, how many more the stream has, and the how manieth it is that this consumer was sent.
fn read(message: Message) -> Result<(Stored, u64, u64), ArchiveError> {
    const OPERATION: &str = "read where a message is in its stream";
    let info = message.info().during(OPERATION)?;
    let time = Timestamp::from_nanosecond(info.published.unix_timestamp_nanos()).during(OPERATION)?;
    let (sequence, pending, nth) = (info.stream_sequence, info.pending, info.consumer_sequence);
    Ok((Stored { sequence, time, message: message.message }, pending, nth))
}
