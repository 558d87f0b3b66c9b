//! Stored events: one by its id, and history newest first.

use bytes::Bytes;
use jiff::Timestamp;
use sqlx::{PgPool, Postgres, QueryBuilder};
use uuid::Uuid;

use super::{During as _, StoreError};
use crate::{
    ids::{ConnectionId, EventUid, OrganizationId, SubscriptionId, uuid_floor},
    pattern::TypePattern,
};

/// How many of an organization's events one call of [`events`] looks at, at most. A search for
/// something rare gives short or empty pages, each of which says where to go on, instead of reading
/// the whole history at once.
pub const EVENT_SCAN: i64 = 10_000;

/// How many bytes of bodies one call of [`events`] reads; the event that passes the mark is the last.
pub const EVENT_PAGE_BYTES: i64 = 8 * 1024 * 1024;

/// A stored event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEvent {
    /// The bus's own id.
    pub uid: EventUid,
    /// The CloudEvents id.
    pub id: String,
    /// The CloudEvents source.
    pub source: String,
    /// The CloudEvents type.
    pub r#type: String,
    /// The CloudEvents subject.
    pub subject: Option<String>,
    /// The CloudEvents time, or when the event arrived if it had none.
    pub time: Timestamp,
    /// When it was stored.
    pub received_at: Timestamp,
    /// The connection that published it, if the key was bound to one.
    pub publisher: Option<ConnectionId>,
    /// The subscriptions that matched.
    pub subscriptions: Vec<SubscriptionId>,
    /// The CloudEvent in the JSON event format, as it is delivered; [`events`] reads it only on request. None if it
    /// was erased.
    pub body: Option<Bytes>,
    /// When its payload was erased.
    pub expunged_at: Option<Timestamp>,
}

/// Which events [`events`] gives.
#[derive(Debug, Clone, Default)]
pub struct EventQuery {
    /// Only those whose type this matches.
    pub event_type: Option<TypePattern>,
    /// Only those of this source.
    pub source: Option<String>,
    /// Only those received at this time or later; fractions of a millisecond are cut off.
    pub since: Option<Timestamp>,
    /// Only those received before this time; fractions of a millisecond are cut off.
    pub until: Option<Timestamp>,
    /// Only those before this one.
    pub before: Option<EventUid>,
    /// At most so many.
    pub limit: u32,
    /// Read the bodies too.
    pub bodies: bool,
}

/// A part of history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventPage {
    /// The events, newest first.
    pub items: Vec<StoredEvent>,
    /// Where the next part starts ([`EventQuery::before`]); none if history ends here.
    pub next: Option<EventUid>,
}

#[derive(sqlx::FromRow)]
struct EventRow {
    uid: Uuid,
    id: String,
    source: String,
    r#type: String,
    subject: Option<String>,
    time: jiff_sqlx::Timestamp,
    received_at: jiff_sqlx::Timestamp,
    publisher: Option<Uuid>,
    subscriptions: Vec<Uuid>,
    size: i32,
    expunged_at: Option<jiff_sqlx::Timestamp>,
    body: Option<Vec<u8>>,
}

impl From<EventRow> for StoredEvent {
    fn from(row: EventRow) -> Self {
        Self {
            uid: EventUid(row.uid),
            id: row.id,
            source: row.source,
            r#type: row.r#type,
            subject: row.subject,
            time: row.time.to_jiff(),
            received_at: row.received_at.to_jiff(),
            publisher: row.publisher.map(ConnectionId),
            subscriptions: row.subscriptions.into_iter().map(SubscriptionId).collect(),
            body: row.body.filter(|_| row.expunged_at.is_none()).map(Bytes::from),
            expunged_at: row.expunged_at.map(jiff_sqlx::Timestamp::to_jiff),
        }
    }
}

macro_rules! columns {
    () => {
        "uid, id, source, type, subject, time, received_at, publisher, subscriptions, expunged_at, \
         octet_length(body) AS size"
    };
}

