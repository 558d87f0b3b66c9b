//! The delivery queue in Postgres, for those who run no NATS: `FOR UPDATE SKIP LOCKED`, leases that
//! expire, `LISTEN/NOTIFY` to wake and polling as the safety net.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use sqlx::{
    PgPool, Row as _,
    postgres::{PgListener, PgRow},
};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use uuid::Uuid;

use super::{Body, DeliveryQueue, Enqueue, Hint, Hints, Lease, Leased, QueueError};
use crate::{
    delivery::Progress,
    ids::{ConnectionId, DeliveryId},
    pg::{self, DeadLetter, During as _},
    receipt::Receipt,
    telemetry::Chain,
};

/// The safety net: a notification that was lost costs at most this.
const POLL: Duration = Duration::from_secs(1);

/// Finished deliveries that leave the table in one statement.
const ACK_BATCH: usize = 500;

/// How long to wait before listening again after the database was away.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// The delivery queue in Postgres.
#[derive(Debug, Clone)]
pub struct PostgresQueue {
    pool: PgPool,
    lanes: u16,
    lease: Duration,
    wake: Arc<Notify>,
    acks: mpsc::Sender<Finished>,
}

#[derive(Debug)]
struct Finished {
    delivery: DeliveryId,
    token: Uuid,
    done: oneshot::Sender<Result<(), Arc<sqlx::Error>>>,
}

impl PostgresQueue {
    /// A queue of `lanes` lanes; a worker that dies loses its hold after `lease`. Its two background
    /// tasks end with `stop` or with the last clone.
    pub fn new(pool: PgPool, prefix: &str, lanes: u16, lease: Duration, stop: CancellationToken) -> Self {
        let (acks, finished) = mpsc::channel(ACK_BATCH * 4);
        tokio::spawn(remove_finished(pool.clone(), finished));
        let wake = Arc::new(Notify::new());
        let woken = wake.clone();
        let mut enqueued = listen(pool.clone(), pg::enqueued_channel(prefix));
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            while enqueued.next().await.is_some() {
                woken.notify_waiters();
            }
        }));
        Self { pool, lanes, lease, wake, acks }
    }

    async fn claim(&self, lane: u16, max: usize) -> Result<Vec<Leased>, QueueError> {
        const OPERATION: &str = "claim deliveries";
        let rows = sqlx::query(
            "WITH due AS (
                 SELECT delivery_id FROM delivery_queue
                 WHERE lane = $1 AND visible_at <= now()
                 ORDER BY visible_at, position
                 LIMIT $2
                 FOR UPDATE SKIP LOCKED
             ), claimed AS (
                 UPDATE delivery_queue q
                 SET visible_at = now() + make_interval(secs => $3), lease_token = gen_random_uuid(),
                     handed_out = q.handed_out + 1
                 FROM due
                 WHERE q.delivery_id = due.delivery_id
                 RETURNING q.*
             )
             SELECT c.*, (SELECT e.body FROM events e WHERE e.uid = c.event_uid) AS body
             FROM claimed c ORDER BY c.position",
        )
        .bind(i16::try_from(lane).unwrap_or(i16::MAX))
        .bind(i64::try_from(max).unwrap_or(i64::MAX))
        .bind(self.lease.as_secs_f64())
        .fetch_all(&self.pool)
        .await
        .during(OPERATION)?;
        Ok(rows.iter().map(|row| self.leased(row)).collect::<Result<_, _>>().during(OPERATION)?)
    }

    fn leased(&self, row: &PgRow) -> Result<Leased, sqlx::Error> {
        let (key, progress) = (pg::key(row)?, pg::progress(row)?);
        let body: Option<Vec<u8>> = row.try_get("body")?;
        let lease = RowLease { queue: self.clone(), delivery: key.id, token: row.try_get("lease_token")? };
        Ok(Leased {
            key,
            progress,
            handed_out: u32::try_from(row.try_get::<i32, _>("handed_out")?).unwrap_or(u32::MAX),
            wait: None,
            body: body.map_or(Body::Stored, |body| Body::Inline(body.into())),
            lease: Box::new(lease),
        })
    }
}

#[async_trait]
impl DeliveryQueue for PostgresQueue {
    async fn enqueue(&self, deliveries: &[Enqueue]) -> Result<(), QueueError> {
        let rows: Vec<_> = deliveries.iter().map(|delivery| (delivery.key, delivery.progress)).collect();
        let mut connection = self.pool.acquire().await.during("enqueue deliveries")?;
        pg::insert_queued(&mut connection, &rows, self.lanes).await?;
        self.wake.notify_waiters();
        Ok(())
    }

