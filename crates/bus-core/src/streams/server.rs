//! The streams on the broker: looked at, created, changed.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_nats::jetstream::{
    ErrorCode,
    context::{GetStreamError, GetStreamErrorKind},
    stream::Info,
};
use futures::TryStreamExt as _;
use jiff::Timestamp;
use metrics::gauge;
use tracing::{error, info, warn};

use super::{
    plan::{Change, ChangeKind, Effect, Existing, Field, Held, Plan, differences},
    spec::{Described, stream_name},
};
use crate::nats::{During as _, Nats, NatsError};

/// Whether a change may lose data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// It may not: such a plan is refused.
    Refused,
    /// Whoever asks for the change accepts it.
    Accepted,
}

/// Why a plan was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamsError {
    /// The broker cannot change streams like this. Nothing was changed.
    #[error("cannot be changed in place: {0}")]
    Impossible(String),
    /// Data would be lost, and nobody has accepted that. Nothing was changed.
    #[error("would lose data: {0}")]
    LosesData(String),
    /// The broker accepted the changes, and has something else.
    #[error("the broker did not take: {0}")]
    NotTaken(String),
    /// The broker is away, or refused a change.
    #[error(transparent)]
    Nats(#[from] NatsError),
}

/// The streams of this deployment that the broker has, described or not.
pub async fn existing(nats: &Nats, now: Timestamp) -> Result<Vec<Existing>, NatsError> {
    let ours = stream_name(&nats.names.prefix, "");
    let all: Vec<Info> = nats.jetstream.streams().try_collect().await.during("list the streams")?;
    let ours = all.into_iter().filter(|stream| stream.config.name.starts_with(&ours));
    Ok(ours
        .map(|Info { config, state, .. }| {
            let first = Timestamp::from_second(state.first_timestamp.unix_timestamp()).unwrap_or(now);
            // Ahead of us by its clock: new.
            let oldest = Duration::try_from(now.duration_since(first)).unwrap_or_default();
            Existing { config, held: Held { messages: state.messages, bytes: state.bytes, oldest } }
        })
        .collect())
}

/// Carries a plan out, and looks whether the broker then has what is described. A plan with anything in it that
/// must not be done is refused as a whole.
pub async fn apply(nats: &Nats, plan: &Plan, loss: Loss, now: Timestamp) -> Result<(), StreamsError> {
    let (mut impossible, mut lossy) = (Vec::new(), Vec::new());
    for (stream, field) in plan.fields() {
        match &field.effect {
            Effect::Harmless => {}
            Effect::LosesData(because) => lossy.push(format!("{stream}, {field} ({because})")),
            Effect::Impossible(because) => impossible.push(format!("{stream}, {field} ({because})")),
        }
    }
    if !impossible.is_empty() {
        return Err(StreamsError::Impossible(impossible.join("; ")));
    }
    if loss == Loss::Refused && !lossy.is_empty() {
        return Err(StreamsError::LosesData(lossy.join("; ")));
    }
    for change in &plan.changes {
        carry_out(nats, change).await?;
    }
    let touched =
        |described: &&Described| plan.changes.iter().any(|change| change.stream == described.config.name);
    let touched: Vec<Described> = nats.streams.iter().filter(touched).cloned().collect();
    let left = super::plan(&existing(nats, now).await?, &touched).changes;
    if left.is_empty() {
        Ok(())
    } else {
        Err(StreamsError::NotTaken(left.iter().map(told).collect::<Vec<_>>().join("; ")))
    }
}

fn told(change: &Change) -> String {
    match &change.kind {
        ChangeKind::Create { .. } => change.stream.clone(),
        ChangeKind::Update { fields } => format!("{}, {}", change.stream, listed(fields)),
    }
}

fn listed(fields: &[Field]) -> String {
    fields.iter().map(Field::to_string).collect::<Vec<_>>().join(", ")
}

async fn carry_out(nats: &Nats, change: &Change) -> Result<(), NatsError> {
    let (operation, done) = match &change.kind {
        ChangeKind::Create { .. } => {
            ("create", nats.jetstream.create_stream(&change.config).await.map(drop).map_err(Into::into))
        }
        ChangeKind::Update { .. } => {
            ("change", nats.jetstream.update_stream(&change.config).await.map(drop).map_err(Into::into))
        }
    };
    done.map_err(|source| NatsError::Stream { operation, stream: change.stream.clone(), source })
}

fn is_missing(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(refused) if refused.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// What was said about the streams that are not as described.
pub(crate) type Said = Mutex<BTreeMap<String, String>>;

/// Creates a stream if it is missing. One that exists stays as it is; where it is not as described, that is said once
/// and shown by a metric.
pub(crate) async fn ensure(nats: &Nats, described: &Described) -> Result<(), NatsError> {
    let name = &described.config.name;
    let failed = |operation, source| NatsError::Stream { operation, stream: name.clone(), source };
    let stream = match nats.jetstream.get_stream(name).await {
        Err(error) if is_missing(&error) => {
            let seen = nats.said.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&described.name);
            let created = nats.jetstream.get_or_create_stream(described.config.clone()).await;
            let created = created.map_err(|error| failed("create", error.into()))?;
            if seen {
                error!(stream = name, "The stream was gone with all that it held, and is there again, empty");
            }
            created
        }
        found => found.map_err(|error| failed("look for", error.into()))?,
    };
    let fields = differences(&stream.cached_info().config, Held::default(), described);
    gauge!("bus_stream_drift", "stream" => described.name.clone()).set(u8::from(!fields.is_empty()));
    let differs = listed(&fields);
    let mut said = nats.said.lock().unwrap_or_else(PoisonError::into_inner);
    let before = said.insert(described.name.clone(), differs.clone()).unwrap_or_default();
    if differs.is_empty() && !before.is_empty() {
        info!(stream = described.config.name, "The stream is as configured again");
    } else if differs != before {
        warn!(
            stream = described.config.name,
            differs, "The stream is not as configured; `cargo xtask streams plan` shows what to do"
        );
    }
    Ok(())
}
