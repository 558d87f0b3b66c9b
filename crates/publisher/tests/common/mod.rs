//! What the tests of the API share: one publisher process on a database of its own, and requests that
//! are checked against the OpenAPI document.

pub(crate) mod audit;
pub(crate) mod deliveries;

use std::sync::LazyLock;

use bus_core::pg;
use devkit::{
    client::{ApiClient, Reply},
    processes::Role,
    stack::{Backend, Stack, StackOptions},
};
use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| serde_json::to_value(publisher::api::openapi()).unwrap());

/// A URL that is public and never called.
pub(crate) const URL: &str = "https://receiver.example/hook";

/// So many different characters of three bytes each, in an order that does not compress.
pub(crate) fn ideographs(count: u32) -> String {
    // 7,919 is prime to the size of the block, so no character comes twice.
    (0..count).map(|n| char::from_u32(0x4e00 + n * 7_919 % 20_000).unwrap()).collect()
}

/// So many seconds from now, by the database's clock, to the millisecond.
pub(crate) async fn ahead(pool: &sqlx::PgPool, seconds: i64) -> String {
    let now = pg::transaction_time(&mut pool.acquire().await.unwrap()).await.unwrap();
    let then = Timestamp::from_millisecond(now.as_millisecond() + seconds * 1_000).unwrap();
    then.to_string()
}

/// One publisher process.
pub(crate) struct Bus {
    pub(crate) stack: Stack,
    pub(crate) admin: Caller,
}

/// An organization, and a key of it with every scope but `admin`.
pub(crate) struct Tenant {
    pub(crate) id: String,
    pub(crate) api: Caller,
    admin: Caller,
}

/// A client whose every answer must be one that the OpenAPI document names.
#[derive(Clone)]
pub(crate) struct Caller(pub(crate) ApiClient);

impl Bus {
    pub(crate) async fn start() -> Self {
        Self::start_with(|options| options).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(StackOptions) -> StackOptions) -> Self {
        let options = [Role::DeliveryWorker, Role::CronScheduler, Role::Archiver]
            .into_iter()
            .fold(StackOptions::default().backend(Backend::Postgres), |options, role| {
                options.replicas(role, 0)
            })
            .role_env(Role::Publisher, "EVENT_BUS_SINK__ALLOW_CIDRS", "[]");
        let mut stack = Stack::start(change(options)).await.unwrap();
        let admin = Caller(stack.admin(0).unwrap());
        Self { stack, admin }
    }

    /// The client without a credential.
    pub(crate) fn anonymous(&mut self) -> Caller {
        Caller(self.stack.client(0).unwrap())
    }

    pub(crate) async fn tenant(&self, name: &str) -> Tenant {
        let organization =
            self.admin.send(Method::POST, "/v1/admin/organizations", Some(json!({ "name": name }))).await;
        let id = organization.expect(201).id().to_owned();
        let mut tenant = Tenant { id, api: self.admin.clone(), admin: self.admin.clone() };
        tenant.api = tenant.key(json!({ "scopes": ["publish", "subscribe", "read"] })).await;
        tenant
    }

    /// Ends the publisher, which must drain and exit with 0.
    pub(crate) async fn stop(self) {
        self.stack.shutdown().await.unwrap();
    }
}

impl Tenant {
    /// The path of the tenant's keys.
    pub(crate) fn keys(&self) -> String {
        format!("/v1/admin/organizations/{}/keys", self.id)
    }

    /// Creates a key and gives a client with it.
    pub(crate) async fn key(&self, mut key: Value) -> Caller {
        key.as_object_mut().unwrap().entry("name").or_insert_with(|| "a key".into());
        let reply = self.admin.send(Method::POST, &self.keys(), Some(key)).await.expect(201);
        Caller(self.admin.0.with_token(reply.text("/key")))
    }

    /// Creates a webhook and gives its id.
    pub(crate) async fn webhook(&self, name: &str) -> String {
        let new = json!({ "name": name, "kind": "webhook", "url": URL });
        self.api.post("/v1/connections", new).await.expect(201).id().to_owned()
    }

    /// Creates a connection that only publishes and gives its id.
    pub(crate) async fn publisher(&self, name: &str) -> String {
        let new = json!({ "name": name, "kind": "publisher" });
        self.api.post("/v1/connections", new).await.expect(201).id().to_owned()
    }

    /// Creates a subscription and gives its id.
    pub(crate) async fn subscription(&self, connection: &str, event_type: &str) -> String {
        let new = json!({ "connectionId": connection, "eventType": event_type });
        self.api.post("/v1/subscriptions", new).await.expect(201).id().to_owned()
    }
}

