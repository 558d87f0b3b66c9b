//! Which deliveries nobody answers for: matched, but neither settled nor waiting in the database. Whoever is in the
//! queue is among them, too; the queue knows.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use sqlx::{PgPool, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{
    During as _, StoreError,
    deliveries::{key, progress},
};
use crate::{
    delivery::{DeliveryKey, Progress},
    fanout::Target,
    ids::{DeliveryId, EventUid, OrganizationId, SubscriptionId},
    lifecycle::State,
    receipt::ReceiptOutcome,
};

/// Events of one page.
const EVENTS: i64 = 500;

/// Deliveries of one page; a single event may have more.
const DELIVERIES: i64 = 20_000;

/// Why a delivery that was put back waits, until a scheduler takes it.
const REASON: &str = "the queue had lost it";

/// A delivery, and how far it has come as far as the database knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The delivery.
    pub key: DeliveryKey,
    /// The latest turn that left a trace, with the failed attempts up to it.
    pub progress: Progress,
}

/// Deliveries of stored events.
#[derive(Debug)]
pub struct Page {
    /// How many events were looked at.
    pub events: u64,
    /// Their deliveries, as they were put into the queue first.
    pub deliveries: Vec<Known>,
    /// The last event of the page; `None` if there are no more.
    pub last: Option<EventUid>,
}

/// The deliveries of the events after `after` and before `until`, as many as a page holds.
pub async fn matched_deliveries(pool: &PgPool, after: Uuid, until: Uuid) -> Result<Page, StoreError> {
    const OPERATION: &str = "read the deliveries of events";
    let rows = sqlx::query(
        "WITH page AS MATERIALIZED (
             SELECT uid, organization_id, received_at, subscriptions,
                    sum(cardinality(subscriptions)) OVER (ORDER BY uid) AS upto,
                    row_number() OVER (ORDER BY uid) AS place
             FROM (SELECT uid, organization_id, received_at, subscriptions FROM events
                   WHERE uid > $1 AND uid < $2 ORDER BY uid LIMIT $3) e
         )
         SELECT p.uid, p.organization_id, p.received_at, s.id, s.connection_id, c.version
         FROM page p
         LEFT JOIN LATERAL UNNEST(p.subscriptions) AS m (id) ON true
         LEFT JOIN subscriptions s ON s.id = m.id
         LEFT JOIN connections c ON c.id = s.connection_id
         WHERE p.upto <= $4 OR p.place = 1
         ORDER BY p.uid",
    )
    .bind(after)
    .bind(until)
    .bind(EVENTS)
    .bind(DELIVERIES)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let mut page = Page { events: 0, deliveries: Vec::with_capacity(rows.len()), last: None };
    for row in &rows {
        let event = EventUid(row.try_get("uid").during(OPERATION)?);
        if page.last != Some(event) {
            page.events += 1;
            page.last = Some(event);
        }
        page.deliveries.extend(matched(row, event).during(OPERATION)?);
    }
    Ok(page)
}

/// `None` for an event that matched nothing.
fn matched(row: &PgRow, event: EventUid) -> Result<Option<Known>, sqlx::Error> {
    let (Some(subscription), Some(connection), Some(connection_version)) = (
        row.try_get::<Option<Uuid>, _>("id")?,
        row.try_get::<Option<Uuid>, _>("connection_id")?,
        row.try_get::<Option<i64>, _>("version")?,
    ) else {
        return Ok(None);
    };
    let target = Target {
        subscription: SubscriptionId(subscription),
        connection: connection.into(),
        connection_version,
    };
    let organization = OrganizationId(row.try_get("organization_id")?);
    let received_at = row.try_get::<jiff_sqlx::Timestamp, _>("received_at")?.to_jiff();
    Ok(Some(Known { key: target.delivery(event, organization), progress: Progress::new(received_at) }))
}

/// A place in the order of [`returned_deliveries`].
pub type Place = (Timestamp, DeliveryId);

