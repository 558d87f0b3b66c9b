//! What an archiver asks about one source when it has lost its own account of it, or has to begin again.

use crate::{
    error::Error,
    manifest::{MANIFESTS, Manifest, check_name},
    store::ColdStorage,
};

impl ColdStorage {
    /// The batch that ends last in an incarnation of a source; `None` if it has none.
    ///
    /// # Errors
    /// If the store cannot be asked, or the manifest is not readable.
    pub async fn last_manifest(&self, source: &str, incarnation: &str) -> Result<Option<Manifest>, Error> {
        match self.slots(&folder(source, incarnation)?).await?.pop_last() {
            Some((slot, revision)) => self.manifest(&slot.manifest_path(revision)).await,
            None => Ok(None),
        }
    }

    /// How many rows an incarnation of a source has in all.
    ///
    /// # Errors
    /// If the store cannot be asked, or a manifest is not readable.
    pub async fn rows_in(&self, source: &str, incarnation: &str) -> Result<u64, Error> {
        let mut rows = 0;
        for (slot, revision) in self.slots(&folder(source, incarnation)?).await? {
            rows += self.manifest(&slot.manifest_path(revision)).await?.map_or(0, |manifest| manifest.rows);
        }
        Ok(rows)
    }

    /// Takes an incarnation of a source out of the archive, from its last batch to its first: for a table's day that is
    /// still in its table, and is to be archived afresh under another incarnation.
    ///
    /// # Errors
    /// If the store cannot be asked, or a manifest is not readable.
    pub async fn retract(&self, source: &str, incarnation: &str) -> Result<(), Error> {
        for (slot, revision) in self.slots(&folder(source, incarnation)?).await?.into_iter().rev() {
            if let Some(manifest) = self.manifest(&slot.manifest_path(revision)).await? {
                self.remove_batch(&manifest).await?;
            }
        }
        Ok(())
    }
}

/// The folder of an incarnation's manifests.
fn folder(source: &str, incarnation: &str) -> Result<String, Error> {
    check_name("the source", source)?;
    check_name("the incarnation", incarnation)?;
    Ok(format!("{MANIFESTS}/{source}/{incarnation}"))
}
