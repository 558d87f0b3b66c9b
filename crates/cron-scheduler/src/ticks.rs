//! Schedules are visited when a tick is due: it is fired, or skipped with a reason.

use std::{collections::HashSet, time::Duration};

use bus_core::{
    cloudevent::CloudEvent,
    fanout::Target,
    ids::{EventUid, ScheduleId},
    pg::{self, NewEvent, Schedule, ScheduleState, StoreError, Visited},
    schedule::{Bounds, Circumstances, Decision, Overlap, Position, Recurrence, SkipReason, occurrence},
    telemetry::Chain,
};
use jiff::Timestamp;
use metrics::{counter, histogram};
use sqlx::{Postgres, Transaction};
use tracing::{error, warn};

use crate::{
    due::IDLE,
    firing::{Budget, Firing, HOLD_S, MAX_BYTES, PUT_OFF_S, Stored},
};

/// Schedules visited in one transaction.
const SCHEDULES: u32 = 200;

/// Ticks looked at in one transaction, and in one visit to a schedule. After a long outage there are more, and
/// schedules are visited again.
const MAX_LOOKED: usize = 50_000;
const MAX_LOOKED_OF_ONE: usize = 10_000;

/// Ticks of one schedule that are fired in one visit: what one has to catch up does not hold up the others.
const MAX_FIRED_OF_ONE: usize = 100;

/// Visits some of the schedules that are due; answers how long there is nothing more to do.
pub async fn visit_due(firing: &Firing) -> Result<Duration, StoreError> {
    let Some(claimed) = ClaimedSchedules::claim(firing, None).await? else { return Ok(IDLE) };
    let ids: Vec<ScheduleId> = claimed.schedules.iter().map(|schedule| schedule.id).collect();
    match claimed.publish().await {
        // What the database refuses for one schedule must not stop the others.
        Err(failed) if !failed.is_unavailable() => {
            warn!(error = %Chain(&failed), schedules = ids.len(), "A visit failed; each schedule is tried alone");
            for id in ids {
                visit_alone(firing, id).await?;
            }
        }
        published => published?,
    }
    Ok(Duration::ZERO)
}

async fn visit_alone(firing: &Firing, id: ScheduleId) -> Result<(), StoreError> {
    let Some(claimed) = ClaimedSchedules::claim(firing, Some(id)).await? else { return Ok(()) };
    match claimed.publish().await {
        Err(failed) if !failed.is_unavailable() => {
            error!(schedule.id = %id, error = %Chain(&failed), "A schedule cannot be visited; it is put off");
            pg::put_off_schedules(&firing.pool, &[id], PUT_OFF_S).await
        }
        published => published,
    }
}

/// Schedules that are due, held by this process.
#[derive(Debug)]
#[must_use = "what is claimed is free again when this is dropped"]
pub struct ClaimedSchedules<'f> {
    firing: &'f Firing,
    transaction: Transaction<'static, Postgres>,
    schedules: Vec<Schedule>,
    /// Those that cannot be read.
    unfit: Vec<ScheduleId>,
}

impl<'f> ClaimedSchedules<'f> {
    /// Claims the schedules that are due the longest, or only this one; none if none is due.
    pub async fn claim(firing: &'f Firing, only: Option<ScheduleId>) -> Result<Option<Self>, StoreError> {
        let mut transaction = pg::begin(&firing.pool).await?;
        let (schedules, unfit) =
            pg::claim_schedules(&mut transaction, only, SCHEDULES, MAX_BYTES.into(), HOLD_S).await?;
        for (id, failed) in &unfit {
            error!(schedule.id = %id, error = %Chain(failed), "A schedule cannot be read");
        }
        let unfit: Vec<ScheduleId> = unfit.into_iter().map(|(id, _)| id).collect();
        let any = !schedules.is_empty() || !unfit.is_empty();
        Ok(any.then_some(Self { firing, transaction, schedules, unfit }))
    }

