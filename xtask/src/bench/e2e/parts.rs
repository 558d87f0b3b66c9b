//! The bare parts without the bus around them, which is the limit that it is measured against: a group-committed insert, a
//! pipelined publish into a stream, a pull, a signed POST, a log of the deliveries, an acknowledgement; one message for each
//! delivery, all in one thread.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{
    self, Message,
    consumer::{PullConsumer, pull},
    message::PublishMessage,
    stream::{Config, RetentionPolicy, StorageType},
};
use bus_core::{
    clock::{Clock as _, SystemClock},
    ids::{Ids as _, SystemIds},
    signature::{SigningSecret, WEBHOOK_ID, WEBHOOK_SIGNATURE, WEBHOOK_TIMESTAMP, sign},
};
use bytes::Bytes;
use devkit::servers::connect_nats;
use futures::{
    Stream, StreamExt as _, TryStreamExt as _,
    stream::{self, FuturesUnordered},
};
use http::{Request, Uri, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rand::{SeedableRng as _, rngs::StdRng};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    sync::mpsc::{self, Receiver, Sender},
    task::JoinSet,
};
use uuid::Uuid;

use crate::bench::{cost::PARTS, load::write_payload, receiver::Tally, work::Work};

const STREAM: &str = "bench_parts";
const SUBJECT: &str = "bench.parts";
/// Rows of a statement at most.
const GROUP: usize = 1_000;
/// Publishes that wait for their acknowledgement.
const WINDOW: usize = 1_000;
/// Messages of a pull at most, and how long it waits for them.
const PULL: usize = 500;
const PULL_WAIT: Duration = Duration::from_secs(2);
/// POSTs under way at a time.
const IN_FLIGHT: usize = 64;
/// Events between two questions whether there is room for more.
const FEED: usize = 500;

/// Where the parts are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// How the owner of the database connects.
    pub(super) database: String,
    pub(super) nats: String,
    pub(super) receiver: String,
}

struct Parts {
    storing: PgConnection,
    logging: PgConnection,
    jetstream: jetstream::Context,
    consumer: PullConsumer,
    poster: Arc<Poster>,
}

struct Event {
    id: Uuid,
    body: Bytes,
}

impl Place {
    /// Makes a schema and a stream of their own, and is ready to deliver the events that are expected.
    pub(super) async fn prepare(&self, tally: Arc<Tally>) -> Result<Work<usize>> {
        let place = self.clone();
        let set = async move || place.set().await.context("set up the bare parts");
        let deliver = async move |parts, _| deliver(parts, tally).await.context("deliver by the bare parts");
        Work::prepare(PARTS, set, deliver).await
    }

    async fn set(&self) -> Result<Parts> {
        let mut storing = self.connect().await?;
        let statements = "CREATE SCHEMA bench_parts;
             CREATE TABLE bench_parts.events (id uuid PRIMARY KEY, body bytea NOT NULL, at timestamptz NOT NULL);
             CREATE TABLE bench_parts.deliveries (
                 event_id uuid PRIMARY KEY, attempt integer NOT NULL, status integer NOT NULL, at timestamptz NOT NULL
             );";
        sqlx::raw_sql(statements).execute(&mut storing).await?;
        let jetstream = jetstream::new(connect_nats(&self.nats).await?);
        let stream = jetstream
            .create_stream(Config {
                name: STREAM.to_owned(),
                subjects: vec![SUBJECT.to_owned()],
                retention: RetentionPolicy::WorkQueue,
                storage: StorageType::File,
                ..Config::default()
            })
            .await?;
        let consumer = pull::Config {
            durable_name: Some("parts".to_owned()),
            max_ack_pending: 4_096,
            ..pull::Config::default()
        };
        Ok(Parts {
            storing,
            logging: self.connect().await?,
            consumer: stream.create_consumer(consumer).await?,
            jetstream,
            poster: Arc::new(Poster::new(self.receiver.parse()?)),
        })
    }

    async fn connect(&self) -> Result<PgConnection> {
        let mut connection = PgConnection::connect(&self.database).await?;
        sqlx::query("SET synchronous_commit = on").execute(&mut connection).await?;
        Ok(connection)
    }

    /// Checks that all of it was stored and logged, and removes it.
    pub(super) async fn clear(&self, events: usize) -> Result<()> {
        let mut connection = self.connect().await?;
        let stored: (i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM bench_parts.events), (SELECT count(*) FROM bench_parts.deliveries)",
        )
        .fetch_one(&mut connection)
        .await?;
        let all = i64::try_from(events)?;
        ensure!(
            stored == (all, all),
            "of {events} events and deliveries {} and {} are stored",
            stored.0,
            stored.1
        );
        sqlx::query("DROP SCHEMA bench_parts CASCADE").execute(&mut connection).await?;
        connection.close().await?;
        jetstream::new(connect_nats(&self.nats).await?).delete_stream(STREAM).await?;
        Ok(())
    }
}

/// The parts run side by side, each as fast as the one behind it.
async fn deliver(parts: Parts, tally: Arc<Tally>) -> Result<usize> {
    let events = tally.deliveries();
    let (feed, fed) = mpsc::channel(GROUP);
    let (store, stored) = mpsc::channel(GROUP);
    let (post, posted) = mpsc::channel(GROUP);
    let mut tasks = JoinSet::new();
    tasks.spawn(make(tally, feed));
    tasks.spawn(commit(parts.storing, fed, store));
    tasks.spawn(publish(parts.jetstream, stored));
    tasks.spawn(post_all(parts.consumer, events, parts.poster, post));
    tasks.spawn(log(parts.logging, posted));
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    // Nobody refuses anything here.
    Ok(0)
}

