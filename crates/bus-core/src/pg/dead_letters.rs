//! Dead letters: the deliveries that were given up. They are listed, replayed and discarded.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool, Postgres, QueryBuilder, Row as _, postgres::PgRow};
use uuid::Uuid;

use super::{During as _, LastAttempt, StoreError, audit, events::pattern_regex};
use crate::{
    audit::{Action, By, Change, TargetKind},
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, SubscriptionId},
    pattern::TypePattern,
};

/// How many of an organization's dead letters one call of [`dead_letters`] looks at, at most, to find
/// those of a type or a reason.
pub const DEAD_LETTER_SCAN: i64 = 5_000;

/// A delivery that was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterRecord {
    /// The delivery.
    pub id: DeliveryId,
    /// Its event.
    pub event: EventUid,
    /// What the event says of itself; none if it has expired.
    pub attributes: Option<EventAttributes>,
    /// What matched.
    pub subscription: SubscriptionId,
    /// Where it was to go.
    pub connection: ConnectionId,
    /// Why it was given up.
    pub reason: String,
    /// Failed attempts.
    pub attempts: u32,
    /// When it was given up.
    pub died_at: Timestamp,
    /// What was tried last.
    pub last: LastAttempt,
}

/// The attributes by which people know an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventAttributes {
    /// The CloudEvents id.
    pub id: String,
    /// The CloudEvents source.
    pub source: String,
    /// The CloudEvents type.
    pub r#type: String,
}

/// Which dead letters; all conditions hold at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterFilter {
    /// Only those of this connection.
    pub connection: Option<ConnectionId>,
    /// Only those of this subscription.
    pub subscription: Option<SubscriptionId>,
    /// Only those whose event's type this matches.
    pub event_type: Option<TypePattern>,
    /// Only those that were given up for this reason.
    pub reason: Option<String>,
    /// Only those that died at this time or later.
    pub since: Option<Timestamp>,
    /// Only those that died before this time.
    pub until: Option<Timestamp>,
}

/// Whose dead letters: an organization's, or of it one connection's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whose {
    /// The organization.
    pub organization: OrganizationId,
    /// Hides those of all other connections.
    pub only: Option<ConnectionId>,
}

/// A place in the list of dead letters, which is ordered by time of death and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadPlace {
    /// When it died, microseconds exactly.
    pub at: Timestamp,
    /// The delivery.
    pub id: Uuid,
}

/// A part of the list of dead letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterPage {
    /// The dead letters, the latest first.
    pub items: Vec<DeadLetterRecord>,
    /// Where the next part starts; none if the list ends here.
    pub next: Option<DeadPlace>,
}

/// One dead letter as a job sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScannedDeadLetter {
    /// Where it is in the list.
    pub place: DeadPlace,
    /// Whether all of the filter's conditions hold.
    pub fits: bool,
}

macro_rules! columns {
    () => {
        "s.delivery_id, s.event_uid, s.subscription_id, s.connection_id, s.reason, s.attempts, s.changed_at,
         s.last_status, s.last_body, s.last_error, s.last_attempt_at, s.last_duration_ms,
         e.id AS event_id, e.source, e.type"
    };
}

/// Lets this transaction read indexes in their order. The planner takes a small or empty table for one that is
/// cheap to read whole and sort, and keeps the plan when the table has grown.
pub(super) async fn read_in_order(connection: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query(
        "SELECT set_config(name, 'off', true) FROM UNNEST(ARRAY ['enable_seqscan', 'enable_sort',
                'enable_incremental_sort', 'enable_bitmapscan', 'enable_hashjoin', 'enable_mergejoin']) AS name",
    )
    .execute(connection)
    .await
    .during("begin to read in order")?;
    Ok(())
}

