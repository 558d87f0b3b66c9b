//! Invariant I8, over the real archiver: what leaves a stream is in cold storage, once, whenever the archiver dies.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use async_nats::{HeaderMap, jetstream};
use bus_core::{
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    receipt::{Receipt, ReceiptOutcome},
};
use cold_storage::{ColdStorage, Config, Query, Value};
use devkit::{
    process::Signal,
    processes::Role,
    servers::connect_nats,
    stack::{Stack, StackOptions},
    wait_until,
};
use futures::TryStreamExt as _;
use jiff::{SignedDuration, Timestamp};
use sqlx::PgPool;
use url::Url;
use uuid::Uuid;

const DEADLINE: Duration = Duration::from_secs(60);

/// The shortest lease.
const LEASE: Duration = Duration::from_secs(5);

/// Where an archiver dies.
const POINTS: [&str; 7] = [
    "archiver.gathered",
    "archiver.written",
    "archiver.confirmed",
    "archiver.committed",
    "archiver.noted",
    "archiver.before-trim",
    "archiver.trimmed",
];

/// An archiver without a bus; the test writes to the audit stream what workers would.
struct Scene {
    stack: Stack,
    pool: PgPool,
    jetstream: jetstream::Context,
    cold: ColdStorage,
    organizations: [OrganizationId; 3],
    /// What was published: delivery and attempt.
    receipts: BTreeSet<(Uuid, i32)>,
    malformed: usize,
}

impl Scene {
    /// With that many archivers, and messages that stay in the stream for so many seconds.
    async fn set(archivers: usize, keep_s: u64) -> Self {
        let mut options = StackOptions::default()
            .role_env(Role::Archiver, "EVENT_BUS_ARCHIVE__LEASE_S", LEASE.as_secs())
            // Everything is due at once.
            .role_env(Role::Archiver, "EVENT_BUS_ARCHIVE__BATCH_AGE_S", 0)
            .role_env(Role::Archiver, "EVENT_BUS_ARCHIVE__BATCH_MESSAGES", 7)
            .env("EVENT_BUS_STREAMS__AUDIT__MAX_AGE_S", keep_s);
        for role in Role::ALL {
            options = options.replicas(role, if role == Role::Archiver { archivers } else { 0 });
        }
        let stack = Stack::start(options).await.unwrap();
        let pool = stack.owner_pool().await.unwrap();
        let client = connect_nats(&stack.nats_url().unwrap()).await.unwrap();
        let url = Url::from_directory_path(stack.cold_dir()).unwrap();
        let cold = ColdStorage::open(&Config::at(url)).unwrap();
        Self {
            stack,
            pool,
            jetstream: jetstream::new(client),
            cold,
            organizations: [(); 3].map(|()| OrganizationId(SystemIds.next())),
            receipts: BTreeSet::new(),
            malformed: 0,
        }
    }

    fn subject(&self, rest: &str) -> String {
        format!("{}.events.audit.{rest}", self.stack.prefix())
    }

    /// Messages with receipts of each organization, and one that nobody can read.
    async fn publish(&mut self, messages: u32) {
        let now: Timestamp = "2026-11-20T23:59:59Z".parse().unwrap();
        for n in 0..messages {
            for (i, organization) in self.organizations.into_iter().enumerate() {
                let event = EventUid(SystemIds.next());
                let subscription = SubscriptionId(SystemIds.next());
                let attempts = (1..=i32::try_from(i).unwrap() + 1).map(|attempt| Receipt {
                    delivery: DeliveryId::derive(event, subscription),
                    attempt: attempt.unsigned_abs(),
                    turn: 0,
                    event,
                    organization,
                    subscription,
                    connection: ConnectionId(SystemIds.next()),
                    outcome: ReceiptOutcome::Failed,
                    status: Some(500),
                    error: Some("no".into()),
                    // Over midnight, so that there are two days.
                    at: now + SignedDuration::from_secs(attempt.into()),
                    duration_ms: n,
                });
                let receipts: Vec<Receipt> = attempts.collect();
                let keys = receipts.iter().map(|receipt| (receipt.delivery.0, receipt.attempt.cast_signed()));
                self.receipts.extend(keys);
                let body = serde_json::to_vec(&receipts).unwrap();
                let subject = self.subject(&format!("receipt.{organization}"));
                self.jetstream.publish(subject, body.into()).await.unwrap().await.unwrap();
            }
        }
        let mut headers = HeaderMap::new();
        headers.insert("X-From", "elsewhere");
        let subject = self.subject("other.kind");
        self.jetstream.publish_with_headers(subject, headers, "no JSON".into()).await.unwrap().await.unwrap();
        self.malformed += 1;
    }

