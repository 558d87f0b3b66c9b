//! Work on a source under a lease: it is renewed beside the work, and the work ends when it is lost.

use std::time::Duration;

use async_trait::async_trait;
use bus_core::{
    launcher::Heartbeat,
    pg::{self, ArchiveLease, ArchivePosition},
    telemetry::Chain,
};
use metrics::counter;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::error::ArchiveError;

/// After an error; doubled after each that follows.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause after an error.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Something that only the holder of a lease does.
#[async_trait]
pub trait LeasedWork: Send + Sync {
    /// What the lease is about.
    fn source(&self) -> &str;

    /// What a new holder does first.
    async fn begin(&self) -> Result<(), ArchiveError>;

    /// Does what there is to do, and says how long to wait before the next round. `position` is where the source stands;
    /// it goes on with what is done.
    async fn round(
        &self,
        lease: &ArchiveLease,
        position: &mut ArchivePosition,
    ) -> Result<Duration, ArchiveError>;
}

/// How leases are taken and held.
#[derive(Debug, Clone)]
pub struct Leases {
    /// Where the leases are.
    pub pool: PgPool,
    /// Who takes them: another one in each process.
    pub holder: String,
    /// How long one lasts after its last renewal, seconds.
    pub seconds: u32,
}

impl Leases {
    /// The name under which a holder writes to cold storage: another one each time that a lease changes hands, even
    /// if the database that counts them was put back to an earlier state.
    pub(crate) fn writer(&self, lease: &ArchiveLease) -> String {
        format!("{}-{}", lease.epoch, self.holder)
    }

    /// Works whenever the lease can be had, until `stop`. The pause after an error grows while it fails again and again.
    pub(crate) async fn keep_working(
        &self,
        work: &dyn LeasedWork,
        beat: &Heartbeat,
        stop: &CancellationToken,
    ) {
        let source = work.source();
        let mut pause = FIRST_PAUSE;
        while !stop.is_cancelled() {
            let wait = match self.work_once(work, beat, stop, &mut pause).await {
                Ok(true) => Duration::ZERO,
                // Somebody else holds it: the first to ask after it ends gets it.
                Ok(false) => {
                    beat.beat();
                    Duration::from_secs(u64::from(self.seconds)) / 4
                }
                Err(failed) => {
                    counter!("bus_archive_failures", "source" => source.to_owned()).increment(1);
                    warn!(source, error = %Chain(&failed), again_in = ?pause, "Archiving put off");
                    let wait = pause;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    wait
                }
            };
            beat.beat();
            stop.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
    }

    /// One round, if the lease can be had; whether it could.
    pub async fn round(&self, work: &dyn LeasedWork) -> Result<bool, ArchiveError> {
        let lease = pg::take_archive_lease(&self.pool, work.source(), &self.holder, self.seconds).await?;
        let Some(lease) = lease else { return Ok(false) };
        let mut position = lease.position.clone();
        let result = match work.begin().await {
            Ok(()) => work.round(&lease, &mut position).await,
            Err(error) => Err(error),
        };
        pg::release_archive_lease(&self.pool, &lease).await?;
        result.map(|_| true)
    }

    /// Whether there was anything to hold.
    async fn work_once(
        &self,
        work: &dyn LeasedWork,
        beat: &Heartbeat,
        stop: &CancellationToken,
        pause: &mut Duration,
    ) -> Result<bool, ArchiveError> {
        let source = work.source();
        let asked = pg::take_archive_lease(&self.pool, source, &self.holder, self.seconds);
        let Some(lease) = pg::answered("take the lease of an archive source", asked).await? else {
            return Ok(false);
        };
        info!(source, epoch = lease.epoch, "Holds the lease of an archive source");
        let mut done = 0;
        let result = tokio::select! {
            result = rounds(work, &lease, &mut done) => result,
            lost = self.renew(&lease, beat) => Err(lost),
            () = stop.cancelled() => Ok(()),
        };
        if !matches!(result, Err(ArchiveError::LeaseLost(_))) {
            let released = pg::release_archive_lease(&self.pool, &lease);
            pg::answered("give back the lease of an archive source", released).await?;
        }
        if done > 0 {
            // It worked for a while: the next failure is a first one.
            *pause = FIRST_PAUSE;
        }
        result.map(|()| true)
    }

    /// Returns when the lease is lost.
    async fn renew(&self, lease: &ArchiveLease, beat: &Heartbeat) -> ArchiveError {
        loop {
            tokio::time::sleep(Duration::from_secs(u64::from(self.seconds)) / 3).await;
            beat.beat();
            let renewed = pg::renew_archive_lease(&self.pool, lease, self.seconds);
            match pg::answered("renew the lease of an archive source", renewed).await {
                Ok(true) => {}
                Ok(false) => return ArchiveError::LeaseLost(lease.source.clone()),
                // As long as nobody else has it, it is ours.
                Err(failed) => warn!(source = lease.source, error = %Chain(&failed), "Lease not renewed yet"),
            }
        }
    }

    /// The last look before something is removed that cannot be had back.
    pub(crate) async fn check(&self, lease: &ArchiveLease) -> Result<(), ArchiveError> {
        if pg::renew_archive_lease(&self.pool, lease, self.seconds).await? {
            Ok(())
        } else {
            Err(ArchiveError::LeaseLost(lease.source.clone()))
        }
    }
}

/// Round after round, until one fails; counts those that did not.
async fn rounds(work: &dyn LeasedWork, lease: &ArchiveLease, done: &mut u64) -> Result<(), ArchiveError> {
    let mut position = lease.position.clone();
    work.begin().await?;
    loop {
        let wait = work.round(lease, &mut position).await?;
        *done += 1;
        tokio::time::sleep(wait).await;
    }
}
