//! Replays: durable jobs that bring deliveries back, or discard dead letters.
//!
//! The publisher creates a job, the scheduler works it off in chunks. A chunk is one transaction: it claims the
//! job by locking its row, changes deliveries, and notes how far it came. Nobody else works on the job meanwhile,
//! and a chunk that is broken off has not happened.

mod walk;
mod work;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::{PgPool, types::Json};
use uuid::Uuid;

pub use self::{walk::*, work::*};
use super::{
    DeadLetterAction, DeadLetterFilter, DeadPlace, During as _, PageRequest, Paged, StoreError, Whose, audit,
    organizations::lock_organization,
};
use crate::{
    audit::{Action, By, Change, TargetKind, shown},
    ids::{ConnectionId, DeliveryId, EventUid, OrganizationId, ReplayId, SubscriptionId},
};

/// The most jobs of one organization that are not finished.
pub const MAX_OPEN_REPLAYS: i64 = 100;

/// How long a finished job is kept, and with it its Idempotency-Key, days. It goes when the organization
/// creates the next one.
pub const REPLAYS_KEPT_DAYS: i32 = 7;

/// The most deliveries of a job that come back in a second.
pub const MAX_PER_SECOND: u32 = 10_000;

/// What a job is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Selection {
    /// One event, to one subscription or to all that match it now.
    Event {
        /// The event.
        event: EventUid,
        /// The one subscription.
        subscription: Option<SubscriptionId>,
    },
    /// The stored events that one subscription matches now.
    Subscription {
        /// The subscription.
        subscription: SubscriptionId,
        /// Events received at this time or later.
        since: Timestamp,
        /// Events received before this time.
        until: Timestamp,
    },
    /// Dead letters.
    DeadLetters {
        /// What is to become of them.
        action: DeadLetterAction,
        /// Which.
        which: DeadLetters,
    },
}

/// Which dead letters a job is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetters {
    /// These, in ascending order.
    Ids(Vec<DeliveryId>),
    /// Those that fit and died before the job was created.
    Filter(DeadLetterFilter),
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplayState {
    /// Not begun.
    Pending,
    /// Some of it is done.
    Running,
    /// All of it is done.
    Done,
    /// It was cancelled; what was done before stays done.
    Cancelled,
    /// It cannot go on.
    Failed,
}

impl ReplayState {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Pending, "pending"),
        (Self::Running, "running"),
        (Self::Done, "done"),
        (Self::Cancelled, "cancelled"),
        (Self::Failed, "failed"),
    ];
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Its id.
    pub id: ReplayId,
    /// Whose deliveries it touches.
    pub whose: Whose,
    /// What it is about.
    pub selection: Selection,
    /// At most so many deliveries come back in a second.
    pub per_second: u32,
    /// Where it stands.
    pub state: ReplayState,
    /// Why it failed: a short stable word.
    pub failure: Option<String>,
    /// How many events, deliveries or dead letters it has looked at.
    pub looked: u64,
    /// How many deliveries it has brought back, or discarded.
    pub replayed: u64,
    /// What it has looked at last.
    pub cursor: Cursor,
    /// When it was created, by the database's clock.
    pub created_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

/// How far a job has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    /// What was looked at last: an event, a subscription, or a delivery.
    pub id: Option<Uuid>,
    /// The time of that, if the job goes by time.
    pub at: Option<Timestamp>,
}

impl From<DeadPlace> for Cursor {
    fn from(place: DeadPlace) -> Self {
        Self { id: Some(place.id), at: Some(place.at) }
    }
}

/// A job to be stored.
#[derive(Debug, Clone)]
pub struct NewReplay {
    /// Its id.
    pub id: ReplayId,
    /// Whose deliveries it touches.
    pub whose: Whose,
    /// What it is about.
    pub selection: Selection,
    /// At most so many deliveries come back in a second, 1 to [`MAX_PER_SECOND`].
    pub per_second: u32,
    /// The request's Idempotency-Key and its SHA-256.
    pub request: Option<(String, [u8; 32])>,
}

