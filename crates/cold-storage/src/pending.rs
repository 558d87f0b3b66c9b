//! What is under way, noted before the first object is written, and what becomes of it after a crash.
//!
//! Objects of a batch that nobody committed may only be deleted when nobody can commit it any more: its writer may
//! be slow, and not dead. So they stay until the slot has a manifest that does not name them.

use futures::TryStreamExt as _;
use jiff::Timestamp;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    error::Error,
    manifest::{Manifest, OBJECTS, PENDING, Slot, check_name},
    store::{ColdStorage, MAX_MANIFEST_BYTES},
};

/// What is about to be written, or to be replaced.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Note {
    pub(crate) slot: Slot,
    /// The revision of the manifest that will be the first to know.
    pub(crate) revision: u32,
    pub(crate) writer: String,
    pub(crate) created_at: Timestamp,
    /// Those that the manifest will name, and those that it will not name any more.
    pub(crate) paths: Vec<String>,
}

/// What was found of batches that were begun and not finished.
#[derive(Debug, Default)]
#[must_use]
pub struct Resumed {
    /// Batches that were complete but for the note about them. A batch that is complete is found by
    /// [`ColdStorage::manifest_at`] in any case.
    pub committed: Vec<Manifest>,
    /// Objects that were deleted, since another batch took their place.
    pub discarded: u64,
    /// Batches that nobody has finished or replaced. Their objects are deleted when the next batch from the same
    /// position is committed.
    pub open: u64,
}

impl Note {
    pub(crate) fn path(&self) -> String {
        self.slot.note_path(self.revision, &self.writer)
    }

    pub(crate) async fn put(&self, cold: &ColdStorage) -> Result<(), Error> {
        let path = self.path();
        let json = serde_json::to_vec(self)
            .map_err(|cause| Error::Unreadable { path: path.clone(), reason: cause.to_string() })?;
        cold.put(&path, json.into()).await
    }

    async fn settle(&self, cold: &ColdStorage, resumed: &mut Resumed) -> Result<(), Error> {
        let newest = cold.manifest_at(&self.slot).await?;
        let Some(manifest) = newest.filter(|manifest| manifest.revision >= self.revision) else {
            resumed.open += 1;
            return Ok(());
        };
        resumed.discarded += cold.discard(&self.paths, &manifest).await?;
        cold.delete(&self.path()).await?;
        if self.revision == 1 && manifest.writer == self.writer {
            resumed.committed.push(manifest);
        }
        Ok(())
    }
}

impl ColdStorage {
    /// Looks at what was begun for a source and not finished, and removes what has been replaced. To be called
    /// before the first batch, and by whoever takes the source over. What is no readable note is passed over: a
    /// verification names it.
    ///
    /// # Errors
    /// If the store cannot be asked, or a manifest is not readable.
    pub async fn resume(&self, source: &str) -> Result<Resumed, Error> {
        check_name("the source", source)?;
        self.resume_below(&format!("{PENDING}/{source}")).await
    }

    /// The same for the notes below a folder.
    pub(crate) async fn resume_below(&self, folder: &str) -> Result<Resumed, Error> {
        let mut resumed = Resumed::default();
        for note in self.notes(folder, pass_over).await? {
            note.settle(self, &mut resumed).await?;
        }
        resumed.committed.sort_by_key(Manifest::slot);
        Ok(resumed)
    }

    /// The notes below a folder. Of what is no readable note `foreign` hears the path and the reason.
    pub(crate) async fn notes(
        &self,
        folder: &str,
        mut foreign: impl FnMut(String, String),
    ) -> Result<Vec<Note>, Error> {
        let found: Vec<_> = self.list(folder).try_collect().await?;
        let mut notes = Vec::with_capacity(found.len());
        for meta in found {
            match self.note(meta.location.as_ref()).await {
                Ok(note) => notes.extend(note),
                Err(Error::Unreadable { path, reason }) => foreign(path, reason),
                Err(error) => return Err(error),
            }
        }
        Ok(notes)
    }

    pub(crate) async fn note(&self, path: &str) -> Result<Option<Note>, Error> {
        let refuse = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
        let Some(bytes) = self.read(path, MAX_MANIFEST_BYTES).await? else { return Ok(None) };
        let note: Note = serde_json::from_slice(&bytes).map_err(|cause| refuse(cause.to_string()))?;
        if note.path() != path {
            return Err(refuse(format!("it is the note of {}", note.slot)));
        }
        note.slot.check().map_err(|cause| refuse(cause.to_string()))?;
        let is_object = |path: &str| path.starts_with(OBJECTS) && Path::parse(path).is_ok();
        if let Some(other) = note.paths.iter().find(|path| !is_object(path)) {
            return Err(refuse(format!("{other} is no object")));
        }
        Ok(Some(note))
    }

    /// Deletes those objects that the manifest in their place does not name.
    pub(crate) async fn discard(&self, paths: &[String], manifest: &Manifest) -> Result<u64, Error> {
        let mut discarded = 0;
        for path in paths.iter().filter(|path| !manifest.names(path)) {
            if self.exists(path).await? {
                self.delete(path).await?;
                discarded += 1;
            }
        }
        Ok(discarded)
    }
}

/// Leaves what is no note where it is.
pub(crate) fn pass_over(path: String, reason: String) {
    warn!(path, reason, "Something that is no readable note lies among the notes about batches under way");
}
