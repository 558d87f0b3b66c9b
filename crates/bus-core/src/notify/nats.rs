//! Hints as core NATS messages.

use async_nats::Subscriber;
use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::{select, sync::watch, time::timeout};
use tracing::warn;

use super::{ANNOUNCED, AnnounceError, Hint, Notifier, outgoing::Outgoing};
use crate::{
    nats::{During as _, Nats, NatsError},
    telemetry::Chain,
};

/// Hints as core NATS messages, one each, on `<prefix>.wake.hints`.
#[derive(Debug, Clone)]
pub struct NatsNotifier {
    nats: Nats,
    outgoing: Outgoing,
}

impl NatsNotifier {
    /// Over this connection. Its background task ends with the last clone.
    pub fn new(nats: Nats) -> Self {
        let sender = nats.clone();
        let outgoing = Outgoing::start("nats", move |hints| {
            let nats = sender.clone();
            async move {
                // The client would take a message all the same, until its buffer is full.
                if !nats.is_connected() {
                    return Err("not connected".into());
                }
                Ok(send(&nats, &hints).await?)
            }
        });
        Self { nats, outgoing }
    }
}

async fn send(nats: &Nats, hints: &[Hint]) -> Result<(), NatsError> {
    for hint in hints {
        let payload = hint.to_string().into();
        nats.client.publish(nats.names.wake_hints(), payload).await.during("send a hint")?;
    }
    Ok(())
}

#[async_trait]
impl Notifier for NatsNotifier {
    async fn notify(&self, hint: Hint) {
        self.outgoing.put(hint);
    }

    /// The server passes messages on in the order in which they come. What was sent on a connection that broke may
    /// be lost, although the server answers on the next one.
    async fn announce(&self, hints: &[Hint]) -> Result<(), AnnounceError> {
        let nats = &self.nats;
        if !nats.is_connected() {
            return Err(AnnounceError::NotConnected);
        }
        let connection = nats.connections();
        let sent = async {
            send(nats, hints).await?;
            nats.round_trip().await
        };
        let sent = timeout(ANNOUNCED, sent).await;
        sent.map_err(|_| AnnounceError::TimedOut)?.map_err(AnnounceError::Nats)?;
        if nats.connections() == connection { Ok(()) } else { Err(AnnounceError::Interrupted) }
    }

    fn listen(&self) -> BoxStream<'static, Hint> {
        let nats = self.nats.clone();
        stream::once(async move {
            match nats.client.subscribe(nats.names.wake_hints()).await {
                Ok(messages) => {
                    Listener { epoch: nats.epoch(), seen: 0, connections: 0, nats, messages }.into_stream()
                }
                Err(failed) => {
                    // The client is closed; it does not refuse otherwise.
                    warn!(error = %Chain(&failed), "No hints from NATS");
                    stream::once(async { Hint::Missed }).chain(stream::pending()).boxed()
                }
            }
        })
        .flatten()
        .boxed()
    }

    async fn flush(&self) {
        if self.nats.is_connected() {
            self.outgoing.flush().await;
            self.nats.flush().await;
        }
    }
}

struct Listener {
    nats: Nats,
    messages: Subscriber,
    epoch: watch::Receiver<u64>,
    /// The epoch that was told last; 0 is the time before the first connection.
    seen: u64,
    /// How many connections there had been by then.
    connections: u64,
}

impl Listener {
    fn into_stream(self) -> BoxStream<'static, Hint> {
        stream::unfold(self, |mut this| async move { this.next().await.map(|hint| (hint, this)) })
            .chain(stream::pending())
            .boxed()
    }

    async fn next(&mut self) -> Option<Hint> {
        loop {
            let epoch = *self.epoch.borrow_and_update();
            if epoch != self.seen {
                let connections = self.nats.connections();
                // What is sent after `Missed` is to arrive: the server must know of the subscription by then.
                // If it does not answer, it is away again, and the next epoch will say so.
                if let Err(failed) = self.nats.round_trip().await {
                    warn!(error = %Chain(&failed), "Hints from NATS may be missed");
                }
                (self.seen, self.connections) = (epoch, connections);
                return Some(Hint::Missed);
            }
            select! {
                biased;
                changed = self.epoch.changed() => changed.ok()?,
                message = self.messages.next(), if self.seen > 0 => {
                    let message = message?;
                    match std::str::from_utf8(&message.payload).ok().and_then(Hint::parse) {
                        // It came before the news of its connection. By that connection hints may have been lost
                        // before, so it proves nothing.
                        Some(Hint::Probe(_)) if self.nats.connections() != self.connections => {}
                        Some(hint) => return Some(hint),
                        None => {}
                    }
                }
            }
        }
    }
}