/// What [`create_replay`] found.
#[derive(Debug, Clone)]
pub enum CreateReplay {
    /// It is there now, by this request or an earlier one with the same key.
    Stored(Box<Replay>),
    /// The key was used with another request.
    KeyReused,
    /// The organization has [`MAX_OPEN_REPLAYS`] already.
    TooMany,
}

#[derive(sqlx::FromRow)]
struct ReplayRow {
    id: Uuid,
    organization_id: Uuid,
    connection_id: Option<Uuid>,
    selection: Json<serde_json::Value>,
    per_second: i32,
    state: String,
    failure: Option<String>,
    looked: i64,
    replayed: i64,
    cursor_id: Option<Uuid>,
    cursor_at: Option<jiff_sqlx::Timestamp>,
    created_at: jiff_sqlx::Timestamp,
    finished_at: Option<jiff_sqlx::Timestamp>,
}

macro_rules! columns {
    () => {
        "id, organization_id, connection_id, selection, per_second, state, failure, looked, replayed, cursor_id, cursor_at, \
         created_at, finished_at"
    };
}
use columns;

impl TryFrom<ReplayRow> for Replay {
    type Error = StoreError;

    fn try_from(row: ReplayRow) -> Result<Self, StoreError> {
        let unfit =
            |problem: String| StoreError::Inconsistent { table: "replays", id: row.id.to_string(), problem };
        let state = ReplayState::ALL.into_iter().find(|(_, name)| *name == row.state);
        Ok(Self {
            id: ReplayId(row.id),
            whose: Whose {
                organization: OrganizationId(row.organization_id),
                only: row.connection_id.map(ConnectionId),
            },
            selection: serde_json::from_value(row.selection.0)
                .map_err(|error| unfit(format!("selection: {error}")))?,
            per_second: u32::try_from(row.per_second).unwrap_or(1),
            state: state.ok_or_else(|| unfit(format!("unknown state {}", row.state)))?.0,
            failure: row.failure,
            looked: u64::try_from(row.looked).unwrap_or(0),
            replayed: u64::try_from(row.replayed).unwrap_or(0),
            cursor: Cursor { id: row.cursor_id, at: row.cursor_at.map(jiff_sqlx::Timestamp::to_jiff) },
            created_at: row.created_at.to_jiff(),
            finished_at: row.finished_at.map(jiff_sqlx::Timestamp::to_jiff),
        })
    }
}