/// The event of that uid.
pub async fn event(
    pool: &PgPool,
    organization: OrganizationId,
    uid: EventUid,
) -> Result<Option<StoredEvent>, StoreError> {
    let row: Option<EventRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        ", body FROM events WHERE uid = $1 AND organization_id = $2"
    ))
    .bind(uid.0)
    .bind(organization.0)
    .fetch_optional(pool)
    .await
    .during("read an event")?;
    Ok(row.map(Into::into))
}

/// Whether the organization has an event of that uid, published or due later.
pub async fn has_event(
    pool: &PgPool,
    organization: OrganizationId,
    uid: EventUid,
) -> Result<bool, StoreError> {
    // One statement, since an event moves from one table to the other.
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM events WHERE uid = $1 AND organization_id = $2)
             OR EXISTS (SELECT FROM scheduled_events WHERE uid = $1 AND organization_id = $2)",
    )
    .bind(uid.0)
    .bind(organization.0)
    .fetch_one(pool)
    .await
    .during("find an event by its uid")
}

/// The uids of the events with that CloudEvents id, published or due later, newest first, at most `limit`.
pub async fn event_uids(
    pool: &PgPool,
    organization: OrganizationId,
    id: &str,
    source: Option<&str>,
    limit: u32,
) -> Result<Vec<EventUid>, StoreError> {
    let uids: Vec<Uuid> = sqlx::query_scalar(
        "(SELECT uid FROM events
          WHERE organization_id = $1 AND id = $2 AND ($3::text IS NULL OR source = $3)
          ORDER BY uid DESC LIMIT $4)
         UNION ALL
         (SELECT uid FROM scheduled_events
          WHERE organization_id = $1 AND id = $2 AND ($3::text IS NULL OR source = $3)
          ORDER BY uid DESC LIMIT $4)
         ORDER BY uid DESC LIMIT $4",
    )
    .bind(organization.0)
    .bind(id)
    .bind(source)
    .bind(i64::from(limit))
    .fetch_all(pool)
    .await
    .during("find events by their id")?;
    Ok(uids.into_iter().map(EventUid).collect())
}

/// The events of an organization, newest first. A part may hold fewer than asked for, or none, and
/// still name a next one: see [`EVENT_SCAN`] and [`EVENT_PAGE_BYTES`].
pub async fn events(
    pool: &PgPool,
    organization: OrganizationId,
    query: &EventQuery,
) -> Result<EventPage, StoreError> {
    // One snapshot for all statements: an event that is committed between them must not fall into the
    // range that the second one declares to be read.
    let mut transaction = pool
        .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        .await
        .during("begin to list events")?;
    // The partitions of the coming days are empty, which the planner does not know: it takes them for small
    // tables that are cheap to read whole and sort, gives up the order of the indexes for their sake, and
    // then sorts everything.
    sqlx::query("SELECT set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true)")
        .execute(&mut *transaction)
        .await
        .during("begin to list events")?;

    let pattern = query.event_type.as_ref().filter(|pattern| !pattern.is_exact());
    let wanted = i64::from(query.limit) + 1;
    let scan = if pattern.is_some() || query.source.is_some() { EVENT_SCAN.max(wanted) } else { wanted };
    let mut list = QueryBuilder::<Postgres>::new(concat!(
        "SELECT ",
        columns!(),
        ", NULL::bytea AS body FROM (SELECT * "
    ));
    push_range(&mut list, organization, query);
    list.push(" LIMIT ").push_bind(scan);
    list.push(") AS scanned WHERE organization_id = ").push_bind(organization.0);
    if let Some(pattern) = pattern {
        list.push(" AND type ~ ").push_bind(pattern_regex(pattern));
    }
    if let Some(source) = &query.source {
        list.push(" AND source = ").push_bind(source);
    }
    list.push(order(query)).push(" LIMIT ").push_bind(wanted);
    let mut rows: Vec<EventRow> =
        list.build_query_as().fetch_all(&mut *transaction).await.during("list events")?;

    let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
    let mut more = rows.len() > limit;
    rows.truncate(limit);
    if query.bodies {
        more |= cut_at_bytes(&mut rows);
        let uids: Vec<Uuid> = rows.iter().map(|row| row.uid).collect();
        let bodies: Vec<(Uuid, Vec<u8>)> = sqlx::query_as(
            "SELECT uid, body FROM events WHERE uid = ANY ($1) AND organization_id = $2 ORDER BY uid DESC",
        )
        .bind(uids)
        .bind(organization.0)
        .fetch_all(&mut *transaction)
        .await
        .during("read the bodies of events")?;
        for (row, (_, body)) in rows.iter_mut().zip(bodies) {
            row.body = Some(body);
        }
    }
    let next = if more {
        rows.last().map(|row| row.uid)
    } else if scan == wanted {
        None
    } else {
        let mut end = QueryBuilder::<Postgres>::new("SELECT uid ");
        push_range(&mut end, organization, query);
        end.push(" LIMIT 1 OFFSET ").push_bind(scan - 1);
        end.build_query_scalar()
            .fetch_optional(&mut *transaction)
            .await
            .during("find where a list of events ends")?
    };
    Ok(EventPage { items: rows.into_iter().map(Into::into).collect(), next: next.map(EventUid) })
}

