//! The statements of the publish transaction.

use std::{collections::HashMap, fmt::Write as _};

use bytes::Bytes;
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use super::{During as _, StoreError};
use crate::{
    cloudevent::CloudEvent,
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, EventUid, KeyId, OrganizationId, OutboxId, SubscriptionId},
};

/// An event to be stored.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// The bus's own id.
    pub uid: EventUid,
    /// Whose it is.
    pub organization: OrganizationId,
    /// The CloudEvents attributes that history is queried by.
    pub id: String,
    /// See `id`.
    pub source: String,
    /// See `id`.
    pub r#type: String,
    /// See `id`.
    pub subject: Option<String>,
    /// See `id`.
    pub time: Timestamp,
    /// The connection that the publishing key is bound to.
    pub publisher: Option<ConnectionId>,
    /// When it arrived, if that was before the transaction that stores it.
    pub received_at: Option<Timestamp>,
    /// The subscriptions that matched.
    pub subscriptions: Vec<SubscriptionId>,
    /// The CloudEvent in the JSON event format.
    pub body: Bytes,
}

impl NewEvent {
    /// A row for an event, with its bytes; `time` is for one that has none of its own. Nothing has matched it yet.
    pub fn of(
        event: &CloudEvent,
        body: Bytes,
        uid: EventUid,
        organization: OrganizationId,
        publisher: Option<ConnectionId>,
        time: Timestamp,
    ) -> Self {
        Self {
            uid,
            organization,
            id: event.id.clone(),
            source: event.source.clone(),
            r#type: event.r#type.clone(),
            subject: event.subject.clone(),
            time: event.time.unwrap_or(time),
            publisher,
            received_at: None,
            subscriptions: Vec::new(),
            body,
        }
    }
}

/// Something that may be published only once within a window.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UniqueKey {
    /// Whose it is.
    pub organization: OrganizationId,
    /// The key; see the table `event_keys`.
    pub key: String,
}

impl UniqueKey {
    /// The identity of an event: source and id together (CloudEvents 1.0, "id").
    pub fn event(organization: OrganizationId, source: &str, id: &str) -> Self {
        let mut key = String::from("e");
        for byte in digest([source, id]) {
            write!(key, "{byte:02x}").expect("a String takes everything");
        }
        Self { organization, key }
    }

    /// An `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07), which is at most 255 bytes.
    pub fn idempotency(organization: OrganizationId, key: &str) -> Self {
        Self { organization, key: format!("i{key}") }
    }
}

/// SHA-256 of texts that identify something together. Hashed, because they may be longer than an index row may be
/// (2,704 bytes); each after its length in bytes, because any character may be in any of them.
pub(super) fn digest<const N: usize>(parts: [&str; N]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// A [`UniqueKey`] and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    /// The key.
    pub key: UniqueKey,
    /// The events that it stands for, if it is new.
    pub events: Vec<EventUid>,
    /// SHA-256 of the request, for an idempotency key.
    pub fingerprint: Option<[u8; 32]>,
}

/// Who had the key before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The events that it stands for.
    pub events: Vec<EventUid>,
    /// SHA-256 of the first request, for an idempotency key.
    pub fingerprint: Option<Vec<u8>>,
}

/// The version of each key's organization, read in the publish transaction (invariant I2). A key that
/// is missing in the answer was revoked or has expired.
pub async fn read_versions(
    connection: &mut PgConnection,
    keys: &[KeyId],
) -> Result<HashMap<KeyId, (OrganizationId, i64)>, StoreError> {
    const OPERATION: &str = "read the organizations' versions";
    let keys: Vec<Uuid> = keys.iter().map(|key| key.0).collect();
    let rows = sqlx::query(
        "SELECT k.id, o.id AS organization_id, o.version
         FROM api_keys k JOIN organizations o ON o.id = k.organization_id
         WHERE k.id = ANY($1) AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())",
    )
    .bind(keys)
    .fetch_all(connection)
    .await
    .during(OPERATION)?;
    rows.iter()
        .map(|row| {
            let organization: Uuid = row.try_get("organization_id")?;
            Ok((KeyId(row.try_get("id")?), (organization.into(), row.try_get("version")?)))
        })
        .collect::<Result<_, _>>()
        .during(OPERATION)
}

