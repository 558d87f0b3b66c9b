//! What a worker does about cancellations that it cannot have heard of yet.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    audit::By,
    clock::{Clock as _, SystemClock},
    config::load,
    connection::Connection,
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    notify::{AnnounceError, Hint, MAX_AGE, MemoryNotifier, Notifier},
    peers::Peers,
    pg::{self, Closed},
    queue::{Body, DeliveryQueue, Enqueue, MemoryQueue},
    sink::{AttemptReport, Outcome, Parcel, Sink},
};
use bytes::Bytes;
use delivery_worker::{
    config::WorkerConfig,
    delivery::{Deliverer, Parts},
    lanes::Homes,
    slots::Slots,
};
use devkit::{database::Database, servers::shared_servers, wait_until};
use futures::{StreamExt as _, stream::BoxStream};
use jiff::Timestamp;
use sqlx::PgPool;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const DEADLINE: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(60);

/// Hints that are late while `held` says so.
#[derive(Debug, Clone)]
struct Late {
    hints: MemoryNotifier,
    held: watch::Sender<bool>,
    probes: Arc<AtomicUsize>,
}

#[async_trait]
impl Notifier for Late {
    async fn notify(&self, hint: Hint) {
        self.hints.notify(hint).await;
    }

    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError> {
        self.probes.fetch_add(1, Ordering::Relaxed);
        self.hints.announce(hints).await
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        let held = self.held.subscribe();
        let late = self.hints.listen().then(move |hint| {
            let mut held = held.clone();
            async move {
                held.wait_for(|held| !held).await.unwrap();
                hint
            }
        });
        late.boxed()
    }

    async fn flush(&self) {}
}

/// A subscriber who takes everything, and notes of what and whether hints were late then.
struct Subscriber(Late, watch::Sender<Vec<(DeliveryId, bool)>>);

#[async_trait]
impl Sink for Subscriber {
    async fn attempt(&self, _: &Connection, parcel: Parcel<'_>, _: Timestamp) -> Vec<AttemptReport> {
        let report = AttemptReport {
            outcome: Outcome::Delivered,
            status: None,
            answer: Bytes::new(),
            duration: Duration::from_millis(1),
        };
        let held = *self.0.held.borrow();
        self.1.send_modify(|seen| seen.extend(parcel.deliveries().iter().map(|one| (one.key.id, held))));
        vec![report; parcel.deliveries().len()]
    }
}

struct Scene {
    database: Database,
    pool: PgPool,
    pool_of_worker: PgPool,
    hints: Late,
    queue: MemoryQueue,
    worker: Arc<Deliverer>,
    attempts: watch::Receiver<Vec<(DeliveryId, bool)>>,
    organization: OrganizationId,
    connection: ConnectionId,
    subscription: SubscriptionId,
    stop: CancellationToken,
}

