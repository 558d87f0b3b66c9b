//! A load whose attempts are known one by one, and three accounts of them: what the receiver saw, what history says, and
//! what an independent reader finds in cold storage.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result};
use async_nats::jetstream;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    client::ApiClient,
    independent, poll,
    processes::Role,
    receiver::{Answer, Receiver, Script},
    servers::connect_nats,
    stack::{Stack, StackOptions},
};

/// Events of one request.
const BATCH: usize = 500;
/// Requests under way at a time.
const REQUESTS: usize = 4;
/// So many differences are described; the others are only counted.
const DESCRIBED: usize = 5;
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

/// An attempt, as somebody tells of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Attempt {
    /// The failed ones before it, plus one.
    number: i32,
    outcome: String,
    status: i32,
}

/// The attempts of each delivery, in order; the key is its organization and its id.
type Attempts = BTreeMap<(String, String), Vec<Attempt>>;

/// A row of history, or of cold storage.
#[derive(Debug, Deserialize, sqlx::FromRow)]
struct Row {
    organization: String,
    delivery: String,
    /// The day in UTC on which it was made.
    day: String,
    attempt: i32,
    outcome: String,
    status: Option<i32>,
}

/// What somebody tells of all attempts.
#[derive(Debug, Default)]
struct Told {
    attempts: Attempts,
    /// How many there are of each organization and day.
    days: BTreeMap<(String, String), usize>,
}

impl Told {
    fn add(&mut self, row: Row) {
        *self.days.entry((row.organization.clone(), row.day)).or_default() += 1;
        let attempt =
            Attempt { number: row.attempt, outcome: row.outcome, status: row.status.unwrap_or_default() };
        self.attempts.entry((row.organization, row.delivery)).or_default().push(attempt);
    }

    async fn by_history(pool: &PgPool) -> Result<Self> {
        let mut rows = sqlx::query_as::<_, Row>(
            "SELECT organization_id::text AS organization, delivery_id::text AS delivery,
                    to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day, attempt, outcome, status
             FROM delivery_attempts ORDER BY turn, at",
        )
        .fetch(pool);
        let mut told = Self::default();
        while let Some(row) = rows.try_next().await.context("read history")? {
            told.add(row);
        }
        Ok(told)
    }

    /// Organization and day are those of the file's place.
    fn by_parquet(cold: &Path) -> Result<Self> {
        let files = format!("{}/domain=receipts/**/*.parquet", cold.display());
        let query = format!(
            r#"SELECT org::text AS organization, delivery::text AS delivery, "date"::text AS day, attempt, outcome, status
             FROM read_parquet('{files}', hive_partitioning = true) ORDER BY turn, "at""#
        );
        let mut told = Self::default();
        for row in independent::parquet(&[&query])?.into_iter().flatten() {
            told.add(serde_json::from_value(row).context("read a row of DuckDB's")?);
        }
        Ok(told)
    }

