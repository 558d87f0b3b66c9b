//! A load whose attempts are known one by one, and three accounts of them: what the receiver saw, what history says, and
//! what an independent reader finds in cold storage.

mod account;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use async_nats::jetstream;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

pub use self::account::Account;
use self::account::{Attempt, Attempts, Told};
use crate::{
    client::ApiClient,
    poll,
    processes::Role,
    receiver::{Answer, Receiver, Script},
    servers::connect_nats,
    stack::{Stack, StackOptions},
};

/// Events of one request.
const BATCH: usize = 500;
/// Requests under way at a time.
const REQUESTS: usize = 4;
/// How often a batch is published that is answered 503, and the pause in between.
const TRIES: usize = 60;
const PAUSE: Duration = Duration::from_secs(1);
/// How far history may be behind when all is delivered.
const BEHIND: Duration = Duration::from_secs(120);
/// A status that the connections call final.
const FINAL: u16 = 422;

/// What the attempts to deliver the `n`th event of an organization are answered; then always the last.
fn answers(n: u64) -> &'static [u16] {
    match n % 20 {
        3 => &[500, 200],
        7 => &[429, 200],
        11 => &[500, 429, 200],
        13 => &[FINAL],
        _ => &[200],
    }
}

/// What the receiver saw, and how it answered.
#[derive(Debug, Default)]
struct Witness {
    /// What each delivery was answered, by its organization and its id.
    answered: HashMap<(String, String), Vec<u16>>,
    /// Deliveries that have had the last of their answers.
    over: usize,
}

impl Witness {
    fn answer(&mut self, organization: &str, delivery: &str, n: u64) -> u16 {
        let answered = self.answered.entry((organization.to_owned(), delivery.to_owned())).or_default();
        let answers = answers(n);
        let status = answers[answered.len().min(answers.len() - 1)];
        answered.push(status);
        if answered.len() == answers.len() {
            self.over += 1;
        }
        status
    }

    fn attempts(&self) -> Attempts {
        let of = |statuses: &Vec<u16>| {
            let mut number = 1;
            let attempts = statuses.iter().map(|status| {
                let outcome = match *status {
                    200 => "delivered",
                    429 => "deferred",
                    FINAL => "dead",
                    _ => "failed",
                };
                let attempt = Attempt { number, outcome: outcome.to_owned(), status: (*status).into() };
                number += i32::from(outcome == "failed");
                attempt
            });
            attempts.collect()
        };
        self.answered.iter().map(|(key, statuses)| (key.clone(), of(statuses))).collect()
    }
}

/// Organizations that publish, and a receiver that answers some deliveries with a failure, a deferral, or both, before
/// it takes them, and refuses others for good.
#[derive(Debug)]
pub struct Load {
    receiver: Receiver,
    witness: Arc<Mutex<Witness>>,
    apis: Vec<ApiClient>,
}

impl Load {
    /// What a stack needs for it: batches that are archived soon.
    #[must_use]
    pub fn options() -> StackOptions {
        StackOptions::default().role_env(Role::Archiver, "EVENT_BUS_ARCHIVE__BATCH_AGE_S", 2)
    }

    /// Creates the organizations, each with a connection and a subscription.
    ///
    /// # Errors
    /// If the API refuses.
    pub async fn set(stack: &mut Stack, organizations: usize) -> Result<Self> {
        let receiver = Receiver::start().await?;
        let witness = Arc::<Mutex<Witness>>::default();
        let admin = stack.admin(0)?;
        let mut apis = Vec::new();
        for n in 0..organizations {
            let created = admin.create_organization(&format!("load {n}")).await?.require(201)?;
            let organization = created.string("/id")?;
            let scopes = json!({ "name": "all", "scopes": ["publish", "subscribe", "read"] });
            let key = admin.create_key(organization, &scopes).await?.require(201)?;
            let api = stack.client(0)?.with_token(key.string("/key")?);
            let path = format!("/{organization}");
            receiver.script(&path, script(&witness, organization));
            let connection = json!({ "name": "load", "kind": "webhook", "url": receiver.url(&path),
                                     "finalStatuses": [FINAL] });
            let connection = api.post("/v1/connections", &connection).await?.require(201)?;
            let wanted = json!({ "connectionId": connection.string("/id")?, "eventType": "load.>" });
            api.subscribe(&wanted).await?.require(201)?;
            apis.push(api);
        }
        Ok(Self { receiver, witness, apis })
    }

