//! What the tests of replays share: an organization on a database of its own.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses its part")]

use bus_core::{
    audit::By,
    delivery::{DeliveryKey, Progress},
    ids::{
        ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, ReplayId, SubscriptionId, SystemIds,
    },
    pg::{
        self, CreateReplay, DeadLetter, DeadLetterAction, DeadLetterFilter, DeadLetters, NewReplay, Replay,
        ReplayState, Selection, Whose,
    },
    retry::DeadReason,
};
use cron_scheduler::replay_due;
use devkit::{
    database::{Database, role_url},
    processes::Role,
    servers::shared_servers,
};
use sqlx::PgPool;

/// One organization with a webhook, and the scheduler's view of the database.
pub(crate) struct Scene {
    pub(crate) database: Database,
    pub(crate) owner: PgPool,
    pub(crate) scheduler: PgPool,
    pub(crate) whose: Whose,
    pub(crate) connection: ConnectionId,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let owner = PgPool::connect(database.url()).await.unwrap();
        let scheduler =
            PgPool::connect(&role_url(database.url(), Role::CronScheduler).unwrap()).await.unwrap();
        let organization = OrganizationId(SystemIds.next());
        let connection = ConnectionId(SystemIds.next());
        sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, 'acme')")
            .bind(organization.0)
            .execute(&owner)
            .await
            .unwrap();
        sqlx::query(
            "INSERT INTO connections (id, organization_id, name, kind, url, secret)
             VALUES ($1, $2, 'hook', 'webhook', 'https://receiver.example', 'whsec_x')",
        )
        .bind(connection.0)
        .bind(organization.0)
        .execute(&owner)
        .await
        .unwrap();
        let whose = Whose { organization, only: None };
        Self { database, owner, scheduler, whose, connection }
    }

    pub(crate) async fn subscription(&self, event_type: &str, filter: Option<&str>) -> SubscriptionId {
        let id = SubscriptionId(SystemIds.next());
        sqlx::query(
            "INSERT INTO subscriptions (id, organization_id, connection_id, event_type, filter, filter_hash)
             VALUES ($1, $2, $3, $4, $5, sha256($5::text::bytea))",
        )
        .bind(id.0)
        .bind(self.whose.organization.0)
        .bind(self.connection.0)
        .bind(event_type)
        .bind(filter)
        .execute(&self.owner)
        .await
        .unwrap();
        id
    }

    /// Stored events of a type with a payload `{"n": …}` each, in order.
    pub(crate) async fn events(&self, event_type: &str, count: usize) -> Vec<EventUid> {
        let uids: Vec<EventUid> = (0..count).map(|_| EventUid(SystemIds.next())).collect();
        let bodies: Vec<Vec<u8>> = (0..count)
            .map(|n| {
                let text = format!(
                    r#"{{"specversion":"1.0","id":"{n}","source":"/test","type":"{event_type}","data":{{"n":{n}}}}}"#
                );
                text.into_bytes()
            })
            .collect();
        sqlx::query(
            "INSERT INTO events (uid, organization_id, id, source, type, time, body)
             SELECT uid, $2, uid::text, '/test', $3, now(), body FROM UNNEST($1::uuid[], $4::bytea[]) AS u (uid, body)",
        )
        .bind(uids.iter().map(|uid| uid.0).collect::<Vec<_>>())
        .bind(self.whose.organization.0)
        .bind(event_type)
        .bind(bodies)
        .execute(&self.owner)
        .await
        .unwrap();
        uids
    }

    pub(crate) fn key(&self, event: EventUid, subscription: SubscriptionId) -> DeliveryKey {
        DeliveryKey {
            id: DeliveryId::derive(event, subscription),
            event,
            organization: self.whose.organization,
            subscription,
            connection: self.connection,
            connection_version: 1,
        }
    }

    pub(crate) async fn dead(&self, events: &[EventUid], subscription: SubscriptionId, reason: DeadReason) {
        let progress = Progress { attempts: 20, turn: 20, since: "2026-01-01T00:00:00Z".parse().unwrap() };
        for event in events {
            let letter = DeadLetter::new(self.key(*event, subscription), progress, reason);
            pg::bury(&self.owner, &letter).await.unwrap();
        }
    }

    pub(crate) async fn start(&self, selection: Selection, per_second: u32) -> ReplayId {
        self.start_for(self.whose, selection, per_second).await
    }

    pub(crate) async fn start_for(&self, whose: Whose, selection: Selection, per_second: u32) -> ReplayId {
        let id = ReplayId(SystemIds.next());
        let new = NewReplay { id, whose, selection, per_second, request: None };
        match pg::create_replay(&self.owner, &new, &By::system(SystemIds.next())).await.unwrap() {
            CreateReplay::Stored(_) => id,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn job(&self, id: ReplayId) -> Replay {
        pg::replay(&self.owner, self.whose, id).await.unwrap().unwrap()
    }

    /// How many deliveries are in each state, and how many turns they have had beyond their first replay.
    pub(crate) async fn states(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT state, count(*) FROM delivery_states GROUP BY state ORDER BY state")
            .fetch_all(&self.owner)
            .await
            .unwrap()
    }

    /// Works until the job has ended; the waits between chunks are skipped.
    pub(crate) async fn finish(&self, id: ReplayId) -> Replay {
        loop {
            let job = self.job(id).await;
            if job.finished_at.is_some() {
                return job;
            }
            self.skip_wait().await;
            replay_due(&self.scheduler).await.unwrap();
        }
    }

    pub(crate) async fn skip_wait(&self) {
        sqlx::query("UPDATE replays SET next_at = now() WHERE finished_at IS NULL")
            .execute(&self.owner)
            .await
            .unwrap();
    }

    pub(crate) async fn end(self) {
        self.owner.close().await;
        self.scheduler.close().await;
        self.database.drop().await.unwrap();
    }
}

pub(crate) fn since(subscription: SubscriptionId) -> Selection {
    Selection::Subscription {
        subscription,
        since: "2020-01-01T00:00:00Z".parse().unwrap(),
        until: "2100-01-01T00:00:00Z".parse().unwrap(),
    }
}

pub(crate) fn dead_letters(action: DeadLetterAction, filter: DeadLetterFilter) -> Selection {
    Selection::DeadLetters { action, which: DeadLetters::Filter(filter) }
}

pub(crate) fn progress(job: &Replay) -> (ReplayState, u64, u64) {
    (job.state, job.looked, job.replayed)
}
