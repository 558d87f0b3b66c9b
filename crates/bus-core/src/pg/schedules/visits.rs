//! How a scheduler visits schedules: claim those that are due, note what becomes of their ticks.

use std::collections::HashSet;

use jiff::Timestamp;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{Schedule, ScheduleRow, columns};
use crate::{
    ids::{EventUid, OrganizationId, ScheduleId},
    pg::{During as _, StoreError, hold_transaction, transaction_time},
    schedule::{Decision, Position, Recurrence, SkipReason, same_day, tz_version},
};

/// A finished attempt is in history about a second later. A delivery of which nothing is known for so long counts as
/// finished: its receipt was lost.
const RECEIPTS_LAG_S: f64 = 3_600.0;

/// Claims at most `limit` schedules whose next tick is due, the longest due first, or this one only, for this transaction;
/// none more once their templates have `max_bytes`.
/// Should this process be cut off from the database, the database ends the transaction after `hold_s` seconds. A row that
/// does not fit is left out, and named.
pub async fn claim_schedules(
    connection: &mut PgConnection,
    only: Option<ScheduleId>,
    limit: u32,
    max_bytes: i64,
    hold_s: u64,
) -> Result<(Vec<Schedule>, Vec<(ScheduleId, StoreError)>), StoreError> {
    const OPERATION: &str = "claim due schedules";
    hold_transaction(connection, hold_s).await?;
    let rows: Vec<ScheduleRow> = sqlx::query_as(concat!(
        // What is read are the rows as they were locked. Joined to the table again, they would be those of the
        // statement's beginning, and one that was cancelled in between would still be active.
        "WITH due AS (
             SELECT * FROM schedules
             WHERE due_at <= now() AND ($2::uuid IS NULL OR id = $2)
             ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED
         ), measured AS (
             SELECT *, sum(octet_length(template)) OVER (ORDER BY due_at, id) - octet_length(template) AS before
             FROM due
         )
         SELECT ",
        columns!(),
        " FROM measured WHERE before < $3 ORDER BY due_at, id"
    ))
    .bind(i64::from(limit))
    .bind(only.map(|id| id.0))
    .bind(max_bytes)
    .fetch_all(connection)
    .await
    .during(OPERATION)?;
    let (mut claimed, mut unfit) = (Vec::with_capacity(rows.len()), Vec::new());
    for row in rows {
        let id = ScheduleId(row.id);
        match Schedule::try_from(row) {
            Ok(schedule) => claimed.push(schedule),
            Err(failed) => unfit.push((id, failed)),
        }
    }
    Ok((claimed, unfit))
}

/// Puts off schedules that cannot be visited, so that they do not keep others from their turn. Their ticks stay due.
pub async fn put_off_schedules(
    executor: impl sqlx::PgExecutor<'_>,
    ids: &[ScheduleId],
    seconds: u32,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE schedules SET due_at = now() + make_interval(secs => $2) WHERE id = ANY($1)")
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(f64::from(seconds))
        .execute(executor)
        .await
        .during("put off schedules")?;
    Ok(())
}

/// Those of these events that still have open deliveries, as far as is known: what succeeded at once is known from
/// history, which lags behind by about a second.
pub async fn with_open_deliveries(
    connection: &mut PgConnection,
    events: &[EventUid],
) -> Result<HashSet<EventUid>, StoreError> {
    let open: Vec<Uuid> = sqlx::query_scalar(
        "SELECT DISTINCT e.uid
         FROM events e
         CROSS JOIN LATERAL UNNEST(e.subscriptions) AS m (id)
         LEFT JOIN delivery_states s ON s.event_uid = e.uid AND s.subscription_id = m.id
         LEFT JOIN occurrences o ON o.uid = e.uid
         WHERE e.uid = ANY($1)
           AND CASE
                   WHEN s.state = 'waiting' THEN true
                   WHEN s.state = 'queued' THEN s.changed_at > now() - make_interval(secs => $2)
                   WHEN s.state IS NOT NULL THEN false
                   ELSE coalesce(o.at, e.received_at) > now() - make_interval(secs => $2)
               END
           AND NOT EXISTS (
                   SELECT FROM delivery_attempts a
                   WHERE a.event_uid = e.uid AND a.subscription_id = m.id AND a.outcome = 'delivered'
                     AND a.turn >= coalesce(s.turn, 0))",
    )
    .bind(events.iter().map(|uid| uid.0).collect::<Vec<_>>())
    .bind(RECEIPTS_LAG_S)
    .fetch_all(connection)
    .await
    .during("look for open deliveries")?;
    Ok(open.into_iter().map(EventUid).collect())
}

