//! The store: what is read is bounded, what is created is created once.

use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload, path::Path};

use crate::{
    config::Config,
    error::{Error, Fault},
    manifest::{Manifest, Object, Slot, check_name, parse_manifest_path},
    parquet_file::{Rows, RowsDigest, sha256},
};

/// The most bytes of an object; larger ones are not read.
pub const MAX_OBJECT_BYTES: u64 = 512 * 1024 * 1024;

/// The most bytes of a manifest or of a note about what is under way.
pub const MAX_MANIFEST_BYTES: u64 = 64 * 1024 * 1024;

/// An archive in an object store. Clones are the same archive.
#[derive(Debug, Clone)]
pub struct ColdStorage {
    store: Arc<dyn ObjectStore>,
}

impl ColdStorage {
    /// The archive at the configured place. An S3 is not asked yet; a folder is made.
    ///
    /// HTTP needs a TLS provider of `rustls`, which the process has installed before.
    ///
    /// # Errors
    /// If the configuration names no store, or the folder cannot be made.
    pub fn open(config: &Config) -> Result<Self, Error> {
        Ok(Self { store: config.store()? })
    }

    /// Makes sure that the store answers, may be written to, and refuses to create what is there: all that the
    /// archive promises about two writers rests on it. To be asked once before archiving.
    ///
    /// # Errors
    /// If it does not, or cannot be asked.
    pub async fn probe(&self, writer: &str) -> Result<(), Error> {
        check_name("the writer", writer)?;
        let path = format!("probe/{writer}");
        self.create(&path, Bytes::from_static(b"probe")).await?;
        let created_twice = self.create(&path, Bytes::from_static(b"probe")).await?;
        self.delete(&path).await?;
        if created_twice { Err(Error::NoConditionalPut) } else { Ok(()) }
    }

    /// The newest manifest of a range, if it was archived.
    ///
    /// # Errors
    /// If the store cannot be asked, or the manifest is not readable.
    pub async fn manifest_at(&self, slot: &Slot) -> Result<Option<Manifest>, Error> {
        slot.check()?;
        let found: Vec<ObjectMeta> = self.list(&slot.folder()).try_collect().await?;
        let revisions = found.iter().filter_map(|meta| parse_manifest_path(meta.location.as_ref()));
        let Some(newest) = revisions.map(|(_, revision)| revision).max() else { return Ok(None) };
        self.manifest(&slot.manifest_path(newest)).await
    }

    pub(crate) async fn manifest(&self, path: &str) -> Result<Option<Manifest>, Error> {
        let Some(bytes) = self.read(path, MAX_MANIFEST_BYTES).await? else { return Ok(None) };
        Manifest::parse(path, &bytes).map(Some)
    }

    /// Puts a manifest where none is, and reads what is there then: the same, or that of another writer.
    pub(crate) async fn create_manifest(&self, manifest: &Manifest) -> Result<Manifest, Error> {
        let path = manifest.path();
        let json = serde_json::to_vec(manifest)
            .map_err(|cause| Error::Unreadable { path: path.clone(), reason: cause.to_string() })?;
        let created = self.create(&path, json.into()).await;
        match (self.manifest(&path).await?, created) {
            // Also if the store has taken it and its answer was lost.
            (Some(stored), _) => Ok(stored),
            (None, Err(error)) => Err(error),
            (None, Ok(_)) => Err(Error::Refused { path, fault: Fault::Missing }),
        }
    }