/// Claims each key for `window_s` seconds, or finds who had it before. A concurrent transaction that
/// claims one of the same keys waits for this one's end.
///
/// The keys must be distinct. They are claimed in their order, so that two transactions cannot wait for
/// each other.
pub async fn claim_keys(
    connection: &mut PgConnection,
    claims: &[Claim],
    window_s: u64,
) -> Result<HashMap<UniqueKey, Taken>, StoreError> {
    const OPERATION: &str = "claim deduplication keys";
    let mut claims: Vec<&Claim> = claims.iter().collect();
    claims.sort();
    let organizations: Vec<Uuid> = claims.iter().map(|claim| claim.key.organization.0).collect();
    let keys: Vec<&str> = claims.iter().map(|claim| claim.key.key.as_str()).collect();
    let events: Vec<String> =
        claims.iter().map(|claim| array_literal(claim.events.iter().map(|uid| uid.0))).collect();
    let fingerprints: Vec<Option<&[u8]>> =
        claims.iter().map(|claim| claim.fingerprint.as_ref().map(|f| &f[..])).collect();
    let claimed = sqlx::query(
        "INSERT INTO event_keys AS k (organization_id, key, event_uids, fingerprint, expires_at)
         SELECT c.organization_id, c.key, c.event_uids::uuid[], c.fingerprint, now() + make_interval(secs => $5)
         FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::bytea[])
              WITH ORDINALITY AS c (organization_id, key, event_uids, fingerprint, position)
         ORDER BY c.position
         ON CONFLICT (organization_id, key) DO UPDATE
             SET event_uids = excluded.event_uids, fingerprint = excluded.fingerprint, expires_at = excluded.expires_at
             WHERE k.expires_at <= now()
         RETURNING organization_id, key",
    )
    .bind(&organizations)
    .bind(&keys)
    .bind(events)
    .bind(fingerprints)
    .bind(seconds(window_s))
    .fetch_all(&mut *connection)
    .await
    .during(OPERATION)?;
    if claimed.len() == claims.len() {
        return Ok(HashMap::new());
    }
    // Read committed: this statement sees what the transaction that we waited for has committed.
    let rows = sqlx::query(
        "SELECT k.organization_id, k.key, k.event_uids, k.fingerprint
         FROM UNNEST($1::uuid[], $2::text[]) AS c (organization_id, key)
         JOIN event_keys k USING (organization_id, key)",
    )
    .bind(&organizations)
    .bind(&keys)
    .fetch_all(&mut *connection)
    .await
    .during(OPERATION)?;
    let mut taken = HashMap::new();
    let ours: std::collections::HashSet<UniqueKey> =
        claimed.iter().map(unique_key).collect::<Result<_, _>>().during(OPERATION)?;
    for row in &rows {
        let key = unique_key(row).during(OPERATION)?;
        if !ours.contains(&key) {
            let events: Vec<Uuid> = row.try_get("event_uids").during(OPERATION)?;
            let fingerprint = row.try_get("fingerprint").during(OPERATION)?;
            taken.insert(key, Taken { events: events.into_iter().map(EventUid).collect(), fingerprint });
        }
    }
    Ok(taken)
}

fn unique_key(row: &sqlx::postgres::PgRow) -> Result<UniqueKey, sqlx::Error> {
    let organization: Uuid = row.try_get("organization_id")?;
    Ok(UniqueKey { organization: organization.into(), key: row.try_get("key")? })
}

