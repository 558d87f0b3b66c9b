//! What is archived: datasets, their columns, and rows.

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp, civil::Date, tz::TimeZone};
use serde::de::IgnoredAny;
use uuid::Uuid;

use crate::error::Error;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 16 bytes, with the logical type UUID.
    Uuid,
    /// Microseconds in UTC.
    Timestamp,
    /// 32 bits.
    Int,
    /// 64 bits.
    Long,
    /// True or false.
    Bool,
    /// UTF-8.
    Text,
    /// UTF-8 that is JSON.
    Json,
    /// Bytes.
    Bytes,
}

/// A column of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Whether it may hold nothing.
    pub nullable: bool,
}

const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind, nullable: false }
}

const fn nullable(name: &'static str, kind: Kind) -> Column {
    Column { name, kind, nullable: true }
}

/// Where the time of a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeOf {
    /// In this column.
    Column(&'static str),
    /// In the UUIDv7 of this column, as in the partitions of the table that the rows come from.
    Uuid(&'static str),
}

/// What is forgotten when an organization's data is erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erasure {
    /// The columns that are emptied.
    pub payload: &'static [&'static str],
    /// The column that says when.
    pub marked: &'static str,
}

/// Rows of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dataset {
    /// Its name, the first part of the path.
    pub domain: &'static str,
    /// Its columns, in order.
    pub columns: &'static [Column],
    /// The column with the organization, the second part of the path.
    pub organization: &'static str,
    /// Where a row's time is; its day in UTC is the third part of the path.
    pub time: TimeOf,
    /// The column with the event that a row belongs to.
    pub event: Option<&'static str>,
    /// What an erasure empties.
    pub erasure: Option<Erasure>,
}

/// Attempts at deliveries.
pub static RECEIPTS: Dataset = Dataset {
    domain: "receipts",
    columns: &[
        column("delivery", Kind::Uuid),
        column("attempt", Kind::Int),
        column("turn", Kind::Long),
        column("event", Kind::Uuid),
        column("organization", Kind::Uuid),
        column("subscription", Kind::Uuid),
        column("connection", Kind::Uuid),
        column("outcome", Kind::Text),
        nullable("status", Kind::Int),
        nullable("error", Kind::Text),
        column("at", Kind::Timestamp),
        column("duration_ms", Kind::Int),
    ],
    organization: "organization",
    time: TimeOf::Column("at"),
    event: Some("event"),
    erasure: None,
};

/// Who changed what.
pub static AUDIT: Dataset = Dataset {
    domain: "audit",
    columns: &[
        column("id", Kind::Uuid),
        nullable("organization", Kind::Uuid),
        column("at", Kind::Timestamp),
        column("actor", Kind::Text),
        nullable("key", Kind::Uuid),
        nullable("connection", Kind::Uuid),
        column("action", Kind::Text),
        column("target_kind", Kind::Text),
        column("target_id", Kind::Text),
        nullable("before", Kind::Json),
        nullable("after", Kind::Json),
        nullable("request_id", Kind::Text),
    ],
    organization: "organization",
    time: TimeOf::Column("at"),
    event: None,
    erasure: None,
};

/// Events, as they were delivered.
pub static EVENTS: Dataset = Dataset {
    domain: "events",
    columns: &[
        column("uid", Kind::Uuid),
        column("organization", Kind::Uuid),
        column("id", Kind::Text),
        column("source", Kind::Text),
        column("type", Kind::Text),
        nullable("subject", Kind::Text),
        column("time", Kind::Timestamp),
        nullable("publisher", Kind::Uuid),
        column("received_at", Kind::Timestamp),
        column("subscriptions", Kind::Json),
        nullable("body", Kind::Bytes),
        nullable("expunged_at", Kind::Timestamp),
    ],
    organization: "organization",
    time: TimeOf::Uuid("uid"),
    event: Some("uid"),
    erasure: Some(Erasure { payload: &["body"], marked: "expunged_at" }),
};

