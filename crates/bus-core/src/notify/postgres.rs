//! Hints through `LISTEN/NOTIFY`.

use std::{io::ErrorKind, sync::Once, time::Duration};

use async_trait::async_trait;
use futures::stream::BoxStream;
use sqlx::{Acquire as _, Connection as _, PgPool, postgres::PgListener};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{ANNOUNCED, AnnounceError, Hint, MemoryNotifier, Notifier, outgoing::Outgoing};
use crate::{
    pg::{During as _, StoreError},
    telemetry::Chain,
};

/// Between two tries to listen while the database is away.
const AGAIN: Duration = Duration::from_millis(500);

/// Whoever listens only reads, and would never notice that the other end has gone without a word: after so
/// long a silence it asks.
const SILENCE: Duration = Duration::from_secs(30);

/// How long the answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Hints through `LISTEN/NOTIFY` on the channel `<prefix>_hints`. The whole process listens with one
/// connection, which is taken from the pool when somebody listens first, and kept.
#[derive(Debug)]
pub struct PostgresNotifier {
    pool: PgPool,
    channel: String,
    outgoing: Outgoing,
    heard: MemoryNotifier,
    listening: Once,
    stop: CancellationToken,
}

impl PostgresNotifier {
    /// Hints of the deployment `prefix`. Stops listening with `stop`.
    pub fn new(pool: PgPool, prefix: &str, stop: CancellationToken) -> Self {
        let channel = format!("{prefix}_hints");
        let (sender, to) = (pool.clone(), channel.clone());
        let outgoing = Outgoing::start("postgres", move |hints| {
            let (pool, channel) = (sender.clone(), to.clone());
            async move { Ok(send(&pool, &channel, &hints).await?) }
        });
        let heard = MemoryNotifier::default();
        Self { pool, channel, outgoing, heard, listening: Once::new(), stop }
    }
}

#[async_trait]
impl Notifier for PostgresNotifier {
    async fn notify(&self, hint: Hint) {
        self.outgoing.put(hint);
    }

    /// Listeners hear in the order of the commits.
    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError> {
        let sent = timeout(ANNOUNCED, send(&self.pool, &self.channel, hints)).await;
        sent.map_err(|_| AnnounceError::TimedOut)?.map_err(AnnounceError::Store)
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        let hints = self.heard.listen();
        self.listening.call_once(|| {
            let listening = forward(self.pool.clone(), self.channel.clone(), self.heard.clone());
            tokio::spawn(self.stop.clone().run_until_cancelled_owned(listening));
        });
        hints
    }

    async fn flush(&self) {
        self.outgoing.flush().await;
    }
}

/// One statement for all of them: every `NOTIFY` takes a lock at its commit that all databases of the server
/// share.
async fn send(pool: &PgPool, channel: &str, hints: &[Hint]) -> Result<(), StoreError> {
    let lines: Vec<String> = hints.iter().map(Hint::to_string).collect();
    sqlx::query("SELECT pg_notify($1, line) FROM UNNEST($2::text[]) AS line")
        .bind(channel)
        .bind(lines)
        .execute(pool)
        .await
        .during("send hints")?;
    Ok(())
}

/// Tells `to` what is heard, and when something may have been missed. Ends when the pool is closed.
async fn forward(pool: PgPool, channel: String, to: MemoryNotifier) {
    let mut said = false;
    loop {
        match follow(&pool, &channel, &to, &mut said).await {
            sqlx::Error::PoolClosed => return,
            failed => {
                if !std::mem::replace(&mut said, true) {
                    warn!(error = %Chain(&failed), "Cannot listen for hints; what they announce is found by polling");
                }
                sleep(AGAIN).await;
            }
        }
    }
}

/// Listens until it fails.
async fn follow(pool: &PgPool, channel: &str, to: &MemoryNotifier, said: &mut bool) -> sqlx::Error {
    let listening = async {
        let mut listener = PgListener::connect_with(pool).await?;
        listener.eager_reconnect(false);
        listener.listen(channel).await?;
        if std::mem::replace(said, false) {
            info!("Listening for hints again");
        }
        to.tell(Hint::Missed);
        loop {
            match timeout(SILENCE, listener.try_recv()).await {
                Ok(Ok(Some(note))) => {
                    if let Some(hint) = Hint::parse(note.payload()) {
                        to.tell(hint);
                    }
                }
                Ok(Ok(None)) => return Err(sqlx::Error::Io(ErrorKind::ConnectionReset.into())),
                Ok(Err(failed)) => return Err(failed),
                Err(_) => ping(&mut listener).await?,
            }
        }
    };
    match listening.await {
        Ok(never) => never,
        Err(failed) => failed,
    }
}

/// A round trip without a statement.
async fn ping(listener: &mut PgListener) -> Result<(), sqlx::Error> {
    let ping = async { listener.acquire().await?.ping().await };
    let silent = |_| sqlx::Error::Io(ErrorKind::TimedOut.into());
    timeout(ANSWER, ping).await.map_err(silent)?
}
