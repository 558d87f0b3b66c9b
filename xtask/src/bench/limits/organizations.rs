//! The same load on few organizations, and spread over many, each with one subscription.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;
use devkit::processes::Role;
use uuid::Uuid;

use super::{
    Limits,
    ground::{EVENT, Ground, Load, Run, by_process},
    report::{Bound, Figure},
};
use crate::{bench::scene::Tenant, ui::Step};

/// Organizations where there are few.
const FEW: u32 = 10;
/// Events of a request: few, since each request is of another organization.
const BATCH: usize = 10;
/// Requests under way at a time.
const REQUESTS: usize = 32;
/// Requests under way at a time when their organizations are published to for the first time.
const FIRST_REQUESTS: usize = 4;
/// Requests of a run at least; otherwise there is one for each of the many.
const LEAST_REQUESTS: u32 = 500;
/// With many organizations it has to reach this share of what it does with few.
const LEAST_RATE: f64 = 0.9;

/// Organizations and what each needs, and gives their keys. The connections are like that of an organization which came
/// through the API.
async fn create(ground: &Ground, like: Uuid, name: &str, count: u32) -> Result<Arc<[String]>> {
    let keys: Vec<String> = (0..count).map(|n| format!("{name}-{n}-{}", Uuid::from_u128(n.into()))).collect();
    sqlx::query(
        "WITH wanted AS MATERIALIZED (
             SELECT uuidv7() AS organization, uuidv7() AS connection, key FROM unnest($1::text[]) key),
         organizations AS (
             INSERT INTO organizations (id, name) SELECT organization, key FROM wanted),
         keys AS (
             INSERT INTO api_keys (id, organization_id, name, hash, scopes)
             SELECT uuidv7(), organization, 'publish', sha256(convert_to(key, 'UTF8')), ARRAY['publish'] FROM wanted),
         hooks AS (
             INSERT INTO connections (id, organization_id, name, kind, url, secret)
             SELECT connection, organization, 'hook', 'webhook', url, secret
               FROM wanted, (SELECT url, secret FROM connections WHERE id = $2) template)
         INSERT INTO subscriptions (id, organization_id, connection_id, event_type)
         SELECT uuidv7(), organization, connection, $3 FROM wanted",
    )
    .bind(&keys)
    .bind(like)
    .bind(EVENT)
    .execute(&ground.pool)
    .await?;
    sqlx::query("ANALYZE organizations, api_keys, connections, subscriptions").execute(&ground.pool).await?;
    Ok(keys.into())
}

/// The memory of publisher and worker after so many events, one by one from a fresh start, and how they went. Few are under
/// way at a time: what a load takes for itself is not what is to be seen.
async fn first_run(ground: &mut Ground, load: &Load, events: u32) -> Result<([u64; 2], Run)> {
    let step = Step::begin(&format!("The first {events} events on {} organizations", load.keys.len()));
    ground.restart(Role::Publisher).await?;
    ground.restart(Role::DeliveryWorker).await?;
    let load = Load { events: usize::try_from(events)?, batch: 1, in_flight: FIRST_REQUESTS, ..load.clone() };
    let run = ground.publish(&load).await?;
    step.done();
    Ok(([ground.memory(Role::Publisher)?, ground.memory(Role::DeliveryWorker)?], run))
}

pub(super) async fn measure(limits: &Limits, bin_dir: PathBuf) -> Result<Vec<Figure>> {
    let mut ground = Ground::set(bin_dir).await?;
    let step = Step::begin(&format!("Creating {FEW} and {} organizations", limits.organizations));
    let template = Tenant::create(&mut ground.stack, "template").await?;
    let hook = template.api.create_webhook("hook", &ground.receiver.url(0)).await?.require(201)?;
    let hook: Uuid = hook.id().parse()?;
    let requests = usize::try_from(limits.organizations.max(LEAST_REQUESTS))?;
    let load = |keys| Load { keys, events: requests * BATCH, batch: BATCH, in_flight: REQUESTS };
    let few = load(create(&ground, hook, "few", FEW).await?);
    let many = load(create(&ground, hook, "many", limits.organizations).await?);
    step.done();

    let (before, again) = first_run(&mut ground, &few, limits.organizations).await?;
    let (after, first) = first_run(&mut ground, &many, limits.organizations).await?;

    let (mut on_few, mut on_many) = (Vec::new(), Vec::new());
    for round in 1..=limits.rounds {
        let step = Step::begin(&format!("Round {round} of {}", limits.rounds));
        on_few.push(ground.publish(&few).await?);
        on_many.push(ground.publish(&many).await?);
        step.done();
    }
    ground.end().await?;

    let rates = |runs: &[Run]| runs.iter().map(Run::delivered_per_s).collect::<Vec<_>>();
    let costs = |runs: &[Run]| runs.iter().map(|run| run.cost.bus()).collect::<Vec<_>>();
    let many = limits.organizations;
    let grown = |place: usize| (after[place] as f64 - before[place] as f64) / f64::from(many);
    let mut figures = vec![
        Figure::new(format!("deliveries/s, {FEW} organizations"), rates(&on_few)),
        Figure::new(format!("deliveries/s, {many} organizations"), rates(&on_many)),
        Figure::ratio("deliveries/s, many ÷ few", &rates(&on_many), &rates(&on_few))
            .bound(Bound::AtLeast(LEAST_RATE)),
        Figure::new(format!("bus's µs a delivery, {FEW} organizations"), costs(&on_few)),
        Figure::new(format!("bus's µs a delivery, {many} organizations"), costs(&on_many)),
        Figure::ratio("bus's µs, many ÷ few", &costs(&on_many), &costs(&on_few)),
        Figure::new(
            "single events/s, the first of each of the many ÷ as many on few",
            vec![first.delivered_per_s() / again.delivered_per_s()],
        ),
        Figure::new("publisher's memory, bytes an idle organization", vec![grown(0)]),
        Figure::new("worker's memory, bytes an idle organization", vec![grown(1)]),
    ];
    let of = |runs: &[Run]| runs.iter().map(|run| run.cost.clone()).collect::<Vec<_>>();
    figures.extend(by_process(&format!("{FEW} organizations"), &of(&on_few)));
    figures.extend(by_process(&format!("{many} organizations"), &of(&on_many)));
    Ok(figures)
}
