//! Hints: what one process tells the others so that they need not wait for their next look.
//!
//! A hint saves latency and nothing else. Whoever listens also looks by itself from time to time, so that a
//! transport which is away, or a hint which is lost, delays but never stops.
//!
//! Who has to rely on hints makes sure of them, on both sides: an announcement fails if it cannot be made, and
//! [`Current`] says whether all that was announced has been heard.

mod compose;
mod current;
mod memory;
mod nats;
mod outgoing;
mod polling;
mod postgres;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt as _, stream::BoxStream};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::{
    compose::Compose,
    current::{Current, MAX_AGE, SETTLED},
    memory::MemoryNotifier,
    nats::NatsNotifier,
    polling::Polling,
    postgres::PostgresNotifier,
};
use crate::{
    config::{Backend, Common, NotifyStrategy},
    ids::{ConnectionId, DeliveryId},
    nats::{Nats, NatsError},
    peers::PeerRole,
    pg::StoreError,
};

/// An idle scheduler looks this often for deliveries that are due. Whoever stores one that is due sooner
/// sends [`Hint::Due`].
pub const DUE_IDLE: Duration = Duration::from_secs(5);

/// How long an announcement may take.
const ANNOUNCED: Duration = Duration::from_secs(2);

/// Something that happened elsewhere. It may come twice, late, or not at all; nothing may depend on it but
/// latency, unless [`Current`] is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hint {
    /// A connection was changed or deleted.
    ConnectionChanged(ConnectionId),
    /// A delivery was acknowledged through the API: workers that hold it drop it, unless it was replayed since.
    Closed(DeliveryId),
    /// A delivery was cancelled, which is for good.
    Cancelled(DeliveryId),
    /// A stored delivery became due, or will be within [`DUE_IDLE`].
    Due,
    /// The queue of the Postgres backend has something new.
    Enqueued,
    /// An organization was moved to another lane.
    LanesChanged,
    /// Says nothing. Whoever announced it and hears it has heard all that was announced before; see [`Current`].
    Probe(Uuid),
    /// A process is there; see [`Peers`](crate::peers::Peers).
    Alive {
        /// What it is.
        role: PeerRole,
        /// Which one.
        instance: Uuid,
    },
    /// Hints may have been lost: whatever was kept in memory on their strength is to be read again.
    Missed,
}

/// One line, the same on every transport: `connection <uuid>`, `closed <uuid>`, `cancelled <uuid>`, `due`,
/// `enqueued`, `lanes`, `probe <uuid>`, `alive <role> <uuid>`, `missed`.
impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectionChanged(id) => write!(f, "connection {id}"),
            Self::Closed(id) => write!(f, "closed {id}"),
            Self::Cancelled(id) => write!(f, "cancelled {id}"),
            Self::Due => f.write_str("due"),
            Self::Enqueued => f.write_str("enqueued"),
            Self::LanesChanged => f.write_str("lanes"),
            Self::Probe(id) => write!(f, "probe {id}"),
            Self::Alive { role, instance } => write!(f, "alive {role} {instance}"),
            Self::Missed => f.write_str("missed"),
        }
    }
}

impl Hint {
    /// Reads a hint. `None` for one that this version does not know, which is to be ignored: versions that
    /// know more may run beside it, and may also add words to a line.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        match words.next()? {
            "connection" => words.next()?.parse().ok().map(Self::ConnectionChanged),
            "closed" => words.next()?.parse().ok().map(Self::Closed),
            "cancelled" => words.next()?.parse().ok().map(Self::Cancelled),
            "due" => Some(Self::Due),
            "enqueued" => Some(Self::Enqueued),
            "lanes" => Some(Self::LanesChanged),
            "probe" => words.next()?.parse().ok().map(Self::Probe),
            "alive" => {
                let role = PeerRole::parse(words.next()?)?;
                words.next()?.parse().ok().map(|instance| Self::Alive { role, instance })
            }
            "missed" => Some(Self::Missed),
            _ => None,
        }
    }
}