    /// A dead archiver's leases end; nobody waits for that.
    async fn end_leases(&self) {
        sqlx::query("UPDATE archive_sources SET lease_until = '-infinity'")
            .execute(&self.pool)
            .await
            .unwrap();
    }

    /// Starts the archiver so that it stops at this point, and kills it there.
    async fn die_at(&mut self, point: &str) {
        self.end_leases().await;
        let archiver = self.stack.process(Role::Archiver, 0);
        let stops = |log: &str| log.matches("Stopped at a fault point").count();
        let before = stops(&archiver.log_text().unwrap());
        archiver.set_env("BUS_FAULT_POINT", Some(point));
        archiver.respawn().unwrap();
        wait_until(point, DEADLINE, async || {
            let log = archiver.log_text().map_err(|error| error.to_string())?;
            if stops(&log) > before { Ok(()) } else { Err(log) }
        })
        .await;
        archiver.sigkill().await.unwrap();
    }

    /// Starts the archiver, and waits until it has archived and trimmed everything.
    async fn finish(&mut self) {
        self.end_leases().await;
        let archiver = self.stack.process(Role::Archiver, 0);
        archiver.set_env("BUS_FAULT_POINT", None);
        archiver.respawn().unwrap();
        self.wait_until_trimmed().await;
    }

    fn stream(&self) -> String {
        format!("{}_AUDIT", self.stack.prefix().to_ascii_uppercase())
    }

    async fn wait_until_trimmed(&self) {
        let name = self.stream();
        wait_until("the stream is empty", DEADLINE, async || {
            let mut stream = self.jetstream.get_stream(&name).await.map_err(|error| error.to_string())?;
            let state = &stream.info().await.map_err(|error| error.to_string())?.state;
            if state.messages == 0 { Ok(()) } else { Err(format!("{state:?}\n{}", self.stack.all_logs())) }
        })
        .await;
    }

    /// How often the stream's lease has changed hands.
    async fn epoch(&self) -> i64 {
        let epoch =
            sqlx::query_scalar("SELECT epoch FROM archive_sources WHERE source = $1").bind(self.stream());
        epoch.fetch_optional(&self.pool).await.unwrap().unwrap_or(0)
    }

    /// Which of these archivers says that it holds the lease, and since when.
    async fn holder(&mut self, archivers: [usize; 2]) -> (usize, i64) {
        let source = self.stream();
        let (mut found, pool) = (None, self.pool.clone());
        let until = Instant::now() + DEADLINE;
        while found.is_none() {
            assert!(Instant::now() < until, "nobody says that it holds the lease");
            let epoch: i64 = sqlx::query_scalar("SELECT epoch FROM archive_sources WHERE source = $1")
                .bind(&source)
                .fetch_one(&pool)
                .await
                .unwrap();
            let line = format!("source=\"{source}\" epoch={epoch}\n");
            for index in archivers {
                if self.stack.process(Role::Archiver, index).log_text().unwrap().contains(&line) {
                    found = Some((index, epoch));
                }
            }
            // It says so right after it has taken it.
            tokio::task::yield_now().await;
        }
        found.unwrap()
    }

    async fn wait_for_epoch(&self, epoch: i64) {
        wait_until("the lease changes hands", DEADLINE, async || match self.epoch().await {
            found if found >= epoch => Ok(()),
            found => Err(found),
        })
        .await;
    }

    /// Which stream the archiver says that it is.
    async fn incarnation(&self) -> String {
        let incarnation =
            "SELECT incarnation FROM archive_sources WHERE source = $1 AND incarnation IS NOT NULL";
        let incarnation = sqlx::query_scalar(incarnation).bind(self.stream());
        incarnation.fetch_optional(&self.pool).await.unwrap().unwrap_or_default()
    }

    /// Gives the incarnation when everything is in cold storage.
    async fn wait_until_archived(&self) -> String {
        let name = self.stream();
        wait_until("everything is archived", DEADLINE, async || {
            let mut stream = self.jetstream.get_stream(&name).await.map_err(|error| error.to_string())?;
            let last = stream.info().await.map_err(|error| error.to_string())?.state.last_sequence;
            let next = sqlx::query_scalar("SELECT next FROM archive_sources WHERE source = $1").bind(&name);
            let next: Option<i64> = next.fetch_optional(&self.pool).await.unwrap();
            if next == Some(last.cast_signed() + 1) { Ok(()) } else { Err(format!("{next:?} of {last}")) }
        })
        .await;
        self.incarnation().await
    }

    async fn rows(&self, domain: &str) -> Vec<cold_storage::Record> {
        let query = Query {
            domain: domain.into(),
            organization: None,
            since: None,
            until: None,
            event: None,
            limit: usize::MAX,
        };
        self.cold.query(&query).unwrap().try_collect().await.unwrap()
    }

