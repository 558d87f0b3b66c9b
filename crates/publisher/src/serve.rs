//! Serves the API with a bound on connections, on the time that a request's head may take, and on that for which a client
//! leaves its answer unread, which `axum::serve` has none of.

mod stall;

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::stall::WriteTimeout;

/// Open connections; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 4_096;

/// A request's head must have arrived this long after the connection became idle.
const HEAD: Duration = Duration::from_secs(30);

/// How long a client may leave an answer unread.
const STALL: Duration = Duration::from_secs(30);

/// After a failed accept, which usually means that there are no more file descriptors.
const AGAIN: Duration = Duration::from_millis(100);

/// Serves until `stop`, then lets the requests that are under way finish.
pub(crate) async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let (room, graceful) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), GracefulShutdown::new());
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD);
    while let Some(permit) = stop.run_until_cancelled(Arc::clone(&room).acquire_owned()).await {
        let stream = match stop.run_until_cancelled(accept(&listener)).await {
            Some(Some(stream)) => stream,
            Some(None) => continue,
            None => break,
        };
        let service = TowerToHyperService::new(router.clone());
        let connection =
            graceful.watch(builder.serve_connection(TokioIo::new(WriteTimeout::new(stream, STALL)), service));
        tokio::spawn(async move {
            if let Err(failed) = connection.await {
                debug!(error = %failed, "A connection broke off");
            }
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn accept(listener: &TcpListener) -> Option<TcpStream> {
    match listener.accept().await {
        Ok((stream, _)) => {
            // Answers are small and complete; without this they may wait 40 ms for an acknowledgement.
            if let Err(failed) = stream.set_nodelay(true) {
                debug!(error = %failed, "TCP_NODELAY not set");
            }
            Some(stream)
        }
        Err(failed) => {
            warn!(error = %failed, "No connection accepted");
            tokio::time::sleep(AGAIN).await;
            None
        }
    }
}
