//! Whether the archive is what its manifests say.

use std::{collections::HashSet, fmt};

use futures::{StreamExt as _, TryStreamExt as _, stream};

use crate::{
    error::{Error, Fault},
    manifest::{MANIFESTS, Manifest, OBJECTS, Object, PENDING, Slot, Source},
    parquet_file::sha256,
    store::ColdStorage,
};

/// How many objects are read at the same time.
const AT_ONCE: usize = 4;

/// What is in the archive, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Report {
    /// Batches looked at.
    pub batches: u64,
    /// Objects read.
    pub objects: u64,
    /// Their rows.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that no manifest names yet, or any more: a batch is being written, or was begun before a crash. And
    /// the newest manifest of each table's day that has no last part yet.
    pub in_progress: Vec<String>,
    /// Everything that is not as it should be.
    pub problems: Vec<Problem>,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// An object of a batch is not what was written.
    Object {
        /// The batch.
        slot: Slot,
        /// The object.
        path: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// A manifest cannot be read, or contradicts itself.
    Manifest {
        /// The manifest.
        path: String,
        /// Why.
        reason: String,
    },
    /// Among the notes about what is under way there is something else, or one that cannot be read.
    Note {
        /// Where it lies.
        path: String,
        /// Why it is none.
        reason: String,
    },
    /// Between two batches one is missing.
    Hole {
        /// The batch that does not begin where it should.
        slot: Slot,
        /// Where it should.
        expected: u64,
    },
    /// Two batches hold the same range.
    Overlap {
        /// The later one.
        slot: Slot,
        /// Where it should begin.
        expected: u64,
    },
    /// An object that nobody names.
    Stray {
        /// The object.
        path: String,
        /// Its length.
        bytes: u64,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object { slot, path, fault } => write!(f, "{path} {fault} ({slot})"),
            Self::Manifest { path, reason } | Self::Note { path, reason } => write!(f, "{path}: {reason}"),
            Self::Hole { slot, expected } => {
                write!(f, "{} {}: {expected} to {} are missing", slot.source, slot.incarnation, before(slot))
            }
            Self::Overlap { slot, expected } => {
                write!(f, "{slot}: a batch before it ends at {}", expected.saturating_sub(1))
            }
            Self::Stray { path, .. } => write!(f, "{path} belongs to no batch"),
        }
    }
}

fn before(slot: &Slot) -> u64 {
    slot.first.saturating_sub(1)
}

impl Problem {
    /// What a person can do about it.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Object { .. } => {
                "restore the object from a copy or an older version in the bucket; its name is its place"
            }
            Self::Manifest { .. } => "restore the manifest from a copy or an older version in the bucket",
            Self::Note { .. } => {
                "delete it, unless a batch is being written under another version; objects that it listed are then \
                 reported as strays"
            }
            Self::Hole { .. } => {
                "restore the missing manifests; without them, the objects of the range are reported as strays"
            }
            Self::Overlap { .. } => "keep one: rows of the range are there twice",
            Self::Stray { .. } => {
                "if no manifest is missing, the rows are also elsewhere in the archive or still in the source: delete it"
            }
        }
    }
}

/// The end of the batch before.
struct Chain {
    slot: Slot,
    next: Option<u64>,
    /// Its manifest, if it is a part of a day that has to have another one.
    open: Option<String>,
}

/// What a look at every manifest has gathered.
#[derive(Default)]
struct Seen {
    /// The newest manifests, by path.
    manifests: HashSet<String>,
    /// The start of the digest of each named path: 16 bytes for each object of the archive.
    objects: HashSet<String>,
}

impl Seen {
    fn key(path: &str) -> String {
        sha256(path.as_bytes())[..16].to_owned()
    }

    fn name(&mut self, manifest: &Manifest) {
        self.manifests.insert(manifest.path());
        self.objects.extend(manifest.objects.iter().map(|object| Self::key(&object.path)));
    }

    fn names(&self, path: &str) -> bool {
        self.objects.contains(&Self::key(path))
    }
}

