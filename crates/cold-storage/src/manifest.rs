//! What a manifest says, and where everything lies.

use std::fmt;

use jiff::{Timestamp, civil::Date};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;

/// The version of the manifests that this crate writes, and the only one that it reads.
pub(crate) const FORMAT: u32 = 1;

/// The longest name of a source, an incarnation or a writer.
const LONGEST_NAME: usize = 100;

/// The top folder of the manifests.
pub(crate) const MANIFESTS: &str = "manifests";

/// The top folder of the notes about what is under way.
pub(crate) const PENDING: &str = "pending";

/// What the folders of objects begin with.
pub(crate) const OBJECTS: &str = "domain=";

/// What a batch holds of its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// A range of a stream.
    Stream {
        /// The stream.
        name: String,
        /// Which of the streams of this name: one that is deleted and made again counts from 1 again.
        incarnation: String,
        /// The first sequence; one more than the last one of the batch before.
        first: u64,
        /// The last sequence.
        last: u64,
        /// The messages in the range; the stream may have deleted others.
        messages: u64,
    },
    /// A part of a day of a table.
    Table {
        /// The table.
        name: String,
        /// The day.
        day: Date,
        /// How often the day was begun before, and taken out of the archive again because rows had come late. Places
        /// are not given out twice, so that whoever still believes in an earlier attempt commits into that.
        attempt: u32,
        /// 0, 1, 2 …
        part: u64,
        /// The key of its last row; the next part begins behind it.
        last: Uuid,
        /// Whether it is the day's last part.
        complete: bool,
    },
}

impl Source {
    /// Which range it is, whatever it holds.
    #[must_use]
    pub fn slot(&self) -> Slot {
        match self {
            Self::Stream { name, incarnation, first, .. } => {
                Slot { source: name.clone(), incarnation: incarnation.clone(), first: *first }
            }
            Self::Table { name, day, attempt, part, .. } => Slot {
                source: name.clone(),
                incarnation: Self::day_incarnation(*day, *attempt),
                first: *part,
            },
        }
    }

    /// What an attempt at a table's day is called: the day, and from the second attempt on its number.
    #[must_use]
    pub fn day_incarnation(day: Date, attempt: u32) -> String {
        if attempt == 0 { day.to_string() } else { format!("{day}-r{attempt}") }
    }

    /// Where the next batch begins; `None` after the last part of a day.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        match self {
            Self::Stream { last, .. } => last.checked_add(1),
            Self::Table { complete: true, .. } => None,
            Self::Table { part, .. } => part.checked_add(1),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        self.slot().check()?;
        if let Self::Stream { first, last, messages, .. } = *self {
            let room = last.checked_sub(first).and_then(|distance| distance.checked_add(1));
            if room.is_none_or(|room| messages > room) {
                return Err(Error::Range { first, last, messages });
            }
        }
        Ok(())
    }
}

/// The place of a batch: of those who write to the same slot, one wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot {
    /// The stream or the table.
    pub source: String,
    /// The stream's incarnation, or the table's day with the attempt.
    pub incarnation: String,
    /// The first sequence, or the part.
    pub first: u64,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} from {}", self.source, self.incarnation, self.first)
    }
}

impl Slot {
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_name("the source", &self.source)?;
        check_name("the incarnation", &self.incarnation)
    }

    /// The folder of its manifests.
    pub(crate) fn folder(&self) -> String {
        format!("{MANIFESTS}/{}/{}/{:020}", self.source, self.incarnation, self.first)
    }

    pub(crate) fn manifest_path(&self, revision: u32) -> String {
        format!("{}/{revision:06}.json", self.folder())
    }

    pub(crate) fn note_path(&self, revision: u32, writer: &str) -> String {
        let Self { source, incarnation, first } = self;
        format!("{PENDING}/{source}/{incarnation}-{first:020}-{revision:06}-{writer}.json")
    }

    /// Where an object with these rows lies. The name holds what is in it, so that nothing is ever overwritten
    /// with something else.
    pub(crate) fn object_path(&self, partition: &Partition, writer: &str, sha256: &str) -> String {
        let digest = &sha256[..12];
        format!("{partition}/{}-{:020}-{writer}-{digest}.parquet", self.source, self.first)
    }
}

