//! The real thing: a queue, a database, two workers, and a subscriber who answers what the test says.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    clock::SystemClock,
    config::{load, load_common},
    connection::Connection,
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    nats::Nats,
    notify::{MemoryNotifier, Notifier},
    peers::Peers,
    queue::{Body, DeliveryQueue, Enqueue, JetStreamQueue, MemoryQueue, PostgresQueue},
    retry::RetryPolicy,
    sink::{AttemptReport, Outcome, Parcel, Sink},
};
use bytes::Bytes;
use delivery_worker::{
    config::WorkerConfig,
    delivery::{Deliverer, Parts},
    lanes::Homes,
    slots::Slots,
};
use devkit::{database::Database, servers::shared_servers};
use jiff::Timestamp;
use sqlx::PgPool;
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::reference::MAX_ATTEMPTS;

/// How long a hold lasts here.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    JetStream,
    Postgres,
    Memory,
}

/// What workers tell the test.
#[derive(Debug)]
pub(crate) enum Note {
    /// The subscriber is asked; whoever drops the answer leaves the worker waiting for ever.
    Asked(DeliveryKey, oneshot::Sender<Outcome>),
    /// The worker is done with what it was given under this number.
    Done(u64),
}

/// A subscriber who answers what the test says.
struct Subscriber(mpsc::UnboundedSender<Note>);

#[async_trait]
impl Sink for Subscriber {
    async fn attempt(&self, _: &Connection, parcel: Parcel<'_>, _: Timestamp) -> Vec<AttemptReport> {
        let mut reports = Vec::new();
        for delivery in parcel.deliveries() {
            let (answer, answered) = oneshot::channel();
            self.0.send(Note::Asked(delivery.key, answer)).unwrap();
            let outcome = match answered.await {
                Ok(outcome) => outcome,
                // The test lets this worker die.
                Err(_) => std::future::pending().await,
            };
            reports.push(AttemptReport {
                outcome,
                status: None,
                answer: Bytes::new(),
                duration: Duration::from_millis(1),
            });
        }
        reports
    }
}

pub(crate) struct World {
    pub(crate) kind: Kind,
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<dyn DeliveryQueue>,
    pub(crate) hints: MemoryNotifier,
    pub(crate) notes: mpsc::UnboundedReceiver<Note>,
    pub(crate) organization: OrganizationId,
    pub(crate) subscriptions: Vec<(SubscriptionId, ConnectionId)>,
    workers: Vec<Arc<Deliverer>>,
    sender: mpsc::UnboundedSender<Note>,
    numbers: AtomicU64,
    stop: CancellationToken,
    tasks: TaskTracker,
    nats: Option<Nats>,
    database: Database,
}

impl World {
    pub(crate) async fn new(kind: Kind) -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let prefix = devkit::random_token(6);
        let (stop, tasks, hints) = (CancellationToken::new(), TaskTracker::new(), MemoryNotifier::default());
        let notifier: Arc<dyn Notifier> = Arc::new(hints.clone());
        let mut nats = None;
        let queue: Arc<dyn DeliveryQueue> = match kind {
            Kind::JetStream => {
                let common = load_common(
                    None,
                    [
                        ("DATABASE_URL", database.url().to_owned()),
                        ("NATS_URL", servers.nats_url().to_owned()),
                        ("EVENT_BUS_PREFIX", prefix),
                        // The server sets this much aside for each test.
                        ("EVENT_BUS_STREAMS__DELIVER__MAX_BYTES", "268435456".to_owned()),
                        ("EVENT_BUS_STREAMS__AUDIT__MAX_BYTES", "67108864".to_owned()),
                        ("EVENT_BUS_NATS__ACK_WAIT_MS", LEASE.as_millis().to_string()),
                        ("EVENT_BUS_NATS__MAX_ACK_PENDING", "1000".to_owned()),
                        // What a crash repeats of a pack the model does not know: see the conformance suite's `packs`.
                        ("EVENT_BUS_NATS__PACK_DELIVERIES", "1".to_owned()),
                    ]
                    .map(|(name, value)| (name.to_owned(), value)),
                )
                .unwrap();
                let connected = Nats::connect(&common, "test").await.unwrap();
                nats = Some(connected.clone());
                Arc::new(JetStreamQueue::new(connected, 1))
            }
            Kind::Postgres => {
                let poll = Duration::from_millis(100);
                let (hints, stop) = (Arc::clone(&notifier), stop.clone());
                Arc::new(PostgresQueue::new(pool.clone(), 1, LEASE, hints, poll, stop))
            }
            Kind::Memory => Arc::new(MemoryQueue::new(pool.clone(), Arc::new(SystemClock), 1, LEASE)),
        };
        queue.prepare().await.unwrap();
        let (sender, notes) = mpsc::unbounded_channel();
        let workers = (0..2)
            .map(|_| Arc::new(worker(&pool, &queue, &notifier, sender.clone(), &tasks, &stop)))
            .collect();
        let (organization, subscriptions) = tenant(&pool).await;
        Self {
            kind,
            pool,
            queue,
            hints,
            notes,
            organization,
            subscriptions,
            workers,
            sender,
            numbers: AtomicU64::new(0),
            stop,
            tasks,
            nats,
            database,
        }
    }

    /// Publishes an event that matched these subscriptions.
    pub(crate) async fn publish(&self, matched: &[(SubscriptionId, ConnectionId)]) -> Vec<DeliveryKey> {
        let event = EventUid(SystemIds.next());
        let subscriptions: Vec<uuid::Uuid> = matched.iter().map(|(id, _)| id.0).collect();
        sqlx::query(
            "INSERT INTO events (uid, organization_id, id, source, type, time, subscriptions, body)
             VALUES ($1, $2, $1::text, '/model', 'model', now(), $3, '{}')",
        )
        .bind(event.0)
        .bind(self.organization.0)
        .bind(subscriptions)
        .execute(&self.pool)
        .await
        .unwrap();
        let since = Timestamp::from_millisecond(1_800_000_000_000).unwrap();
        let deliveries: Vec<Enqueue> = matched
            .iter()
            .map(|(subscription, connection)| Enqueue {
                key: DeliveryKey {
                    id: DeliveryId::derive(event, *subscription),
                    event,
                    organization: self.organization,
                    subscription: *subscription,
                    connection: *connection,
                    connection_version: 1,
                },
                progress: Progress::new(since),
                lane: None,
                body: Body::Inline(Bytes::from_static(b"{}")),
            })
            .collect();
        self.queue.enqueue(&deliveries).await.unwrap();
        deliveries.into_iter().map(|delivery| delivery.key).collect()
    }

    /// A worker pulls, and starts with what it gets. Answers the numbers of what was started.
    pub(crate) async fn pull(&self, worker: usize, max: usize) -> BTreeMap<u64, (DeliveryId, AbortHandle)> {
        use futures::StreamExt as _;
        let wait = Duration::from_millis(20);
        let leased: Vec<_> = self.queue.pull(0, max, wait).await.unwrap().map(Result::unwrap).collect().await;
        assert!(leased.len() <= max, "asked for {max}, got {}", leased.len());
        // A lane so wide that no limit per connection matters.
        let slots = Slots::new(max * 1_000);
        let mut started = BTreeMap::new();
        for leased in leased {
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            let (worker, sender) = (Arc::clone(&self.workers[worker]), self.sender.clone());
            let id = leased.key.id;
            let slot = slots.acquire().await;
            let task = tokio::spawn(async move {
                worker.deliver(leased, slot).await;
                // The test may be over.
                let _ = sender.send(Note::Done(number));
            });
            started.insert(number, (id, task.abort_handle()));
        }
        started
    }

    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        drop(self.workers);
        self.tasks.wait().await;
        if let Some(nats) = &self.nats {
            for stream in [&nats.names.deliver_stream, &nats.names.dead_stream, &nats.names.audit_stream] {
                nats.jetstream.delete_stream(stream).await.unwrap();
            }
        }
        drop(self.queue);
        self.pool.close().await;
        self.database.drop().await.unwrap();
    }
}

