//! The HTTP API.

mod acks;
mod audit;
pub mod auth;
mod cancel;
mod connections;
mod dead_letters;
mod deliveries;
mod drain;
mod erasures;
mod events;
mod explain;
mod extract;
mod finish;
mod history;
mod keys;
mod lanes;
mod limits;
mod openapi;
mod organizations;
mod page;
pub mod problem;
mod replays;
mod schedules;
mod subscriptions;
mod sync;

use std::{ops::Deref, sync::Arc};

use axum::{
    Router,
    extract::State,
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{auth::KeyCache, extract::Room};
use crate::state::{AppState, Inner};

/// The state of the handlers: the process's, and what only the API needs.
#[derive(Clone)]
struct Api(Arc<ApiParts>);

struct ApiParts {
    app: AppState,
    key_cache: KeyCache,
    room: Room,
    explains: Arc<Semaphore>,
    document: Bytes,
}

impl Deref for ApiParts {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.app
    }
}

impl Deref for Api {
    type Target = ApiParts;
    fn deref(&self) -> &ApiParts {
        &self.0
    }
}

/// The API, ready to be served.
pub fn router(state: AppState) -> Router {
    finish::describe_metrics();
    let (router, document) = documented().split_for_parts();
    let document = document.to_json().expect("an OpenAPI document is JSON").into();
    let api = Api(Arc::new(ApiParts {
        app: state,
        key_cache: KeyCache::new(),
        room: Room::new(),
        explains: Arc::new(Semaphore::new(explain::AT_A_TIME)),
        document,
    }));
    router
        .fallback(finish::not_found)
        .method_not_allowed_fallback(finish::method_not_allowed)
        .layer(CatchPanicLayer::custom(finish::panicked))
        .layer(from_fn_with_state(api.clone(), finish::finish))
        .with_state(api)
}

/// The OpenAPI document of [`router`].
pub fn openapi() -> utoipa::openapi::OpenApi {
    documented().into_openapi()
}

/// Every route with its description: a route that is added here is in the document.
fn documented() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(openapi::Base::openapi())
        .routes(routes!(events::publish, schedules::put, history::list))
        .routes(routes!(history::get))
        .routes(routes!(deliveries::list))
        .routes(routes!(acks::ack))
        .routes(routes!(cancel::cancel))
        .routes(routes!(replays::replay_event))
        .routes(routes!(erasures::expunge))
        .routes(routes!(schedules::list))
        .routes(routes!(schedules::get))
        .routes(routes!(schedules::occurrences))
        .routes(routes!(schedules::pause))
        .routes(routes!(schedules::resume))
        .routes(routes!(schedules::trigger))
        .routes(routes!(schedules::cancel))
        .routes(routes!(dead_letters::list))
        .routes(routes!(dead_letters::replay_many))
        .routes(routes!(dead_letters::discard_many))
        .routes(routes!(dead_letters::get, dead_letters::discard))
        .routes(routes!(dead_letters::replay))
        .routes(routes!(replays::list))
        .routes(routes!(replays::get))
        .routes(routes!(replays::cancel))
        .routes(routes!(erasures::create, erasures::list))
        .routes(routes!(erasures::get))
        .routes(routes!(connections::create, connections::list))
        .routes(routes!(connections::get, connections::change, connections::delete))
        .routes(routes!(sync::sync))
        .routes(routes!(subscriptions::create, subscriptions::list))
        .routes(routes!(subscriptions::get, subscriptions::change, subscriptions::delete))
        .routes(routes!(explain::explain))
        .routes(routes!(replays::replay_subscription))
        .routes(routes!(organizations::create, organizations::list))
        .routes(routes!(organizations::get))
        .routes(routes!(lanes::set))
        .routes(routes!(limits::set))
        .routes(routes!(limits::usage))
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::revoke))
        .routes(routes!(audit::list))
        .routes(routes!(audit::list_all))
        .routes(routes!(document))
}

/// This document
#[utoipa::path(
    get,
    path = "/openapi.json",
    tag = "meta",
    operation_id = "getOpenapi",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json"))
)]
async fn document(State(api): State<Api>) -> Response {
    let mut response = api.document.clone().into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The answer to the creation of something: 201 with its address.
fn created(path: &str, body: impl IntoResponse) -> Response {
    located(StatusCode::CREATED, path, body)
}

/// The answer to the start of something that takes a while: 202 with the address where to follow it.
fn accepted(path: &str, body: impl IntoResponse) -> Response {
    located(StatusCode::ACCEPTED, path, body)
}

fn located(status: StatusCode, path: &str, body: impl IntoResponse) -> Response {
    let mut response = body.into_response();
    *response.status_mut() = status;
    let location = HeaderValue::try_from(path).expect("a path of ids is visible ASCII");
    response.headers_mut().insert(http::header::LOCATION, location);
    response
}