impl Caller {
    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Reply {
        let mut request = self.0.request(method.clone(), path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        self.raw(method, path, request).await
    }

    /// Sends a request that was made with [`ApiClient::request`] for that method and path.
    pub(crate) async fn raw(&self, method: Method, path: &str, request: reqwest::RequestBuilder) -> Reply {
        let reply = self.0.send(request).await.unwrap();
        check_documented(&method, path, &reply);
        reply
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(Method::POST, path, Some(body)).await
    }

    /// A request without a body.
    pub(crate) async fn bare(&self, path: &str) -> Reply {
        self.send(Method::POST, path, None).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Reply {
        self.send(Method::PUT, path, Some(body)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: Value) -> Reply {
        self.send(Method::PATCH, path, Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        self.send(Method::DELETE, path, None).await
    }

    /// A list from its first part to its last, `limit` at a time.
    pub(crate) async fn all(&self, path: &str, limit: u32) -> Vec<Value> {
        let mut items = Vec::new();
        let mut cursor = String::new();
        loop {
            let separator = if path.contains('?') { '&' } else { '?' };
            let part = self.get(&format!("{path}{separator}limit={limit}{cursor}")).await.expect(200);
            items.extend(part.body["items"].as_array().unwrap().iter().cloned());
            match part.body.get("nextCursor").and_then(Value::as_str) {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return items,
            }
        }
    }
}

/// The problem that an answer is, which must be one in every respect: RFC 9457, and our own members.
#[track_caller]
pub(crate) fn problem(reply: &Reply, status: u16, slug: &str) -> Value {
    assert_eq!(reply.body["type"], format!("urn:event-bus:problem:{slug}"), "{:#}", reply.body);
    assert_eq!(reply.status, status, "{:#}", reply.body);
    assert_eq!(reply.headers["content-type"], "application/problem+json");
    assert_eq!(reply.body["status"], status);
    assert_eq!(reply.body["requestId"], reply.headers["x-request-id"].to_str().unwrap());
    for member in ["title", "detail"] {
        assert!(reply.body[member].as_str().is_some_and(|text| !text.is_empty()), "{:#}", reply.body);
    }
    assert_eq!(reply.headers.contains_key("retry-after"), status == 503);
    assert_eq!(reply.headers.contains_key("www-authenticate"), status == 401);
    reply.body.clone()
}

/// [`Reply::expect`] for a reply that is not looked at any further.
pub(crate) trait Check {
    fn is(self, status: u16);
}

impl Check for Reply {
    #[track_caller]
    fn is(self, status: u16) {
        let _checked = self.expect(status);
    }
}

/// Where the errors of a problem of the type `invalid-fields` are.
#[track_caller]
pub(crate) fn pointers(reply: &Reply) -> Vec<String> {
    let body = problem(reply, 422, "invalid-fields");
    let errors = body["errors"].as_array().unwrap();
    errors.iter().map(|error| error["pointer"].as_str().unwrap_or("no pointer").to_owned()).collect()
}

/// Every operation of the document: method, path, description.
pub(crate) fn operations() -> Vec<(Method, String, Value)> {
    let mut operations = Vec::new();
    for (path, item) in DOCUMENT["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let method = method.to_uppercase().parse().unwrap();
            operations.push((method, path.clone(), operation.clone()));
        }
    }
    operations
}

/// Fails if the document does not say that this operation may have this answer.
fn check_documented(method: &Method, path: &str, reply: &Reply) {
    let path = path.split('?').next().unwrap();
    let Some((_, template, operation)) = operations()
        .into_iter()
        .filter(|(of, template, _)| of == method && fits(template, path))
        .min_by_key(|(_, template, _)| template.matches('{').count())
    else {
        return;
    };
    let documented = &operation["responses"][reply.status.to_string()];
    assert!(
        documented.is_object(),
        "{method} {template} answers {}, undocumented: {:#}",
        reply.status,
        reply.body
    );
    let empty = reply.body.is_null();
    let content = documented["content"].as_object();
    assert_eq!(empty, content.is_none_or(serde_json::Map::is_empty), "{method} {template} {}", reply.status);
    if !empty {
        let media_type = reply.headers["content-type"].to_str().unwrap();
        assert!(content.unwrap().contains_key(media_type), "{method} {template} answers {media_type}");
    }
}

fn fits(template: &str, path: &str) -> bool {
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return true,
            (Some(wanted), Some(given)) if wanted == given || wanted.starts_with('{') => {}
            _ => return false,
        }
    }
}
