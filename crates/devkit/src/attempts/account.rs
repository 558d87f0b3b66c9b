//! What history and cold storage say of attempts, compared with what the receiver saw.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::{Context, Result};
use futures::TryStreamExt as _;
use serde::Deserialize;
use sqlx::PgPool;

use crate::independent;

/// So many differences are described; the others are only counted.
const DESCRIBED: usize = 5;

/// An attempt, as somebody tells of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Attempt {
    /// The failed ones before it, plus one.
    pub(super) number: i32,
    pub(super) outcome: String,
    pub(super) status: i32,
}

/// The attempts of each delivery, in order; the key is its organization and its id.
pub(super) type Attempts = BTreeMap<(String, String), Vec<Attempt>>;

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
pub(super) struct Told {
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

    pub(super) async fn by_history(pool: &PgPool) -> Result<Self> {
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
    pub(super) fn by_parquet(cold: &Path) -> Result<Self> {
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
    pub(super) fn of(seen: &Attempts, history: &Told, parquet: &Told) -> Self {
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

    use super::{super::Witness, *};

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
