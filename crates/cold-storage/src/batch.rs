//! A batch on its way into the archive: gathered, written, read back, committed.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use tracing::warn;

use crate::{
    dataset::{Dataset, Row},
    error::Error,
    manifest::{FORMAT, Manifest, Object, Partition, Slot, Source, check_name},
    parquet_file::{RowsDigest, encode, row_size, sha256},
    pending::Note,
    store::{ColdStorage, compute},
};

/// The most bytes that a batch holds in memory, as estimated.
pub const MAX_BATCH_BYTES: usize = 256 * 1024 * 1024;

/// The most objects of a batch.
pub const MAX_BATCH_OBJECTS: usize = 10_000;

/// How many objects are written, or read back, at the same time.
const AT_ONCE: usize = 16;

/// Rows that are archived together.
#[derive(Default)]
pub struct Batch {
    gathered: BTreeMap<Partition, Gathered>,
    bytes: usize,
    rows: u64,
}

/// The rows of one object.
struct Gathered {
    dataset: &'static Dataset,
    rows: Vec<Row>,
    digest: RowsDigest,
    earliest: Timestamp,
    latest: Timestamp,
}

impl Batch {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a row.
    ///
    /// # Errors
    /// If the row does not fit the dataset, or the batch is full: it then holds what it held before.
    pub fn push(&mut self, dataset: &'static Dataset, mut row: Row) -> Result<(), Error> {
        let place = dataset.accept(&mut row)?;
        let size = row_size(&row);
        if self.bytes.saturating_add(size) > MAX_BATCH_BYTES {
            return Err(Error::BatchFull { what: "bytes", limit: MAX_BATCH_BYTES });
        }
        let partition = Partition {
            domain: dataset.domain.to_owned(),
            organization: place.organization,
            date: place.date,
        };
        if self.gathered.len() >= MAX_BATCH_OBJECTS && !self.gathered.contains_key(&partition) {
            return Err(Error::BatchFull { what: "objects", limit: MAX_BATCH_OBJECTS });
        }
        let gathered = self.gathered.entry(partition).or_insert_with(|| Gathered {
            dataset,
            rows: Vec::new(),
            digest: RowsDigest::default(),
            earliest: place.time,
            latest: place.time,
        });
        gathered.digest.add(&row);
        gathered.earliest = gathered.earliest.min(place.time);
        gathered.latest = gathered.latest.max(place.time);
        gathered.rows.push(row);
        self.bytes += size;
        self.rows += 1;
        Ok(())
    }

    /// About as many bytes as it holds in memory. As Parquet they are far fewer.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many objects it will be.
    #[must_use]
    pub fn objects(&self) -> usize {
        self.gathered.len()
    }

    /// How many rows it holds.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Writes the objects. Nothing of it is a part of the archive yet.
    ///
    /// `writer` names whoever holds the lease of the source, and is another one each time that the lease changes
    /// hands.
    ///
    /// # Errors
    /// [`Error::AlreadyArchived`] if a batch begins where this one does; or if the store cannot be written to.
    pub async fn write(
        self,
        cold: &ColdStorage,
        source: Source,
        writer: &str,
        now: Timestamp,
    ) -> Result<Written, Error> {
        source.check()?;
        check_name("the writer", writer)?;
        let slot = source.slot();
        if let Some(manifest) = cold.manifest_at(&slot).await? {
            return Err(Error::AlreadyArchived(Box::new(manifest)));
        }
        let mut objects = Vec::with_capacity(self.gathered.len());
        let mut files = Vec::with_capacity(self.gathered.len());
        for (partition, gathered) in self.gathered {
            let (object, file) = gathered.encode(partition, &slot, writer).await?;
            files.push((object.path.clone(), file));
            objects.push(object);
        }
        let mut paths: Vec<String> = objects.iter().map(|object| object.path.clone()).collect();
        // The same writer has begun here before: what it wrote then must not be forgotten.
        if let Some(earlier) = cold.note(&slot.note_path(1, writer)).await? {
            paths.extend(earlier.paths.into_iter().filter(|path| !objects.iter().any(|o| o.path == *path)));
        }
        let note = Note { slot, revision: 1, writer: writer.to_owned(), created_at: now, paths };
        note.put(cold).await?;
        // The futures are made before they are a stream: otherwise the compiler cannot tell that this one is `Send`
        // (rust-lang/rust#102211).
        let writes: Vec<_> =
            files.into_iter().map(|(path, file)| async move { cold.put(&path, file).await }).collect();
        stream::iter(writes).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        let manifest = Manifest {
            format: FORMAT,
            source,
            revision: 1,
            created_at: now,
            writer: writer.to_owned(),
            rows: self.rows,
            objects,
        };
        Ok(Written(manifest))
    }
}

