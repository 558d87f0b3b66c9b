//! Delivering what was queued while there was no worker: little, or much.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;

use super::{
    Limits, WARM_UP,
    ground::{BATCH, BATCHES, EVENT, Ground, Load, Stretch, by_process},
    report::{Bound, Figure},
};
use crate::{bench::scene::Tenant, ui::Step};

/// With much in the queue it has to reach this share of what it does with little, at so many times the cost at most.
const LEAST_RATE: f64 = 0.9;
const MOST_COST: f64 = 1.1;

pub(super) async fn measure(limits: &Limits, bin_dir: PathBuf) -> Result<Vec<Figure>> {
    let mut ground = Ground::set(bin_dir).await?;
    let tenant = Tenant::create(&mut ground.stack, "queued").await?;
    tenant.receive(&ground.receiver.url(0), EVENT).await?;
    let keys: Arc<[String]> = [tenant.key].into();
    let load = |events| Load { keys: Arc::clone(&keys), events, batch: BATCH, in_flight: BATCHES };

    // All stretches are equally long, and none has the start of a worker or the end of the queue in it.
    let much = usize::try_from(limits.queued)?;
    let little = much / 10;
    let edge = little / 10;
    let step = Step::begin("Warming up");
    ground.publish(&load((little / WARM_UP).max(1))).await?;
    step.done();
    let (mut of_little, mut at_first, mut at_last) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=limits.rounds {
        let step = Step::begin(&format!("Round {round} of {}: {little} queued", limits.rounds));
        let [stretch] = ground.drain(&load(little), [(edge, little - edge)]).await?;
        of_little.push(stretch);
        step.done();
        let step = Step::begin(&format!("Round {round} of {}: {much} queued", limits.rounds));
        let ends = [(edge, little - edge), (much - little + edge, much - edge)];
        let [first, last] = ground.drain(&load(much), ends).await?;
        at_first.push(first);
        at_last.push(last);
        step.done();
    }
    ground.end().await?;

    let rates = |of: &[Stretch]| of.iter().map(|stretch| stretch.delivered_per_s).collect::<Vec<_>>();
    let costs = |of: &[Stretch]| of.iter().map(|stretch| stretch.cost.bus()).collect::<Vec<_>>();
    let rate = |what, other| Figure::ratio(what, &rates(&at_first), other).bound(Bound::AtLeast(LEAST_RATE));
    let cost = |what, other| Figure::ratio(what, &costs(&at_first), other).bound(Bound::AtMost(MOST_COST));
    let mut figures = vec![
        Figure::new(format!("deliveries/s, {little} queued"), rates(&of_little)),
        Figure::new(format!("deliveries/s, first tenth of {much} queued"), rates(&at_first)),
        Figure::new(format!("deliveries/s, last tenth of {much} queued"), rates(&at_last)),
        rate("deliveries/s, first tenth ÷ little queued", &rates(&of_little)),
        rate("deliveries/s, first tenth ÷ last tenth", &rates(&at_last)),
        Figure::new(format!("bus's µs a delivery, {little} queued"), costs(&of_little)),
        Figure::new(format!("bus's µs a delivery, first tenth of {much} queued"), costs(&at_first)),
        Figure::new(format!("bus's µs a delivery, last tenth of {much} queued"), costs(&at_last)),
        cost("bus's µs, first tenth ÷ little queued", &costs(&of_little)),
        cost("bus's µs, first tenth ÷ last tenth", &costs(&at_last)),
    ];
    let of = |stretches: &[Stretch]| stretches.iter().map(|stretch| stretch.cost.clone()).collect::<Vec<_>>();
    figures.extend(by_process(&format!("first tenth of {much} queued"), &of(&at_first)));
    figures.extend(by_process(&format!("last tenth of {much} queued"), &of(&at_last)));
    Ok(figures)
}