/// The part of the query that an index answers: the organization, one type, a range of uids, in order.
///
/// It compares rows instead of saying `organization_id = …`. With an equality, `ORDER BY uid` could be
/// had from the primary key too, and the planner takes that where it expects the organization's events
/// to be spread evenly. Those of an organization that stopped publishing are not: all that others
/// published since would be read first.
fn push_range(builder: &mut QueryBuilder<Postgres>, organization: OrganizationId, query: &EventQuery) {
    let until = query.until.map(uuid_floor);
    let before = query.before.map(|uid| uid.0);
    let upper = until.into_iter().chain(before).min().unwrap_or(Uuid::max());
    let lower = query.since.map(uuid_floor).unwrap_or_default();
    let exact = query.event_type.as_ref().filter(|pattern| pattern.is_exact());
    let key = if exact.is_some() { "(organization_id, type, uid)" } else { "(organization_id, uid)" };
    builder.push("FROM events WHERE ");
    for (index, (comparison, uid)) in [(" < (", upper), (" >= (", lower)].into_iter().enumerate() {
        builder
            .push(if index > 0 { " AND " } else { "" })
            .push(key)
            .push(comparison)
            .push_bind(organization.0);
        if let Some(exact) = exact {
            builder.push(", ").push_bind(exact.as_str().to_owned());
        }
        builder.push(", ").push_bind(uid).push(")");
    }
    builder.push(order(query));
}

/// The order of the index that [`push_range`] reads, which is that of the uids.
fn order(query: &EventQuery) -> &'static str {
    match &query.event_type {
        Some(pattern) if pattern.is_exact() => " ORDER BY organization_id DESC, type DESC, uid DESC",
        _ => " ORDER BY organization_id DESC, uid DESC",
    }
}

/// Leaves the rows whose bodies fit [`EVENT_PAGE_BYTES`], and one at least. True if it cut any off.
fn cut_at_bytes(rows: &mut Vec<EventRow>) -> bool {
    let mut bytes = 0;
    let fits = rows
        .iter()
        .take_while(|row| {
            let before = bytes;
            bytes += i64::from(row.size);
            before < EVENT_PAGE_BYTES
        })
        .count();
    let cut = fits < rows.len();
    rows.truncate(fits);
    cut
}

/// The pattern as a regular expression of Postgres ("advanced", without back references, so that its
/// time is linear in the text).
pub(super) fn pattern_regex(pattern: &TypePattern) -> String {
    let mut regex = String::from("^");
    for (index, token) in pattern.as_str().split('.').enumerate() {
        if index > 0 {
            regex.push_str(r"\.");
        }
        match token {
            "*" => regex.push_str("[^.]*"),
            ">" => regex.push_str(".*"),
            literal => {
                for char in literal.chars() {
                    if char.is_ascii_punctuation() {
                        regex.push('\\');
                    }
                    regex.push(char);
                }
            }
        }
    }
    regex.push('$');
    regex
}
