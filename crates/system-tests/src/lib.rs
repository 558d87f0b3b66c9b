//! What the system tests share: a tenant, and a ledger of what was accepted and what arrived.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use devkit::{client::ApiClient, receiver::Receiver, stack::Stack, wait_until};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Within this time everything that was accepted has arrived, whatever died meanwhile: longer than a lost
/// message takes to be given out again and a dead publisher's outbox row to be taken over.
pub const ARRIVAL: Duration = Duration::from_secs(120);

/// Within this time more events are accepted, whatever died meanwhile.
const MORE: Duration = Duration::from_secs(60);

/// `sink.max_timeout_ms` and the shortest `nats.ack_wait_ms` that goes with it, so that what a dead worker
/// held comes again soon.
pub const QUICK_TIMEOUT_MS: u64 = 2_000;
/// See [`QUICK_TIMEOUT_MS`].
pub const QUICK_ACK_WAIT_MS: u64 = 7_500;

/// An organization with a key of all scopes.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Its id.
    pub organization: String,
    /// A client with its key, at the stack's first publisher.
    pub api: ApiClient,
}

impl Tenant {
    /// Creates an organization.
    pub async fn create(stack: &mut Stack, name: &str) -> Result<Self> {
        let admin = stack.admin(0)?;
        let organization = admin.create_organization(name).await?.require(201)?.id().to_owned();
        let scopes = json!({ "name": "all", "scopes": ["publish", "subscribe", "read", "admin"] });
        let key = admin.create_key(&organization, &scopes).await?.require(201)?;
        Ok(Self { organization, api: stack.client(0)?.with_token(key.text("/key")) })
    }

    /// A webhook connection; gives its id and its signing secret.
    pub async fn webhook(&self, name: &str, url: &str) -> Result<(String, String)> {
        let created = self.api.create_webhook(name, url).await?.require(201)?;
        Ok((created.id().to_owned(), created.text("/secret").to_owned()))
    }

    /// A subscription of `connection` to `event_type`; gives its id.
    pub async fn subscribe(&self, connection: &str, event_type: &str) -> Result<String> {
        let wanted = json!({ "connectionId": connection, "eventType": event_type });
        Ok(self.api.subscribe(&wanted).await?.require(201)?.id().to_owned())
    }

    /// A webhook connection that takes `event_type`.
    pub async fn receive(&self, receiver: &Receiver, path: &str, event_type: &str) -> Result<String> {
        let (connection, _) = self.webhook(&format!("to {path}"), &receiver.url(path)).await?;
        self.subscribe(&connection, event_type).await?;
        Ok(connection)
    }

    /// Publishes `{n}` as `event_type`; gives the event's id if the answer was 202.
    pub async fn publish_number(&self, event_type: &str, n: usize) -> Option<String> {
        let event = json!({ "type": event_type, "data": { "n": n } });
        let reply = self.api.publish(&event).await.ok()?;
        (reply.status == 202).then(|| reply.id().to_owned())
    }

    /// Waits until the event's aggregate status is this one.
    ///
    /// # Panics
    /// After [`ARRIVAL`], with the last answer.
    pub async fn event_is(&self, id: &str, status: &str) {
        let path = format!("/v1/events/{id}");
        wait_until(&format!("the event to be {status}"), ARRIVAL, || async {
            let event = self.api.get(&path).await.map_err(|error| format!("{error:#}"))?;
            if event.body["status"] == status { Ok(()) } else { Err(event.body.to_string()) }
        })
        .await;
    }
}

/// Publishes from several tasks until told to stop; an event counts if it was answered 202.
#[derive(Debug)]
pub struct Load {
    accepted: Arc<Mutex<BTreeSet<String>>>,
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Starts four tasks that take turns with these tenants.
    pub fn start(tenants: &[Tenant]) -> Self {
        let (accepted, stop) = (Arc::<Mutex<BTreeSet<String>>>::default(), Arc::<AtomicBool>::default());
        let mut tasks = JoinSet::new();
        for tenant in tenants.iter().cycle().take(4) {
            let (tenant, accepted, stop) = (tenant.clone(), accepted.clone(), stop.clone());
            tasks.spawn(async move {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    match tenant.publish_number("load.test", n).await {
                        Some(id) => {
                            accepted.lock().expect("no task panics while it holds the list").insert(id);
                        }
                        // Refused, or nobody there: another try at once would only burn the processor.
                        None => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            });
        }
        Self { accepted, stop, tasks }
    }

    /// How many events were accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.lock().expect("no task panics while it holds the list").len()
    }

    /// Waits until this many more than now have been accepted.
    ///
    /// # Panics
    /// After a minute.
    pub async fn more(&self, n: usize) {
        let goal = self.accepted() + n;
        wait_until("more accepted events", MORE, || async {
            let accepted = self.accepted();
            if accepted >= goal { Ok(()) } else { Err(format!("{accepted} of {goal}")) }
        })
        .await;
    }

    /// Stops, and gives the ids of all that were accepted.
    pub async fn finish(mut self) -> BTreeSet<String> {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        std::mem::take(&mut *self.accepted.lock().expect("no task panics while it holds the list"))
    }
}

/// How often each event has arrived at a path, kept while requests come.
///
/// Each look reads only what came since the one before: a test and its receiver share a thread, and who reads
/// thousands of requests again at each look keeps the receiver from answering until they time out.
#[derive(Debug)]
struct Arrivals<'a> {
    receiver: &'a Receiver,
    path: &'a str,
    seen: usize,
    times: BTreeMap<String, usize>,
}

impl<'a> Arrivals<'a> {
    fn new(receiver: &'a Receiver, path: &'a str) -> Self {
        Self { receiver, path, seen: 0, times: BTreeMap::new() }
    }

    fn look(&mut self) -> &BTreeMap<String, usize> {
        for request in self.receiver.received_after(self.path, self.seen) {
            let body: Value = request.json();
            let id = body["id"].as_str().unwrap_or_default().to_owned();
            *self.times.entry(id).or_insert(0) += 1;
            self.seen += 1;
        }
        &self.times
    }
}

/// How often each event arrived at a path.
pub fn arrivals(receiver: &Receiver, path: &str) -> BTreeMap<String, usize> {
    let mut arrivals = Arrivals::new(receiver, path);
    arrivals.look();
    arrivals.times
}

/// Waits until every accepted event has arrived at every path, and gives the number of repeated arrivals.
///
/// # Panics
/// After [`ARRIVAL`], with the number that is missing at each path.
pub async fn all_arrived(receiver: &Receiver, paths: &[&str], accepted: &BTreeSet<String>) -> usize {
    let mut arrivals: Vec<Arrivals<'_>> = paths.iter().map(|path| Arrivals::new(receiver, path)).collect();
    wait_until("every accepted event at every subscriber", ARRIVAL, || {
        let missing: BTreeMap<&str, usize> = arrivals
            .iter_mut()
            .map(|path| {
                let arrived = path.look();
                let missing = accepted.iter().filter(|id| !arrived.contains_key(*id)).count();
                (path.path, missing)
            })
            .filter(|(_, missing)| *missing > 0)
            .collect();
        std::future::ready(if missing.is_empty() { Ok(()) } else { Err(missing) })
    })
    .await;
    arrivals.iter().flat_map(|path| path.times.values()).map(|n| n - 1).sum()
}