impl Gathered {
    async fn encode(self, partition: Partition, slot: &Slot, writer: &str) -> Result<(Object, Bytes), Error> {
        let Self { dataset, rows, digest, earliest, latest } = self;
        let (file, sha256) = encode_rows(dataset, rows).await?;
        let object = Object {
            path: slot.object_path(&partition, writer, &sha256),
            domain: partition.domain,
            organization: partition.organization,
            date: partition.date,
            rows: digest.rows,
            bytes: file.len() as u64,
            sha256,
            rows_sha256: digest.finish(),
            earliest,
            latest,
        };
        Ok((object, file))
    }
}

/// Rows as a file, with the SHA-256 of its bytes.
pub(crate) async fn encode_rows(dataset: &'static Dataset, rows: Vec<Row>) -> Result<(Bytes, String), Error> {
    let encoded = compute("write rows as Parquet", move || {
        encode(dataset, &rows).map(|file| {
            let digest = sha256(&file);
            (file, digest)
        })
    });
    encoded.await?.map_err(|source| Error::Encode { domain: dataset.domain.to_owned(), source })
}

/// A batch whose objects are in the store, unread.
#[derive(Debug)]
#[must_use = "what is not committed is no part of the archive"]
pub struct Written(Manifest);

impl Written {
    /// Reads every object back from the store: its length, its bytes, and that its rows are those that were given.
    ///
    /// # Errors
    /// [`Error::Refused`] if an object is not what was written; [`Error::Fenced`] if that is so because another
    /// writer was faster; or if the store cannot be asked.
    pub async fn confirm(self, cold: &ColdStorage) -> Result<Confirmed, Error> {
        let checks: Vec<_> = self.0.objects.iter().map(|object| cold.check_object(object)).collect();
        let mut checks = stream::iter(checks).buffer_unordered(AT_ONCE);
        let mut outcome = Ok(());
        while outcome.is_ok() {
            let Some(checked) = checks.next().await else { break };
            outcome = checked;
        }
        drop(checks);
        match outcome {
            Ok(()) => Ok(Confirmed(self.0)),
            Err(refused @ Error::Refused { .. }) => match cold.manifest_at(&self.0.slot()).await? {
                Some(winner) => Err(fenced(cold, &self.0, &winner).await?),
                None => Err(refused),
            },
            Err(error) => Err(error),
        }
    }
}

/// A batch whose objects were read back.
#[derive(Debug)]
#[must_use = "what is not committed is no part of the archive"]
pub struct Confirmed(Manifest);

impl Confirmed {
    /// Makes the batch a part of the archive. With the manifest in hand, and not before, the source may be trimmed.
    ///
    /// # Errors
    /// [`Error::Fenced`] if another writer was faster; or if the store cannot be asked: then it is unknown whether
    /// the batch was committed, and [`ColdStorage::manifest_at`] will say.
    pub async fn commit(self, cold: &ColdStorage) -> Result<Manifest, Error> {
        let manifest = self.0;
        let stored = cold.create_manifest(&manifest).await?;
        if stored != manifest {
            return Err(fenced(cold, &manifest, &stored).await?);
        }
        let slot = manifest.slot();
        if let Err(error) = cold.resume(&slot.source).await {
            // The batch is in the archive; the next one tidies up.
            warn!(error = %error, source = %slot.source, "The note about an archived batch was not removed");
        }
        Ok(manifest)
    }
}

/// Removes what the loser wrote.
async fn fenced(cold: &ColdStorage, loser: &Manifest, winner: &Manifest) -> Result<Error, Error> {
    let paths: Vec<String> = loser.objects.iter().map(|object| object.path.clone()).collect();
    cold.discard(&paths, winner).await?;
    let _ = cold.resume(&loser.slot().source).await?;
    Ok(Error::Fenced { slot: loser.slot(), winner: winner.writer.clone() })
}