/// Stores a job, or finds the one that the same request has created already.
pub async fn create_replay(pool: &PgPool, new: &NewReplay, by: &By) -> Result<CreateReplay, StoreError> {
    const OPERATION: &str = "create a replay";
    let organization = new.whose.organization.0;
    let mut transaction = pool.begin().await.during(OPERATION)?;
    // One at a time, so that a repeated request finds the first one's job, and the count is exact.
    lock_organization(&mut transaction, new.whose.organization).await?;
    sqlx::query(
        "DELETE FROM replays WHERE organization_id = $1 AND finished_at < now() - make_interval(days => $2)",
    )
    .bind(organization)
    .bind(REPLAYS_KEPT_DAYS)
    .execute(&mut *transaction)
    .await
    .during(OPERATION)?;
    if let Some((key, fingerprint)) = &new.request {
        let before: Option<(Uuid, Vec<u8>)> = sqlx::query_as(
            "SELECT id, fingerprint FROM replays WHERE organization_id = $1 AND idempotency_key = $2",
        )
        .bind(organization)
        .bind(key)
        .fetch_optional(&mut *transaction)
        .await
        .during(OPERATION)?;
        match before {
            Some((_, other)) if other != fingerprint => return Ok(CreateReplay::KeyReused),
            Some((id, _)) => {
                let row: ReplayRow =
                    sqlx::query_as(concat!("SELECT ", columns!(), " FROM replays WHERE id = $1"))
                        .bind(id)
                        .fetch_one(&mut *transaction)
                        .await
                        .during(OPERATION)?;
                return Ok(CreateReplay::Stored(Box::new(row.try_into()?)));
            }
            None => {}
        }
    }
    let open: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM replays WHERE organization_id = $1 AND state IN ('pending', 'running')",
    )
    .bind(organization)
    .fetch_one(&mut *transaction)
    .await
    .during(OPERATION)?;
    if open >= MAX_OPEN_REPLAYS {
        return Ok(CreateReplay::TooMany);
    }
    let row: ReplayRow = sqlx::query_as(concat!(
        "INSERT INTO replays (id, organization_id, connection_id, selection, per_second, idempotency_key, fingerprint)
         VALUES ($1, $2, $3, $4, $5, $6, $7)
         RETURNING ",
        columns!()
    ))
    .bind(new.id.0)
    .bind(organization)
    .bind(new.whose.only.map(|id| id.0))
    .bind(Json(&new.selection))
    .bind(i32::try_from(new.per_second).unwrap_or(i32::MAX))
    .bind(new.request.as_ref().map(|(key, _)| key))
    .bind(new.request.as_ref().map(|(_, fingerprint)| &fingerprint[..]))
    .fetch_one(&mut *transaction)
    .await
    .during(OPERATION)?;
    let change = Change::new(Action::ReplayCreated, TargetKind::Replay, new.id).after(shown::replay(new));
    audit::record(&mut transaction, by, Some(new.whose.organization), change).await?;
    transaction.commit().await.during("commit a new replay")?;
    Ok(CreateReplay::Stored(Box::new(row.try_into()?)))
}

/// The job of that id; [`Whose::only`] hides all but those that touch that connection alone.
pub async fn replay(pool: &PgPool, whose: Whose, id: ReplayId) -> Result<Option<Replay>, StoreError> {
    let row: Option<ReplayRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM replays WHERE id = $3 AND organization_id = $1 AND ($2::uuid IS NULL OR connection_id = $2)"
    ))
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .fetch_optional(pool)
    .await
    .during("read a replay")?;
    row.map(Replay::try_from).transpose()
}

/// The jobs of an organization, oldest first.
pub async fn replays(pool: &PgPool, whose: Whose, page: PageRequest) -> Result<Paged<Replay>, StoreError> {
    let rows: Vec<ReplayRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM replays
          WHERE organization_id = $1 AND id > $3 AND ($2::uuid IS NULL OR connection_id = $2)
          ORDER BY id LIMIT $4"
    ))
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(page.bound())
    .bind(page.rows())
    .fetch_all(pool)
    .await
    .during("list replays")?;
    let items = rows.into_iter().map(Replay::try_from).collect::<Result<_, _>>()?;
    Ok(Paged::cut(items, page, |item: &Replay| item.id.0))
}

/// Ends a job that is not finished, after the chunk that is under way, and gives it as it is then. One that is
/// finished stays as it is.
pub async fn cancel_replay(
    pool: &PgPool,
    whose: Whose,
    id: ReplayId,
    by: &By,
) -> Result<Option<Replay>, StoreError> {
    const OPERATION: &str = "cancel a replay";
    let mut transaction = pool.begin().await.during(OPERATION)?;
    let cancelled = sqlx::query(
        "UPDATE replays SET state = 'cancelled', finished_at = now()
         WHERE id = $3 AND organization_id = $1 AND ($2::uuid IS NULL OR connection_id = $2)
           AND state IN ('pending', 'running')",
    )
    .bind(whose.organization.0)
    .bind(whose.only.map(|id| id.0))
    .bind(id.0)
    .execute(&mut *transaction)
    .await
    .during(OPERATION)?;
    if cancelled.rows_affected() > 0 {
        let change = Change::new(Action::ReplayCancelled, TargetKind::Replay, id);
        audit::record(&mut transaction, by, Some(whose.organization), change).await?;
    }
    transaction.commit().await.during(OPERATION)?;
    replay(pool, whose, id).await
}
