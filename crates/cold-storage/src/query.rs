//! Rows from the archive.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use parquet::errors::ParquetError;
use serde_json::json;
use uuid::Uuid;

use crate::{
    dataset::{Dataset, Row, TimeOf, Value, earliest_of_event, uuid_time},
    error::{Error, Fault},
    manifest::{Manifest, Object},
    parquet_file::Rows,
    store::{ColdStorage, compute},
};

/// Which rows.
#[derive(Debug, Clone)]
pub struct Query {
    /// The dataset.
    pub domain: String,
    /// Those of this organization.
    pub organization: Option<Uuid>,
    /// Those of this time or later.
    pub since: Option<Timestamp>,
    /// Those before this time.
    pub until: Option<Timestamp>,
    /// Those that belong to this event.
    pub event: Option<Uuid>,
    /// At most so many.
    pub limit: usize,
}

/// A row from the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The names of its columns.
    pub columns: Arc<[String]>,
    /// Their values.
    pub values: Row,
}

impl Record {
    /// The value of a column; `None` if the row has no such column.
    #[must_use]
    pub fn get(&self, column: &str) -> Option<&Value> {
        let index = self.columns.iter().position(|name| name == column)?;
        self.values.get(index)
    }

    /// As a JSON object. Bytes that are UTF-8 are a string, others `{"base64": …}`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let values = self.values.iter().map(|value| match value {
            Value::Null => json!(null),
            Value::Uuid(uuid) => json!(uuid),
            Value::Timestamp(at) => json!(at),
            Value::Int(number) => json!(number),
            Value::Long(number) => json!(number),
            Value::Bool(truth) => json!(truth),
            Value::Text(text) => json!(text),
            Value::Json(text) => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
            Value::Bytes(bytes) => match str::from_utf8(bytes) {
                Ok(text) => json!(text),
                Err(_) => json!({ "base64": BASE64_STANDARD.encode(bytes) }),
            },
        });
        self.columns.iter().cloned().zip(values).collect()
    }
}

/// A query whose dataset is known.
#[derive(Debug, Clone)]
struct Wanted {
    query: Query,
    dataset: &'static Dataset,
    /// Nothing that belongs to the event is older.
    earliest: Option<Timestamp>,
}

impl Wanted {
    fn object(&self, object: &Object) -> bool {
        let Query { domain, organization, since, until, .. } = &self.query;
        object.domain == *domain
            && organization.is_none_or(|organization| object.organization == Some(organization))
            && since.is_none_or(|since| object.latest >= since)
            && until.is_none_or(|until| object.earliest < until)
            && self.earliest.is_none_or(|earliest| object.latest >= earliest)
    }

    /// The rows of a file that are asked for.
    fn rows(&self, file: Bytes) -> Result<Vec<Record>, ParquetError> {
        let rows = Rows::open(file)?;
        let columns = rows.columns.clone();
        let position = |name: &str| columns.iter().position(|column| column == name);
        let event = self.dataset.event.and_then(position);
        let (time, in_uuid) = match self.dataset.time {
            TimeOf::Column(name) => (position(name), false),
            TimeOf::Uuid(name) => (position(name), true),
        };
        let mut records = Vec::new();
        for row in rows {
            let row = row?;
            let value = |index: Option<usize>| index.and_then(|index| row.get(index));
            if self.query.event.is_some() && value(event).and_then(Value::as_uuid) != self.query.event {
                continue;
            }
            let at = match value(time) {
                Some(Value::Timestamp(at)) => Some(*at),
                Some(Value::Uuid(uuid)) if in_uuid => uuid_time(*uuid),
                _ => None,
            };
            let within = |at| {
                self.query.since.is_none_or(|since| at >= since)
                    && self.query.until.is_none_or(|until| at < until)
            };
            if at.is_some_and(within) {
                records.push(Record { columns: columns.clone(), values: row });
            }
            if records.len() >= self.query.limit {
                break;
            }
        }
        Ok(records)
    }
}

impl ColdStorage {
    /// Rows, in the order in which they were archived. Only those objects are read that may have some, by what the
    /// manifests say; one at a time.
    ///
    /// # Errors
    /// If there is no such dataset, or an event is asked for where rows belong to none. The stream ends with an error
    /// if the store cannot be asked, or an object is not what was written.
    pub fn query(
        &self,
        query: &Query,
    ) -> Result<impl Stream<Item = Result<Record, Error>> + Send + use<>, Error> {
        let dataset = Dataset::named(&query.domain)?;
        if query.event.is_some() && dataset.event.is_none() {
            return Err(Error::NoEvent(dataset.domain));
        }
        let earliest = query.event.and_then(earliest_of_event);
        let wanted = Wanted { query: query.clone(), dataset, earliest };
        let cold = self.clone();
        let records = self.manifests(None).and_then(move |manifest| {
            let (cold, wanted) = (cold.clone(), wanted.clone());
            async move {
                let objects: Vec<_> =
                    manifest.objects.iter().filter(|object| wanted.object(object)).cloned().collect();
                let found = stream::iter(objects).then(move |object| {
                    let (cold, wanted, manifest) = (cold.clone(), wanted.clone(), manifest.clone());
                    async move { cold.records(&manifest, object, wanted).await }
                });
                Ok(found.map_ok(|records| stream::iter(records.into_iter().map(Ok))).try_flatten())
            }
        });
        Ok(records.try_flatten().take(query.limit))
    }

    async fn records(
        &self,
        manifest: &Manifest,
        object: Object,
        wanted: Wanted,
    ) -> Result<Vec<Record>, Error> {
        let mut path = object.path.clone();
        let file = match self.read_object(&object).await {
            Err(Error::Refused { path: missing, fault: Fault::Missing }) => {
                match self.successor(manifest, &object).await? {
                    // It was rewritten, or has expired, since its manifest was read.
                    Successor::Rewritten(successor) => {
                        path.clone_from(&successor.path);
                        self.read_object(&successor).await?
                    }
                    Successor::Expired => return Ok(Vec::new()),
                    Successor::None => return Err(Error::Refused { path: missing, fault: Fault::Missing }),
                }
            }
            file => file?,
        };
        let found = compute("search an object", move || wanted.rows(file)).await?;
        found.map_err(|source| Error::Decode { path, source })
    }

    async fn successor(&self, manifest: &Manifest, object: &Object) -> Result<Successor, Error> {
        let Some(newest) = self.manifest_at(&manifest.slot()).await? else { return Ok(Successor::Expired) };
        let moved = newest.objects.into_iter().find(|other| other.partition() == object.partition());
        Ok(moved.filter(|other| other.path != object.path).map_or(Successor::None, Successor::Rewritten))
    }
}

/// What became of an object that is not there.
enum Successor {
    Rewritten(Object),
    Expired,
    None,
}
