//! Publishing into an organization with few subscriptions, and into one with many.
//!
//! Each hundredth subscription wants the type that is published, and half of all have a filter. Of those that want the type
//! one takes the events in either organization, so that what differs is matching alone; what the filters do not refuse is
//! wanted from another publisher.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;
use devkit::processes::Role;
use serde_json::json;
use uuid::Uuid;

use super::{
    Limits, WARM_UP,
    ground::{BATCH, BATCHES, EVENT, Ground, Load, Run},
    report::{Bound, Figure},
};
use crate::{bench::scene::Tenant, ui::Step};

/// Subscriptions where there are few. Also of a connection, and each one of so many is to the type that is published.
const FEW: u32 = 100;
/// Publishing to many has to reach this share of what publishing to few does, and to cost at most so many times as much.
const LEAST_RATE: f64 = 0.8;
const MOST_COST: f64 = 1.2;

struct Organization {
    tenant: Tenant,
    /// A subscription to another type.
    idle: Uuid,
}

impl Organization {
    async fn create(ground: &mut Ground, name: &str, subscriptions: u32) -> Result<Self> {
        let step = Step::begin(&format!("Subscribing {subscriptions} times"));
        let tenant = Tenant::create(&mut ground.stack, name).await?;
        let hook = tenant.api.create_webhook("0", &ground.receiver.url(0)).await?.require(201)?;
        let other = json!({ "name": "another publisher", "kind": "publisher" });
        let other = tenant.api.post("/v1/connections", &other).await?.require(201)?;
        let wanted = json!({ "connectionId": hook.id(), "eventType": EVENT, "filter": "$[?$.n >= 0]" });
        tenant.api.subscribe(&wanted).await?.require(201)?;
        let (organization, hook, other): (Uuid, Uuid, Uuid) =
            (tenant.organization.parse()?, hook.id().parse()?, other.id().parse()?);
        // There may be more than the API accepts of one organization, and it takes them one by one.
        let mut transaction = ground.pool.begin().await?;
        sqlx::query(
            "WITH template AS (SELECT id, url, secret FROM connections WHERE id = $2),
             hooks AS (
                 INSERT INTO connections (id, organization_id, name, kind, url, secret)
                 SELECT uuidv7(), $1, n::text, 'webhook', url, secret
                   FROM template, generate_series(1, ($4 - 1) / $5) n
                 RETURNING id, name),
             places AS (SELECT id, 0 AS place FROM template UNION ALL SELECT id, name::int FROM hooks)
             INSERT INTO subscriptions (id, organization_id, connection_id, event_type, publisher, filter, filter_hash,
                                        filter_bytes)
             SELECT uuidv7(), $1, places.id,
                    CASE WHEN n % $5 = 0 THEN $6 ELSE 'bench.other' || n % $5 END,
                    CASE WHEN n % $5 = 0 AND filter IS NULL THEN $3 END,
                    filter, sha256(convert_to(filter, 'UTF8')), coalesce(length(filter) * 32, 0)
               FROM generate_series(1, $4 - 1) n
               JOIN places ON place = n / $5
               CROSS JOIN LATERAL (SELECT CASE WHEN (n / $5 + n) % 2 = 0 THEN '$[?$.n < -' || n || ']' END) f (filter)",
        )
        .bind(organization)
        .bind(hook)
        .bind(other)
        .bind(i32::try_from(subscriptions)?)
        .bind(i32::try_from(FEW)?)
        .bind(EVENT)
        .execute(&mut *transaction)
        .await?;
        sqlx::query("UPDATE organizations SET version = version + 1 WHERE id = $1")
            .bind(organization)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        sqlx::query("ANALYZE connections, subscriptions").execute(&ground.pool).await?;
        let idle = "SELECT id FROM subscriptions WHERE organization_id = $1 AND event_type <> $2 LIMIT 1";
        let idle = sqlx::query_scalar(idle).bind(organization).bind(EVENT).fetch_one(&ground.pool).await?;
        step.done();
        Ok(Self { tenant, idle })
    }

    async fn publish(&self, ground: &mut Ground, events: usize) -> Result<Run> {
        let keys: Arc<[String]> = [self.tenant.key.clone()].into();
        ground.publish(&Load { keys, events, batch: BATCH, in_flight: BATCHES }).await
    }

    /// How long one event takes until it is accepted, ms.
    async fn publish_one(&self, ground: &mut Ground) -> Result<f64> {
        Ok(self.publish(ground, 1).await?.accepted.as_secs_f64() * 1e3)
    }

    async fn change(&self, enabled: bool) -> Result<()> {
        let path = format!("/v1/subscriptions/{}", self.idle);
        self.tenant.api.patch(&path, &json!({ "enabled": enabled })).await?.require(200).map(drop)
    }
}

pub(super) async fn measure(limits: &Limits, bin_dir: PathBuf) -> Result<Vec<Figure>> {
    let mut ground = Ground::set(bin_dir).await?;
    let few = Organization::create(&mut ground, "few", FEW).await?;
    let many = Organization::create(&mut ground, "many", limits.subscriptions).await?;
    let events = usize::try_from(limits.events)?;

    let step = Step::begin("Warming up");
    few.publish(&mut ground, (events / WARM_UP).max(1)).await?;
    let before = ground.memory(Role::Publisher)?;
    let first_ms = many.publish_one(&mut ground).await?;
    let grown = ground.memory(Role::Publisher)? as f64 - before as f64;
    many.publish(&mut ground, (events / WARM_UP).max(1)).await?;
    step.done();

    let (mut to_few, mut to_many) = (Vec::new(), Vec::new());
    for round in 1..=limits.rounds {
        let step = Step::begin(&format!("Round {round} of {}", limits.rounds));
        to_few.push(few.publish(&mut ground, events).await?);
        to_many.push(many.publish(&mut ground, events).await?);
        step.done();
    }
    let mut since_change: [Vec<f64>; 3] = Default::default();
    let step = Step::begin("Changing one of the many");
    for round in 1..=limits.rounds {
        many.change(round % 2 == 0).await?;
        for took in &mut since_change {
            took.push(many.publish_one(&mut ground).await?);
        }
    }
    step.done();
    ground.end().await?;

    let rates = |runs: &[Run]| runs.iter().map(Run::accepted_per_s).collect::<Vec<_>>();
    let costs =
        |runs: &[Run]| runs.iter().map(|run| run.cost.of(Role::Publisher.binary())).collect::<Vec<_>>();
    let many = limits.subscriptions;
    let [first, second, third] = since_change;
    Ok(vec![
        Figure::new(format!("events/s accepted, {FEW} subscriptions"), rates(&to_few)),
        Figure::new(format!("events/s accepted, {many} subscriptions"), rates(&to_many)),
        Figure::ratio("events/s, many ÷ few", &rates(&to_many), &rates(&to_few))
            .bound(Bound::AtLeast(LEAST_RATE)),
        Figure::new(format!("publisher's µs an event, {FEW} subscriptions"), costs(&to_few)),
        Figure::new(format!("publisher's µs an event, {many} subscriptions"), costs(&to_many)),
        Figure::ratio("publisher's µs, many ÷ few", &costs(&to_many), &costs(&to_few))
            .bound(Bound::AtMost(MOST_COST)),
        Figure::new("publisher's memory, bytes an idle subscription", vec![grown / f64::from(many)]),
        Figure::new("first event to many, ms", vec![first_ms]),
        Figure::new("first event after a change to one of them, ms", first),
        Figure::new("second event after a change, ms", second),
        Figure::new("third event after a change, ms", third),
    ])
}
