//! Errors: every one is a problem, whatever went wrong, and every answer has a request id.

use crate::common::{Bus, Caller, Check as _, pointers, problem};
use http::Method;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_goes_wrong_is_a_problem() {
    let mut bus = Bus::start().await;
    let anonymous = bus.anonymous();
    let tenant = bus.tenant("acme").await;
    let api = &tenant.api;

    for path in ["/", "/v1", "/v1/nothing", "/v1/connections/", "/v1/admin/organizations/x/y/z"] {
        problem(&api.get(path).await, 404, "not-found");
    }
    let refused = anonymous.send(Method::DELETE, "/v1/events", None).await;
    problem(&refused, 405, "method-not-allowed");
    let allowed = refused.headers["allow"].to_str().unwrap();
    assert!(["POST", "PUT", "GET"].iter().all(|method| allowed.contains(method)), "{allowed}");
    problem(&anonymous.send(Method::OPTIONS, "/openapi.json", None).await, 405, "method-not-allowed");

    let connections = "/v1/connections";
    let send = async |content_type: Option<&str>, body: &str| {
        let mut request = api.0.request(Method::POST, connections).body(body.to_owned());
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        api.raw(Method::POST, connections, request).await
    };
    problem(&send(None, "{}").await, 415, "unsupported-media-type");
    problem(&send(Some("text/plain"), "{}").await, 415, "unsupported-media-type");
    problem(&send(Some("application/json"), "{").await, 400, "malformed-json");
    problem(&send(Some("application/json"), "").await, 400, "malformed-json");
    problem(&send(Some("application/json; charset=utf-8"), "{} {}").await, 422, "invalid-fields");
    problem(&send(Some("application/json"), &" ".repeat(65 * 1024)).await, 413, "too-large");
    // A body in chunks does not say its length first.
    let chunks = futures::stream::iter((0..65).map(|_| Ok::<_, std::io::Error>(" ".repeat(1024))));
    let chunked = api
        .0
        .request(Method::POST, connections)
        .header("content-type", "application/json")
        .body(reqwest::Body::wrap_stream(chunks));
    problem(&api.raw(Method::POST, connections, chunked).await, 413, "too-large");

    // A refusal reaches a client that is still sending, whatever it is refused for.
    for size in [1_000_000, 7_000_000, 12_000_000] {
        let body = vec![b' '; size];
        let request = |caller: &Caller| caller.0.request(Method::POST, "/v1/events").body(body.clone());
        problem(&anonymous.raw(Method::POST, "/v1/events", request(&anonymous)).await, 401, "unauthorized");
        let refused = api.raw(Method::POST, "/v1/events", request(api)).await;
        let (status, slug) = if size > 8 << 20 { (413, "too-large") } else { (400, "malformed-event") };
        problem(&refused, status, slug);
        let unrouted = api.0.request(Method::POST, "/v1/nothing").body(body.clone());
        problem(&api.raw(Method::POST, "/v1/nothing", unrouted).await, 404, "not-found");
    }

    assert_eq!(pointers(&send(Some("Application/JSON"), "[]").await), [""]);
    assert_eq!(pointers(&api.post(connections, json!({ "name": 1, "kind": "webhook" })).await), ["/name"]);
    let unknown = api.post(connections, json!({ "name": "a", "kind": "webhook", "x~/y": 1 })).await;
    assert_eq!(pointers(&unknown), ["/x~0~1y"]);

    for query in ["limit=0", "limit=201", "limit=x", "limit=1&limit=2", "cursor=x", "nothing=1"] {
        let refused = api.get(&format!("/v1/connections?{query}")).await;
        let body = problem(&refused, 422, "invalid-fields");
        let name = query.split('=').next().unwrap();
        assert_eq!(body["errors"][0]["parameter"], name, "{query}: {body:#}");
    }
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn request_ids_are_echoed_or_made() {
    let mut bus = Bus::start().await;
    let anonymous = bus.anonymous();
    let with = async |id: &str| {
        let request = anonymous.0.request(Method::GET, "/openapi.json").header("x-request-id", id);
        let reply = anonymous.raw(Method::GET, "/openapi.json", request).await.expect(200);
        reply.headers["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(with("mine-1").await, "mine-1");
    let long = "x".repeat(200);
    for refused in ["a b", "a\"b", long.as_str()] {
        let made = with(refused).await;
        assert!(made.parse::<uuid::Uuid>().is_ok(), "{made}");
    }
    let reply = anonymous.get("/openapi.json").await;
    assert_eq!(reply.body, serde_json::to_value(publisher::api::openapi()).unwrap());
    assert_eq!(reply.headers["x-content-type-options"], "nosniff");
    bus.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_database_the_answer_is_503_with_a_time_to_come_back() {
    use devkit::{servers::Durability, stack::ServerChoice};
    let mut bus = Bus::start_with(|options| options.servers(ServerChoice::Own(Durability::Fast))).await;
    let tenant = bus.tenant("acme").await;
    let published = tenant.api.post("/v1/events", json!({ "type": "a", "data": 1 })).await;
    published.is(202);
    bus.stack.postgres().kill().await.unwrap();
    let gone = Caller(tenant.api.0.clone());
    for (method, path) in [(Method::GET, "/v1/connections"), (Method::POST, "/v1/events")] {
        let body = (method == Method::POST).then(|| json!({ "type": "a", "data": 1 }));
        let refused = problem(&gone.send(method, path, body).await, 503, "unavailable");
        let detail = refused["detail"].as_str().unwrap();
        assert!(!detail.contains("sql") && !detail.contains("connection refused"), "{detail}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_by_route_and_not_by_path() {
    let mut bus = Bus::start().await;
    let tenant = bus.tenant("acme").await;
    problem(&tenant.api.get("/v1/connections/one").await, 404, "not-found");
    problem(&tenant.api.get("/v1/connections/two").await, 404, "not-found");
    problem(&tenant.api.get("/somewhere").await, 404, "not-found");
    let url = format!("{}/metrics", bus.stack.publisher(0).admin_url());
    let metrics = reqwest::get(url).await.unwrap().text().await.unwrap();
    for line in [
        r#"bus_http_requests{method="GET",route="/v1/connections/{id}",status="404"} 2"#,
        r#"bus_http_requests{method="GET",route="other",status="404"} 1"#,
        r#"bus_http_request_duration_seconds_count{method="GET",route="/v1/connections/{id}"} 2"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    bus.stop().await;
}