    /// The bytes of an object, if they are those that were written.
    pub(crate) async fn read_object(&self, object: &Object) -> Result<Bytes, Error> {
        let refuse = |fault| Error::Refused { path: object.path.clone(), fault };
        let found = match self.store.get(&path_of(&object.path)?).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Err(refuse(Fault::Missing)),
            Err(source) => return Err(failed("read", &object.path, source)),
        };
        if found.meta.size != object.bytes {
            return Err(refuse(Fault::Length { expected: object.bytes, found: found.meta.size }));
        }
        self.refuse_large(&object.path, found.meta.size, MAX_OBJECT_BYTES)?;
        let bytes = found.bytes().await.map_err(|source| failed("read", &object.path, source))?;
        let length = bytes.len() as u64;
        if length != object.bytes {
            return Err(refuse(Fault::Length { expected: object.bytes, found: length }));
        }
        let hashed = compute("hash an object", move || {
            let digest = sha256(&bytes);
            (bytes, digest)
        });
        let (bytes, digest) = hashed.await?;
        if digest == object.sha256 { Ok(bytes) } else { Err(refuse(Fault::Bytes)) }
    }

    /// Reads an object back, down to its rows.
    pub(crate) async fn check_object(&self, object: &Object) -> Result<(), Error> {
        let bytes = self.read_object(object).await?;
        let (expected, digest) = (object.rows, object.rows_sha256.clone());
        let fault = compute("read an object back", move || {
            let mut found = RowsDigest::default();
            let read = Rows::open(bytes).and_then(|mut rows| {
                rows.try_for_each(|row| {
                    found.add(&row?);
                    Ok(())
                })
            });
            match read {
                Err(cause) => Some(Fault::Unreadable(cause.to_string())),
                Ok(()) if found.rows != expected => Some(Fault::Rows { expected, found: found.rows }),
                Ok(()) => (found.finish() != digest).then_some(Fault::OtherRows),
            }
        });
        match fault.await? {
            Some(fault) => Err(Error::Refused { path: object.path.clone(), fault }),
            None => Ok(()),
        }
    }

    pub(crate) async fn read(&self, path: &str, limit: u64) -> Result<Option<Bytes>, Error> {
        let found = match self.store.get(&path_of(path)?).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(source) => return Err(failed("read", path, source)),
        };
        self.refuse_large(path, found.meta.size, limit)?;
        found.bytes().await.map(Some).map_err(|source| failed("read", path, source))
    }

    fn refuse_large(&self, path: &str, size: u64, limit: u64) -> Result<(), Error> {
        if size <= limit {
            return Ok(());
        }
        Err(Error::Unreadable {
            path: path.to_owned(),
            reason: format!("it has {size} bytes, above {limit}"),
        })
    }

    pub(crate) async fn put(&self, path: &str, bytes: Bytes) -> Result<(), Error> {
        let stored = self.store.put(&path_of(path)?, PutPayload::from_bytes(bytes)).await;
        stored.map(drop).map_err(|source| failed("write", path, source))
    }

    /// Writes what must not be there yet; false if it is.
    pub(crate) async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, Error> {
        let payload = PutPayload::from_bytes(bytes);
        match self.store.put_opts(&path_of(path)?, payload, PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(false)
            }
            Err(source) => Err(failed("create", path, source)),
        }
    }

    /// Deletes what is there; nothing is fine too.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), Error> {
        match self.store.delete(&path_of(path)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("delete", path, source)),
        }
    }

    pub(crate) async fn exists(&self, path: &str) -> Result<bool, Error> {
        match self.store.head(&path_of(path)?).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(failed("look for", path, source)),
        }
    }

    /// Everything below a folder.
    pub(crate) fn list(&self, folder: &str) -> impl Stream<Item = Result<ObjectMeta, Error>> + Send + use<> {
        let folder = folder.to_owned();
        self.store
            .list(Some(&Path::from(folder.as_str())))
            .map_err(move |source| failed("list", &folder, source))
    }

    /// The names of the folders in a folder.
    pub(crate) async fn folders(&self, folder: &str) -> Result<Vec<String>, Error> {
        let listed = self.store.list_with_delimiter(Some(&path_of(folder)?)).await;
        let listed = listed.map_err(|source| failed("list", folder, source))?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename().map(ToOwned::to_owned));
        Ok(names.collect())
    }
}

fn failed(operation: &'static str, path: &str, source: object_store::Error) -> Error {
    Error::Store { operation, path: path.to_owned(), source }
}

fn path_of(path: &str) -> Result<Path, Error> {
    Path::parse(path)
        .map_err(|cause| Error::Unreadable { path: path.to_owned(), reason: format!("no path: {cause}") })
}

/// Runs what takes its time beside the runtime's threads.
pub(crate) async fn compute<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::Ended { operation, source })
}
