//! Replays are worked off, chunk by chunk. The queue is not touched: a replayed delivery waits in the database,
//! due at once, and is returned like a parked retry.

use std::time::Duration;

use bus_core::{
    cloudevent::CloudEvent,
    delivery::DeliveryKey,
    fanout::Target,
    ids::{DeliveryId, EventUid, OrganizationId, ReplayId, SubscriptionId, uuid_floor},
    matcher::{Candidate, Mismatch, Snapshot, Subject},
    pg::{
        self, Chunk, ClaimReplay, Cursor, DeadLetterAction, DeadLetterFilter, DeadLetters, DeadPlace, Replay,
        Selection, StoreError, Then, Walk, WalkedEvent,
    },
    telemetry::Chain,
};
use jiff::Timestamp;
use metrics::counter;
use sqlx::{PgConnection, PgPool};
use tracing::{info, warn};
use uuid::Uuid;

use crate::due::{IDLE, SHORTEST};

/// After an error, for the job that met it.
const AGAIN_S: u32 = 1;

/// The most events, deliveries or dead letters that a chunk looks at.
const CHUNK: usize = 500;

/// The most bytes of bodies that a chunk reads for filters; one event may be more.
const CHUNK_BYTES: u64 = 8 * 1024 * 1024;

/// If this process is cut off in the middle of a chunk, the job is free again after this time.
const HOLD_S: u64 = 30;

/// Works off one chunk of the job that is due the longest; answers how long there is nothing more to do.
pub async fn replay_due(pool: &PgPool) -> Result<Duration, StoreError> {
    let mut transaction = pg::begin(pool).await?;
    let replay = match pg::claim_replay(&mut transaction, HOLD_S).await? {
        ClaimReplay::None => return Ok(IDLE),
        ClaimReplay::In(seconds) => {
            return Ok(Duration::try_from_secs_f64(seconds).unwrap_or(IDLE).clamp(SHORTEST, IDLE));
        }
        ClaimReplay::Unreadable(id, failed) => {
            drop(transaction);
            return put_off(pool, id, &failed).await;
        }
        ClaimReplay::Due(replay) => replay,
    };
    let result = match replay_chunk(&mut transaction, &replay).await {
        Ok(chunk) => pg::commit(transaction).await.map(|()| chunk),
        Err(failed) => {
            drop(transaction);
            Err(failed)
        }
    };
    match result {
        Ok(chunk) => {
            counter!("bus_replayed").increment(chunk.replayed);
            if chunk.then != Then::More {
                info!(replay.id = %replay.id, end = ?chunk.then, "Replay ended");
            }
            Ok(Duration::ZERO)
        }
        Err(failed) => put_off(pool, replay.id, &failed).await,
    }
}

/// Lets the others have their turn. What is stored wrongly stays so; all else may pass.
async fn put_off(pool: &PgPool, replay: ReplayId, failed: &StoreError) -> Result<Duration, StoreError> {
    warn!(error = %Chain(failed), replay.id = %replay, "A chunk of a replay failed");
    let reason = matches!(failed, StoreError::Inconsistent { .. }).then_some("inconsistent");
    pg::put_off_replay(pool, replay, AGAIN_S, reason).await?;
    Ok(Duration::ZERO)
}

/// Does one chunk of a claimed job, and notes it; all in the caller's transaction.
pub async fn replay_chunk(connection: &mut PgConnection, replay: &Replay) -> Result<Chunk, StoreError> {
    let chunk = match &replay.selection {
        Selection::Event { event, subscription } => {
            event_chunk(connection, replay, *event, *subscription).await?
        }
        Selection::Subscription { subscription, since, until } => {
            subscription_chunk(connection, replay, *subscription, *since, *until).await?
        }
        Selection::DeadLetters { action, which: DeadLetters::Ids(ids) } => {
            named_chunk(connection, replay, *action, ids).await?
        }
        Selection::DeadLetters { action, which: DeadLetters::Filter(filter) } => {
            dead_letter_chunk(connection, replay, *action, filter).await?
        }
    };
    pg::advance_replay(connection, replay.id, &chunk).await?;
    Ok(chunk)
}

/// The most deliveries that a chunk of this job may bring back.
fn most(replay: &Replay) -> usize {
    usize::try_from(replay.per_second).unwrap_or(CHUNK).clamp(1, CHUNK)
}

fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn failed(replay: &Replay, why: &'static str) -> Chunk {
    Chunk { looked: 0, replayed: 0, cursor: replay.cursor, then: Then::Failed(why) }
}

fn more(unless: bool) -> Then {
    if unless { Then::Done } else { Then::More }
}

fn after(id: Uuid) -> Uuid {
    Uuid::from_u128(id.as_u128().saturating_add(1))
}

/// One event: its deliveries in the order of the subscriptions.
async fn event_chunk(
    connection: &mut PgConnection,
    replay: &Replay,
    event: EventUid,
    subscription: Option<SubscriptionId>,
) -> Result<Chunk, StoreError> {
    let organization = replay.whose.organization;
    let snapshot = pg::load_snapshot_of(connection, organization, subscription).await?;
    let walk = Walk { event_type: None, from: event.0, until: after(event.0), limit: 1 };
    let mut walked = pg::walk_events(connection, organization, walk).await?;
    if walked.is_empty() {
        return Ok(failed(replay, "event_expired"));
    }
    if walked.iter().any(|event| event.expunged) {
        return Ok(failed(replay, "expunged"));
    }
    let bodies = payloads(connection, organization, &snapshot, &mut walked).await?;
    let matched: Vec<DeliveryKey> = matching(&snapshot, &walked, &bodies, organization)
        .into_iter()
        .flat_map(|(_, deliveries)| deliveries)
        .filter(|delivery| replay.whose.only.is_none_or(|only| only == delivery.connection))
        .collect();
    if let (Some(id), true) = (subscription, matched.is_empty()) {
        let why = match snapshot.candidate(id) {
            None => "subscription_deleted",
            Some(candidate) if !candidate.enabled => "subscription_disabled",
            Some(_) => "no_match",
        };
        return Ok(failed(replay, why));
    }
    let begin = matched.partition_point(|delivery| Some(delivery.subscription.0) <= replay.cursor.id);
    let end = matched.len().min(begin + most(replay));
    let part = &matched[begin..end];
    let replayed = pg::restart_deliveries(connection, part).await?;
    let cursor = part.last().map_or(replay.cursor, |last| Cursor { id: Some(last.subscription.0), at: None });
    Ok(Chunk { looked: count(part.len()), replayed, cursor, then: more(end == matched.len()) })
}

/// The events since a time, as they arrived, to one subscription.
async fn subscription_chunk(
    connection: &mut PgConnection,
    replay: &Replay,
    subscription: SubscriptionId,
    since: Timestamp,
    until: Timestamp,
) -> Result<Chunk, StoreError> {
    let organization = replay.whose.organization;
    let snapshot = pg::load_snapshot_of(connection, organization, Some(subscription)).await?;
    let Some(candidate) = snapshot.candidate(subscription) else {
        return Ok(failed(replay, "subscription_deleted"));
    };
    if !candidate.enabled {
        return Ok(failed(replay, "subscription_disabled"));
    }
    let from = replay.cursor.id.map_or_else(|| uuid_floor(since), after);
    let event_type = Some(&candidate.event_type);
    let walk = Walk { event_type, from, until: uuid_floor(until), limit: CHUNK };
    let mut walked = pg::walk_events(connection, organization, walk).await?;
    let mut last_part = walked.len() < CHUNK;
    let before = walked.len();
    let bodies = payloads(connection, organization, &snapshot, &mut walked).await?;
    last_part &= walked.len() == before;

    let (mut deliveries, mut looked) = (Vec::new(), 0_usize);
    for (_, matched) in matching(&snapshot, &walked, &bodies, organization) {
        if deliveries.len() == most(replay) {
            last_part = false;
            break;
        }
        deliveries.extend(matched);
        looked += 1;
    }
    let replayed = pg::restart_deliveries(connection, &deliveries).await?;
    let cursor = match looked.checked_sub(1).and_then(|last| walked.get(last)) {
        Some(last) => Cursor { id: Some(last.uid.0), at: last.uid.received_at() },
        None => replay.cursor,
    };
    Ok(Chunk { looked: count(looked), replayed, cursor, then: more(last_part) })
}