    async fn pull(
        &self,
        lane: u16,
        max: usize,
        wait: Duration,
    ) -> Result<BoxStream<'static, Result<Leased, QueueError>>, QueueError> {
        let deadline = Instant::now() + wait;
        loop {
            // Registered before the query, so that what is enqueued in between wakes us.
            let woken = self.wake.notified();
            let claimed = self.claim(lane, max).await?;
            let left = deadline.saturating_duration_since(Instant::now());
            if !claimed.is_empty() || left.is_zero() {
                return Ok(stream::iter(claimed.into_iter().map(Ok)).boxed());
            }
            // Either way the answer is the same: look again.
            let _ = timeout(left.min(POLL), woken).await;
        }
    }

    async fn withdraw(&self, deliveries: &[DeliveryId]) -> Result<(), QueueError> {
        sqlx::query("DELETE FROM delivery_queue WHERE delivery_id = ANY($1)")
            .bind(deliveries.iter().map(|id| id.0).collect::<Vec<_>>())
            .execute(&self.pool)
            .await
            .during("withdraw closed deliveries")?;
        Ok(())
    }

    async fn lanes(&self) -> Result<u16, QueueError> {
        let highest: Option<i16> = sqlx::query_scalar("SELECT max(lane) FROM delivery_queue")
            .fetch_one(&self.pool)
            .await
            .during("look for lanes of an earlier configuration")?;
        let highest = highest.and_then(|lane| u16::try_from(lane).ok());
        Ok(highest.map_or(self.lanes, |highest| self.lanes.max(highest.saturating_add(1))))
    }

    async fn len(&self) -> Result<u64, QueueError> {
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM delivery_queue")
            .fetch_one(&self.pool)
            .await
            .during("count the deliveries in the queue")?;
        Ok(u64::try_from(rows).unwrap_or(0))
    }

    async fn dead_letter(&self, _: &DeadLetter, _: &Bytes) -> Result<(), QueueError> {
        // The row that the caller writes is the only record without a broker.
        Ok(())
    }

    async fn receipts(&self, receipts: &[Receipt]) -> Result<(), QueueError> {
        Ok(pg::insert_attempts(&self.pool, receipts).await?)
    }

    async fn prepare(&self) -> Result<(), QueueError> {
        Ok(())
    }
}

#[derive(Debug)]
struct RowLease {
    queue: PostgresQueue,
    delivery: DeliveryId,
    token: Uuid,
}

#[async_trait]
impl Lease for RowLease {
    async fn ack(self: Box<Self>) -> Result<(), QueueError> {
        let (done, result) = oneshot::channel();
        let finished = Finished { delivery: self.delivery, token: self.token, done };
        let gone = || sqlx::Error::WorkerCrashed;
        self.queue.acks.send(finished).await.map_err(|_| gone()).during("finish a delivery")?;
        result
            .await
            .map_err(|_| gone())
            .during("finish a delivery")?
            .map_err(shared)
            .during("finish a delivery")?;
        Ok(())
    }

    async fn postpone(self: Box<Self>, next: Progress, wait: Duration) -> Result<(), QueueError> {
        // A late answer of an earlier holder finds another token and changes nothing.
        sqlx::query(
            "UPDATE delivery_queue
             SET visible_at = now() + make_interval(secs => $3), attempts = $4, turn = $5, handed_out = 0,
                 lease_token = NULL
             WHERE delivery_id = $1 AND lease_token = $2",
        )
        .bind(self.delivery.0)
        .bind(self.token)
        .bind(wait.as_secs_f64())
        .bind(i32::try_from(next.attempts).unwrap_or(i32::MAX))
        .bind(next.turn)
        .execute(&self.queue.pool)
        .await
        .during("postpone a delivery")?;
        Ok(())
    }

    async fn put_back(self: Box<Self>, wait: Duration) -> Result<(), QueueError> {
        sqlx::query(
            "UPDATE delivery_queue SET visible_at = now() + make_interval(secs => $3), lease_token = NULL
             WHERE delivery_id = $1 AND lease_token = $2",
        )
        .bind(self.delivery.0)
        .bind(self.token)
        .bind(wait.as_secs_f64())
        .execute(&self.queue.pool)
        .await
        .during("put a delivery back")?;
        Ok(())
    }

