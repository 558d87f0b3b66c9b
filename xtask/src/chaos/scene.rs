//! Who publishes and who receives: organizations that are all alike, each with endpoints good and bad.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Result;
use devkit::{
    client::ApiClient,
    receiver::{Answer, Received, Receiver, Script},
    stack::Stack,
};
use serde_json::{Value, json};
use standardwebhooks::Webhook;

use super::ledger::{Endpoint, Entry, Ledger, Request, Seen, Want};

/// How many organizations there are; ids, names and paths are the same in all of them.
const ORGANIZATIONS: usize = 3;

/// How an endpoint answers.
#[derive(Debug, Clone, Copy)]
enum Conduct {
    Good,
    Slow,
    /// Fails often, and takes each event in the end.
    Flaky,
    /// Wants to be asked again later, the first time.
    Busy,
    Failing,
    Hanging,
    Dripping,
    Resetting,
    Redirecting,
    /// Takes it, and says so without end.
    Endless,
    /// Speaks no TLS, where TLS is asked for.
    WithoutTls,
}

/// An endpoint that every organization has.
struct Plan {
    name: &'static str,
    wants: &'static [(&'static str, Option<u32>)],
    conduct: Conduct,
    batched: bool,
    /// The waits after failures; none for a long policy.
    delays_ms: &'static [u64],
}

const PLANS: [Plan; 15] = [
    Plan::good("all", &[("order.>", None)]),
    Plan::good("twice", &[("order.*", None), ("*.created", None)]),
    Plan::good("large", &[("order.>", Some(500)), ("user.*", Some(900))]),
    Plan { batched: true, ..Plan::good("batches", &[("stock.*", None)]) },
    Plan::good("ticks", &[("tick.*", None)]),
    Plan::new("slow", &[("order.paid", None)], Conduct::Slow, &[]),
    Plan::new("flaky", &[("user.>", None)], Conduct::Flaky, &[]),
    Plan::new("busy", &[("user.created", None)], Conduct::Busy, &[]),
    Plan::new("failing", &[("bad.*", None)], Conduct::Failing, &[300, 600]),
    Plan::new("hanging", &[("bad.*", None)], Conduct::Hanging, &[300]),
    Plan::new("dripping", &[("bad.*", None)], Conduct::Dripping, &[300]),
    Plan::new("resetting", &[("bad.*", None)], Conduct::Resetting, &[300]),
    Plan::new("redirecting", &[("bad.*", None)], Conduct::Redirecting, &[300]),
    Plan::new("endless", &[("bad.*", None)], Conduct::Endless, &[300]),
    Plan::new("without-tls", &[("bad.*", None)], Conduct::WithoutTls, &[300]),
];

/// The long policy, and its shortest wait.
const ATTEMPTS: u32 = 40;
const WAIT_MS: u64 = 300;

impl Plan {
    const fn new(
        name: &'static str,
        wants: &'static [(&'static str, Option<u32>)],
        conduct: Conduct,
        delays_ms: &'static [u64],
    ) -> Self {
        Self { name, wants, conduct, batched: false, delays_ms }
    }

    const fn good(name: &'static str, wants: &'static [(&'static str, Option<u32>)]) -> Self {
        Self::new(name, wants, Conduct::Good, &[])
    }

    fn policy(&self) -> Value {
        if self.delays_ms.is_empty() {
            json!({ "maxAttempts": ATTEMPTS, "baseMs": WAIT_MS, "factor": 1.5, "capMs": 4_000 })
        } else {
            json!({ "delaysMs": self.delays_ms })
        }
    }

    /// Short where no answer comes; else long enough for a machine that has much else to do.
    fn timeout_ms(&self) -> u64 {
        if matches!(self.conduct, Conduct::Hanging | Conduct::Dripping) { 1_000 } else { 5_000 }
    }

    fn attempts(&self) -> u32 {
        u32::try_from(self.delays_ms.len())
            .map_or(ATTEMPTS, |waits| if waits == 0 { ATTEMPTS } else { waits + 1 })
    }

    fn wait_ms(&self) -> u64 {
        self.delays_ms.iter().min().copied().unwrap_or(WAIT_MS)
    }
}

/// An organization with its key.
#[derive(Debug, Clone)]
pub(super) struct Tenant {
    /// Its name, which its events carry.
    pub(super) name: String,
    pub(super) api: ApiClient,
}

impl Tenant {
    /// The same, at another publisher.
    pub(super) fn at(&self, base: &str) -> Self {
        Self { name: self.name.clone(), api: self.api.at(base) }
    }
}

/// The organizations, and the server behind their endpoints.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) tenants: Vec<Tenant>,
    /// Held, since it ends with the value.
    _receiver: Receiver,
}

impl Scene {
    pub(super) async fn set(stack: &mut Stack, ledger: &Ledger) -> Result<Self> {
        let receiver = Receiver::start().await?;
        let admin = stack.admin(0)?;
        let mut tenants = Vec::new();
        for number in 0..ORGANIZATIONS {
            let name = format!("org-{number}");
            let organization = admin.create_organization(&name).await?.require(201)?;
            let scopes = json!({ "name": "all", "scopes": ["publish", "subscribe", "read", "admin"] });
            let key = admin.create_key(organization.string("/id")?, &scopes).await?.require(201)?;
            let api = admin.with_token(key.string("/key")?);
            for plan in &PLANS {
                open(&api, &name, plan, &receiver, ledger).await?;
            }
            tenants.push(Tenant { name, api });
        }
        Ok(Self { tenants, _receiver: receiver })
    }
}