    /// Publishes so many events, in batches from each organization in turn.
    ///
    /// # Errors
    /// If they are not accepted.
    pub async fn publish(&self, events: usize) -> Result<()> {
        let batches = (0..events).step_by(BATCH).zip(self.apis.iter().cycle());
        let requests = batches.map(|(first, api)| async move {
            let event = |n: usize| {
                json!({ "specversion": "1.0", "id": n.to_string(), "source": "/load", "type": "load.event",
                        "data": { "n": n } })
            };
            let batch: Vec<Value> = (first..events.min(first + BATCH)).map(event).collect();
            accepted(api, &batch).await
        });
        stream::iter(requests).buffer_unordered(REQUESTS).try_collect().await
    }

    /// How far history is behind, milliseconds, as the API tells; `None` as long as nothing is known of that.
    ///
    /// # Errors
    /// If no event was published yet, or the API does not answer.
    pub async fn behind_ms(&self) -> Result<Option<u64>> {
        let api = self.apis.first().context("there is no organization")?;
        let events = api.get("/v1/events?limit=1").await?.require(200)?;
        let uid = events.string("/items/0/uid")?;
        let deliveries = api.get(&format!("/v1/events/{uid}/deliveries")).await?.require(200)?;
        Ok(deliveries.body["history"]["behindMs"].as_u64())
    }

    /// Waits until so many events are delivered, in history, and in cold storage.
    ///
    /// # Errors
    /// If the deliveries are not over, or nothing more is archived, within `deadline`. Whether history has every attempt
    /// is for [`account`](Self::account) to say.
    pub async fn settle(&self, stack: &Stack, events: usize, deadline: Duration) -> Result<()> {
        let left = |left: u64| if left == 0 { Ok(()) } else { Err(left) };
        poll("every delivery to be over", deadline, async || left((events - self.over()) as u64)).await?;
        poll("an empty queue", deadline, async || left(stack.undelivered().await.map_err(|_| u64::MAX)?))
            .await?;
        let pool = stack.owner_pool().await?;
        let attempts = self.receiver.total() as u64;
        let in_history = async || -> Result<u64> {
            let rows: i64 =
                sqlx::query_scalar("SELECT count(*) FROM delivery_attempts").fetch_one(&pool).await?;
            Ok(rows.cast_unsigned())
        };
        // What is missing after that time is lost, and counted as such.
        let _ = poll("every attempt in history", BEHIND, async || {
            left(attempts.saturating_sub(in_history().await.map_err(|_| u64::MAX)?))
        })
        .await;
        let nats = connect_nats(&stack.nats_url().context("the stack has no NATS")?).await?;
        let name = format!("{}_AUDIT", stack.prefix().to_ascii_uppercase());
        let last = jetstream::new(nats).get_stream(&name).await?.cached_info().state.last_sequence;
        poll("the audit stream in cold storage", deadline, async || {
            let next: i64 = sqlx::query_scalar("SELECT next FROM archive_sources WHERE source = $1")
                .bind(&name)
                .fetch_one(&pool)
                .await
                .map_err(|_| u64::MAX)?;
            left((last + 1).saturating_sub(next.cast_unsigned()))
        })
        .await?;
        pool.close().await;
        Ok(())
    }

    fn over(&self) -> usize {
        self.witness.lock().expect("no script panics").over
    }

    /// Compares the accounts.
    ///
    /// # Errors
    /// If history or cold storage cannot be read.
    pub async fn account(&self, stack: &Stack) -> Result<Account> {
        let seen = self.witness.lock().expect("no script panics").attempts();
        let pool = stack.owner_pool().await?;
        let history = Told::by_history(&pool).await?;
        pool.close().await;
        let cold = stack.cold_dir();
        let parquet = tokio::task::spawn_blocking(move || Told::by_parquet(&cold)).await??;
        Ok(Account::of(&seen, &history, &parquet))
    }
}

/// Publishes a batch, again if the bus is busy: whether that attempt took effect or not, the ids keep it to one.
async fn accepted(api: &ApiClient, batch: &[Value]) -> Result<()> {
    for _ in 0..TRIES {
        let reply = api.publish_batch(batch).await?;
        if reply.status != 503 {
            return reply.require(202).map(drop);
        }
        tokio::time::sleep(PAUSE).await;
    }
    bail!("the bus answers 503 to a batch, again and again")
}

fn script(witness: &Arc<Mutex<Witness>>, organization: &str) -> Script {
    let (witness, organization) = (witness.clone(), organization.to_owned());
    Script::decided_by(move |request| {
        let n = request.json()["data"]["n"].as_u64().expect("an event of this load has a number");
        let delivery = request.header("webhook-id");
        match witness.lock().expect("no script panics").answer(&organization, delivery, n) {
            429 => Answer::status(429).header("retry-after", "1"),
            status => Answer::status(status),
        }
    })
}
