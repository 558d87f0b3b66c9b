//! Which deliveries nobody answers for: matched, but neither settled nor waiting in the database. Whoever is in the
//! queue is among them, too; the queue knows.

use std::collections::{HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};
use sqlx::{PgPool, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{
    During as _, StoreError,
    deliveries::{key, progress},
};
use crate::{
    delivery::{DeliveryKey, Progress},
    fanout::Target,
    ids::{DeliveryId, EventUid, OrganizationId, SubscriptionId, uuid_floor},
    lifecycle::State,
    receipt::ReceiptOutcome,
};

/// Events of one page.
const EVENTS: i64 = 500;

/// Deliveries of one page; a single event may have more.
const DELIVERIES: i64 = 20_000;

/// Why a delivery that was put back waits, until a scheduler takes it.
const REASON: &str = "the queue had lost it";

/// So many turns on from the last one that left a trace: more than a delivery can have had without one.
const FURTHER: i64 = 1_000;

/// An event's uid is made at most this long before the transaction that stores it, if it is due at once.
const PUBLISHED_BEFORE: SignedDuration = SignedDuration::from_secs(120);

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

/// Deliveries that came back into the queue after `after`, and at `until` at the latest, as many as a page holds, and that
/// [`matched_deliveries`] does not give: their event came before `from`, or they were replayed to a subscription that did not
/// match it. With the place of the last one.
pub async fn returned_deliveries(
    pool: &PgPool,
    from: Uuid,
    after: Place,
    until: Timestamp,
) -> Result<(Vec<Known>, Option<Place>), StoreError> {
    const OPERATION: &str = "read the deliveries that came back";
    let rows = sqlx::query(
        "SELECT delivery_id, event_uid, organization_id, subscription_id, connection_id, connection_version,
                attempts, turn, since, changed_at
         FROM delivery_states d
         WHERE state = 'queued' AND (changed_at, delivery_id) > ($2, $3) AND changed_at <= $5
           AND (event_uid < $1
                OR NOT EXISTS (SELECT FROM events e
                               WHERE e.uid = d.event_uid AND d.subscription_id = ANY(e.subscriptions)))
         ORDER BY changed_at, delivery_id LIMIT $4",
    )
    .bind(from)
    .bind(jiff_sqlx::Timestamp::from(after.0))
    .bind(after.1.0)
    .bind(DELIVERIES)
    .bind(jiff_sqlx::Timestamp::from(until))
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

/// A delivery that neither history nor a row in the database answers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsettled {
    /// As it was asked for.
    pub known: Known,
    /// How far it has come by now.
    pub progress: Progress,
}

/// Those of the deliveries that neither history nor a row in the database answers for. One that came back into the queue after
/// `asked` is none of them: it was not there to be found.
pub async fn unsettled(
    pool: &PgPool,
    deliveries: &[Known],
    asked: Option<Timestamp>,
) -> Result<Vec<Unsettled>, StoreError> {
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
        "SELECT delivery_id, state, attempts, turn, since, coalesce(changed_at >= $2, false) AS is_news
         FROM delivery_states WHERE delivery_id = ANY($1)",
    )
    .bind(&ids)
    .bind(asked.map(jiff_sqlx::Timestamp::from))
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
            let is_news: bool = row.try_get("is_news")?;
            Ok::<_, sqlx::Error>((DeliveryId(row.try_get("delivery_id")?), (state, progress(row)?), is_news))
        };
        let (id, at, is_news) = read().during(OPERATION)?;
        standing.insert(id, (at, is_news));
    }
    let left = deliveries.iter().filter_map(|known| {
        let tried = tried.get(&known.key.id).map_or(&[][..], Vec::as_slice);
        let standing = match standing.get(&known.key.id) {
            Some((_, true)) => return None,
            row => row.map(|(at, _)| at),
        };
        let progress = open_at(known.progress, standing, tried)?;
        Some(Unsettled { known: *known, progress })
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
         JOIN UNNEST($1::uuid[]) AS wanted (uid) USING (uid)
         WHERE o.finished_at IS NULL",
    )
    .bind(uids)
    .fetch_all(pool)
    .await
    .during(OPERATION)?;
    Ok(open.into_iter().map(EventUid).collect())
}

/// The first event of the fan-outs that were finished at `since` or later: what was late to be due, or waited for a broker, is
/// older than its fan-out.
pub async fn fanned_out_from(pool: &PgPool, since: Timestamp) -> Result<Option<Uuid>, StoreError> {
    const OPERATION: &str = "read the finished fan-outs";
    let since = jiff_sqlx::Timestamp::from(since);
    let first: Option<Uuid> = sqlx::query_scalar(
        "SELECT u.uid FROM outbox o CROSS JOIN LATERAL UNNEST(o.event_uids) AS u (uid)
         WHERE o.finished_at >= $1 ORDER BY u.uid LIMIT 1",
    )
    .bind(since)
    .fetch_optional(pool)
    .await
    .during(OPERATION)?;
    // A relay takes from a row what it has done; but none of its events was published much earlier than the row.
    let oldest: Option<jiff_sqlx::Timestamp> =
        sqlx::query_scalar("SELECT min(created_at) FROM outbox WHERE finished_at >= $1")
            .bind(since)
            .fetch_one(pool)
            .await
            .during(OPERATION)?;
    let published = oldest.and_then(|at| at.to_jiff().saturating_sub(PUBLISHED_BEFORE).ok()).map(uuid_floor);
    Ok(first.into_iter().chain(published).min())
}

/// Makes deliveries wait that are due at once, so that a scheduler puts them into the queue. Those about which something
/// was written meanwhile stay as they are. Returns how many were put back.
///
/// Far on in turns: those that left no trace may have been in the queue that lost it, which may still drop them as
/// repetitions.
pub async fn put_back(pool: &PgPool, lost: &[Unsettled]) -> Result<u64, StoreError> {
    let each = |f: fn(&DeliveryKey) -> Uuid| lost.iter().map(|one| f(&one.known.key)).collect::<Vec<_>>();
    let since: Vec<jiff_sqlx::Timestamp> = lost.iter().map(|one| one.progress.since.into()).collect();
    let attempts = lost.iter().map(|one| i32::try_from(one.progress.attempts).unwrap_or(i32::MAX));
    let done = sqlx::query(
        "INSERT INTO delivery_states AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                           connection_version, state, attempts, turn, since, due_at, reason)
         SELECT d, e, o, s, c, v, 'waiting', n, t + $11, a, now(), $10
         FROM UNNEST($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int8[], $7::int4[],
                     $8::int8[], $9::timestamptz[]) AS u (d, e, o, s, c, v, n, t, a)
         ORDER BY d
         ON CONFLICT (delivery_id) DO UPDATE
             SET state = 'waiting', attempts = excluded.attempts, turn = excluded.turn, since = excluded.since,
                 due_at = excluded.due_at, lease_until = '-infinity', reason = excluded.reason,
                 connection_version = excluded.connection_version, changed_at = now()
             WHERE p.state = 'queued' AND p.turn <= excluded.turn - $11",
    )
    .bind(each(|key| key.id.0))
    .bind(each(|key| key.event.0))
    .bind(each(|key| key.organization.0))
    .bind(each(|key| key.subscription.0))
    .bind(each(|key| key.connection.0))
    .bind(lost.iter().map(|one| one.known.key.connection_version).collect::<Vec<_>>())
    .bind(attempts.collect::<Vec<_>>())
    .bind(lost.iter().map(|one| one.progress.turn).collect::<Vec<_>>())
    .bind(since)
    .bind(REASON)
    .bind(FURTHER)
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
