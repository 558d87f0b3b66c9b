//! Erasure: payloads are emptied, what happened stays.

use bytes::Bytes;
use futures::TryStreamExt as _;
use jiff::Timestamp;
use uuid::Uuid;

use crate::{
    batch::encode_rows,
    dataset::{Dataset, Erasure, Row, Value, earliest_of_event},
    error::Error,
    manifest::{Manifest, Object, PENDING},
    parquet_file::{Rows, RowsDigest, sha256},
    pending::Note,
    store::{ColdStorage, compute},
};

/// What was emptied.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Expunged {
    /// Rows.
    pub rows: u64,
    /// The objects that were written anew.
    pub objects: u64,
    /// The batches that they belong to.
    pub batches: u64,
}

/// Whose payloads.
#[derive(Debug, Clone, Copy)]
struct Erased {
    organization: Uuid,
    event: Option<Uuid>,
    now: Timestamp,
}

/// An object that takes the place of another one.
struct Rewritten {
    old: String,
    new: Object,
    file: Bytes,
    /// How many of its rows were emptied.
    count: u64,
}

impl ColdStorage {
    /// Empties the payloads of an organization, or of one of its events: the columns that
    /// [`Erasure`] names, in every dataset that has one. An object concerned is
    /// written anew beside the old one, and read back; a new revision of the manifest names it; then the old one is
    /// deleted. Whoever is killed in between leaves a note, and repeating the call completes it. What is emptied
    /// already is left alone.
    ///
    /// It must not run beside [`ColdStorage::expire`]. What is archived later is not concerned: it has to be empty
    /// at the source before.
    ///
    /// # Errors
    /// If the store cannot be asked, or an object concerned is not what was written; [`Error::UnknownColumn`] if a
    /// later version wrote it.
    pub async fn expunge(
        &self,
        organization: Uuid,
        event: Option<Uuid>,
        now: Timestamp,
    ) -> Result<Expunged, Error> {
        // One that was killed after its new manifest has left the old objects.
        let _ = self.resume_below(PENDING).await?;
        let erased = Erased { organization, event, now };
        let mut expunged = Expunged::default();
        let mut manifests = std::pin::pin!(self.manifests(None));
        while let Some(manifest) = manifests.try_next().await? {
            self.expunge_batch(manifest, erased, &mut expunged).await?;
        }
        Ok(expunged)
    }

    async fn expunge_batch(
        &self,
        mut manifest: Manifest,
        erased: Erased,
        expunged: &mut Expunged,
    ) -> Result<(), Error> {
        // Each round that is lost to another one has added a revision.
        loop {
            let rewritten = self.rewrite(&manifest, erased).await?;
            if rewritten.is_empty() {
                return Ok(());
            }
            if self.replace(&manifest, &rewritten).await? {
                expunged.rows += rewritten.iter().map(|rewritten| rewritten.count).sum::<u64>();
                expunged.objects += rewritten.len() as u64;
                expunged.batches += 1;
                return Ok(());
            }
            let Some(newest) = self.manifest_at(&manifest.slot()).await? else { return Ok(()) };
            manifest = newest;
        }
    }

    /// The objects of a batch that hold something to be emptied, emptied.
    async fn rewrite(&self, manifest: &Manifest, erased: Erased) -> Result<Vec<Rewritten>, Error> {
        let mut rewritten = Vec::new();
        for old in manifest.objects.iter().filter(|object| erased.concerns(object)) {
            // A domain that this version does not know has nothing that it could empty.
            let Ok(dataset) = Dataset::named(&old.domain) else { continue };
            let Some(erasure) = dataset.erasure else { continue };
            let file = self.read_object(old).await?;
            let path = old.path.clone();
            let emptied =
                compute("empty payloads", move || erased.empty(dataset, erasure, &path, file)).await??;
            if emptied.count == 0 {
                continue;
            }
            let (file, sha256) = encode_rows(dataset, emptied.rows).await?;
            let new = Object {
                path: manifest.slot().object_path(&old.partition(), &manifest.writer, &sha256),
                bytes: file.len() as u64,
                sha256,
                rows_sha256: emptied.digest.finish(),
                ..old.clone()
            };
            rewritten.push(Rewritten { old: old.path.clone(), new, file, count: emptied.count });
        }
        Ok(rewritten)
    }

