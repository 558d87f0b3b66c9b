//! What the measurements share: a private stack, organizations, and many events published at once.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use devkit::{
    client::ApiClient,
    poll,
    processes::Role,
    receiver::Receiver,
    servers::Durability,
    stack::{ServerChoice, Stack, StackOptions},
};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection, PgPool};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::ui::Step;

/// Events of one request.
const BATCH: usize = 500;
/// How long history may take to have what was delivered.
const SETTLED: Duration = Duration::from_secs(300);

/// Starts servers that keep what they acknowledge, and one of each binary unless the options say otherwise.
pub(super) async fn start(bin_dir: PathBuf, options: StackOptions) -> Result<Stack> {
    let step = Step::begin("Starting nats-server, Postgres and the binaries");
    let mut options = options.servers(ServerChoice::Own(Durability::Full));
    options.bin_dir = Some(bin_dir);
    let stack = Stack::start(options).await?;
    step.done();
    Ok(stack)
}

/// So that no run pays for what one before it has written.
pub(super) async fn write_what_is_dirty(stack: &mut Stack) -> Result<()> {
    let mut superuser = PgConnection::connect(&stack.postgres().superuser_url("postgres")).await?;
    sqlx::query("CHECKPOINT").execute(&mut superuser).await.context("write what is dirty")?;
    superuser.close().await?;
    Ok(())
}

/// Waits until history has so many deliveries of events since then, and makes sure that none of them failed.
pub(super) async fn settle(stack: &Stack, pool: &PgPool, since: Uuid, deliveries: usize) -> Result<()> {
    let wanted = i64::try_from(deliveries)?;
    let other = poll("history to have every delivery", SETTLED, async || {
        let attempts: Result<(i64, i64), _> = sqlx::query_as(
            "SELECT count(*) FILTER (WHERE outcome = 'delivered'), count(*) FILTER (WHERE outcome <> 'delivered')
             FROM delivery_attempts WHERE event_uid >= $1",
        )
        .bind(since)
        .fetch_one(pool)
        .await;
        match attempts {
            Ok((delivered, other)) if delivered >= wanted => Ok(other),
            Ok((delivered, _)) => Err(format!("{delivered} of {wanted}")),
            Err(failed) => Err(failed.to_string()),
        }
    })
    .await?;
    ensure!(other == 0, "{other} attempts did not deliver");
    poll("the queue to be empty", SETTLED, async || match stack.undelivered().await {
        Ok(0) => Ok(()),
        Ok(left) => Err(format!("{left} are left")),
        Err(failed) => Err(format!("{failed:#}")),
    })
    .await?;
    let dead: i64 = sqlx::query_scalar("SELECT count(*) FROM delivery_states WHERE state = 'dead'")
        .fetch_one(pool)
        .await?;
    ensure!(dead == 0, "{dead} deliveries are dead");
    Ok(())
}

/// An organization, and a key that may do everything in it.
#[derive(Debug, Clone)]
pub(super) struct Tenant {
    pub(super) api: ApiClient,
    pub(super) organization: String,
    pub(super) key: String,
}

impl Tenant {
    pub(super) async fn create(stack: &mut Stack, name: &str) -> Result<Self> {
        let admin = stack.admin(0)?;
        let organization = admin.create_organization(name).await?.require(201)?.id().to_owned();
        let key = json!({ "name": "all", "scopes": ["publish", "subscribe", "read", "admin"] });
        let key = admin.create_key(&organization, &key).await?.require(201)?.text("/key").to_owned();
        let api = stack.client(0)?.with_token(&key);
        Ok(Self { api, organization, key })
    }

    /// A webhook connection, with one subscription to events of this type.
    pub(super) async fn receive(&self, url: &str, event_type: &str) -> Result<()> {
        let hook = self.api.create_webhook(&format!("{event_type} at {url}"), url).await?.require(201)?;
        self.subscribe(hook.id(), event_type).await
    }

    /// A subscription of a connection.
    pub(super) async fn subscribe(&self, connection: &str, event_type: &str) -> Result<()> {
        let wanted = json!({ "connectionId": connection, "eventType": event_type });
        self.api.subscribe(&wanted).await?.require(201).map(drop)
    }

    /// Publishes `count` events as fast as they are taken, with so many requests under way at a time. `room` is asked before
    /// each request, with the number of the events before it, and returns when there is room for more.
    pub(super) async fn publish_many(
        &self,
        count: usize,
        requests: usize,
        event: impl Fn(usize) -> Value,
        room: impl AsyncFn(usize) -> Result<()>,
    ) -> Result<()> {
        let mut under_way = JoinSet::new();
        for first in (0..count).step_by(BATCH) {
            room(first).await?;
            let batch: Value = (first..count.min(first + BATCH)).map(&event).collect();
            under_way.spawn(patiently(self.api.clone(), batch));
            while under_way.len() >= requests {
                under_way.join_next().await.context("there is one")???;
            }
        }
        while let Some(accepted) = under_way.join_next().await {
            accepted??;
        }
        Ok(())
    }
}

/// 503 asks for patience: the bus protects itself.
async fn patiently(api: ApiClient, batch: Value) -> Result<()> {
    loop {
        let reply = api.publish(&batch).await?;
        if reply.status != 503 {
            return reply.require(202).map(drop);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// A private stack with one organization.
pub(super) struct Scene {
    pub(super) stack: Stack,
    pub(super) receiver: Receiver,
    pub(super) tenant: Tenant,
}

impl Scene {
    /// Starts it; every event whose type begins with `bench` goes to the receiver's `/bench`.
    pub(super) async fn set(bin_dir: PathBuf, schedulers: usize) -> Result<Self> {
        let options = StackOptions::default()
            .replicas(Role::CronScheduler, schedulers)
            .role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MIN_INTERVAL_S", 1)
            .role_env(Role::Publisher, "EVENT_BUS_SCHEDULES__MAX_PER_ORGANIZATION", 1_000_000);
        let mut stack = start(bin_dir, options).await?;
        let receiver = Receiver::start().await?;
        let tenant = Tenant::create(&mut stack, "bench").await?;
        tenant.receive(&receiver.url("/bench"), "bench.>").await?;
        Ok(Self { stack, receiver, tenant })
    }
}
