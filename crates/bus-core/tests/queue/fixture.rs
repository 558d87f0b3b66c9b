//! A queue of one lane on a real server, and what the cases need around it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bus_core::{
    clock::{Clock, ManualClock, SystemClock},
    config::load_common,
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    nats::Nats,
    notify::PostgresNotifier,
    queue::{Body, DeliveryQueue, Enqueue, JetStreamQueue, Leased, MemoryQueue, PostgresQueue},
};
use bytes::Bytes;
use devkit::{database::Database, servers::shared_servers};
use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// How long one pull waits.
pub(crate) const WAIT: Duration = Duration::from_secs(2);
/// What no hint announced is seen after this time.
const POLL: Duration = Duration::from_secs(1);
/// How long a lease lasts here.
pub(crate) const LEASE: Duration = Duration::from_secs(2);
/// Deliveries of one message where they are packed.
pub(crate) const PACK: usize = 8;
/// The most messages that a lane of the broker leaves unacknowledged here.
pub(crate) const WINDOW: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Each delivery in a message of its own.
    JetStream,
    /// [`PACK`] of them in one, if they are put in together; here all are of one connection.
    JetStreamPacked,
    Postgres,
    Memory,
}

impl Kind {
    pub(crate) fn is_jetstream(self) -> bool {
        matches!(self, Self::JetStream | Self::JetStreamPacked)
    }
}

/// A queue of one lane, and a second worker's view of it.
pub(crate) struct Fixture {
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) other_worker: Arc<dyn DeliveryQueue>,
    pub(crate) nats: Option<Nats>,
    pub(crate) pool: PgPool,
    pub(crate) organization: OrganizationId,
    /// The connection of all deliveries that are for none in particular, if there is one.
    connection: Option<ConnectionId>,
    clock: Option<ManualClock>,
    database: Database,
}