/// Dead letters, the latest first, after the place `before`. A part may have fewer than `limit`, or none, and
/// still name a next one: see [`DEAD_LETTER_SCAN`].
pub async fn dead_letters(
    pool: &PgPool,
    whose: Whose,
    filter: &DeadLetterFilter,
    before: Option<DeadPlace>,
    limit: u32,
) -> Result<DeadLetterPage, StoreError> {
    const OPERATION: &str = "list dead letters";
    let mut transaction =
        pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await.during(OPERATION)?;
    read_in_order(&mut transaction).await?;
    let wanted = i64::from(limit) + 1;
    let searches = filter.event_type.is_some() || filter.reason.is_some();
    let scan = if searches { DEAD_LETTER_SCAN.max(wanted) } else { wanted };
    let mut list = QueryBuilder::<Postgres>::new(concat!("SELECT ", columns!(), " FROM (SELECT * "));
    push_range(&mut list, whose, filter, before);
    list.push(" LIMIT ").push_bind(scan).push(") AS s LEFT JOIN events e ON e.uid = s.event_uid WHERE ");
    push_fits(&mut list, filter);
    list.push(" ORDER BY s.changed_at DESC, s.delivery_id DESC LIMIT ").push_bind(wanted);
    let rows = list.build().fetch_all(&mut *transaction).await.during(OPERATION)?;
    let mut items: Vec<DeadLetterRecord> =
        rows.iter().map(record).collect::<Result<_, _>>().during(OPERATION)?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let next = if items.len() > limit {
        items.truncate(limit);
        items.last().map(|item| DeadPlace { at: item.died_at, id: item.id.0 })
    } else if searches {
        let mut end = QueryBuilder::<Postgres>::new("SELECT changed_at, delivery_id ");
        push_range(&mut end, whose, filter, before);
        end.push(" LIMIT 1 OFFSET ").push_bind(scan - 1);
        let row = end.build().fetch_optional(&mut *transaction).await.during(OPERATION)?;
        row.as_ref().map(place).transpose().during(OPERATION)?
    } else {
        None
    };
    Ok(DeadLetterPage { items, next })
}

/// The part of the question that an index answers, in its order.
fn push_range(
    builder: &mut QueryBuilder<Postgres>,
    whose: Whose,
    filter: &DeadLetterFilter,
    before: Option<DeadPlace>,
) {
    builder.push("FROM delivery_states WHERE state = 'dead' AND organization_id = ");
    builder.push_bind(whose.organization.0);
    for connection in [whose.only, filter.connection].into_iter().flatten() {
        builder.push(" AND connection_id = ").push_bind(connection.0);
    }
    if let Some(subscription) = filter.subscription {
        builder.push(" AND subscription_id = ").push_bind(subscription.0);
    }
    if let Some(since) = filter.since {
        builder.push(" AND changed_at >= ").push_bind(jiff_sqlx::Timestamp::from(since));
    }
    if let Some(until) = filter.until {
        builder.push(" AND changed_at < ").push_bind(jiff_sqlx::Timestamp::from(until));
    }
    if let Some(before) = before {
        builder.push(" AND (changed_at, delivery_id) < (").push_bind(jiff_sqlx::Timestamp::from(before.at));
        builder.push(", ").push_bind(before.id).push(")");
    }
    builder.push(" ORDER BY changed_at DESC, delivery_id DESC");
}

/// The part that has to be looked at row by row; a single expression, never null.
fn push_fits(builder: &mut QueryBuilder<Postgres>, filter: &DeadLetterFilter) {
    builder.push("(true");
    if let Some(reason) = &filter.reason {
        builder.push(" AND s.reason = ").push_bind(reason.clone());
    }
    match &filter.event_type {
        None => {}
        Some(exact) if exact.is_exact() => {
            builder.push(" AND coalesce(e.type = ").push_bind(exact.as_str().to_owned()).push(", false)");
        }
        Some(pattern) => {
            builder.push(" AND coalesce(e.type ~ ").push_bind(pattern_regex(pattern)).push(", false)");
        }
    }
    builder.push(")");
}

