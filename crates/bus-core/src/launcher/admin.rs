//! The admin port: `/healthz`, `/readyz`, `/metrics`.

use std::{future::IntoFuture as _, time::Duration};

use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tracing::error;

use super::Health;

/// The exporter drains its histogram buffers this often; without it they grow.
const UPKEEP: Duration = Duration::from_secs(5);

pub(super) async fn serve(listener: TcpListener, health: Health, metrics: PrometheusHandle) {
    let router =
        Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(health).route(
            "/metrics",
            get({
                let metrics = metrics.clone();
                move || async move { metrics.render() }
            }),
        );
    let upkeep = async {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            metrics.run_upkeep();
        }
    };
    tokio::select! {
        result = axum::serve(listener, router).into_future() => {
            if let Err(failed) = result {
                error!(error = %failed, "The admin port failed");
            }
        }
        () = upkeep => {}
    }
}

async fn healthz(State(health): State<Health>) -> (StatusCode, Json<Value>) {
    let stuck = health.stuck();
    (status(stuck.is_empty()), Json(json!({ "alive": stuck.is_empty(), "stuck": stuck })))
}

async fn readyz(State(health): State<Health>) -> (StatusCode, Json<Value>) {
    let waiting = health.waiting();
    (status(waiting.is_empty()), Json(json!({ "ready": waiting.is_empty(), "waiting": waiting })))
}

fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}