    fn count(&self) -> usize {
        self.days.values().sum()
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
            let numbers = first..events.min(first + BATCH);
            let batch: Vec<Value> =
                numbers.map(|n| json!({ "type": "load.event", "data": { "n": n } })).collect();
            api.publish(&Value::from(batch)).await?.require(202).map(drop)
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
        let _ = poll("every attempt in history", deadline, async || {
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

    /// Deliveries that have had the last of their answers.
    #[must_use]
    pub fn over(&self) -> usize {
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

/// The three accounts, compared.
#[derive(Debug, Default)]
pub struct Account {
    /// Deliveries that the receiver saw.
    pub deliveries: usize,
    /// Attempts that it saw.
    pub attempts: usize,
    /// Attempts of each outcome.
    pub outcomes: BTreeMap<String, usize>,
    /// Rows of history.
    pub in_history: usize,
    /// Rows in cold storage.
    pub in_parquet: usize,
    /// Organizations with each day that cold storage has of them.
    pub days: usize,
    /// Attempts that the receiver saw, and history or cold storage lacks.
    pub lost: usize,
    /// Attempts that history or cold storage has, and the receiver did not see, or fewer of them.
    pub doubled: usize,
    /// The first differences, in words: whatever is not as the receiver saw it, the order included. Empty if there are
    /// none.
    pub differences: Vec<String>,
}

impl Account {
    fn of(seen: &Attempts, history: &Told, parquet: &Told) -> Self {
        let mut account = Self {
            deliveries: seen.len(),
            attempts: seen.values().map(Vec::len).sum(),
            in_history: history.count(),
            in_parquet: parquet.count(),
            days: parquet.days.len(),
            ..Self::default()
        };
        for attempt in seen.values().flatten() {
            *account.outcomes.entry(attempt.outcome.clone()).or_default() += 1;
        }
        account.compare(seen, "history", &history.attempts);
        account.compare(seen, "cold storage", &parquet.attempts);
        if history.days != parquet.days {
            account.differ(|| {
                format!(
                    "rows of each organization and day: {:?} in history, {:?} in cold storage",
                    history.days, parquet.days
                )
            });
        }
        account
    }

    fn compare(&mut self, seen: &Attempts, who: &str, told: &Attempts) {
        let unknown = told.keys().filter(|key| !seen.contains_key(*key));
        for key in seen.keys().chain(unknown) {
            let of = |attempts: &Attempts| attempts.get(key).cloned().unwrap_or_default();
            let (seen, told) = (of(seen), of(told));
            if seen == told {
                continue;
            }
            self.lost += missing(&seen, &told);
            self.doubled += missing(&told, &seen);
            let (organization, delivery) = key;
            self.differ(|| {
                format!(
                    "delivery {delivery} of {organization}: the receiver saw {seen:?}, {who} has {told:?}"
                )
            });
        }
    }

    fn differ(&mut self, difference: impl FnOnce() -> String) {
        if self.differences.len() < DESCRIBED {
            self.differences.push(difference());
        }
    }
}

/// How many of `these` are not among `those`; one that is there twice must be there twice.
fn missing(these: &[Attempt], those: &[Attempt]) -> usize {
    let mut those = those.to_vec();
    let found = these.iter().filter(|this| {
        let position = those.iter().position(|that| that == *this);
        position.map(|position| those.swap_remove(position)).is_some()
    });
    these.len() - found.count()
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { deliveries, attempts, in_history, in_parquet, lost, doubled, .. } = self;
        write!(
            f,
            "deliveries {deliveries}, attempts {attempts}, in history {in_history}, in Parquet {in_parquet}, lost {lost}, \
             doubled {doubled}"
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

    use super::*;

    fn seen() -> Attempts {
        let mut witness = Witness::default();
        // A failure, a deferral and a success; then a success at once.
        for n in [11, 11, 11, 0] {
            witness.answer("acme", &format!("delivery {n}"), n);
        }
        assert_eq!(witness.over, 2);
        witness.attempts()
    }

    fn row(delivery: &str, attempt: i32, outcome: &str, status: i32) -> Row {
        Row {
            organization: "acme".to_owned(),
            delivery: delivery.to_owned(),
            day: "2026-11-21".to_owned(),
            attempt,
            outcome: outcome.to_owned(),
            status: Some(status),
        }
    }

    fn rows() -> Vec<Row> {
        vec![
            row("delivery 0", 1, "delivered", 200),
            row("delivery 11", 1, "failed", 500),
            row("delivery 11", 2, "deferred", 429),
            row("delivery 11", 2, "delivered", 200),
        ]
    }

    fn told(rows: Vec<Row>) -> Told {
        let mut told = Told::default();
        rows.into_iter().for_each(|row| told.add(row));
        told
    }

    #[test]
    fn accounts_that_agree_differ_in_nothing() {
        let account = Account::of(&seen(), &told(rows()), &told(rows()));
        assert_eq!(
            account.to_string(),
            "deliveries 2, attempts 4, in history 4, in Parquet 4, lost 0, doubled 0"
        );
        assert!(account.differences.is_empty(), "{:?}", account.differences);
    }

    #[test]
    fn what_is_lost_and_what_is_doubled_is_counted() {
        let (mut history, mut parquet) = (rows(), rows());
        history.remove(2);
        parquet.push(row("delivery 0", 1, "delivered", 200));
        parquet.push(row("another", 1, "delivered", 200));
        let account = Account::of(&seen(), &told(history), &told(parquet));
        assert_eq!((account.lost, account.doubled), (1, 2));
        // Three deliveries, and the counts of the day.
        assert_eq!(account.differences.len(), 4, "{:?}", account.differences);
    }

    #[test]
    fn another_order_another_day_and_another_organization_are_differences() {
        let mut swapped = rows();
        swapped.swap(1, 2);
        let account = Account::of(&seen(), &told(swapped), &told(rows()));
        assert_eq!((account.lost, account.doubled, account.differences.len()), (0, 0, 1));

        let mut late = rows();
        late[0].day = "2026-11-22".to_owned();
        let account = Account::of(&seen(), &told(rows()), &told(late));
        assert_eq!((account.lost, account.doubled, account.differences.len()), (0, 0, 1));

        let mut foreign = rows();
        foreign[0].organization = "rival".to_owned();
        let account = Account::of(&seen(), &told(foreign), &told(rows()));
        assert_eq!((account.lost, account.doubled), (1, 1));
    }
}