/// Changes what a key stands for, in the transaction that claimed it.
pub async fn amend_key(
    connection: &mut PgConnection,
    key: &UniqueKey,
    events: &[EventUid],
) -> Result<(), StoreError> {
    let events: Vec<Uuid> = events.iter().map(|uid| uid.0).collect();
    sqlx::query("UPDATE event_keys SET event_uids = $3 WHERE organization_id = $1 AND key = $2")
        .bind(key.organization.0)
        .bind(&key.key)
        .bind(events)
        .execute(connection)
        .await
        .during("amend a deduplication key")?;
    Ok(())
}

/// Stores events: one statement, whatever their number.
pub async fn insert_events(connection: &mut PgConnection, events: &[NewEvent]) -> Result<(), StoreError> {
    let each = |f: fn(&NewEvent) -> Uuid| events.iter().map(f).collect::<Vec<_>>();
    let text = |f: fn(&NewEvent) -> &str| events.iter().map(f).collect::<Vec<_>>();
    let times: Vec<jiff_sqlx::Timestamp> = events.iter().map(|event| event.time.into()).collect();
    let subjects: Vec<Option<&str>> = events.iter().map(|event| event.subject.as_deref()).collect();
    let publishers: Vec<Option<Uuid>> = events.iter().map(|event| event.publisher.map(|id| id.0)).collect();
    let received: Vec<Option<jiff_sqlx::Timestamp>> =
        events.iter().map(|event| event.received_at.map(Into::into)).collect();
    let bodies: Vec<&[u8]> = events.iter().map(|event| &event.body[..]).collect();
    // UNNEST flattens arrays of arrays, so each event's matches travel as an array literal.
    let subscriptions: Vec<String> =
        events.iter().map(|event| array_literal(event.subscriptions.iter().map(|id| id.0))).collect();
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, subject, time, publisher, subscriptions, body,
                             received_at)
         SELECT uid, organization_id, id, source, type, subject, time, publisher, subscriptions::uuid[], body,
                coalesce(received_at, now())
         FROM UNNEST($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::timestamptz[],
                     $8::uuid[], $9::text[], $10::bytea[], $11::timestamptz[])
              AS e (uid, organization_id, id, source, type, subject, time, publisher, subscriptions, body,
                    received_at)",
    )
    .bind(each(|event| event.uid.0))
    .bind(each(|event| event.organization.0))
    .bind(text(|event| &event.id))
    .bind(text(|event| &event.source))
    .bind(text(|event| &event.r#type))
    .bind(subjects)
    .bind(times)
    .bind(publishers)
    .bind(subscriptions)
    .bind(bodies)
    .bind(received)
    .execute(connection)
    .await
    .during("store events")?;
    Ok(())
}

/// Opens the outbox row of a publish transaction, held by the caller for `lease_s` seconds.
pub async fn insert_outbox(
    connection: &mut PgConnection,
    id: OutboxId,
    events: &[EventUid],
    lease_s: u64,
) -> Result<(), StoreError> {
    let events: Vec<Uuid> = events.iter().map(|uid| uid.0).collect();
    sqlx::query(
        "INSERT INTO outbox (id, event_uids, lease_until) VALUES ($1, $2, now() + make_interval(secs => $3))",
    )
    .bind(id.0)
    .bind(events)
    .bind(seconds(lease_s))
    .execute(connection)
    .await
    .during("open an outbox row")?;
    Ok(())
}

/// Puts deliveries into the queue table of the Postgres backend, each into its lane. Those that are there already
/// stay, unless this is a later turn. None is fine.
pub async fn insert_queued(
    connection: &mut PgConnection,
    deliveries: &[(DeliveryKey, Progress, u16)],
) -> Result<(), StoreError> {
    if deliveries.is_empty() {
        return Ok(());
    }
    let each = |f: fn(&DeliveryKey) -> Uuid| deliveries.iter().map(|(key, ..)| f(key)).collect::<Vec<_>>();
    let since: Vec<jiff_sqlx::Timestamp> =
        deliveries.iter().map(|(_, progress, _)| progress.since.into()).collect();
    sqlx::query(
        "INSERT INTO delivery_queue AS q (delivery_id, lane, event_uid, organization_id, subscription_id, connection_id,
                                          connection_version, attempts, turn, since, visible_at)
         SELECT d, l, e, o, s, c, v, n, t, a, now()
         FROM (SELECT DISTINCT ON (d) *
               FROM UNNEST($1::uuid[], $2::int2[], $3::uuid[], $4::uuid[], $5::uuid[], $6::uuid[], $7::int8[],
                           $8::int4[], $9::int8[], $10::timestamptz[])
                    WITH ORDINALITY AS u (d, l, e, o, s, c, v, n, t, a, place)
               ORDER BY d, t DESC) AS once
         ORDER BY place
         ON CONFLICT (delivery_id) DO UPDATE
             SET lane = excluded.lane, attempts = excluded.attempts, turn = excluded.turn, since = excluded.since, handed_out = 0,
                 connection_version = excluded.connection_version, visible_at = excluded.visible_at,
                 lease_token = NULL
             WHERE q.turn < excluded.turn",
    )
    .bind(each(|key| key.id.0))
    .bind(deliveries.iter().map(|(.., lane)| i16::try_from(*lane).unwrap_or(i16::MAX)).collect::<Vec<_>>())
    .bind(each(|key| key.event.0))
    .bind(each(|key| key.organization.0))
    .bind(each(|key| key.subscription.0))
    .bind(each(|key| key.connection.0))
    .bind(deliveries.iter().map(|(key, ..)| key.connection_version).collect::<Vec<_>>())
    .bind(deliveries.iter().map(|(_, p, _)| i32::try_from(p.attempts).unwrap_or(i32::MAX)).collect::<Vec<_>>())
    .bind(deliveries.iter().map(|(_, progress, _)| progress.turn).collect::<Vec<_>>())
    .bind(since)
    .execute(connection)
    .await
    .during("enqueue deliveries")?;
    Ok(())
}