    /// Puts the objects in the place of the old ones; false if another rewrite was faster.
    async fn replace(&self, manifest: &Manifest, rewritten: &[Rewritten]) -> Result<bool, Error> {
        let slot = manifest.slot();
        let mut next = manifest.clone();
        next.revision += 1;
        for Rewritten { old, new, .. } in rewritten {
            next.objects
                .iter_mut()
                .filter(|object| object.path == *old)
                .for_each(|object| *object = new.clone());
        }
        let digests: String = rewritten.iter().map(|rewritten| rewritten.new.sha256.as_str()).collect();
        let paths =
            rewritten.iter().flat_map(|rewritten| [rewritten.new.path.clone(), rewritten.old.clone()]);
        let note = Note {
            slot: slot.clone(),
            revision: next.revision,
            writer: format!("rewrite-{}", &sha256(digests.as_bytes())[..12]),
            created_at: manifest.created_at,
            paths: paths.collect(),
        };
        note.put(self).await?;
        for Rewritten { new, file, .. } in rewritten {
            self.put(&new.path, file.clone()).await?;
            self.check_object(new).await?;
        }
        let stored = self.create_manifest(&next).await?;
        let _ = self.resume(&slot.source).await?;
        Ok(stored == next)
    }
}

impl Erased {
    fn concerns(&self, object: &Object) -> bool {
        let earliest = self.event.and_then(earliest_of_event);
        object.organization == Some(self.organization)
            && earliest.is_none_or(|earliest| object.latest >= earliest)
    }

    fn empty(&self, dataset: &Dataset, erasure: Erasure, path: &str, file: Bytes) -> Result<Emptied, Error> {
        let unreadable = |source| Error::Decode { path: path.to_owned(), source };
        let found = Rows::open(file).map_err(unreadable)?;
        let known = |name: &str| dataset.columns.iter().any(|column| column.name == name);
        if let Some(column) = found.columns.iter().find(|name| !known(name)) {
            return Err(Error::UnknownColumn { path: path.to_owned(), column: column.clone() });
        }
        // A file of an older version may lack a column, which then holds nothing.
        let order: Vec<Option<usize>> = dataset
            .columns
            .iter()
            .map(|column| found.columns.iter().position(|name| name == column.name))
            .collect();
        let position = |name: &str| dataset.columns.iter().position(|column| column.name == name);
        let event = dataset.event.and_then(position);
        let payload: Vec<usize> = erasure.payload.iter().filter_map(|name| position(name)).collect();
        let marked = position(erasure.marked);
        let mut emptied = Emptied::default();
        for row in found {
            let row = row.map_err(unreadable)?;
            let value = |index: &Option<usize>| index.and_then(|index| row.get(index)).cloned();
            let mut row: Row = order.iter().map(|index| value(index).unwrap_or(Value::Null)).collect();
            let its_event = event.and_then(|index| row.get(index)).and_then(Value::as_uuid);
            let full = payload.iter().any(|index| row.get(*index).is_some_and(|value| *value != Value::Null));
            if full && self.event.is_none_or(|event| its_event == Some(event)) {
                for index in &payload {
                    row[*index] = Value::Null;
                }
                if let Some(marked) = marked {
                    row[marked] = Value::Timestamp(self.now);
                }
                emptied.count += 1;
            }
            emptied.digest.add(&row);
            emptied.rows.push(row);
        }
        Ok(emptied)
    }
}

/// The rows of an object, emptied.
#[derive(Default)]
struct Emptied {
    rows: Vec<Row>,
    digest: RowsDigest,
    count: u64,
}