fn worker(
    pool: &PgPool,
    queue: &Arc<dyn DeliveryQueue>,
    hints: &Arc<dyn Notifier>,
    sender: mpsc::UnboundedSender<Note>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Deliverer {
    let environment = [("DATABASE_URL", "postgres://localhost/x"), ("NATS_URL", "nats://localhost")];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut settings = load::<WorkerConfig>(None, environment).unwrap().config.worker;
    settings.retry = RetryPolicy {
        max_attempts: MAX_ATTEMPTS,
        base_ms: 1,
        factor: 1.0,
        cap_ms: 1,
        jitter: 0.0,
        ..RetryPolicy::default()
    };
    settings.defer_min_ms = 1;
    // What fails here fails for the sake of the model.
    settings.breaker.enabled = false;
    settings.connection.in_flight = 10_000;
    // Crashes are frequent here.
    settings.max_handed_out = 1_000;
    Deliverer::start(Parts {
        pool: pool.clone(),
        queue: Arc::clone(queue),
        hints: Arc::clone(hints),
        peers: Peers::alone(),
        webhooks: Box::new(Subscriber(sender)),
        settings,
        lease: LEASE,
        longest_gathering: Duration::ZERO,
        clock: Arc::new(SystemClock),
        ids: Arc::new(SystemIds),
        homes: Homes::new(pool.clone(), 1),
        random: || 0.0,
        tasks: tasks.clone(),
        stop: stop.clone(),
    })
}

/// An organization with three connections, one of which has two subscriptions.
async fn tenant(pool: &PgPool) -> (OrganizationId, Vec<(SubscriptionId, ConnectionId)>) {
    let organization = OrganizationId(SystemIds.next());
    sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, $1::text)")
        .bind(organization.0)
        .execute(pool)
        .await
        .unwrap();
    let mut subscriptions = Vec::new();
    for place in 0..3 {
        let connection = ConnectionId(SystemIds.next());
        sqlx::query(
            "INSERT INTO connections (id, organization_id, name, kind, url, secret)
             VALUES ($1, $2, $1::text, 'webhook', 'https://example.com/', 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw')",
        )
        .bind(connection.0)
        .bind(organization.0)
        .execute(pool)
        .await
        .unwrap();
        for number in 0..=usize::from(place == 0) {
            let subscription = SubscriptionId(SystemIds.next());
            sqlx::query(
                "INSERT INTO subscriptions (id, organization_id, connection_id, event_type) VALUES ($1, $2, $3, $4)",
            )
            .bind(subscription.0)
            .bind(organization.0)
            .bind(connection.0)
            .bind(["model", "*"][number])
            .execute(pool)
            .await
            .unwrap();
            subscriptions.push((subscription, connection));
        }
    }
    (organization, subscriptions)
}