/// Deliveries of events before `before` that came back into the queue at `after.0` or later, as many as a page holds.
/// With the place of the last one.
pub async fn returned_deliveries(
    pool: &PgPool,
    before: Uuid,
    after: Place,
) -> Result<(Vec<Known>, Option<Place>), StoreError> {
    const OPERATION: &str = "read the deliveries that came back";
    let rows = sqlx::query(
        "SELECT delivery_id, event_uid, organization_id, subscription_id, connection_id, connection_version,
                attempts, turn, since, changed_at
         FROM delivery_states
         WHERE state = 'queued' AND event_uid < $1 AND (changed_at, delivery_id) > ($2, $3)
         ORDER BY changed_at, delivery_id LIMIT $4",
    )
    .bind(before)
    .bind(jiff_sqlx::Timestamp::from(after.0))
    .bind(after.1.0)
    .bind(DELIVERIES)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let known = rows.iter().map(|row| Ok(Known { key: key(row)?, progress: progress(row)? }));
    let known = known.collect::<Result<_, sqlx::Error>>().during(OPERATION)?;
    let place = |row: &PgRow| {
        let at = row.try_get::<jiff_sqlx::Timestamp, _>("changed_at")?.to_jiff();
        Ok((at, DeliveryId(row.try_get("delivery_id")?)))
    };
    Ok((known, rows.last().map(place).transpose().during(OPERATION)?))
}

/// Those of the deliveries that neither history nor a row in the database answers for, as far as they have come.
pub async fn unsettled(pool: &PgPool, deliveries: &[Known]) -> Result<Vec<Known>, StoreError> {
    const OPERATION: &str = "ask which deliveries are settled";
    let events: HashSet<Uuid> = deliveries.iter().map(|known| known.key.event.0).collect();
    let events: Vec<Uuid> = events.into_iter().collect();
    let ids: Vec<Uuid> = deliveries.iter().map(|known| known.key.id.0).collect();
    // History first: what leaves it for a row meanwhile, a retry that is parked, is found there.
    let attempts = sqlx::query(
        "SELECT delivery_id, turn, outcome FROM delivery_attempts
         WHERE event_uid = ANY($1) AND delivery_id = ANY($2)",
    )
    .bind(&events)
    .bind(&ids)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let rows = sqlx::query(
        "SELECT delivery_id, state, attempts, turn, since FROM delivery_states WHERE delivery_id = ANY($1)",
    )
    .bind(&ids)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    let mut tried: HashMap<DeliveryId, Vec<(i64, String)>> = HashMap::new();
    for row in &attempts {
        let read = || {
            let id = DeliveryId(row.try_get("delivery_id")?);
            Ok::<_, sqlx::Error>((id, (row.try_get("turn")?, row.try_get("outcome")?)))
        };
        let (id, attempt) = read().during(OPERATION)?;
        tried.entry(id).or_default().push(attempt);
    }
    let mut standing = HashMap::new();
    for row in &rows {
        let read = || {
            let state: String = row.try_get("state")?;
            let state: State = state.parse().map_err(|()| sqlx::Error::Decode("unknown state".into()))?;
            Ok::<_, sqlx::Error>((DeliveryId(row.try_get("delivery_id")?), (state, progress(row)?)))
        };
        let (id, at) = read().during(OPERATION)?;
        standing.insert(id, at);
    }
    let left = deliveries.iter().filter_map(|known| {
        let tried = tried.get(&known.key.id).map_or(&[][..], Vec::as_slice);
        let progress = open_at(known.progress, standing.get(&known.key.id), tried)?;
        Some(Known { key: known.key, progress })
    });
    Ok(left.collect())
}

/// How far a delivery has come that nobody answers for; `None` for one that is settled, or waits for its time.
fn open_at(
    matched: Progress,
    standing: Option<&(State, Progress)>,
    tried: &[(i64, String)],
) -> Option<Progress> {
    let from = match standing {
        Some((State::Queued, progress)) => *progress,
        Some(_) => return None,
        None => matched,
    };
    let of_this_life = || tried.iter().filter(|(turn, _)| *turn >= from.turn);
    let ends = [ReceiptOutcome::Delivered, ReceiptOutcome::Dead].map(ReceiptOutcome::as_str);
    if of_this_life().any(|(_, outcome)| ends.contains(&outcome.as_str())) {
        return None;
    }
    let failed = ReceiptOutcome::Failed.as_str();
    let failures: HashSet<i64> =
        of_this_life().filter(|(_, outcome)| outcome == failed).map(|(turn, _)| *turn).collect();
    let failures = u32::try_from(failures.len()).unwrap_or(u32::MAX);
    Some(Progress {
        attempts: from.attempts.saturating_add(failures),
        turn: of_this_life().map(|(turn, _)| *turn).max().unwrap_or(from.turn),
        since: from.since,
    })
}