/// What a visit decided on one schedule.
#[derive(Debug)]
pub struct Visited {
    /// The schedule.
    pub id: ScheduleId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// What became of its ticks, in order.
    pub decisions: Vec<Decision>,
    /// Where the next visit begins, and when; `None` if there are no more ticks.
    pub next: Option<(Position, Timestamp)>,
    /// The row of skipped ticks that the first decision may add to.
    pub open_skip: Option<EventUid>,
}

impl Visited {
    /// How many ticks it decided on.
    pub fn looked(&self) -> usize {
        let ticks = |decision: &Decision| match decision {
            Decision::Fire(_) => 1,
            Decision::Skip { ticks, .. } => usize::try_from(*ticks).unwrap_or(usize::MAX),
        };
        self.decisions.iter().map(ticks).fold(0, usize::saturating_add)
    }

    /// The last tick that was fired.
    fn last_event(&self) -> Option<EventUid> {
        self.decisions.iter().rev().find_map(|decision| match decision {
            Decision::Fire(tick) => Some(EventUid::of_tick(self.id, *tick)),
            Decision::Skip { .. } => None,
        })
    }
}

/// Notes visits in the transaction that claimed the schedules and stores the events of the ticks that are fired.
pub async fn note_visits(connection: &mut PgConnection, visits: &[Visited]) -> Result<(), StoreError> {
    let mut rows = Rows::default();
    let mut open_skips: Vec<Option<Uuid>> = Vec::with_capacity(visits.len());
    for visit in visits {
        let mut open = visit.open_skip;
        for decision in &visit.decisions {
            match *decision {
                Decision::Fire(tick) => {
                    rows.push(visit, EventUid::of_tick(visit.id, tick), None, (tick, tick, 1));
                    open = None;
                }
                Decision::Skip { first, last, ticks, reason } => {
                    if let Some(uid) = open
                        && uid.received_at().is_some_and(|begun| same_day(begun, first))
                        && lengthen(connection, uid, reason, last, ticks).await?
                    {
                        continue;
                    }
                    let uid = EventUid::of_tick(visit.id, first);
                    rows.push(visit, uid, Some(reason), (first, last, ticks));
                    open = Some(uid);
                }
            }
        }
        open_skips.push(open.map(|uid| uid.0));
    }
    rows.insert(connection).await?;
    advance(connection, visits, open_skips).await
}

/// Adds ticks to a run of skipped ones. False if that run is of another kind, or has expired.
async fn lengthen(
    connection: &mut PgConnection,
    run: EventUid,
    reason: SkipReason,
    last: Timestamp,
    ticks: u64,
) -> Result<bool, StoreError> {
    let lengthened = sqlx::query(
        "UPDATE occurrences SET last_tick = $3, ticks = ticks + $4, at = now()
         WHERE uid = $1 AND state = 'skipped' AND reason = $2",
    )
    .bind(run.0)
    .bind(reason.as_str())
    .bind(jiff_sqlx::Timestamp::from(last))
    .bind(i64::try_from(ticks).unwrap_or(i64::MAX))
    .execute(connection)
    .await
    .during("note skipped ticks")?;
    Ok(lengthened.rows_affected() > 0)
}

/// Rows of `occurrences`, column by column.
#[derive(Default)]
struct Rows {
    uids: Vec<Uuid>,
    schedules: Vec<Uuid>,
    organizations: Vec<Uuid>,
    reasons: Vec<Option<&'static str>>,
    first: Vec<jiff_sqlx::Timestamp>,
    last: Vec<jiff_sqlx::Timestamp>,
    ticks: Vec<i64>,
}

impl Rows {
    fn push(
        &mut self,
        visit: &Visited,
        uid: EventUid,
        skipped: Option<SkipReason>,
        (first, last, ticks): (Timestamp, Timestamp, u64),
    ) {
        self.uids.push(uid.0);
        self.schedules.push(visit.id.0);
        self.organizations.push(visit.organization.0);
        self.reasons.push(skipped.map(SkipReason::as_str));
        self.first.push(first.into());
        self.last.push(last.into());
        self.ticks.push(i64::try_from(ticks).unwrap_or(i64::MAX));
    }

    /// A tick that has a row already makes this fail: whoever decided on it first has decided (invariant I5).
    async fn insert(self, connection: &mut PgConnection) -> Result<(), StoreError> {
        if self.uids.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "INSERT INTO occurrences (uid, schedule_id, organization_id, state, reason, tick, last_tick, ticks, at)
             SELECT uid, schedule, organization, CASE WHEN reason IS NULL THEN 'fired' ELSE 'skipped' END, reason,
                    first, last, ticks, now()
             FROM UNNEST($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::timestamptz[], $6::timestamptz[],
                         $7::int8[])
                  AS o (uid, schedule, organization, reason, first, last, ticks)",
        )
        .bind(self.uids)
        .bind(self.schedules)
        .bind(self.organizations)
        .bind(self.reasons)
        .bind(self.first)
        .bind(self.last)
        .bind(self.ticks)
        .execute(connection)
        .await
        .during("note occurrences")?;
        Ok(())
    }
}