    /// Decides on their ticks, and stores what becomes of them and the events of those that are fired. Schedules that do
    /// not fit are left for the next transaction.
    pub async fn store(self) -> Result<Stored<'f>, StoreError> {
        let Self { firing, mut transaction, schedules, mut unfit } = self;
        let now = pg::transaction_time(&mut transaction).await?;
        let organizations = schedules.iter().map(|schedule| schedule.organization);
        let snapshots = firing.snapshots(&mut transaction, organizations).await?;
        let before = schedules.iter().filter(|schedule| schedule.rules.overlap == Overlap::Skip);
        let before: Vec<EventUid> = before.filter_map(|schedule| schedule.last_event).collect();
        let open = if before.is_empty() {
            HashSet::new()
        } else {
            pg::with_open_deliveries(&mut transaction, &before).await?
        };
        let (mut budget, mut visits, mut matched) = (Budget::new(), Vec::new(), Vec::new());
        let mut looked = 0;
        let deciding = || {
            for schedule in schedules {
                if budget.events == 0 || looked >= MAX_LOOKED {
                    break;
                }
                let Some((template, position)) = Template::of(&schedule).zip(schedule.position) else {
                    unfit.push(schedule.id);
                    continue;
                };
                let snapshot = snapshots.get(&schedule.organization);
                let targets = snapshot
                    .map_or_else(Vec::new, |known| Target::of(known, &template.event, schedule.publisher));
                let max_fired = budget.fits(schedule.template.len(), targets.len());
                if max_fired == 0 {
                    break;
                }
                let overlapping = schedule.last_event.is_some_and(|last| open.contains(&last));
                let missed_after = Duration::from_secs(firing.config.scheduler.missed_after_s);
                let max_looked = MAX_LOOKED_OF_ONE.min(MAX_LOOKED - looked);
                let bounds = Bounds { missed_after, max_fired: max_fired.min(MAX_FIRED_OF_ONE), max_looked };
                let found = Found { position, now, overlapping };
                let visit = template.visit(&schedule, found, bounds);
                let fired = template.events(&schedule, &visit, &targets);
                budget.take(fired.len(), schedule.template.len(), targets.len());
                looked += visit.looked();
                count(&visit, now);
                matched.extend(fired);
                visits.push(visit);
            }
        };
        // Filters of tenants may take a while; the other tasks of this thread need not wait for them.
        tokio::task::block_in_place(deciding);
        if !unfit.is_empty() {
            pg::put_off_schedules(&mut *transaction, &unfit, PUT_OFF_S).await?;
        }
        if !visits.is_empty() {
            pg::note_visits(&mut transaction, &visits).await?;
        }
        firing.store(transaction, &snapshots, matched).await
    }

    async fn publish(self) -> Result<(), StoreError> {
        self.store().await?.publish().await
    }
}

/// What a visit finds.
struct Found {
    position: Position,
    now: Timestamp,
    overlapping: bool,
}

/// What a schedule's occurrences are made from.
struct Template {
    event: CloudEvent,
    recurrence: Recurrence,
}

impl Template {
    fn of(schedule: &Schedule) -> Option<Self> {
        let event = CloudEvent::from_structured(&schedule.template)
            .inspect_err(|failed| {
                error!(schedule.id = %schedule.id, error = %Chain(failed), "A schedule's template cannot be read");
            })
            .ok()?;
        // A zone may be gone with new data.
        let recurrence = Recurrence::parse(&schedule.cron, &schedule.timezone)
            .inspect_err(|failed| {
                error!(schedule.id = %schedule.id, error = %Chain(failed), "A schedule's ticks cannot be computed");
            })
            .ok()?;
        Some(Self { event, recurrence })
    }

    fn visit(&self, schedule: &Schedule, found: Found, bounds: Bounds) -> Visited {
        let mut rules = schedule.rules.clone();
        let closed = match schedule.state {
            ScheduleState::Paused => Some(SkipReason::Paused),
            ScheduleState::Cancelled => {
                // Later ticks are none.
                rules.ends_at = rules.ends_at.into_iter().chain([schedule.updated_at]).min();
                Some(SkipReason::Cancelled)
            }
            ScheduleState::Active | ScheduleState::Ended => None,
        };
        let Found { position, now, overlapping } = found;
        let circumstances = Circumstances { now, closed, paused_until: schedule.resumed_at, overlapping };
        let visit = rules.visit(&self.recurrence, schedule.id, position, circumstances, bounds);
        // One that is not done yet queues up behind the others that are due.
        let due = |position: Position| rules.due(schedule.id, position.next_tick).max(now);
        let next = visit.position.map(|position| (position, due(position)));
        Visited {
            id: schedule.id,
            organization: schedule.organization,
            decisions: visit.decisions,
            next,
            open_skip: schedule.open_skip,
        }
    }

    /// The events of the ticks that are fired.
    fn events(
        &self,
        schedule: &Schedule,
        visit: &Visited,
        targets: &[Target],
    ) -> Vec<(NewEvent, Vec<Target>)> {
        visit
            .decisions
            .iter()
            .filter_map(|decision| match decision {
                Decision::Fire(tick) => Some((self.occurrence(schedule, *tick), targets.to_vec())),
                Decision::Skip { .. } => None,
            })
            .collect()
    }

    fn occurrence(&self, schedule: &Schedule, tick: Timestamp) -> NewEvent {
        let uid = EventUid::of_tick(schedule.id, tick);
        let event = occurrence(&self.event, schedule.id, uid, tick, Some(tick));
        let body = event.to_structured();
        NewEvent::of(&event, body, uid, schedule.organization, schedule.publisher, tick)
    }
}

fn count(visit: &Visited, now: Timestamp) {
    for decision in &visit.decisions {
        match decision {
            Decision::Fire(tick) => {
                counter!("bus_occurrences", "state" => "fired", "reason" => "").increment(1);
                histogram!("bus_occurrence_lateness_seconds").record(now.duration_since(*tick).as_secs_f64());
            }
            Decision::Skip { ticks, reason, .. } => {
                counter!("bus_occurrences", "state" => "skipped", "reason" => reason.as_str())
                    .increment(*ticks);
            }
        }
    }
}
