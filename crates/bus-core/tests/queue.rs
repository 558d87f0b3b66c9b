//! What every delivery queue does, run against each implementation on its real server.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bus_core::{
    config::NatsConfig,
    delivery::DeliveryKey,
    ids::{DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    nats::Nats,
    notify::PostgresNotifier,
    queue::{Body, DeliveryQueue, Enqueue, JetStreamQueue, Leased, MAX_INLINE, PostgresQueue},
};
use bytes::Bytes;
use devkit::{database::Database, servers::shared_servers, wait_until};
use futures::StreamExt as _;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_secs(2);
/// How long a lease lasts here.
const LEASE: Duration = Duration::from_secs(2);
/// What no hint announced is seen after this time.
const POLL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
enum Kind {
    JetStream,
    Postgres,
}

/// A queue of one lane, and a second worker's view of it.
struct Fixture {
    queue: Arc<dyn DeliveryQueue>,
    other_worker: Arc<dyn DeliveryQueue>,
    nats: Option<Nats>,
    pool: PgPool,
    organization: OrganizationId,
    database: Database,
}

impl Fixture {
    async fn new(kind: Kind) -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let prefix = devkit::random_token(6);
        let (queue, other_worker, nats): (Arc<dyn DeliveryQueue>, Arc<dyn DeliveryQueue>, _) = match kind {
            Kind::JetStream => {
                let config = NatsConfig {
                    url: Some(servers.nats_url().to_owned().into()),
                    credentials_file: None,
                    replicas: 1,
                    duplicate_window_s: 120,
                    ack_wait_ms: u64::try_from(LEASE.as_millis()).unwrap(),
                    max_ack_pending: 100,
                    max_stream_bytes: 64 * 1024 * 1024,
                    max_audit_bytes: 64 * 1024 * 1024,
                    max_dead_bytes: 64 * 1024 * 1024,
                };
                let nats = Nats::connect(&config, &prefix, "test").await.unwrap();
                let other = Nats::connect(&config, &prefix, "other").await.unwrap();
                (
                    Arc::new(JetStreamQueue::new(nats.clone(), 1)),
                    Arc::new(JetStreamQueue::new(other, 1)),
                    Some(nats),
                )
            }
            Kind::Postgres => {
                let stop = CancellationToken::new();
                let queue = || {
                    let hints = Arc::new(PostgresNotifier::new(pool.clone(), &prefix, stop.clone()));
                    Arc::new(PostgresQueue::new(pool.clone(), 1, LEASE, hints, POLL, stop.clone()))
                };
                (queue(), queue(), None)
            }
        };
        queue.prepare().await.unwrap();
        other_worker.prepare().await.unwrap();
        let organization = OrganizationId(SystemIds.next());
        Self { queue, other_worker, nats, pool, organization, database }
    }

    /// A delivery of a stored event with this body.
    async fn delivery(&self, body: &[u8]) -> Enqueue {
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
            connection: SystemIds.next().into(),
            connection_version: 3,
        };
        Enqueue { key, attempts: 0, body: Body::bounded(&Bytes::copy_from_slice(body)) }
    }

    async fn deliveries(&self, n: usize) -> Vec<Enqueue> {
        let mut deliveries = Vec::with_capacity(n);
        for number in 0..n {
            deliveries.push(self.delivery(number.to_string().as_bytes()).await);
        }
        deliveries
    }

    async fn end(self) {
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
async fn pull(queue: &Arc<dyn DeliveryQueue>, max: usize) -> Vec<Leased> {
    let leased = queue.pull(0, max, WAIT).await.unwrap();
    leased.map(Result::unwrap).collect().await
}

/// Pulls until there are `n`.
async fn pull_all(queue: &Arc<dyn DeliveryQueue>, n: usize) -> Vec<Leased> {
    let mut all = Vec::new();
    let until = tokio::time::Instant::now() + DEADLINE;
    while all.len() < n {
        assert!(tokio::time::Instant::now() < until, "{} of {n} deliveries came", all.len());
        all.extend(pull(queue, n - all.len()).await);
    }
    all
}

fn ids(deliveries: &[Enqueue]) -> BTreeSet<DeliveryId> {
    deliveries.iter().map(|delivery| delivery.key.id).collect()
}

async fn comes_out_as_it_was_put_in(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.deliveries(50).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let leased = pull_all(&fixture.queue, 50).await;
    for one in leased {
        let sent = deliveries.iter().find(|delivery| delivery.key == one.key).expect("one that was put in");
        assert_eq!((one.attempts, &one.body), (0, &sent.body));
        one.lease.ack().await.unwrap();
    }
    assert!(pull(&fixture.queue, 10).await.is_empty(), "what is finished does not come again");
    fixture.end().await;
}

async fn is_put_in_once_however_often_it_is_tried(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.deliveries(20).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    fixture.other_worker.enqueue(&deliveries).await.unwrap();
    let leased = pull_all(&fixture.queue, 20).await;
    assert_eq!(leased.iter().map(|one| one.key.id).collect::<BTreeSet<_>>(), ids(&deliveries));
    for one in leased {
        one.lease.ack().await.unwrap();
    }
    assert!(pull(&fixture.queue, 10).await.is_empty());
    fixture.end().await;
}

async fn hands_out_no_more_than_was_asked_for(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.queue.enqueue(&fixture.deliveries(30).await).await.unwrap();
    let first = pull(&fixture.queue, 7).await;
    assert_eq!(first.len(), 7);
    fixture.end().await;
}

async fn a_second_worker_takes_only_what_nobody_holds(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.deliveries(20).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let mine = pull_all(&fixture.queue, 12).await;
    let others = pull_all(&fixture.other_worker, 8).await;
    let all: BTreeSet<_> = mine.iter().chain(&others).map(|one| one.key.id).collect();
    assert_eq!(all, ids(&deliveries), "each is held by one worker");
    fixture.end().await;
}

async fn what_a_dead_worker_held_comes_again(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let deliveries = fixture.deliveries(5).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    // Dropped without an answer, as a crash does.
    drop(pull_all(&fixture.queue, 5).await);
    let again = pull_all(&fixture.other_worker, 5).await;
    assert_eq!(again.iter().map(|one| one.key.id).collect::<BTreeSet<_>>(), ids(&deliveries));
    fixture.end().await;
}

async fn what_is_put_back_comes_again_with_one_more_attempt(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let mut deliveries = fixture.deliveries(1).await;
    deliveries[0].attempts = 4;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let first = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!(first.attempts, 4);
    first.lease.retry(Duration::from_millis(300)).await.unwrap();
    let second = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((second.key, second.attempts), (deliveries[0].key, 5));
    second.lease.ack().await.unwrap();
    fixture.end().await;
}

async fn a_hold_that_is_extended_lasts(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.queue.enqueue(&fixture.deliveries(1).await).await.unwrap();
    let held = pull_all(&fixture.queue, 1).await.remove(0);
    for _ in 0..4 {
        held.lease.extend().await.unwrap();
        let taken = fixture.other_worker.pull(0, 1, LEASE / 2).await.unwrap().next().await;
        assert!(taken.is_none(), "nobody else gets what is held");
    }
    held.lease.ack().await.unwrap();
    fixture.end().await;
}

async fn deliveries_that_wait_do_not_stop_the_others(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    fixture.queue.enqueue(&fixture.deliveries(10).await).await.unwrap();
    for waiting in pull_all(&fixture.queue, 10).await {
        waiting.lease.retry(Duration::from_secs(5)).await.unwrap();
    }
    let fresh = fixture.deliveries(10).await;
    fixture.queue.enqueue(&fresh).await.unwrap();
    let next = pull_all(&fixture.queue, 10).await;
    assert_eq!(next.iter().map(|one| one.key.id).collect::<BTreeSet<_>>(), ids(&fresh));
    fixture.end().await;
}

async fn a_waiting_pull_gets_what_is_enqueued_meanwhile(kind: Kind) {
    let fixture = Fixture::new(kind).await;
    let queue = fixture.queue.clone();
    let waiting = tokio::spawn(async move { pull_all(&queue, 1).await });
    let deliveries = fixture.deliveries(1).await;
    fixture.other_worker.enqueue(&deliveries).await.unwrap();
    let got = waiting.await.unwrap();
    assert_eq!(got[0].key, deliveries[0].key);
    fixture.end().await;
}

macro_rules! on_every_queue {
    ($($behaviour:ident),* $(,)?) => {
        mod jetstream {
            $(#[tokio::test] async fn $behaviour() { super::$behaviour(super::Kind::JetStream).await })*
        }
        mod postgres {
            $(#[tokio::test] async fn $behaviour() { super::$behaviour(super::Kind::Postgres).await })*
        }
    };
}

on_every_queue! {
    comes_out_as_it_was_put_in,
    is_put_in_once_however_often_it_is_tried,
    hands_out_no_more_than_was_asked_for,
    a_second_worker_takes_only_what_nobody_holds,
    what_a_dead_worker_held_comes_again,
    what_is_put_back_comes_again_with_one_more_attempt,
    a_hold_that_is_extended_lasts,
    deliveries_that_wait_do_not_stop_the_others,
    a_waiting_pull_gets_what_is_enqueued_meanwhile,
}

#[tokio::test]
async fn i10_many_large_fan_outs_at_once_do_not_wait_for_each_other() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let sample = fixture.delivery(b"many").await;
    let fan_outs = (0..16).map(|_| {
        let deliveries: Vec<Enqueue> = (0..1_000)
            .map(|_| {
                let key = DeliveryKey { id: DeliveryId(SystemIds.next()), ..sample.key };
                Enqueue { key, ..sample.clone() }
            })
            .collect();
        let queue = fixture.queue.clone();
        async move { queue.enqueue(&deliveries).await.unwrap() }
    });
    tokio::time::timeout(DEADLINE, futures::future::join_all(fan_outs)).await.expect("every fan-out ends");
    let nats = fixture.nats.clone().unwrap();
    let stream = nats.jetstream.get_stream(&nats.names.deliver_stream).await.unwrap();
    assert_eq!(stream.cached_info().state.messages, 16_000);
    fixture.end().await;
}

#[tokio::test]
async fn a_lane_of_an_earlier_configuration_is_still_pulled() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    assert_eq!(fixture.queue.lanes().await.unwrap(), 1);
    let earlier: Arc<dyn DeliveryQueue> = Arc::new(JetStreamQueue::new(nats, 8));
    // Whoever pulled lane 5 made its consumer.
    assert!(earlier.pull(5, 1, Duration::from_millis(100)).await.unwrap().next().await.is_none());
    assert_eq!(fixture.queue.lanes().await.unwrap(), 6);
    fixture.end().await;
}

#[tokio::test]
async fn i10_a_large_body_stays_out_of_the_stream() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let large = fixture.delivery(&vec![b'x'; MAX_INLINE + 1]).await;
    assert_eq!(large.body, Body::Stored);
    fixture.queue.enqueue(std::slice::from_ref(&large)).await.unwrap();
    let leased = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!((leased.key, &leased.body), (large.key, &Body::Stored));
    leased.lease.ack().await.unwrap();
    fixture.end().await;
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_set_aside_and_blocks_nothing() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    let subject = nats.names.deliver(0, fixture.organization, SystemIds.next().into());
    nats.jetstream.publish(subject.clone(), "not ours".into()).await.unwrap().await.unwrap();
    let deliveries = fixture.deliveries(1).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let leased = pull_all(&fixture.queue, 1).await.remove(0);
    assert_eq!(leased.key, deliveries[0].key);
    leased.lease.ack().await.unwrap();
    let dead = nats.jetstream.get_stream(&nats.names.dead_stream).await.unwrap();
    let aside = dead.get_last_raw_message_by_subject(&nats.names.malformed()).await.unwrap();
    assert_eq!(aside.payload, "not ours");
    assert_eq!(aside.headers.get("Bus-Reason").unwrap().as_str(), "no headers");
    assert_eq!(aside.headers.get("Bus-Subject").unwrap().as_str(), subject);
    wait_until("an empty work queue", DEADLINE, || async {
        let stream = nats.jetstream.get_stream(&nats.names.deliver_stream).await.unwrap();
        let left = stream.cached_info().state.messages;
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    fixture.end().await;
}

#[tokio::test]
async fn a_full_stream_refuses_and_keeps_what_it_has() {
    let fixture = Fixture::new(Kind::JetStream).await;
    let nats = fixture.nats.clone().unwrap();
    let mut config =
        nats.jetstream.get_stream(&nats.names.deliver_stream).await.unwrap().cached_info().config.clone();
    config.max_bytes = 10_000;
    nats.jetstream.update_stream(config).await.unwrap();
    let mut accepted = Vec::new();
    loop {
        let one = fixture.delivery(&[b'x'; 1_000]).await;
        match fixture.queue.enqueue(std::slice::from_ref(&one)).await {
            Ok(()) => accepted.push(one),
            Err(_) => break,
        }
        assert!(accepted.len() < 100, "the stream does not refuse");
    }
    let held = pull_all(&fixture.queue, accepted.len()).await;
    assert_eq!(held.iter().map(|one| one.key.id).collect::<BTreeSet<_>>(), ids(&accepted));
    fixture.end().await;
}

#[tokio::test]
async fn a_late_answer_of_an_earlier_holder_changes_nothing() {
    let fixture = Fixture::new(Kind::Postgres).await;
    let deliveries = fixture.deliveries(1).await;
    fixture.queue.enqueue(&deliveries).await.unwrap();
    let late = pull_all(&fixture.queue, 1).await.remove(0);
    let present = pull_all(&fixture.other_worker, 1).await.remove(0);
    late.lease.ack().await.unwrap();
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM delivery_queue").fetch_one(&fixture.pool).await.unwrap();
    assert_eq!(left, 1, "the present holder still has it");
    present.lease.ack().await.unwrap();
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM delivery_queue").fetch_one(&fixture.pool).await.unwrap();
    assert_eq!(left, 0);
    fixture.end().await;
}
