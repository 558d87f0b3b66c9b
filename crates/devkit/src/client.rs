//! The HTTP API as a client sees it.

use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::{Value, json};

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(60);

/// A client of the HTTP API, with one credential.
#[derive(Debug, Clone)]
pub struct ApiClient {
    http: reqwest::Client,
    base: String,
    token: Option<String>,
}

/// An answer of the API.
#[derive(Debug, Clone)]
pub struct Reply {
    /// What was asked, for messages.
    request: String,
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body; `null` if there is none, and a string if it is not JSON.
    pub body: Value,
}

impl Reply {
    /// The same answer, if it has this status.
    ///
    /// # Panics
    /// If it has another; then with the body.
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}: {:#}", self.request, self.body);
        self
    }

    /// The same answer, if it has this status.
    ///
    /// # Errors
    /// If it has another; then with the body.
    pub fn require(self, status: u16) -> Result<Self> {
        anyhow::ensure!(self.status == status, "{}: {} {}", self.request, self.status, self.body);
        Ok(self)
    }

    /// The string at a JSON pointer.
    ///
    /// # Errors
    /// If there is none. The body is not in the error: it may hold a secret.
    pub fn string(&self, pointer: &str) -> Result<&str> {
        let found = self.body.pointer(pointer).and_then(Value::as_str);
        found.with_context(|| format!("{}: no string at {pointer} in the answer", self.request))
    }

    /// The string at a JSON pointer, for tests.
    ///
    /// # Panics
    /// If there is none; then with the body.
    #[must_use]
    pub fn text(&self, pointer: &str) -> &str {
        self.string(pointer).unwrap_or_else(|error| panic!("{error}: {:#}", self.body))
    }

    /// The `id` of what was created or read, for tests.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn id(&self) -> &str {
        self.text("/id")
    }
}

impl ApiClient {
    /// A client without a credential for the API at `base` (`http://127.0.0.1:8080`).
    ///
    /// # Errors
    /// If the HTTP client cannot be set up.
    pub fn new(base: impl Into<String>) -> Result<Self> {
        crate::install_tls_provider();
        let http = reqwest::Client::builder().no_proxy().timeout(REQUEST).build()?;
        Ok(Self { http, base: base.into(), token: None })
    }

    /// The same client with a credential: a key, or the admin token.
    #[must_use]
    pub fn with_token(&self, token: impl Into<String>) -> Self {
        Self { token: Some(token.into()), ..self.clone() }
    }

    /// The same client and credential, at another replica.
    #[must_use]
    pub fn at(&self, base: impl Into<String>) -> Self {
        Self { base: base.into(), ..self.clone() }
    }

    /// A request to be finished by the caller, with the credential already in it.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn send(&self, request: RequestBuilder) -> Result<Reply> {
        let request = request.build()?;
        let what = format!("{} {}", request.method(), request.url().path());
        let answer = self.http.execute(request).await.with_context(|| what.clone())?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let bytes = answer.bytes().await.with_context(|| what.clone())?;
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes)
                .unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into())
        };
        Ok(Reply { request: what, status, headers, body })
    }

    /// `GET`.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn get(&self, path: &str) -> Result<Reply> {
        self.send(self.request(Method::GET, path)).await
    }

    /// `POST` with a JSON body.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Reply> {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// `PUT` with a JSON body.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn put(&self, path: &str, body: &Value) -> Result<Reply> {
        self.send(self.request(Method::PUT, path).json(body)).await
    }

    /// `PATCH` with a JSON body.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn patch(&self, path: &str, body: &Value) -> Result<Reply> {
        self.send(self.request(Method::PATCH, path).json(body)).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn delete(&self, path: &str) -> Result<Reply> {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Creates an organization; needs the admin token.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn create_organization(&self, name: &str) -> Result<Reply> {
        self.post("/v1/admin/organizations", &json!({ "name": name })).await
    }

    /// Creates a key of an organization (`{name, scopes, connectionId?, expiresAt?}`); needs the admin token.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn create_key(&self, organization: &str, key: &Value) -> Result<Reply> {
        self.post(&format!("/v1/admin/organizations/{organization}/keys"), key).await
    }

    /// Creates a webhook connection.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn create_webhook(&self, name: &str, url: &str) -> Result<Reply> {
        self.post("/v1/connections", &json!({ "name": name, "kind": "webhook", "url": url })).await
    }

    /// Creates a subscription (`{connectionId, eventType, publisher?, filter?, enabled?}`).
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn subscribe(&self, subscription: &Value) -> Result<Reply> {
        self.post("/v1/subscriptions", subscription).await
    }

    /// Publishes a plain JSON event (`{type, data, …}`).
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn publish(&self, event: &Value) -> Result<Reply> {
        self.post("/v1/events", event).await
    }

    /// Publishes a CloudEvent in structured mode.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn publish_structured(&self, event: &Value) -> Result<Reply> {
        self.publish_as("application/cloudevents+json", event.to_string().into_bytes()).await
    }

    /// Publishes a CloudEvent, given in its JSON form, in binary mode: its string attributes as headers,
    /// its JSON data as the body.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn publish_binary(&self, event: &Value) -> Result<Reply> {
        let mut request = self.request(Method::POST, "/v1/events");
        let attributes = event.as_object().into_iter().flatten();
        for (name, value) in attributes.filter(|(name, _)| *name != "data") {
            let value = value.as_str().unwrap_or_default();
            request = match name.as_str() {
                "datacontenttype" => request.header("content-type", value),
                _ => request.header(format!("ce-{name}"), value),
            };
        }
        self.send(request.body(event["data"].to_string())).await
    }

    /// Publishes CloudEvents in batch mode.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn publish_batch(&self, events: &[Value]) -> Result<Reply> {
        self.publish_as("application/cloudevents-batch+json", Value::from(events).to_string().into_bytes())
            .await
    }

    /// Publishes a body with a media type.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn publish_as(&self, media_type: &str, body: Vec<u8>) -> Result<Reply> {
        let request = self.request(Method::POST, "/v1/events").header("content-type", media_type).body(body);
        self.send(request).await
    }
}
