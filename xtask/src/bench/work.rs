//! Work on a thread of its own, so that its processor time can be told from that of others.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{runtime::Builder, sync::oneshot};

use super::cost::Thread;

/// Work that waits for its beginning.
#[derive(Debug)]
pub(super) struct Work<T> {
    begin: oneshot::Sender<()>,
    done: oneshot::Receiver<Result<Done<T>>>,
}

/// Work that is done.
#[derive(Debug)]
pub(super) struct Done<T> {
    pub(super) value: T,
    /// When it began.
    pub(super) begun: Instant,
    /// The processor time that it has taken since then.
    pub(super) processor: Duration,
}

impl<T: Send + 'static> Work<T> {
    /// Starts a thread with a runtime that needs no other, and returns when `prepare` is through there. `work` is told when it
    /// began.
    pub(super) async fn prepare<S>(
        name: &str,
        prepare: impl AsyncFnOnce() -> Result<S> + Send + 'static,
        work: impl AsyncFnOnce(S, Instant) -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (begin, may_begin) = oneshot::channel();
        let (tell_ready, ready) = oneshot::channel();
        let (tell_done, done) = oneshot::channel();
        let body = async move || {
            let prepared = prepare().await;
            let (prepared, said) = match prepared {
                Ok(prepared) => (Some(prepared), Ok(())),
                Err(failed) => (None, Err(failed)),
            };
            // Whoever has gone away wants nothing any more.
            let heard = tell_ready.send(said).is_ok();
            if let Some(prepared) = prepared.filter(|_| heard)
                && may_begin.await.is_ok()
            {
                let _ = tell_done.send(measured(prepared, work).await);
            }
        };
        thread::Builder::new().name(name.to_owned()).spawn(move || runtime.block_on(body()))?;
        ready.await.with_context(|| format!("the thread `{name}` has ended"))??;
        Ok(Self { begin, done })
    }

    /// Lets it begin, and waits until it is done.
    pub(super) async fn run(self) -> Result<Done<T>> {
        // If its thread has ended, that shows in what follows.
        let _ = self.begin.send(());
        self.done.await.context("the thread has ended before its work was done")?
    }
}

async fn measured<S, T>(prepared: S, work: impl AsyncFnOnce(S, Instant) -> Result<T>) -> Result<Done<T>> {
    let thread = Thread::current()?;
    let (begun, before) = (Instant::now(), thread.processor_time()?);
    let value = work(prepared, begun).await?;
    Ok(Done { value, begun, processor: thread.processor_time()?.saturating_sub(before) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)]

    use super::*;

    #[tokio::test]
    async fn what_was_prepared_is_worked_on_by_the_same_thread() {
        let name = async || Ok(thread::current().name().map(str::to_owned));
        let work = Work::prepare("worker", name, async |prepared, _| {
            Ok((prepared, thread::current().name().map(str::to_owned)))
        });
        let done = work.await.unwrap().run().await.unwrap();
        let own = Some("worker".to_owned());
        assert_eq!(done.value, (own.clone(), own));
    }

    #[tokio::test]
    async fn what_fails_is_told() {
        let failing = async || anyhow::bail!("nothing is there");
        let work = Work::prepare("worker", failing, async |(), _| Ok(()));
        assert_eq!(work.await.unwrap_err().to_string(), "nothing is there");
        let work = Work::<()>::prepare("worker", async || Ok(()), async |(), _| anyhow::bail!("it broke"));
        assert_eq!(work.await.unwrap().run().await.unwrap_err().to_string(), "it broke");
    }
}
