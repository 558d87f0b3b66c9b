//! What the archive holds: its manifests, one source after the other.

use std::collections::BTreeMap;

use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};

use crate::{
    error::Error,
    manifest::{MANIFESTS, Manifest, Slot, check_name, parse_manifest_path},
    store::ColdStorage,
};

/// How many manifests are read at the same time.
const AT_ONCE: usize = 8;

impl ColdStorage {
    /// The newest manifest of every batch, of one source or of all: by source and incarnation, and in each from the
    /// first to the last. One incarnation's names are in memory at a time, and a few manifests.
    ///
    /// A batch that expires meanwhile may be left out.
    pub fn manifests(
        &self,
        source: Option<&str>,
    ) -> impl Stream<Item = Result<Manifest, Error>> + Send + use<> {
        let (cold, source) = (self.clone(), source.map(ToOwned::to_owned));
        let listed = self.clone();
        let incarnations = async move { listed.incarnations(source.as_deref()).await };
        stream::once(incarnations)
            .map_ok(|folders| stream::iter(folders.into_iter().map(Ok)))
            .try_flatten()
            .and_then(move |folder| {
                let cold = cold.clone();
                async move {
                    let slots = cold.slots(&folder).await?;
                    let found = stream::iter(slots).map(move |(slot, revision)| {
                        let cold = cold.clone();
                        async move { cold.manifest(&slot.manifest_path(revision)).await }
                    });
                    Ok(found.buffered(AT_ONCE).try_filter_map(async |found| Ok(found)))
                }
            })
            .try_flatten()
    }

    /// The folders with the manifests of one incarnation each.
    pub(crate) async fn incarnations(&self, source: Option<&str>) -> Result<Vec<String>, Error> {
        let sources = match source {
            Some(source) => {
                check_name("the source", source)?;
                vec![source.to_owned()]
            }
            None => self.folders(MANIFESTS).await?,
        };
        let mut folders = Vec::new();
        for source in sources {
            let folder = format!("{MANIFESTS}/{source}");
            let incarnations = self.folders(&folder).await?;
            folders.extend(incarnations.into_iter().map(|incarnation| format!("{folder}/{incarnation}")));
        }
        folders.sort();
        Ok(folders)
    }

    /// The slots below a folder with their newest revisions, in order.
    pub(crate) async fn slots(&self, folder: &str) -> Result<BTreeMap<Slot, u32>, Error> {
        let mut slots = BTreeMap::new();
        let mut found = std::pin::pin!(self.list(folder));
        while let Some(meta) = found.next().await {
            if let Some((slot, revision)) = parse_manifest_path(meta?.location.as_ref()) {
                let newest = slots.entry(slot).or_insert(revision);
                *newest = revision.max(*newest);
            }
        }
        Ok(slots)
    }
}