/// Moves the schedules on to their next ticks.
async fn advance(
    connection: &mut PgConnection,
    visits: &[Visited],
    open_skips: Vec<Option<Uuid>>,
) -> Result<(), StoreError> {
    let time = |time: Option<Timestamp>| time.map(jiff_sqlx::Timestamp::from);
    let position = |visit: &Visited| visit.next.map(|(position, _)| position);
    sqlx::query(
        "UPDATE schedules s
         SET next_tick = v.next_tick, due_at = v.due_at, catch_up_until = v.catch_up_until,
             last_event = coalesce(v.last_event, s.last_event), open_skip = v.open_skip, tz_version = $7,
             state = CASE WHEN v.next_tick IS NULL AND s.state <> 'cancelled' THEN 'ended' ELSE s.state END
         FROM UNNEST($1::uuid[], $2::timestamptz[], $3::timestamptz[], $4::timestamptz[], $5::uuid[], $6::uuid[])
              AS v (id, next_tick, due_at, catch_up_until, last_event, open_skip)
         WHERE s.id = v.id",
    )
    .bind(visits.iter().map(|visit| visit.id.0).collect::<Vec<_>>())
    .bind(visits.iter().map(|visit| time(position(visit).map(|p| p.next_tick))).collect::<Vec<_>>())
    .bind(visits.iter().map(|visit| time(visit.next.map(|(_, due)| due))).collect::<Vec<_>>())
    .bind(visits.iter().map(|visit| time(position(visit).and_then(|p| p.catch_up_until))).collect::<Vec<_>>())
    .bind(visits.iter().map(|visit| visit.last_event().map(|uid| uid.0)).collect::<Vec<_>>())
    .bind(open_skips)
    .bind(tz_version())
    .execute(connection)
    .await
    .during("move schedules on")?;
    Ok(())
}

/// Computes the next ticks of at most `limit` schedules again that were computed with older time zone data; how many
/// they were. To be called until there are none.
///
/// A zone's rules may change after a tick was planned. What is due already stays as it was planned.
pub async fn refresh_time_zones(pool: &PgPool, limit: u32) -> Result<usize, StoreError> {
    const OPERATION: &str = "compute ticks with new time zone data";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let now = transaction_time(&mut transaction).await?;
    let rows: Vec<ScheduleRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!("''::bytea AS template"),
        " FROM schedules WHERE tz_version < $1 AND due_at IS NOT NULL LIMIT $2 FOR UPDATE SKIP LOCKED"
    ))
    .bind(tz_version())
    .bind(i64::from(limit))
    .fetch_all(&mut *transaction)
    .await
    .during(OPERATION)?;
    let (found, mut ids, mut ticks, mut due) = (rows.len(), Vec::new(), Vec::new(), Vec::new());
    let all: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    // One that cannot be read is for its visit to report.
    for schedule in rows.into_iter().filter_map(|row| Schedule::try_from(row).ok()) {
        let planned = schedule.position.map(|position| position.next_tick);
        // A zone that is gone, or an expression that has no more ticks: the visit will say so.
        let again = Recurrence::parse(&schedule.cron, &schedule.timezone)
            .ok()
            .and_then(|recurrence| schedule.rules.first_tick(&recurrence, now));
        let Some(next) = planned.filter(|tick| *tick <= now).or(again).or(planned) else { continue };
        ids.push(schedule.id.0);
        ticks.push(jiff_sqlx::Timestamp::from(next));
        due.push(jiff_sqlx::Timestamp::from(schedule.rules.due(schedule.id, next)));
    }
    sqlx::query(
        "UPDATE schedules s
         SET next_tick = coalesce(v.next_tick, s.next_tick), due_at = coalesce(v.due_at, s.due_at), tz_version = $4
         FROM UNNEST($5::uuid[]) AS a (id)
         LEFT JOIN UNNEST($1::uuid[], $2::timestamptz[], $3::timestamptz[]) AS v (id, next_tick, due_at) USING (id)
         WHERE s.id = a.id",
    )
    .bind(&ids)
    .bind(ticks)
    .bind(due)
    .bind(tz_version())
    .bind(all)
    .execute(&mut *transaction)
    .await
    .during(OPERATION)?;
    transaction.commit().await.during(OPERATION)?;
    Ok(found)
}