impl Scene {
    async fn new() -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let [organization, connection, subscription] = [(); 3].map(|()| SystemIds.next());
        for statement in [
            "INSERT INTO organizations (id, name) SELECT $1, $2::text || $3::text",
            "INSERT INTO connections (id, organization_id, name, kind, url, secret)
             SELECT $2, $1, $3::text, 'webhook', 'https://example.com/', 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'",
            "INSERT INTO subscriptions (id, organization_id, connection_id, event_type) VALUES ($3, $1, $2, '*')",
        ] {
            let statement = sqlx::query(statement).bind(organization).bind(connection).bind(subscription);
            statement.execute(&pool).await.unwrap();
        }
        let hints = Late {
            hints: MemoryNotifier::default(),
            held: watch::Sender::new(false),
            probes: Arc::default(),
        };
        let environment = [("DATABASE_URL", "postgres://localhost/x"), ("NATS_URL", "nats://localhost")];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let queue = MemoryQueue::new(pool.clone(), Arc::new(SystemClock), 1, LEASE);
        let (seen, attempts) = watch::channel(Vec::new());
        let stop = CancellationToken::new();
        let pool_of_worker = PgPool::connect(database.url()).await.unwrap();
        let worker = Arc::new(Deliverer::start(Parts {
            pool: pool_of_worker.clone(),
            queue: Arc::new(queue.clone()),
            hints: Arc::new(hints.clone()),
            peers: Peers::alone(),
            webhooks: Box::new(Subscriber(hints.clone(), seen)),
            settings: load::<WorkerConfig>(None, environment).unwrap().config.worker,
            lease: LEASE,
            longest_gathering: Duration::ZERO,
            clock: Arc::new(SystemClock),
            ids: Arc::new(SystemIds),
            homes: Homes::new(pool_of_worker.clone(), 1),
            random: || 0.0,
            tasks: TaskTracker::new(),
            stop: stop.clone(),
        }));
        Self {
            database,
            pool,
            pool_of_worker,
            hints,
            queue,
            worker,
            attempts,
            organization: organization.into(),
            connection: connection.into(),
            subscription: subscription.into(),
            stop,
        }
    }

    /// Puts a delivery into the queue, and gives its id.
    async fn publish(&self) -> (EventUid, DeliveryId) {
        let event = EventUid(SystemIds.next());
        sqlx::query(
            "INSERT INTO events (uid, organization_id, id, source, type, time, subscriptions, body)
             VALUES ($1, $2, $1::text, '/test', 'x', now(), ARRAY[$3], '{}')",
        )
        .bind(event.0)
        .bind(self.organization.0)
        .bind(self.subscription.0)
        .execute(&self.pool)
        .await
        .unwrap();
        let key = DeliveryKey {
            id: DeliveryId::derive(event, self.subscription),
            event,
            organization: self.organization,
            subscription: self.subscription,
            connection: self.connection,
            connection_version: 1,
        };
        let progress = Progress::new(SystemClock.now());
        let body = Body::Inline(Bytes::from_static(b"{}"));
        self.queue.enqueue(&[Enqueue { key, progress, lane: None, body }]).await.unwrap();
        (event, key.id)
    }

    /// The worker takes what is in the queue and brings it to its end.
    async fn deliver(&self) {
        let leased = self.queue.pull(0, 1, DEADLINE).await.unwrap().next().await.unwrap().unwrap();
        let slot = Slots::new(1).acquire().await;
        tokio::time::timeout(DEADLINE, self.worker.deliver(leased, slot)).await.unwrap();
    }

    async fn cancel(&self, event: EventUid) {
        let by = By::system(SystemIds.next());
        let closed = pg::close_deliveries(&self.pool, self.organization, event, None, Closed::Cancelled, &by);
        for id in closed.await.unwrap().unwrap() {
            self.hints.announce(&[Hint::Cancelled(id)]).await.unwrap();
        }
    }

    async fn end(self) {
        self.stop.cancel();
        self.pool_of_worker.close().await;
        self.pool.close().await;
        self.database.drop().await.unwrap();
    }
}

#[tokio::test]
async fn nothing_is_attempted_on_the_strength_of_hints_that_are_late() {
    let scene = Scene::new().await;
    let (_, first) = scene.publish().await;
    scene.deliver().await;
    // Nothing it has heard says so, and it knows that it may not have heard everything.
    scene.hints.held.send_replace(true);
    let (event, _) = scene.publish().await;
    scene.cancel(event).await;
    // The promise begins after this time; it is no wait for something.
    tokio::time::sleep(MAX_AGE).await;
    scene.deliver().await;
    // Another one is attempted all the same: the database knows.
    let (_, last) = scene.publish().await;
    scene.deliver().await;
    assert_eq!(*scene.attempts.borrow(), [(first, false), (last, true)]);
    scene.end().await;
}

#[tokio::test]
async fn without_hints_and_without_the_database_a_delivery_is_held() {
    let scene = Scene::new().await;
    let (_, first) = scene.publish().await;
    scene.deliver().await;
    scene.hints.held.send_replace(true);
    let (_, last) = scene.publish().await;
    scene.pool_of_worker.close().await;
    // As above.
    tokio::time::sleep(MAX_AGE).await;
    let before = scene.hints.probes.load(Ordering::Relaxed);
    let hints_return = async {
        wait_until("a second try to catch up", DEADLINE, || async {
            let tries = scene.hints.probes.load(Ordering::Relaxed) - before;
            if tries >= 2 { Ok(()) } else { Err(tries) }
        })
        .await;
        scene.hints.held.send_replace(false);
    };
    tokio::join!(scene.deliver(), hints_return);
    assert_eq!(*scene.attempts.borrow(), [(first, false), (last, false)]);
    scene.end().await;
}