impl ColdStorage {
    /// Reads everything: each manifest, each object of it down to its rows, whether the ranges of a stream join, and
    /// whether there are objects that nobody names. `tell` hears of each batch.
    ///
    /// That the first batches of a stream are missing, or its last ones, cannot be seen: they may have expired, or
    /// not have been written yet.
    ///
    /// # Errors
    /// If the store cannot be asked. What is wrong in the archive is in the report.
    pub async fn verify(&self, mut tell: impl FnMut(&Report)) -> Result<Report, Error> {
        let mut report = Report::default();
        let mut seen = Seen::default();
        for folder in self.incarnations(None).await? {
            let mut chain: Option<Chain> = None;
            for (slot, revision) in self.slots(&folder).await? {
                let path = slot.manifest_path(revision);
                let manifest = match self.manifest(&path).await {
                    Ok(Some(manifest)) => manifest,
                    // It has just expired.
                    Ok(None) => continue,
                    Err(Error::Unreadable { path, reason }) => {
                        report.problems.push(Problem::Manifest { path, reason });
                        chain = None;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                report.problems.extend(join(chain.as_ref(), &manifest));
                let open = matches!(manifest.source, Source::Table { complete: false, .. });
                chain = Some(Chain { slot, next: manifest.source.next(), open: open.then_some(path) });
                seen.name(&manifest);
                self.verify_batch(&manifest, &mut report).await?;
                tell(&report);
            }
            report.in_progress.extend(chain.and_then(|last| last.open));
        }
        self.find_strays(&mut seen, &mut report).await?;
        Ok(report)
    }

    async fn verify_batch(&self, manifest: &Manifest, report: &mut Report) -> Result<(), Error> {
        let checks = stream::iter(&manifest.objects).map(async |object: &Object| {
            match self.check_object(object).await {
                Ok(()) => Ok(None),
                Err(Error::Refused { path, fault }) => Ok(Some((path, fault))),
                Err(Error::Decode { path, source }) => {
                    Ok(Some((path, Fault::Unreadable(source.to_string()))))
                }
                Err(error) => Err(error),
            }
        });
        let faults: Vec<_> =
            checks.buffer_unordered(AT_ONCE).try_filter_map(async |f| Ok(f)).try_collect().await?;
        // A batch that was rewritten or has expired while we read it is not what we looked for.
        if !faults.is_empty() && self.manifest_at(&manifest.slot()).await?.as_ref() != Some(manifest) {
            return Ok(());
        }
        let slot = manifest.slot();
        let faulty =
            faults.into_iter().map(|(path, fault)| Problem::Object { slot: slot.clone(), path, fault });
        report.problems.extend(faulty);
        let rows: u64 = manifest.objects.iter().map(|object| object.rows).sum();
        if rows != manifest.rows {
            let reason = format!("it counts {} rows, and its objects {rows}", manifest.rows);
            report.problems.push(Problem::Manifest { path: manifest.path(), reason });
        }
        report.batches += 1;
        report.objects += manifest.objects.len() as u64;
        report.rows += rows;
        report.bytes += manifest.bytes();
        Ok(())
    }

    async fn find_strays(&self, seen: &mut Seen, report: &mut Report) -> Result<(), Error> {
        let mut unnamed: Vec<(String, u64)> = Vec::new();
        for domain in self.object_folders().await? {
            let mut found = std::pin::pin!(self.list(&domain));
            while let Some(meta) = found.next().await {
                let meta = meta?;
                let path = String::from(meta.location);
                if !seen.names(&path) {
                    unnamed.push((path, meta.size));
                }
            }
        }
        // What was begun meanwhile is in a note; what was begun and committed, in a manifest that we have not seen.
        let foreign = |path, reason| report.problems.push(Problem::Note { path, reason });
        let noted = self.notes(PENDING, foreign).await?;
        if unnamed.is_empty() {
            return Ok(());
        }
        let noted: HashSet<String> = noted.into_iter().flat_map(|note| note.paths).collect();
        for (slot, revision) in self.slots(MANIFESTS).await? {
            let path = slot.manifest_path(revision);
            if seen.manifests.contains(&path) {
                continue;
            }
            match self.manifest(&path).await {
                Ok(manifest) => manifest.iter().for_each(|manifest| seen.name(manifest)),
                // Reported already.
                Err(Error::Unreadable { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        for (path, bytes) in unnamed {
            if seen.names(&path) || !self.exists(&path).await? {
                continue;
            }
            if noted.contains(&path) {
                report.in_progress.push(path);
            } else {
                report.problems.push(Problem::Stray { path, bytes });
            }
        }
        Ok(())
    }

    async fn object_folders(&self) -> Result<Vec<String>, Error> {
        let folders = self.folders("").await?;
        Ok(folders.into_iter().filter(|name| name.starts_with(OBJECTS)).collect())
    }
}

/// Whether a batch begins where the one before it ended.
fn join(before: Option<&Chain>, manifest: &Manifest) -> Option<Problem> {
    let slot = manifest.slot();
    let expected = match (&manifest.source, before) {
        // Older batches have expired.
        (Source::Stream { .. }, None) => return None,
        (Source::Table { .. }, None) => 0,
        // Nothing comes after the last part of a day.
        (_, Some(Chain { next: None, slot: last, .. })) => {
            return Some(Problem::Overlap { slot, expected: last.first.saturating_add(1) });
        }
        (_, Some(Chain { next: Some(next), .. })) => *next,
    };
    match slot.first.cmp(&expected) {
        std::cmp::Ordering::Equal => None,
        std::cmp::Ordering::Greater => Some(Problem::Hole { slot, expected }),
        std::cmp::Ordering::Less => Some(Problem::Overlap { slot, expected }),
    }
}