/// What became of the ticks of schedules.
pub static OCCURRENCES: Dataset = Dataset {
    domain: "occurrences",
    columns: &[
        column("uid", Kind::Uuid),
        column("schedule", Kind::Uuid),
        column("organization", Kind::Uuid),
        column("state", Kind::Text),
        nullable("reason", Kind::Text),
        column("manual", Kind::Bool),
        column("tick", Kind::Timestamp),
        column("last_tick", Kind::Timestamp),
        column("ticks", Kind::Long),
        column("at", Kind::Timestamp),
    ],
    organization: "organization",
    time: TimeOf::Uuid("uid"),
    event: Some("uid"),
    erasure: None,
};

/// Messages of a stream, as they are.
pub static MESSAGES: Dataset = Dataset {
    domain: "messages",
    columns: &[
        column("sequence", Kind::Long),
        column("subject", Kind::Text),
        nullable("organization", Kind::Uuid),
        nullable("event", Kind::Uuid),
        column("time", Kind::Timestamp),
        nullable("headers", Kind::Json),
        nullable("payload", Kind::Bytes),
        nullable("expunged_at", Kind::Timestamp),
    ],
    organization: "organization",
    time: TimeOf::Column("time"),
    event: Some("event"),
    erasure: Some(Erasure { payload: &["headers", "payload"], marked: "expunged_at" }),
};

/// Every dataset.
pub static DATASETS: [&Dataset; 5] = [&RECEIPTS, &AUDIT, &EVENTS, &OCCURRENCES, &MESSAGES];

/// One value of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Nothing.
    Null,
    /// For [`Kind::Uuid`].
    Uuid(Uuid),
    /// For [`Kind::Timestamp`]; what is below a microsecond is not kept.
    Timestamp(Timestamp),
    /// For [`Kind::Int`].
    Int(i32),
    /// For [`Kind::Long`].
    Long(i64),
    /// For [`Kind::Bool`].
    Bool(bool),
    /// For [`Kind::Text`].
    Text(String),
    /// For [`Kind::Json`].
    Json(String),
    /// For [`Kind::Bytes`].
    Bytes(Bytes),
}

/// The values of a row, in the order of the dataset's columns.
pub type Row = Vec<Value>;

impl Value {
    fn kind(&self) -> Option<Kind> {
        Some(match self {
            Self::Null => return None,
            Self::Uuid(_) => Kind::Uuid,
            Self::Timestamp(_) => Kind::Timestamp,
            Self::Int(_) => Kind::Int,
            Self::Long(_) => Kind::Long,
            Self::Bool(_) => Kind::Bool,
            Self::Text(_) => Kind::Text,
            Self::Json(_) => Kind::Json,
            Self::Bytes(_) => Kind::Bytes,
        })
    }

    /// About as much memory as it takes.
    pub(crate) fn size(&self) -> usize {
        let content = match self {
            Self::Text(text) | Self::Json(text) => text.len(),
            Self::Bytes(bytes) => bytes.len(),
            _ => 0,
        };
        size_of::<Self>() + content
    }

    pub(crate) fn as_uuid(&self) -> Option<Uuid> {
        if let Self::Uuid(uuid) = self { Some(*uuid) } else { None }
    }
}

/// What a row says about where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) organization: Option<Uuid>,
    pub(crate) time: Timestamp,
    pub(crate) date: Date,
}

