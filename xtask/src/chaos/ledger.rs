//! The ledger: what was asked of the bus and what came of it, written by those outside of it, one JSON object a line.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The time, as those outside of the bus know it.
#[expect(clippy::disallowed_methods, reason = "the ledger is the outside world: its clock is the real one")]
pub(super) fn now() -> Timestamp {
    Timestamp::now()
}

/// One line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) at: Timestamp,
    #[serde(flatten)]
    pub(super) entry: Entry,
}

/// What is known from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(super) enum Entry {
    /// A place that gets events.
    Endpoint(Endpoint),
    /// An event that was answered 202.
    Accepted(Accepted),
    /// An event about which nothing else was ever answered than that it may not have been taken.
    Unresolved { organization: String, id: String },
    /// What the bus is still not done with, long after everything is whole and nothing more is published.
    Restless { open: String },
    /// A request that was refused for good, which none of this load is to be.
    Refused { organization: String, id: String, answer: String },
    /// A schedule that ticks from `first` to `last`, each `every` seconds.
    Schedule { organization: String, schedule: String, kind: String, first: i64, last: i64, every: i64 },
    /// What the bus says of a tick, or of a run of ticks.
    Tick { schedule: String, state: String, first: i64, last: i64, uid: Option<String> },
    /// A request that came to an endpoint.
    Request(Request),
    /// A delivery that the bus says it has given up.
    Dead(Dead),
    /// Something was broken, or is whole again; for so long afterwards, if at all, it may repeat what was delivered.
    Fault { number: usize, kind: String, target: String, phase: Phase, aftermath_s: Option<i64> },
    /// The most memory that a process had in use.
    Memory { process: String, bytes: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    Begins,
    Over,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Endpoint {
    pub(super) organization: String,
    pub(super) path: String,
    pub(super) connection: String,
    /// What its subscriptions ask for.
    pub(super) wants: Vec<Want>,
    /// Several events come in one request.
    pub(super) batched: bool,
    /// It takes everything at once.
    pub(super) good: bool,
    /// It takes everything in the end, with fewer failures than its policy allows.
    pub(super) takes_all: bool,
    /// Its requests can be seen.
    pub(super) visible: bool,
    /// After so many failed attempts a delivery is dead.
    pub(super) attempts: u32,
    /// The shortest wait after a failure, milliseconds.
    pub(super) wait_ms: u64,
}

/// What one subscription asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Want {
    /// Its id.
    pub(super) subscription: String,
    pub(super) pattern: String,
    /// Only events with at least this number.
    pub(super) at_least: Option<u32>,
}

impl Want {
    /// Whether the event is wanted: the harness's own reading of the rules, not the bus's.
    pub(super) fn is_met(&self, kind: &str, number: u32) -> bool {
        self.at_least.is_none_or(|least| number >= least) && matches(&self.pattern, kind)
    }
}

fn matches(pattern: &str, kind: &str) -> bool {
    let (mut pattern, mut kind) = (pattern.split('.'), kind.split('.'));
    loop {
        match (pattern.next(), kind.next()) {
            (None, None) => return true,
            (Some(">"), Some(_)) => return true,
            (Some(wanted), Some(token)) if wanted == "*" || wanted == token => {}
            _ => return false,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Accepted {
    pub(super) organization: String,
    pub(super) id: String,
    pub(super) uid: String,
    pub(super) kind: String,
    /// What filters look at.
    pub(super) number: u32,
    /// When it was sent first.
    pub(super) sent: Timestamp,
    pub(super) deliver_at: Option<Timestamp>,
    /// How often it was sent.
    pub(super) tries: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) organization: String,
    pub(super) path: String,
    /// The `webhook-id`.
    pub(super) delivery: String,
    pub(super) events: Vec<Seen>,
    /// What is answered; 0 for nothing.
    pub(super) status: u16,
    /// Not again before so much later, says the answer.
    pub(super) after_ms: Option<u64>,
    /// The signature is that of this endpoint's secret.
    pub(super) signed: bool,
}

/// What a receiver reads of an event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) id: String,
    /// Whose it is, as its payload says.
    pub(super) organization: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Dead {
    pub(super) connection: String,
    pub(super) delivery: String,
    pub(super) uid: String,
    pub(super) reason: String,
    pub(super) attempts: u32,
}

/// The file, open for writing. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    path: PathBuf,
    book: Arc<Mutex<Book>>,
}

#[derive(Debug)]
struct Book {
    file: BufWriter<File>,
    /// The first line that could not be written.
    broken: Option<io::Error>,
}

impl Ledger {
    pub(super) fn create(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self::over(path, file))
    }

    fn over(path: &Path, file: File) -> Self {
        let book = Book { file: BufWriter::new(file), broken: None };
        Self { path: path.to_owned(), book: Arc::new(Mutex::new(book)) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn write(&self, entry: Entry) {
        self.write_at(now(), entry);
    }

    pub(super) fn write_at(&self, at: Timestamp, entry: Entry) {
        let line = serde_json::to_string(&Line { at, entry }).expect("entries are plain data");
        let mut book = self.lock();
        if let Err(error) = writeln!(book.file, "{line}") {
            book.broken.get_or_insert(error);
        }
    }

    /// Everything so far; an error if any of it could not be written.
    pub(super) fn read(&self) -> Result<Vec<Line>> {
        {
            let mut book = self.lock();
            let written = book.broken.take().map_or_else(|| book.file.flush(), Err);
            if let Err(error) = written {
                // The next one who reads must not take what is there for everything.
                book.broken = Some(error.kind().into());
                return Err(error).with_context(|| format!("write {}", self.path.display()));
            }
        }
        let file = File::open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        let mut lines = Vec::new();
        for line in BufReader::new(file).lines() {
            lines.push(serde_json::from_str(&line?).context("read the ledger")?);
        }
        Ok(lines)
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_line_that_could_not_be_written_is_told_of_by_each_who_reads() {
        let path = std::env::temp_dir().join(format!("ledger-{}.jsonl", std::process::id()));
        fs::write(&path, "").unwrap();
        // Open for reading only: it takes nothing.
        let ledger = Ledger::over(&path, File::open(&path).unwrap());
        assert_eq!(ledger.read().unwrap().len(), 0);
        for _ in 0..1_000 {
            ledger.write(Entry::Memory { process: "publisher-0".to_owned(), bytes: 1 });
        }
        assert!(ledger.read().is_err());
        assert!(ledger.read().is_err());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn patterns_are_read_token_by_token() {
        for (pattern, kind, met) in [
            ("order.*", "order.paid", true),
            ("order.*", "order.paid.late", false),
            ("*.paid", "order.paid", true),
            ("order.>", "order.paid.late", true),
            ("order.>", "order", false),
            ("order.paid", "order.paid", true),
            ("order", "orders", false),
        ] {
            assert_eq!(matches(pattern, kind), met, "{pattern} {kind}");
        }
        let filtered =
            Want { subscription: String::new(), pattern: "order.*".to_owned(), at_least: Some(500) };
        assert!(filtered.is_met("order.paid", 500) && !filtered.is_met("order.paid", 499));
    }
}