/// A Postgres array literal; UUIDs need no quoting.
fn array_literal(ids: impl Iterator<Item = Uuid>) -> String {
    let mut literal = String::from("{");
    for (index, id) in ids.enumerate() {
        if index > 0 {
            literal.push(',');
        }
        literal.push_str(id.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
    }
    literal.push('}');
    literal
}

/// Seconds for `make_interval(secs => …)`.
pub(super) fn seconds(seconds: u64) -> f64 {
    f64::from(u32::try_from(seconds).unwrap_or(u32::MAX))
}

/// What an event was accepted as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The bus's own id.
    pub uid: EventUid,
    /// See [`NewEvent`].
    pub id: String,
    /// See [`NewEvent`].
    pub source: String,
    /// See [`NewEvent`].
    pub r#type: String,
    /// See [`NewEvent`].
    pub time: Timestamp,
}

/// The identities of stored events, by uid; an event that has expired is missing.
pub async fn read_identities(
    connection: &mut PgConnection,
    events: &[EventUid],
) -> Result<HashMap<EventUid, Identity>, StoreError> {
    const OPERATION: &str = "read the first events of repeated publishes";
    let uids: Vec<Uuid> = events.iter().map(|uid| uid.0).collect();
    sqlx::query(
        "SELECT uid, id, source, type, time FROM events WHERE uid = ANY($1)
         UNION ALL
         SELECT uid, id, source, type, time FROM scheduled_events WHERE uid = ANY($1)",
    )
    .bind(uids)
    .fetch_all(connection)
    .await
    .during(OPERATION)?
    .iter()
    .map(|row| {
        let uid = EventUid(row.try_get("uid")?);
        let time: jiff_sqlx::Timestamp = row.try_get("time")?;
        let identity = Identity {
            uid,
            id: row.try_get("id")?,
            source: row.try_get("source")?,
            r#type: row.try_get("type")?,
            time: time.to_jiff(),
        };
        Ok((uid, identity))
    })
    .collect::<Result<_, sqlx::Error>>()
    .during(OPERATION)
}