/// The revision and the slot of a path below `manifests/`.
pub(crate) fn parse_manifest_path(path: &str) -> Option<(Slot, u32)> {
    let mut parts = path.strip_prefix(MANIFESTS)?.strip_prefix('/')?.split('/');
    let slot = Slot {
        source: parts.next()?.to_owned(),
        incarnation: parts.next()?.to_owned(),
        first: parts.next()?.parse().ok()?,
    };
    let revision = parts.next()?.strip_suffix(".json")?.parse().ok()?;
    parts.next().is_none().then_some((slot, revision))
}

pub(crate) fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let dots = name.bytes().all(|byte| byte == b'.');
    if dots || name.len() > LONGEST_NAME || !name.bytes().all(plain) {
        return Err(Error::Name { what, name: name.to_owned() });
    }
    Ok(())
}

/// The folder of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Partition {
    pub(crate) domain: String,
    pub(crate) organization: Option<Uuid>,
    pub(crate) date: Date,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{OBJECTS}{}/org=", self.domain)?;
        match self.organization {
            Some(organization) => write!(f, "{organization}")?,
            None => f.write_str("_")?,
        }
        write!(f, "/date={}", self.date)
    }
}

/// One Parquet file of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Below the configured prefix.
    pub path: String,
    /// The dataset.
    pub domain: String,
    /// Whose rows they are.
    pub organization: Option<Uuid>,
    /// The day of all of its rows, in UTC.
    pub date: Date,
    /// How many they are.
    pub rows: u64,
    /// Its length.
    pub bytes: u64,
    /// Of its bytes, hexadecimal.
    pub sha256: String,
    /// Of its rows, however they are written: over each value's kind, length and bytes.
    pub rows_sha256: String,
    /// The time of its oldest row.
    pub earliest: Timestamp,
    /// The time of its newest row.
    pub latest: Timestamp,
}

impl Object {
    pub(crate) fn partition(&self) -> Partition {
        Partition { domain: self.domain.clone(), organization: self.organization, date: self.date }
    }
}

/// What makes a batch a part of the archive. It is never changed: a rewrite adds one with the next revision, and
/// the newest counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this format.
    pub format: u32,
    /// What it holds.
    pub source: Source,
    /// 1, and one more with each rewrite.
    pub revision: u32,
    /// When it was begun.
    pub created_at: Timestamp,
    /// Who wrote it.
    pub writer: String,
    /// The rows of all objects.
    pub rows: u64,
    /// The files.
    pub objects: Vec<Object>,
}

impl Manifest {
    /// Which range it is.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.source.slot()
    }

    /// The time of the newest row; of a batch without any, when it was begun.
    #[must_use]
    pub fn latest(&self) -> Timestamp {
        self.objects.iter().map(|object| object.latest).max().unwrap_or(self.created_at)
    }

    /// The bytes of all objects.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.bytes).sum()
    }

    pub(crate) fn path(&self) -> String {
        self.slot().manifest_path(self.revision)
    }

    pub(crate) fn names(&self, path: &str) -> bool {
        self.objects.iter().any(|object| object.path == path)
    }

    /// Reads what lies at `path`, and refuses what does not belong there: paths of a manifest are deleted one day.
    pub(crate) fn parse(path: &str, bytes: &[u8]) -> Result<Self, Error> {
        let refuse = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
        let found: Self = serde_json::from_slice(bytes).map_err(|cause| refuse(cause.to_string()))?;
        if found.format != FORMAT {
            return Err(refuse(format!("format {} is not known", found.format)));
        }
        if found.path() != path {
            return Err(refuse(format!("it is the manifest of {}", found.slot())));
        }
        for object in &found.objects {
            if !object.path.starts_with(&format!("{}/", object.partition())) {
                return Err(refuse(format!("{} lies in another partition", object.path)));
            }
        }
        Ok(found)
    }
}