/// Why hints could not be announced. Some may have been.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnnounceError {
    /// There is nothing that could bring a probe back.
    #[error("announce hints: no transport carries them")]
    NoTransport,
    /// There is no connection to NATS.
    #[error("announce hints: not connected to NATS")]
    NotConnected,
    /// The connection to NATS was replaced meanwhile, and what was sent by the old one may be lost.
    #[error("announce hints: the connection to NATS broke")]
    Interrupted,
    /// The transport did not answer in time.
    #[error("announce hints: no answer in time")]
    TimedOut,
    /// NATS.
    #[error("announce hints")]
    Nats(#[source] NatsError),
    /// Postgres.
    #[error("announce hints")]
    Store(#[source] StoreError),
}

/// Sends and receives hints.
#[async_trait]
pub trait Notifier: Send + Sync + fmt::Debug {
    /// Tells everyone who listens, this process included. Best effort, and never a wait for a transport that
    /// is away: a failure is logged, not returned.
    async fn notify(&self, hint: Hint);

    /// Tells everyone who listens, and returns when the transport has it: a listener hears these hints, or
    /// [`Hint::Missed`], before any [`Hint::Probe`] that is announced later, whoever announces it. What the hints are
    /// about must be committed by then. Takes two seconds at most.
    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError>;

    /// The hints from now on; never ends. The first is [`Hint::Missed`], and another one follows whenever
    /// hints may have been lost, also once a transport that was away is there.
    fn listen(&self) -> BoxStream<'static, Hint>;

    /// Waits, for at most two seconds, until the hints so far are sent. For the end of a process.
    async fn flush(&self);
}

/// Calls `wake` for each `wanted` hint and for each [`Hint::Missed`]. Never ends.
pub async fn wake_on(notifier: Arc<dyn Notifier>, wanted: Hint, wake: impl Fn() + Send) {
    let mut hints = notifier.listen();
    while let Some(hint) = hints.next().await {
        if hint == wanted || hint == Hint::Missed {
            wake();
        }
    }
}

/// The notifier that the configuration asks for. `nats` is the connection of the backend, if it has one; a
/// strategy that needs one opens its own otherwise. Returns without waiting for a server.
pub async fn connect(
    common: &Common,
    pool: &PgPool,
    nats: Option<Nats>,
    role: &'static str,
    stop: CancellationToken,
) -> Result<Arc<dyn Notifier>, NatsError> {
    let over_nats = async || {
        let nats = match nats {
            Some(nats) => nats,
            None => Nats::connect(common, role).await?,
        };
        Ok::<Arc<dyn Notifier>, NatsError>(Arc::new(NatsNotifier::new(nats)))
    };
    let over_postgres =
        || -> Arc<dyn Notifier> { Arc::new(PostgresNotifier::new(pool.clone(), &common.prefix, stop)) };
    Ok(match common.notify_strategy() {
        NotifyStrategy::Polling => Arc::new(Polling::new(Duration::from_millis(common.notify.poll_ms))),
        NotifyStrategy::Nats => over_nats().await?,
        NotifyStrategy::Postgres => over_postgres(),
        NotifyStrategy::Auto | NotifyStrategy::Compose => {
            // Where the deliveries are nothing goes without that server anyway: it has the word.
            let (nats, postgres) = (over_nats().await?, over_postgres());
            Arc::new(match common.backend {
                Backend::Jetstream => Compose::new(nats, vec![postgres]),
                Backend::Postgres | Backend::Memory => Compose::new(postgres, vec![nats]),
            })
        }
        NotifyStrategy::Memory => Arc::new(MemoryNotifier::default()),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn any_hint() -> impl Strategy<Value = Hint> {
        let id = any::<u128>().prop_map(Uuid::from_u128);
        prop_oneof![
            id.clone().prop_map(|id| Hint::ConnectionChanged(id.into())),
            id.clone().prop_map(|id| Hint::Closed(id.into())),
            id.clone().prop_map(|id| Hint::Cancelled(id.into())),
            id.clone().prop_map(Hint::Probe),
            id.prop_map(|instance| Hint::Alive { role: PeerRole::DeliveryWorker, instance }),
            Just(Hint::Due),
            Just(Hint::Enqueued),
            Just(Hint::LanesChanged),
            Just(Hint::Missed),
        ]
    }

    #[test]
    fn what_a_later_version_says_is_no_hint() {
        let id = Uuid::from_u128(1);
        assert_eq!(Hint::parse(&format!("paused {id}")), None);
        assert_eq!(Hint::parse(&format!("alive archiver {id}")), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(hint in any_hint(), more in "( [a-z]{0,8}){0,2}") {
            prop_assert_eq!(Hint::parse(&hint.to_string()), Some(hint));
            prop_assert_eq!(Hint::parse(&format!("{hint}{more}")), Some(hint), "a later version may say more");
            prop_assert!(!hint.to_string().contains('\n'));
        }

        #[test]
        fn garbage_is_no_hint(line in "\\PC{0,80}", word in "connection|closed|cancelled|probe|alive|due|paused|") {
            let known = ["connection", "closed", "cancelled", "due", "enqueued", "lanes", "probe", "alive", "missed"];
            let read = Hint::parse(&line);
            prop_assert!(read.is_none() || known.contains(&line.split_whitespace().next().unwrap()));
            let _ = Hint::parse(&format!("{word} {line}"));
        }
    }
}
