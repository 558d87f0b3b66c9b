//! What a replay reads and writes besides its own row: stored events in the order of their arrival, and the
//! deliveries that begin again.

use std::collections::HashMap;

use bytes::Bytes;
use sqlx::{PgConnection, Postgres, QueryBuilder};
use uuid::Uuid;

use crate::{
    delivery::DeliveryKey,
    ids::{ConnectionId, EventUid, OrganizationId},
    pattern::TypePattern,
    pg::{During as _, StoreError},
};

/// A stored event as far as matching needs it at first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalkedEvent {
    /// The event.
    pub uid: EventUid,
    /// Its type.
    pub r#type: String,
    /// The connection that published it.
    pub publisher: Option<ConnectionId>,
    /// How large its body is, bytes.
    pub size: u64,
    /// Whether its payload was erased: there is nothing to deliver.
    pub expunged: bool,
}

/// Which stored events, by uid.
#[derive(Debug, Clone, Copy)]
pub struct Walk<'a> {
    /// Only those of this type, if it is exact: then the index of types leads to them.
    pub event_type: Option<&'a TypePattern>,
    /// From this uid on.
    pub from: Uuid,
    /// Up to before this uid.
    pub until: Uuid,
    /// At most so many.
    pub limit: usize,
}

/// The organization's events in the order of their arrival. The transaction reads in order.
pub async fn walk_events(
    connection: &mut PgConnection,
    organization: OrganizationId,
    walk: Walk<'_>,
) -> Result<Vec<WalkedEvent>, StoreError> {
    let exact = walk.event_type.filter(|pattern| pattern.is_exact());
    // Rows are compared, as in the list of events, so that the planner takes these indexes and no other.
    let key = if exact.is_some() { "organization_id, type, uid" } else { "organization_id, uid" };
    let mut query = QueryBuilder::<Postgres>::new(
        "SELECT uid, type, publisher, octet_length(body)::int8, expunged_at IS NOT NULL FROM events WHERE ",
    );
    for (index, (comparison, uid)) in [(" >= (", walk.from), (" < (", walk.until)].into_iter().enumerate() {
        query.push(if index > 0 { " AND (" } else { "(" }).push(key).push(")").push(comparison);
        query.push_bind(organization.0);
        if let Some(exact) = exact {
            query.push(", ").push_bind(exact.as_str().to_owned());
        }
        query.push(", ").push_bind(uid).push(")");
    }
    query.push(" ORDER BY ").push(key).push(" LIMIT ");
    query.push_bind(i64::try_from(walk.limit).unwrap_or(i64::MAX));
    let rows: Vec<(Uuid, String, Option<Uuid>, i64, bool)> =
        query.build_query_as().fetch_all(connection).await.during("walk through stored events")?;
    Ok(rows
        .into_iter()
        .map(|(uid, r#type, publisher, size, expunged)| WalkedEvent {
            uid: EventUid(uid),
            r#type,
            publisher: publisher.map(ConnectionId),
            size: u64::try_from(size).unwrap_or(0),
            expunged,
        })
        .collect())
}

/// The CloudEvents of those events that are still stored.
pub async fn event_bodies(
    connection: &mut PgConnection,
    organization: OrganizationId,
    events: &[EventUid],
) -> Result<HashMap<EventUid, Bytes>, StoreError> {
    if events.is_empty() {
        return Ok(HashMap::new());
    }
    let uids: Vec<Uuid> = events.iter().map(|uid| uid.0).collect();
    let rows: Vec<(Uuid, Vec<u8>)> =
        sqlx::query_as("SELECT uid, body FROM events WHERE uid = ANY ($2) AND organization_id = $1")
            .bind(organization.0)
            .bind(uids)
            .fetch_all(connection)
            .await
            .during("read the bodies of walked events")?;
    Ok(rows.into_iter().map(|(uid, body)| (EventUid(uid), body.into())).collect())
}

/// Lets deliveries begin again, due at once, with no attempts and a new lifetime; says how many did. The new turn
/// is later than every turn before, so that an open one, in the queue or in a worker's hands, is overruled. A
/// cancelled one stays cancelled.
pub async fn restart_deliveries(
    connection: &mut PgConnection,
    deliveries: &[DeliveryKey],
) -> Result<u64, StoreError> {
    if deliveries.is_empty() {
        return Ok(0);
    }
    let each = |f: fn(&DeliveryKey) -> Uuid| deliveries.iter().map(f).collect::<Vec<_>>();
    let restarted = sqlx::query(
        "INSERT INTO delivery_states AS p (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                           connection_version, state, turn, attempts, since, due_at, reason)
         SELECT d, e, o, s, c, v, 'waiting', floor(extract(epoch FROM now()) * 1000)::int8, 0,
                date_trunc('milliseconds', now()), now(), 'replayed'
         FROM UNNEST($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::int8[]) AS u (d, e, o, s, c, v)
         ORDER BY d
         ON CONFLICT (delivery_id) DO UPDATE
             SET state = 'waiting', turn = greatest(p.turn + 1, excluded.turn), attempts = 0, since = excluded.since,
                 due_at = excluded.due_at, lease_until = '-infinity', reason = excluded.reason,
                 connection_version = excluded.connection_version, changed_at = now()
             WHERE p.state <> 'cancelled'",
    )
    .bind(each(|key| key.id.0))
    .bind(each(|key| key.event.0))
    .bind(each(|key| key.organization.0))
    .bind(each(|key| key.subscription.0))
    .bind(each(|key| key.connection.0))
    .bind(deliveries.iter().map(|key| key.connection_version).collect::<Vec<_>>())
    .execute(connection)
    .await
    .during("restart deliveries")?;
    Ok(restarted.rows_affected())
}