    async fn extend(&self) -> Result<(), QueueError> {
        sqlx::query(
            "UPDATE delivery_queue SET visible_at = now() + make_interval(secs => $3)
             WHERE delivery_id = $1 AND lease_token = $2",
        )
        .bind(self.delivery.0)
        .bind(self.token)
        .bind(self.queue.lease.as_secs_f64())
        .execute(&self.queue.pool)
        .await
        .during("hold a delivery longer")?;
        Ok(())
    }
}

/// One failed statement finishes nobody of its batch; each is told.
fn shared(error: Arc<sqlx::Error>) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::other(error))
}

/// Deletes finished rows, as many at once as have gathered while the statement before was under way.
async fn remove_finished(pool: PgPool, mut finished: mpsc::Receiver<Finished>) {
    let mut batch = Vec::with_capacity(ACK_BATCH);
    while finished.recv_many(&mut batch, ACK_BATCH).await > 0 {
        let deliveries: Vec<Uuid> = batch.iter().map(|one| one.delivery.0).collect();
        let tokens: Vec<Uuid> = batch.iter().map(|one| one.token).collect();
        let removed = sqlx::query(
            "DELETE FROM delivery_queue q
             USING UNNEST($1::uuid[], $2::uuid[]) AS f (delivery_id, lease_token)
             WHERE q.delivery_id = f.delivery_id AND q.lease_token = f.lease_token",
        )
        .bind(deliveries)
        .bind(tokens)
        .execute(&pool)
        .await
        .map_err(Arc::new);
        for one in batch.drain(..) {
            // Whoever waited may be gone.
            let _ = one.done.send(removed.as_ref().map(|_| ()).map_err(Arc::clone));
        }
    }
}

/// Hints through `LISTEN/NOTIFY`.
#[derive(Debug, Clone)]
pub struct PostgresHints {
    pool: PgPool,
    channel: String,
}

impl PostgresHints {
    /// Hints of the deployment `prefix`.
    pub fn new(pool: PgPool, prefix: &str) -> Self {
        Self { pool, channel: format!("{prefix}_connection") }
    }
}

/// What the hint of a closed delivery starts with.
const CLOSED: &str = "closed:";

#[async_trait]
impl Hints for PostgresHints {
    async fn connection_changed(&self, connection: ConnectionId) {
        let sent = sqlx::query("SELECT pg_notify($1, $2)")
            .bind(&self.channel)
            .bind(connection.to_string())
            .execute(&self.pool)
            .await;
        if let Err(failed) = sent {
            warn!(error = %Chain(&failed), connection.id = %connection, "The workers learn of a change late");
        }
    }

    async fn closed(&self, delivery: DeliveryId) {
        let sent = sqlx::query("SELECT pg_notify($1, $2)")
            .bind(&self.channel)
            .bind(format!("{CLOSED}{delivery}"))
            .execute(&self.pool)
            .await;
        if let Err(failed) = sent {
            warn!(error = %Chain(&failed), delivery.id = %delivery, "The workers learn of a closed delivery late");
        }
    }

    async fn listen(&self) -> BoxStream<'static, Hint> {
        let hint = |payload: String| match payload.strip_prefix(CLOSED) {
            Some(id) => id.parse().ok().map(Hint::Closed),
            None => payload.parse().ok().map(Hint::ConnectionChanged),
        };
        listen(self.pool.clone(), self.channel.clone())
            .map(move |payload| payload.and_then(hint).unwrap_or(Hint::Missed))
            .boxed()
    }
}

/// The payloads of a channel; `None` at the start and after each interruption. Never ends.
fn listen(pool: PgPool, channel: String) -> BoxStream<'static, Option<String>> {
    let start: Option<PgListener> = None;
    stream::unfold((pool, channel, start), |(pool, channel, mut listener)| async move {
        loop {
            match listener.as_mut() {
                None => match connect(&pool, &channel).await {
                    Ok(connected) => return Some((None, (pool, channel, Some(connected)))),
                    Err(failed) => {
                        error!(error = %Chain(&failed), "Cannot listen for notifications; polling goes on");
                        tokio::time::sleep(LISTEN_AGAIN).await;
                    }
                },
                Some(connected) => match connected.try_recv().await {
                    Ok(Some(note)) => {
                        return Some((Some(note.payload().to_owned()), (pool, channel, listener)));
                    }
                    // The connection was lost and made again.
                    Ok(None) => return Some((None, (pool, channel, listener))),
                    Err(_) => listener = None,
                },
            }
        }
    })
    .boxed()
}

async fn connect(pool: &PgPool, channel: &str) -> Result<PgListener, sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(channel).await?;
    Ok(listener)
}