fn place(row: &PgRow) -> Result<DeadPlace, sqlx::Error> {
    Ok(DeadPlace {
        at: row.try_get::<jiff_sqlx::Timestamp, _>("changed_at")?.to_jiff(),
        id: row.try_get("delivery_id")?,
    })
}

fn record(row: &PgRow) -> Result<DeadLetterRecord, sqlx::Error> {
    let place = place(row)?;
    let attributes = match row.try_get::<Option<String>, _>("event_id")? {
        Some(id) => {
            Some(EventAttributes { id, source: row.try_get("source")?, r#type: row.try_get("type")? })
        }
        None => None,
    };
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    let last = LastAttempt {
        status: row.try_get::<Option<i32>, _>("last_status")?.and_then(|status| u16::try_from(status).ok()),
        body: row.try_get::<Option<Vec<u8>>, _>("last_body")?.map(Bytes::from),
        error: row.try_get("last_error")?,
        at: row.try_get::<Option<jiff_sqlx::Timestamp>, _>("last_attempt_at")?.map(|at| at.to_jiff()),
        duration: row
            .try_get::<Option<i32>, _>("last_duration_ms")?
            .map(|ms| Duration::from_millis(number(ms).into())),
    };
    Ok(DeadLetterRecord {
        id: DeliveryId(place.id),
        event: EventUid(row.try_get("event_uid")?),
        attributes,
        subscription: SubscriptionId(row.try_get("subscription_id")?),
        connection: ConnectionId(row.try_get("connection_id")?),
        reason: row.try_get("reason")?,
        attempts: number(row.try_get("attempts")?),
        died_at: place.at,
        last,
    })
}

/// The dead letter of that delivery.
pub async fn dead_letter(
    pool: &PgPool,
    whose: Whose,
    id: DeliveryId,
) -> Result<Option<DeadLetterRecord>, StoreError> {
    const OPERATION: &str = "read a dead letter";
    let row = sqlx::query(concat!(
        "SELECT ",
        columns!(),
        " FROM delivery_states s LEFT JOIN events e ON e.uid = s.event_uid
          WHERE s.delivery_id = $3 AND s.organization_id = $1 AND ($2::uuid IS NULL OR s.connection_id = $2)
            AND s.state = 'dead'"
    ))
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .fetch_optional(pool)
    .await
    .during(OPERATION)?;
    row.as_ref().map(record).transpose().during(OPERATION)
}

/// At most `limit` dead letters after the place `before`, each with the word whether it fits the filter: for a
/// job, which must know how far it has looked. The transaction reads in order.
pub async fn scan_dead_letters(
    connection: &mut PgConnection,
    whose: Whose,
    filter: &DeadLetterFilter,
    before: DeadPlace,
    limit: usize,
) -> Result<Vec<ScannedDeadLetter>, StoreError> {
    const OPERATION: &str = "look for dead letters";
    let mut scan = QueryBuilder::<Postgres>::new("SELECT s.changed_at, s.delivery_id, ");
    push_fits(&mut scan, filter);
    scan.push(" AS fits FROM (SELECT delivery_id, changed_at, reason, event_uid ");
    push_range(&mut scan, whose, filter, Some(before));
    scan.push(" LIMIT ").push_bind(i64::try_from(limit).unwrap_or(i64::MAX));
    scan.push(
        ") AS s LEFT JOIN events e ON e.uid = s.event_uid ORDER BY s.changed_at DESC, s.delivery_id DESC",
    );
    let rows = scan.build().fetch_all(connection).await.during(OPERATION)?;
    rows.iter()
        .map(|row| Ok(ScannedDeadLetter { place: place(row)?, fits: row.try_get("fits")? }))
        .collect::<Result<_, sqlx::Error>>()
        .during(OPERATION)
}

/// What is to become of dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterAction {
    /// They are tried once more, with a new lifetime.
    Replay,
    /// They are over for good.
    Discard,
}

/// Replays or discards those of the deliveries that are dead; says how many were. One whose event was expunged is not
/// replayed: there is nothing to deliver. A discarded one is cancelled,
/// so that neither a late result nor a replay brings it back. Whoever asked for it is on record by then: a job is, from
/// its creation on, and [`settle_dead_letter`] sees to it for one.
pub async fn settle_dead_letters(
    connection: &mut PgConnection,
    whose: Whose,
    deliveries: &[Uuid],
    action: DeadLetterAction,
) -> Result<u64, StoreError> {
    let statement = match action {
        DeadLetterAction::Replay => {
            "UPDATE delivery_states p
             SET state = 'waiting', turn = greatest(p.turn + 1, floor(extract(epoch FROM now()) * 1000)::int8),
                 attempts = 0, since = date_trunc('milliseconds', now()), due_at = now(),
                 lease_until = '-infinity', reason = 'replayed', changed_at = now(),
                 -- Whoever delivers it knows the connection as it is now: it may have been repaired.
                 connection_version = coalesce((SELECT c.version FROM connections c WHERE c.id = p.connection_id),
                                               p.connection_version)
             WHERE p.delivery_id = ANY ($3) AND p.organization_id = $1
               AND ($2::uuid IS NULL OR p.connection_id = $2) AND p.state = 'dead'
               AND NOT EXISTS (SELECT FROM events e WHERE e.uid = p.event_uid AND e.expunged_at IS NOT NULL)"
        }
        DeadLetterAction::Discard => {
            "UPDATE delivery_states p SET state = 'cancelled', reason = 'discarded', changed_at = now()
             WHERE p.delivery_id = ANY ($3) AND p.organization_id = $1
               AND ($2::uuid IS NULL OR p.connection_id = $2) AND p.state = 'dead'"
        }
    };
    let settled = sqlx::query(statement)
        .bind(whose.organization.0)
        .bind(whose.only.map(|id| id.0))
        .bind(deliveries)
        .execute(connection)
        .await
        .during("replay or discard dead letters")?;
    Ok(settled.rows_affected())
}

/// Replays or discards one dead letter, as [`settle_dead_letters`] does. False if there is no such dead letter, or it
/// cannot be replayed.
pub async fn settle_dead_letter(
    pool: &PgPool,
    whose: Whose,
    delivery: DeliveryId,
    action: DeadLetterAction,
    by: &By,
) -> Result<bool, StoreError> {
    let mut transaction = pool.begin().await.during("begin to replay or discard a dead letter")?;
    if settle_dead_letters(&mut transaction, whose, &[delivery.0], action).await? == 0 {
        return Ok(false);
    }
    let action = match action {
        DeadLetterAction::Replay => Action::DeadLetterReplayed,
        DeadLetterAction::Discard => Action::DeadLetterDiscarded,
    };
    let change = Change::new(action, TargetKind::DeadLetter, delivery);
    audit::record(&mut transaction, by, Some(whose.organization), change).await?;
    transaction.commit().await.during("commit a dead letter that was replayed or discarded")?;
    Ok(true)
}

/// Removes at most `limit` dead letters that were given up more than `keep_days` ago.
pub async fn sweep_dead_letters(pool: &PgPool, keep_days: u32, limit: u32) -> Result<u64, StoreError> {
    let swept = sqlx::query(
        "DELETE FROM delivery_states WHERE delivery_id IN (
             SELECT delivery_id FROM delivery_states
             WHERE state = 'dead' AND changed_at < now() - make_interval(days => $1)
             ORDER BY changed_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
    )
    .bind(i32::try_from(keep_days).unwrap_or(i32::MAX))
    .bind(i64::from(limit))
    .execute(pool)
    .await
    .during("sweep old dead letters")?;
    Ok(swept.rows_affected())
}