impl Dataset {
    /// The dataset of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(domain: &str) -> Result<&'static Self, Error> {
        DATASETS
            .into_iter()
            .find(|dataset| dataset.domain == domain)
            .ok_or_else(|| Error::UnknownDomain(domain.to_owned()))
    }

    /// Checks a row against the columns, brings its times to microseconds, and says where it belongs.
    pub(crate) fn accept(&self, row: &mut Row) -> Result<Place, Error> {
        let refuse = |reason| Error::Row { domain: self.domain, reason };
        if row.len() != self.columns.len() {
            return Err(refuse(format!("{} values for {} columns", row.len(), self.columns.len())));
        }
        for (column, value) in self.columns.iter().zip(row.iter_mut()) {
            match value.kind() {
                None if column.nullable => {}
                None => return Err(refuse(format!("{} is null", column.name))),
                Some(kind) if kind == column.kind => {}
                Some(kind) => {
                    return Err(refuse(format!("{} is {kind:?} and not {:?}", column.name, column.kind)));
                }
            }
            match value {
                Value::Timestamp(at) => *at = micros(at.as_microsecond()).map_err(refuse)?,
                Value::Json(text) if serde_json::from_str::<IgnoredAny>(text).is_err() => {
                    return Err(refuse(format!("{} is not JSON", column.name)));
                }
                _ => {}
            }
        }
        let time = self.time_of(row).map_err(refuse)?;
        let organization = self.value(row, self.organization).and_then(Value::as_uuid);
        Ok(Place { organization, time, date: utc_day(time) })
    }

    fn time_of(&self, row: &Row) -> Result<Timestamp, String> {
        match self.time {
            TimeOf::Column(name) => match self.value(row, name) {
                Some(Value::Timestamp(at)) => Ok(*at),
                _ => Err(format!("{name} is no time")),
            },
            TimeOf::Uuid(name) => match self.value(row, name) {
                Some(Value::Uuid(uuid)) => uuid_time(*uuid).ok_or_else(|| format!("{name} holds no time")),
                _ => Err(format!("{name} is no UUID")),
            },
        }
    }

    fn value<'a>(&self, row: &'a Row, name: &str) -> Option<&'a Value> {
        let index = self.columns.iter().position(|column| column.name == name)?;
        row.get(index)
    }
}

/// A time from microseconds since 1970.
pub(crate) fn micros(microseconds: i64) -> Result<Timestamp, String> {
    Timestamp::from_microsecond(microseconds).map_err(|cause| cause.to_string())
}

/// The time in a UUIDv7: its first 48 bits.
pub(crate) fn uuid_time(uuid: Uuid) -> Option<Timestamp> {
    let milliseconds = i64::try_from(uuid.as_u128() >> 80).ok()?;
    Timestamp::from_millisecond(milliseconds).ok()
}

/// How far the clock of one machine may be behind that of another.
const CLOCKS_APART: SignedDuration = SignedDuration::from_hours(1);

/// Nothing that belongs to an event is older than this.
pub(crate) fn earliest_of_event(event: Uuid) -> Option<Timestamp> {
    uuid_time(event)?.checked_sub(CLOCKS_APART).ok()
}

/// The day of a time in UTC.
pub(crate) fn utc_day(time: Timestamp) -> Date {
    time.to_zoned(TimeZone::UTC).date()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_dataset_names_columns_that_it_has() {
        for dataset in DATASETS {
            let kind = |name| dataset.columns.iter().find(|column| column.name == name).unwrap().kind;
            assert_eq!(kind(dataset.organization), Kind::Uuid, "{}", dataset.domain);
            match dataset.time {
                TimeOf::Column(name) => assert_eq!(kind(name), Kind::Timestamp, "{}", dataset.domain),
                TimeOf::Uuid(name) => assert_eq!(kind(name), Kind::Uuid, "{}", dataset.domain),
            }
            if let Some(name) = dataset.event {
                assert_eq!(kind(name), Kind::Uuid, "{}", dataset.domain);
            }
            if let Some(erasure) = dataset.erasure {
                assert_eq!(kind(erasure.marked), Kind::Timestamp);
                for name in erasure.payload.iter().chain([&erasure.marked]) {
                    let column = dataset.columns.iter().find(|column| column.name == *name).unwrap();
                    assert!(column.nullable, "{}.{name}", dataset.domain);
                }
            }
        }
    }

    #[test]
    fn a_uuid_holds_its_milliseconds() {
        let uuid: Uuid = "019f1c2a-7b00-7000-8000-000000000000".parse().unwrap();
        assert_eq!(uuid_time(uuid).unwrap().as_millisecond(), 0x019f_1c2a_7b00);
    }
}
