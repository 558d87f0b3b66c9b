//! The delivery queue in Postgres, for those who run no NATS: `FOR UPDATE SKIP LOCKED`, leases that
//! expire, hints to wake and polling as the safety net.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use sqlx::{PgPool, Row as _, postgres::PgRow};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Body, DeliveryQueue, Enqueue, Lease, Leased, QueueError};
use crate::{
    delivery::{DeliveryKey, Progress},
    ids::DeliveryId,
    notify::{self, Hint, Notifier},
    pg::{self, DeadLetter, During as _},
    receipt::Receipt,
};

/// Finished deliveries that leave the table in one statement.
const ACK_BATCH: usize = 500;

/// The delivery queue in Postgres.
#[derive(Debug, Clone)]
pub struct PostgresQueue {
    pool: PgPool,
    lanes: u16,
    lease: Duration,
    notifier: Arc<dyn Notifier>,
    poll: Duration,
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
    /// A queue of `lanes` lanes; a worker that dies loses its hold after `lease`. Hints of the `notifier`
    /// wake who waits; one that was lost costs at most `poll`. Its two background tasks end with `stop` or
    /// with the last clone.
    pub fn new(
        pool: PgPool,
        lanes: u16,
        lease: Duration,
        notifier: Arc<dyn Notifier>,
        poll: Duration,
        stop: CancellationToken,
    ) -> Self {
        let (acks, finished) = mpsc::channel(ACK_BATCH * 4);
        tokio::spawn(remove_finished(pool.clone(), finished));
        let wake = Arc::new(Notify::new());
        let woken = wake.clone();
        let following =
            notify::wake_on(Arc::clone(&notifier), Hint::Enqueued, move || woken.notify_waiters());
        tokio::spawn(stop.run_until_cancelled_owned(following));
        Self { pool, lanes, lease, notifier, poll, wake, acks }
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
             SELECT c.*, (SELECT e.body FROM events e WHERE e.uid = c.event_uid AND e.expunged_at IS NULL) AS body
             FROM claimed c ORDER BY c.position",
        )
        .bind(i16::try_from(lane).unwrap_or(i16::MAX))
        .bind(i64::try_from(max).unwrap_or(i64::MAX))
        .bind(self.lease.as_secs_f64())
        .fetch_all(&self.pool)
        .await
        .during(OPERATION)?;
        Ok(rows.iter().map(|row| self.leased(lane, row)).collect::<Result<_, _>>().during(OPERATION)?)
    }

    fn leased(&self, lane: u16, row: &PgRow) -> Result<Leased, sqlx::Error> {
        let (key, progress) = (pg::key(row)?, pg::progress(row)?);
        let body: Option<Vec<u8>> = row.try_get("body")?;
        let lease = RowLease { queue: self.clone(), delivery: key.id, token: row.try_get("lease_token")? };
        Ok(Leased {
            key,
            progress,
            lane,
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
        let row = |delivery: &Enqueue| (delivery.key, delivery.progress, delivery.lane(self.lanes));
        let rows: Vec<_> = deliveries.iter().map(row).collect();
        let mut connection = self.pool.acquire().await.during("enqueue deliveries")?;
        pg::insert_queued(&mut connection, &rows).await?;
        self.wake.notify_waiters();
        self.notifier.notify(Hint::Enqueued).await;
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
            let _ = timeout(left.min(self.poll), woken).await;
        }
    }

    async fn withdraw(&self, deliveries: &[DeliveryId]) -> Result<(), QueueError> {
        // Only what is still closed: it may have been replayed since.
        sqlx::query(
            "DELETE FROM delivery_queue q USING delivery_states s
             WHERE q.delivery_id = ANY($1) AND s.delivery_id = q.delivery_id AND s.state IN ('acked', 'cancelled')",
        )
            .bind(deliveries.iter().map(|id| id.0).collect::<Vec<_>>())
            .execute(&self.pool)
            .await
            .during("withdraw closed deliveries")?;
        Ok(())
    }

    async fn lanes(&self) -> Result<BTreeSet<u16>, QueueError> {
        // One look into the index for each lane, however many rows there are.
        let taken: Vec<i16> = sqlx::query_scalar(
            "WITH RECURSIVE taken AS (
                 SELECT min(lane) AS lane FROM delivery_queue
                 UNION ALL
                 SELECT (SELECT min(q.lane) FROM delivery_queue q WHERE q.lane > taken.lane) FROM taken
                 WHERE taken.lane IS NOT NULL
             )
             SELECT lane FROM taken WHERE lane IS NOT NULL",
        )
        .fetch_all(&self.pool)
        .await
        .during("look for other lanes that hold deliveries")?;
        Ok((0..self.lanes).chain(taken.into_iter().filter_map(|lane| u16::try_from(lane).ok())).collect())
    }

    async fn holds(&self, deliveries: &[DeliveryKey]) -> Result<HashSet<DeliveryId>, QueueError> {
        let held: Vec<Uuid> =
            sqlx::query_scalar("SELECT delivery_id FROM delivery_queue WHERE delivery_id = ANY($1)")
                .bind(deliveries.iter().map(|key| key.id.0).collect::<Vec<_>>())
                .fetch_all(&self.pool)
                .await
                .during("look deliveries up in the queue")?;
        Ok(held.into_iter().map(DeliveryId).collect())
    }

    async fn depth(&self) -> Result<u64, QueueError> {
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
    async fn ack(&self) -> Result<(), QueueError> {
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

    async fn postpone(&self, next: Progress, wait: Duration) -> Result<(), QueueError> {
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

    async fn put_back(&self, wait: Duration) -> Result<(), QueueError> {
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