    /// Nothing lost, nothing twice, and nothing in cold storage that no manifest names.
    async fn check(&self) {
        let report = self.cold.verify(|_| ()).await.unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        assert!(report.in_progress.is_empty(), "{:?}", report.in_progress);
        let mut archived = BTreeMap::new();
        for row in self.rows("receipts").await {
            let (Some(Value::Uuid(delivery)), Some(Value::Int(attempt))) =
                (row.get("delivery"), row.get("attempt"))
            else {
                panic!("{row:?}")
            };
            *archived.entry((*delivery, *attempt)).or_insert(0) += 1;
        }
        let lost: Vec<_> = self.receipts.iter().filter(|key| !archived.contains_key(key)).collect();
        let twice: Vec<_> = archived.iter().filter(|(_, times)| **times > 1).collect();
        assert!(lost.is_empty() && twice.is_empty(), "lost {lost:?}, twice {twice:?}");
        assert_eq!(archived.len(), self.receipts.len());
        assert_eq!(self.rows("messages").await.len(), self.malformed);
        let history: Vec<(Uuid, i32)> = sqlx::query_as("SELECT delivery_id, attempt FROM delivery_attempts")
            .fetch_all(&self.pool)
            .await
            .unwrap();
        assert_eq!(history.len(), self.receipts.len());
        assert_eq!(history.into_iter().collect::<BTreeSet<_>>(), self.receipts);
    }
}

/// `ARCHIVE_KILLS=50` for a long run.
#[tokio::test]
async fn i8_an_archiver_that_dies_after_any_step_loses_nothing_and_archives_nothing_twice() {
    let kills = std::env::var("ARCHIVE_KILLS").map_or(POINTS.len(), |kills| kills.parse().unwrap());
    let mut scene = Scene::set(1, 1).await;
    scene.stack.process(Role::Archiver, 0).sigkill().await.unwrap();
    for point in POINTS.iter().cycle().take(kills) {
        scene.publish(4).await;
        scene.die_at(point).await;
    }
    scene.publish(4).await;
    scene.finish().await;
    scene.check().await;
    let repeats = scene.stack.process(Role::Archiver, 0).log_text().unwrap();
    assert!(repeats.contains("Trimmed what is in cold storage"), "{repeats}");
    println!("archive: {kills} kills, {} receipts, lost 0, doubled 0", scene.receipts.len());
    scene.pool.close().await;
    scene.stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i8_an_archiver_that_was_only_slow_does_no_harm_to_its_successor() {
    let mut scene = Scene::set(1, 1).await;
    scene.publish(8).await;
    scene.wait_for_epoch(1).await;
    let other = scene.stack.spawn(Role::Archiver, &[]).unwrap();
    scene.stack.process(Role::Archiver, other).wait_ready().await.unwrap();
    // Each time the one that holds the lease.
    for _ in 0..3 {
        scene.publish(8).await;
        let (slow, epoch) = scene.holder([0, other]).await;
        scene.stack.process(Role::Archiver, slow).signal(Signal::STOP).unwrap();
        scene.wait_for_epoch(epoch + 1).await;
        scene.publish(8).await;
        scene.stack.process(Role::Archiver, slow).signal(Signal::CONT).unwrap();
        scene.publish(8).await;
        scene.wait_until_trimmed().await;
    }
    scene.check().await;
    scene.pool.close().await;
    scene.stack.shutdown().await.unwrap();
}

#[tokio::test]
async fn i8_a_broker_that_has_gone_back_gives_out_numbers_that_are_archived_and_nothing_is_taken_for_done() {
    let mut scene = Scene::set(1, 3_600).await;
    scene.publish(8).await;
    let archived = scene.wait_until_archived().await;
    assert!(!archived.contains("-r"), "{archived}");

    // What the broker has in the last archived message's place came at another time: a moment later.
    let earlier = "UPDATE archive_sources SET last_at = last_at - interval '10 us' WHERE source = $1";
    sqlx::query(earlier).bind(scene.stream()).execute(&scene.pool).await.unwrap();
    scene.end_leases().await;
    let archiver = scene.stack.process(Role::Archiver, 0);
    archiver.sigkill().await.unwrap();
    archiver.respawn().unwrap();
    wait_until("the archiver notices", DEADLINE, async || match scene.incarnation().await {
        found if found == format!("{archived}-r1") => Ok(()),
        found => Err(found),
    })
    .await;

    // It goes on from there, once.
    scene.publish(8).await;
    assert_eq!(scene.wait_until_archived().await, format!("{archived}-r1"));
    let report = scene.cold.verify(|_| ()).await.unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert_eq!(
        scene.rows("messages").await.len(),
        scene.malformed + 1,
        "that one message is there under both numbers"
    );
    assert_eq!(scene.rows("receipts").await.len(), scene.receipts.len());
    scene.pool.close().await;
    scene.stack.shutdown().await.unwrap();
}