async fn make(tally: Arc<Tally>, made: Sender<Event>) -> Result<()> {
    for (event, number) in (tally.first()..).enumerate().take(tally.deliveries()) {
        if event % FEED == 0 {
            tally.room(event).await?;
        }
        let mut body = Vec::new();
        write_payload(&mut body, number);
        made.send(Event { id: SystemIds.next(), body: body.into() }).await?;
    }
    Ok(())
}

/// Each statement stores what has gathered while the one before was under way.
async fn commit(
    mut connection: PgConnection,
    mut made: Receiver<Event>,
    stored: Sender<Event>,
) -> Result<()> {
    let mut group = Vec::with_capacity(GROUP);
    while made.recv_many(&mut group, GROUP).await > 0 {
        let ids: Vec<Uuid> = group.iter().map(|event| event.id).collect();
        let bodies: Vec<&[u8]> = group.iter().map(|event| &*event.body).collect();
        sqlx::query(
            "INSERT INTO bench_parts.events (id, body, at)
             SELECT id, body, now() FROM unnest($1::uuid[], $2::bytea[]) AS event (id, body)",
        )
        .bind(ids)
        .bind(bodies)
        .execute(&mut connection)
        .await
        .context("store events")?;
        for event in group.drain(..) {
            stored.send(event).await?;
        }
    }
    Ok(())
}

/// A message is the id of the event, 16 bytes, and its body.
async fn publish(jetstream: jetstream::Context, mut stored: Receiver<Event>) -> Result<()> {
    let mut acks = FuturesUnordered::new();
    while let Some(event) = stored.recv().await {
        if acks.len() == WINDOW {
            acks.next().await.transpose().context("publish")?;
        }
        let payload = [&event.id.as_bytes()[..], &event.body].concat();
        let message = PublishMessage::build().payload(payload.into());
        let ack = jetstream.send_publish(SUBJECT, message).await.context("publish")?;
        acks.push(ack.into_future());
    }
    while acks.next().await.transpose().context("publish")?.is_some() {}
    Ok(())
}

fn pull_all(consumer: PullConsumer) -> impl Stream<Item = Result<Message>> {
    let batches = stream::try_unfold(consumer, async |consumer| {
        // Without idle heartbeats, as in the bus: a batch would hang on them.
        let batch = consumer.batch().max_messages(PULL).expires(PULL_WAIT).messages().await?;
        let batch = batch.map_err(|failed| anyhow::Error::from_boxed(failed).context("pull"));
        Ok::<_, anyhow::Error>(Some((batch, consumer)))
    });
    batches.try_flatten()
}

async fn post_all(
    consumer: PullConsumer,
    events: usize,
    poster: Arc<Poster>,
    posted: Sender<(Message, Uuid)>,
) -> Result<()> {
    let posting = pull_all(consumer).take(events).map_ok(|message| {
        let poster = Arc::clone(&poster);
        async move {
            let id = poster.post(&message.payload).await?;
            Ok((message, id))
        }
    });
    let mut posting = std::pin::pin!(posting.try_buffer_unordered(IN_FLIGHT));
    while let Some(delivered) = posting.try_next().await? {
        posted.send(delivered).await?;
    }
    Ok(())
}

async fn log(mut connection: PgConnection, mut posted: Receiver<(Message, Uuid)>) -> Result<()> {
    let mut group = Vec::with_capacity(GROUP);
    while posted.recv_many(&mut group, GROUP).await > 0 {
        let ids: Vec<Uuid> = group.iter().map(|(_, id)| *id).collect();
        sqlx::query(
            "INSERT INTO bench_parts.deliveries (event_id, attempt, status, at)
             SELECT id, 1, 200, now() FROM unnest($1::uuid[]) AS id",
        )
        .bind(ids)
        .execute(&mut connection)
        .await
        .context("log deliveries")?;
        for (message, _) in group.drain(..) {
            message.ack().await.map_err(anyhow::Error::from_boxed).context("acknowledge")?;
        }
    }
    Ok(())
}

/// Sends signed requests.
struct Poster {
    client: Client<HttpConnector, Full<Bytes>>,
    secret: SigningSecret,
    uri: Uri,
}

impl Poster {
    fn new(uri: Uri) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self {
            client: Client::builder(TokioExecutor::new()).pool_max_idle_per_host(IN_FLIGHT).build(connector),
            secret: SigningSecret::generate(&mut StdRng::seed_from_u64(1)),
            uri,
        }
    }

    /// Posts the event of a message, and gives its id.
    async fn post(&self, message: &Bytes) -> Result<Uuid> {
        let (id, _) = message.split_first_chunk().context("the message is too short")?;
        let (id, body) = (Uuid::from_bytes(*id), message.slice(id.len()..));
        let (name, at) = (id.to_string(), SystemClock.now().as_second());
        let request = Request::post(&self.uri)
            .header(CONTENT_TYPE, "application/json")
            .header(WEBHOOK_SIGNATURE, sign([&self.secret], &name, at, &body))
            .header(WEBHOOK_TIMESTAMP, at)
            .header(WEBHOOK_ID, name)
            .body(Full::new(body))?;
        let response = self.client.request(request).await.context("post")?;
        let status = response.status();
        response.into_body().collect().await.context("post")?;
        ensure!(status.is_success(), "post: {status}");
        Ok(id)
    }
}
