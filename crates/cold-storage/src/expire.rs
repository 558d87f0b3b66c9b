//! The end of what is old.

use futures::TryStreamExt as _;
use jiff::{SignedDuration, Timestamp, civil::Date};

use crate::{
    dataset::utc_day,
    error::Error,
    manifest::{Manifest, PENDING, Source},
    pending::pass_over,
    store::ColdStorage,
};

/// How far a publisher's clock may be ahead of the archiver's.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_hours(24);

/// What was deleted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// Batches.
    pub batches: u64,
    /// Their objects.
    pub objects: u64,
    /// The bytes of those.
    pub bytes: u64,
}

impl ColdStorage {
    /// Deletes the batches whose newest row is of a day before `before`: of a stream from the oldest on until one has
    /// to stay, so that no hole comes to be; of a table whole days only. Objects go first and their manifest last, so
    /// that whoever is killed in between is followed up by the next one.
    ///
    /// A row of a stream counts as at most a day newer than its batch: one with a wrong clock would keep the stream.
    ///
    /// It must not run beside [`ColdStorage::expunge`].
    ///
    /// # Errors
    /// If the store cannot be asked, or a manifest is not readable.
    pub async fn expire(&self, before: Date) -> Result<Expired, Error> {
        let mut expired = Expired::default();
        for folder in self.incarnations(None).await? {
            let mut old = Vec::new();
            let mut all = true;
            for (slot, revision) in self.slots(&folder).await? {
                let Some(manifest) = self.manifest(&slot.manifest_path(revision)).await? else { continue };
                if utc_day(newest(&manifest)) >= before {
                    all = false;
                    break;
                }
                if matches!(manifest.source, Source::Stream { .. }) {
                    self.expire_batch(&manifest, &mut expired).await?;
                } else {
                    old.push(manifest);
                }
            }
            if all {
                // From the last part on: what is left of a day then has no hole.
                for manifest in old.into_iter().rev() {
                    self.expire_batch(&manifest, &mut expired).await?;
                }
            }
        }
        Ok(expired)
    }

    async fn expire_batch(&self, manifest: &Manifest, expired: &mut Expired) -> Result<(), Error> {
        self.remove_batch(manifest).await?;
        expired.batches += 1;
        expired.objects += manifest.objects.len() as u64;
        expired.bytes += manifest.bytes();
        Ok(())
    }

    /// Objects first and the manifest last, so that whoever is killed in between is followed up by the next one.
    pub(crate) async fn remove_batch(&self, manifest: &Manifest) -> Result<(), Error> {
        let slot = manifest.slot();
        for object in &manifest.objects {
            self.delete(&object.path).await?;
        }
        // Without its manifest nobody could tell what became of a rewrite.
        for note in self.notes(&format!("{PENDING}/{}", slot.source), pass_over).await? {
            if note.slot == slot {
                for path in &note.paths {
                    self.delete(path).await?;
                }
                self.delete(&note.path()).await?;
            }
        }
        let mut manifests: Vec<String> =
            self.list(&slot.folder()).map_ok(|meta| meta.location.into()).try_collect().await?;
        // The newest last: an older one must not count again.
        manifests.sort();
        for path in manifests {
            self.delete(&path).await?;
        }
        Ok(())
    }
}

/// What the age of a batch is measured by.
fn newest(manifest: &Manifest) -> Timestamp {
    let latest = manifest.latest();
    match manifest.source {
        Source::Stream { .. } => {
            latest.min(manifest.created_at.checked_add(CLOCKS_DIFFER).unwrap_or(Timestamp::MAX))
        }
        // Its rows are those of its day, which is what expires.
        Source::Table { .. } => latest,
    }
}