/// The bodies of the events of which a filter wants to see the payload. If they are too large together, the
/// events from there on are left to the next chunk.
async fn payloads(
    connection: &mut PgConnection,
    organization: OrganizationId,
    snapshot: &Snapshot,
    events: &mut Vec<WalkedEvent>,
) -> Result<Vec<Option<CloudEvent>>, StoreError> {
    let (mut bytes, mut wanted) = (0, Vec::new());
    let mut fits = events.len();
    for (index, event) in events.iter().enumerate().filter(|(_, event)| !event.expunged) {
        let subject = Subject { event_type: &event.r#type, publisher: event.publisher, payload: None };
        // All else fits, so the payload decides.
        let decides = |(_, mismatch): &(&Candidate, _)| *mismatch == Some(Mismatch::NoJson);
        if snapshot.explain(subject).iter().any(decides) {
            if bytes > 0 && bytes + event.size > CHUNK_BYTES {
                fits = index;
                break;
            }
            bytes += event.size;
            wanted.push(event.uid);
        }
    }
    events.truncate(fits);
    let bodies = pg::event_bodies(connection, organization, &wanted).await?;
    let read = |event: &WalkedEvent| {
        let body = bodies.get(&event.uid)?;
        CloudEvent::from_structured(body)
            .inspect_err(
                |error| warn!(event.uid = %event.uid, error = %Chain(error), "Stored event cannot be read"),
            )
            .ok()
    };
    Ok(events.iter().map(read).collect())
}

/// The deliveries that each of the events makes now, ordered by subscription.
fn matching(
    snapshot: &Snapshot,
    events: &[WalkedEvent],
    bodies: &[Option<CloudEvent>],
    organization: OrganizationId,
) -> Vec<(EventUid, Vec<DeliveryKey>)> {
    let of_event = |(event, body): (&WalkedEvent, &Option<CloudEvent>)| {
        // It is passed over, and counts as looked at.
        if event.expunged {
            return (event.uid, Vec::new());
        }
        let payload = body.as_ref().and_then(CloudEvent::json_payload);
        let subject = Subject { event_type: &event.r#type, publisher: event.publisher, payload };
        let key = |candidate: &Candidate| Target::from(candidate).delivery(event.uid, organization);
        (event.uid, snapshot.matching(subject).into_iter().map(key).collect())
    };
    let all = || events.iter().zip(bodies).map(of_event).collect();
    // Filters of tenants may take a while; the other tasks of this thread need not wait for them.
    if bodies.iter().any(Option::is_some) { tokio::task::block_in_place(all) } else { all() }
}

/// Dead letters that the request has named.
async fn named_chunk(
    connection: &mut PgConnection,
    replay: &Replay,
    action: DeadLetterAction,
    ids: &[DeliveryId],
) -> Result<Chunk, StoreError> {
    let begin = ids.partition_point(|id| Some(id.0) <= replay.cursor.id);
    let end = ids.len().min(begin + most(replay));
    let part: Vec<Uuid> = ids[begin..end].iter().map(|id| id.0).collect();
    let replayed = pg::settle_dead_letters(connection, replay.whose, &part, action).await?;
    let cursor = part.last().map_or(replay.cursor, |last| Cursor { id: Some(*last), at: None });
    Ok(Chunk { looked: count(part.len()), replayed, cursor, then: more(end == ids.len()) })
}

/// Dead letters by filter, the latest first, of those that died before the job was created.
async fn dead_letter_chunk(
    connection: &mut PgConnection,
    replay: &Replay,
    action: DeadLetterAction,
    filter: &DeadLetterFilter,
) -> Result<Chunk, StoreError> {
    let before = DeadPlace {
        at: replay.cursor.at.unwrap_or(replay.created_at),
        id: replay.cursor.id.unwrap_or_default(),
    };
    let scanned = pg::scan_dead_letters(connection, replay.whose, filter, before, CHUNK).await?;
    let mut last_part = scanned.len() < CHUNK;
    let (mut fitting, mut looked, mut cursor) = (Vec::new(), 0, replay.cursor);
    for letter in scanned {
        if letter.fits && fitting.len() == most(replay) {
            last_part = false;
            break;
        }
        if letter.fits {
            fitting.push(letter.place.id);
        }
        (looked, cursor) = (looked + 1, letter.place.into());
    }
    let replayed = pg::settle_dead_letters(connection, replay.whose, &fitting, action).await?;
    Ok(Chunk { looked, replayed, cursor, then: more(last_part) })
}