async fn open(
    api: &ApiClient,
    organization: &str,
    plan: &Plan,
    receiver: &Receiver,
    ledger: &Ledger,
) -> Result<()> {
    let path = format!("/{organization}/{}", plan.name);
    let visible = !matches!(plan.conduct, Conduct::WithoutTls);
    let url = if visible { receiver.url(&path) } else { receiver.url_without_tls(&path) };
    let connection =
        json!({ "name": plan.name, "kind": "webhook", "url": url, "timeoutMs": plan.timeout_ms() });
    let connection = api.post("/v1/connections", &connection).await?.require(201)?;
    let id = connection.string("/id")?;
    let mut wants = Vec::new();
    for (pattern, at_least) in plan.wants {
        let mut wish = json!({ "connectionId": id, "eventType": pattern, "retryPolicy": plan.policy() });
        if let Some(least) = at_least {
            wish["filter"] = format!("$[?@.number >= {least}]").into();
        }
        if plan.batched {
            wish["batch"] = json!({ "maxEvents": 10, "maxWaitMs": 300 });
        }
        let subscription = api.subscribe(&wish).await?.require(201)?.string("/id")?.to_owned();
        wants.push(Want { subscription, pattern: (*pattern).to_owned(), at_least: *at_least });
    }
    let endpoint = Endpoint {
        organization: organization.to_owned(),
        path: path.clone(),
        connection: id.to_owned(),
        wants,
        batched: plan.batched,
        good: matches!(plan.conduct, Conduct::Good),
        // An endless answer is not among them: a worker that is frozen while it reads may use up the few attempts there.
        takes_all: matches!(plan.conduct, Conduct::Good | Conduct::Slow | Conduct::Flaky | Conduct::Busy),
        visible,
        attempts: plan.attempts(),
        wait_ms: plan.wait_ms(),
    };
    ledger.write(Entry::Endpoint(endpoint.clone()));
    let witness = Witness {
        endpoint,
        conduct: plan.conduct,
        secret: Webhook::new(connection.string("/secret")?)?,
        ledger: ledger.clone(),
        attempts: Arc::default(),
    };
    receiver.script(&path, Script::decided_by(move |request| witness.answer(request)));
    Ok(())
}

/// Answers for one endpoint, and writes down what came.
struct Witness {
    endpoint: Endpoint,
    conduct: Conduct,
    secret: Webhook,
    ledger: Ledger,
    /// How often each delivery came.
    attempts: Arc<Mutex<HashMap<String, u32>>>,
}

impl Witness {
    fn answer(&self, request: &Received) -> Answer {
        let delivery = request.header("webhook-id").to_owned();
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let before = attempts.entry(delivery.clone()).or_default();
        let (status, after_ms, answer) = decide(self.conduct, &delivery, *before);
        *before += 1;
        drop(attempts);
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let events = match &body {
            Value::Array(events) => events.iter().map(seen).collect(),
            event => vec![seen(event)],
        };
        let signed = self.secret.verify(&request.body, &request.headers).is_ok();
        let Endpoint { organization, path, .. } = &self.endpoint;
        let (organization, path) = (organization.clone(), path.clone());
        let entry = Request { organization, path, delivery, events, status, after_ms, signed };
        self.ledger.write_at(request.time, Entry::Request(entry));
        answer
    }
}

fn seen(event: &Value) -> Seen {
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    Seen { id: text("/id"), organization: text("/data/organization") }
}

/// What an attempt is answered: the status, as the bus is to take it, and the wait that is asked for.
fn decide(conduct: Conduct, delivery: &str, before: u32) -> (u16, Option<u64>, Answer) {
    let plain = |status: u16| (status, None, Answer::status(status));
    match conduct {
        Conduct::Good | Conduct::WithoutTls => plain(200),
        Conduct::Slow => (200, None, Answer::ok().after(Duration::from_millis(300))),
        // The same for the same delivery and attempt.
        Conduct::Flaky => match (fold(delivery) + u64::from(before) * 7) % 10 {
            0..5 if before < 8 => plain(500),
            5 if before < 8 => (0, None, Answer::reset()),
            _ => plain(200),
        },
        Conduct::Busy if before == 0 => (429, Some(2_000), Answer::status(429).header("retry-after", "2")),
        Conduct::Busy => plain(200),
        Conduct::Failing => plain(500),
        Conduct::Hanging => (0, None, Answer::hang()),
        Conduct::Dripping => (0, None, Answer::drip(vec![b' '; 60], Duration::from_secs(1))),
        Conduct::Resetting => (0, None, Answer::reset()),
        Conduct::Redirecting => (307, None, Answer::redirect("http://127.0.0.1:1/elsewhere")),
        Conduct::Endless => (200, None, Answer::endless()),
    }
}

/// A number for a text.
fn fold(text: &str) -> u64 {
    text.bytes().fold(17, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into())) >> 3
}