/// Which of the events have a fan-out that is not finished: a publisher sees to them.
pub async fn being_fanned_out(
    pool: &PgPool,
    events: &HashSet<EventUid>,
) -> Result<HashSet<EventUid>, StoreError> {
    const OPERATION: &str = "read the unfinished fan-outs";
    let uids: Vec<Uuid> = events.iter().map(|uid| uid.0).collect();
    let open: Vec<Uuid> = sqlx::query_scalar(
        "SELECT DISTINCT u.uid FROM outbox o CROSS JOIN LATERAL UNNEST(o.event_uids) AS u (uid)
         WHERE o.finished_at IS NULL AND u.uid = ANY($1)",
    )
    .bind(uids)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    Ok(open.into_iter().map(EventUid).collect())
}

/// Makes deliveries wait that are due at once, so that a scheduler puts them into the queue. Those about which something
/// was written meanwhile stay as they are. Returns how many were put back.
///
/// Two turns on: the next one may have been in the queue that lost it, which may still drop it as a repetition.
pub async fn put_back(pool: &PgPool, lost: &[Known]) -> Result<u64, StoreError> {
    let each = |f: fn(&DeliveryKey) -> Uuid| lost.iter().map(|one| f(&one.key)).collect::<Vec<_>>();
    let since: Vec<jiff_sqlx::Timestamp> = lost.iter().map(|one| one.progress.since.into()).collect();
    let attempts = lost.iter().map(|one| i32::try_from(one.progress.attempts).unwrap_or(i32::MAX));
    let done = sqlx::query(
        "INSERT INTO delivery_states AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                           connection_version, state, attempts, turn, since, due_at, reason)
         SELECT d, e, o, s, c, v, 'waiting', n, t + 2, a, now(), $10
         FROM UNNEST($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int8[], $7::int4[],
                     $8::int8[], $9::timestamptz[]) AS u (d, e, o, s, c, v, n, t, a)
         ORDER BY d
         ON CONFLICT (delivery_id) DO UPDATE
             SET state = 'waiting', attempts = excluded.attempts, turn = excluded.turn, since = excluded.since,
                 due_at = excluded.due_at, lease_until = '-infinity', reason = excluded.reason,
                 connection_version = excluded.connection_version, changed_at = now()
             WHERE p.state = 'queued' AND p.turn < excluded.turn - 1",
    )
    .bind(each(|key| key.id.0))
    .bind(each(|key| key.event.0))
    .bind(each(|key| key.organization.0))
    .bind(each(|key| key.subscription.0))
    .bind(each(|key| key.connection.0))
    .bind(lost.iter().map(|one| one.key.connection_version).collect::<Vec<_>>())
    .bind(attempts.collect::<Vec<_>>())
    .bind(lost.iter().map(|one| one.progress.turn).collect::<Vec<_>>())
    .bind(since)
    .bind(REASON)
    .execute(pool)
    .await
    .during("put lost deliveries back")?;
    Ok(done.rows_affected())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(attempts: u32, turn: i64) -> Progress {
        Progress { attempts, turn, since: Timestamp::UNIX_EPOCH }
    }

    #[test]
    fn i1_nobody_answers_for_what_has_neither_an_end_in_history_nor_a_row() {
        let queued = |attempts, turn| Some((State::Queued, at(attempts, turn)));
        let (delivered, failed, deferred, dead) = ("delivered", "failed", "deferred", "dead");
        let cases: [(_, &[(i64, &str)], _); 14] = [
            (None, &[], Some((0, 0))),
            (None, &[(0, delivered)], None),
            (None, &[(0, failed), (1, dead)], None),
            (None, &[(0, failed), (1, failed)], Some((2, 1))),
            (None, &[(0, deferred)], Some((0, 0))),
            // One attempt that was reported twice.
            (None, &[(0, failed), (0, failed)], Some((1, 0))),
            (queued(3, 5), &[(0, failed), (4, failed)], Some((3, 5))),
            (queued(3, 5), &[(5, failed), (6, failed)], Some((5, 6))),
            (queued(3, 5), &[(5, delivered)], None),
            // Replayed after it was delivered.
            (queued(0, 9), &[(0, delivered)], Some((0, 9))),
            (Some((State::Waiting, at(1, 1))), &[(0, failed)], None),
            (Some((State::Dead, at(1, 1))), &[], None),
            (Some((State::Acked, at(0, 0))), &[], None),
            (Some((State::Cancelled, at(0, 0))), &[], None),
        ];
        for (row, tried, open) in cases {
            let history: Vec<(i64, String)> =
                tried.iter().map(|(turn, outcome)| (*turn, (*outcome).to_owned())).collect();
            let found = open_at(at(0, 0), row.as_ref(), &history);
            assert_eq!(found, open.map(|(attempts, turn)| at(attempts, turn)), "{row:?} {tried:?}");
        }
    }
}