impl Fixture {
    pub(crate) async fn new(kind: Kind) -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let prefix = devkit::random_token(6);
        let (mut nats, mut clock) = (None, None);
        let (queue, other_worker): (Arc<dyn DeliveryQueue>, Arc<dyn DeliveryQueue>) = match kind {
            Kind::JetStream | Kind::JetStreamPacked => {
                let pack = if kind == Kind::JetStreamPacked { PACK } else { 1 };
                let common = load_common(
                    None,
                    [
                        ("DATABASE_URL", database.url().to_owned()),
                        ("NATS_URL", servers.nats_url().to_owned()),
                        ("EVENT_BUS_PREFIX", prefix.clone()),
                        // The server sets this much aside for each test.
                        ("EVENT_BUS_STREAMS__DELIVER__MAX_BYTES", "268435456".to_owned()),
                        ("EVENT_BUS_STREAMS__AUDIT__MAX_BYTES", "67108864".to_owned()),
                        ("EVENT_BUS_NATS__ACK_WAIT_MS", LEASE.as_millis().to_string()),
                        ("EVENT_BUS_NATS__MAX_ACK_PENDING", WINDOW.to_string()),
                        ("EVENT_BUS_NATS__PACK_DELIVERIES", pack.to_string()),
                    ]
                    .map(|(name, value)| (name.to_owned(), value)),
                )
                .unwrap();
                let one = Nats::connect(&common, "test").await.unwrap();
                let other = Nats::connect(&common, "other").await.unwrap();
                nats = Some(one.clone());
                (Arc::new(JetStreamQueue::new(one, 1)), Arc::new(JetStreamQueue::new(other, 1)))
            }
            Kind::Postgres => {
                let stop = CancellationToken::new();
                let queue = || {
                    let hints = Arc::new(PostgresNotifier::new(pool.clone(), &prefix, stop.clone()));
                    PostgresQueue::new(pool.clone(), 1, LEASE, hints, POLL, stop.clone())
                };
                (Arc::new(queue()), Arc::new(queue()))
            }
            Kind::Memory => {
                let manual = ManualClock::new(SystemClock.now());
                let queue = MemoryQueue::new(pool.clone(), Arc::new(manual.clone()), 1, LEASE);
                clock = Some(manual);
                (Arc::new(queue.clone()), Arc::new(queue))
            }
        };
        queue.prepare().await.unwrap();
        other_worker.prepare().await.unwrap();
        let organization = OrganizationId(SystemIds.next());
        let connection = (kind == Kind::JetStreamPacked).then(|| SystemIds.next().into());
        Self { queue, other_worker, nats, pool, organization, connection, clock, database }
    }

    /// Lets time pass: by the queue's own clock if it has one that can be moved, else really.
    pub(crate) async fn pass(&self, time: Duration) {
        match &self.clock {
            Some(clock) => clock.advance(SignedDuration::try_from(time).unwrap()),
            None => tokio::time::sleep(time).await,
        }
    }

    /// A delivery of a stored event with this body; to a connection of its own, if deliveries are not packed.
    pub(crate) async fn delivery(&self, body: &[u8]) -> Enqueue {
        self.delivery_to(self.connection.unwrap_or_else(|| SystemIds.next().into()), body).await
    }

    pub(crate) async fn delivery_to(&self, connection: ConnectionId, body: &[u8]) -> Enqueue {
        let event = EventUid(SystemIds.next());
        sqlx::query(
            "INSERT INTO events (uid, organization_id, id, source, type, time, body)
             VALUES ($1, $2, $1::text, '/test', 'test', now(), $3)",
        )
        .bind(event.0)
        .bind(self.organization.0)
        .bind(body)
        .execute(&self.pool)
        .await
        .unwrap();
        let subscription = SubscriptionId(SystemIds.next());
        let key = DeliveryKey {
            id: DeliveryId::derive(event, subscription),
            event,
            organization: self.organization,
            subscription,
            connection,
            connection_version: 3,
        };
        let since = Timestamp::from_second(1_800_000_000).unwrap();
        let body = Body::bounded(&Bytes::copy_from_slice(body));
        Enqueue { key, progress: Progress::new(since), lane: None, body }
    }

    pub(crate) async fn deliveries(&self, n: usize) -> Vec<Enqueue> {
        let mut deliveries = Vec::with_capacity(n);
        for number in 0..n {
            deliveries.push(self.delivery(number.to_string().as_bytes()).await);
        }
        deliveries
    }

    /// Puts `n` deliveries in.
    pub(crate) async fn put(&self, n: usize) -> Vec<Enqueue> {
        let deliveries = self.deliveries(n).await;
        self.queue.enqueue(&deliveries).await.unwrap();
        deliveries
    }

    /// Puts `n` deliveries in, one by one: so each is in a message of its own.
    pub(crate) async fn put_each(&self, n: usize) -> Vec<Enqueue> {
        let deliveries = self.deliveries(n).await;
        for delivery in &deliveries {
            self.queue.enqueue(std::slice::from_ref(delivery)).await.unwrap();
        }
        deliveries
    }

    pub(crate) async fn end(self) {
        if let Some(nats) = &self.nats {
            for stream in [&nats.names.deliver_stream, &nats.names.dead_stream, &nats.names.audit_stream] {
                nats.jetstream.delete_stream(stream).await.unwrap();
            }
        }
        self.pool.close().await;
        self.database.drop().await.unwrap();
    }
}

/// One pull.
pub(crate) async fn pull(queue: &Arc<dyn DeliveryQueue>, max: usize) -> Vec<Leased> {
    pull_for(queue, max, WAIT).await
}

/// One pull that waits this long.
pub(crate) async fn pull_for(queue: &Arc<dyn DeliveryQueue>, max: usize, wait: Duration) -> Vec<Leased> {
    pull_lane(queue, 0, max, wait).await
}

/// One pull of this lane.
pub(crate) async fn pull_lane(
    queue: &Arc<dyn DeliveryQueue>,
    lane: u16,
    max: usize,
    wait: Duration,
) -> Vec<Leased> {
    queue.pull(lane, max, wait).await.unwrap().map(Result::unwrap).collect().await
}

/// Pulls until there are `n`.
pub(crate) async fn pull_all(queue: &Arc<dyn DeliveryQueue>, n: usize) -> Vec<Leased> {
    let mut all = Vec::new();
    let until = tokio::time::Instant::now() + DEADLINE;
    while all.len() < n {
        assert!(tokio::time::Instant::now() < until, "{} of {n} deliveries came", all.len());
        all.extend(pull(queue, n - all.len()).await);
    }
    all
}

pub(crate) fn ids(deliveries: &[Enqueue]) -> BTreeSet<DeliveryId> {
    deliveries.iter().map(|delivery| delivery.key.id).collect()
}

pub(crate) fn leased_ids(leased: &[Leased]) -> BTreeSet<DeliveryId> {
    leased.iter().map(|one| one.key.id).collect()
}
