//! The stack of the demo: the shops, their keys, their receivers, and how their events are published.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use devkit::{
    client::{ApiClient, Reply},
    poll,
    processes::Role,
    receiver::{Answer, Received, Receiver},
    servers::Durability,
    stack::{Backend, ServerChoice, Stack, StackOptions},
};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    DemoOptions,
    events::{Event, Publisher, draw},
    ledger::Published,
    progress::Progress,
    scenario::{SHOPS, Shop, Subscription},
};
use crate::ui::{BAD, STRONG, Step, elapsed, line, paint};

/// How many of each binary, unless one process is all of them.
const REPLICAS: usize = 2;
const ROLES: &str = "2 publishers, 2 delivery workers, scheduler, archiver";
/// No exchange may take longer here; that lets the broker give an unacknowledged delivery to another
/// worker soon, so that nobody has to wait long until the crash is mended.
const MAX_TIMEOUT_MS: u64 = 1_000;
const ACK_WAIT: Duration = Duration::from_millis(6_500);
/// Between two requests, so that one can watch.
const PACE: Duration = Duration::from_millis(10);
/// Requests under way at a time.
const REQUESTS: usize = 32;
/// Events in one batch.
const BATCH: usize = 5;
/// How long a receiver takes for an answer; and while the crash is near, so that it surely falls into
/// deliveries.
const THINKING: Duration = Duration::from_millis(10);
const THINKING_HARD: Duration = Duration::from_millis(700);
/// This many requests before the middle, the receivers begin to think hard.
const BEFORE_CRASH: usize = 10;
/// So many deliveries are to be under way when the crash comes.
const UNDER_WAY: usize = 6;

/// One request to the bus.
struct Letter {
    shop: usize,
    publisher: Publisher,
    mode: Mode,
    events: Vec<Event>,
}

/// How its events are written.
#[derive(Debug, Clone, Copy)]
enum Mode {
    Structured,
    Binary,
    Plain,
    Batch,
}

/// All requests in order.
pub(super) struct Plan(Vec<Letter>);

impl Plan {
    /// The warehouse sends batches, the storefront one event at a time, in each way there is.
    pub(super) fn draw(per_shop: [usize; 2], seed: u64) -> Self {
        let mut letters: Vec<(usize, Letter)> = Vec::new();
        for (shop, n) in per_shop.into_iter().enumerate() {
            let mut batch = Vec::new();
            // Each shop has a story of its own, and yet the same ids.
            for (number, event) in draw(n, seed.wrapping_add(shop as u64)).into_iter().enumerate() {
                let mode = [Mode::Structured, Mode::Binary, Mode::Plain][number % 3];
                if event.publisher == Publisher::Storefront {
                    letters.push((
                        number,
                        Letter { shop, publisher: event.publisher, mode, events: vec![event] },
                    ));
                    continue;
                }
                batch.push(event);
                if batch.len() == BATCH {
                    letters.push((number, Letter::batch(shop, &mut batch)));
                }
            }
            if !batch.is_empty() {
                letters.push((n, Letter::batch(shop, &mut batch)));
            }
        }
        // Both shops at the same time.
        letters.sort_by_key(|(number, _)| *number);
        Self(letters.into_iter().map(|(_, letter)| letter).collect())
    }

    /// The events with their shop.
    pub(super) fn events(&self) -> impl Iterator<Item = (usize, &Event)> {
        self.0.iter().flat_map(|letter| letter.events.iter().map(|event| (letter.shop, event)))
    }
}

impl Letter {
    fn batch(shop: usize, events: &mut Vec<Event>) -> Self {
        Self { shop, publisher: Publisher::Warehouse, mode: Mode::Batch, events: std::mem::take(events) }
    }
}

/// A shop that is open.
struct Opened {
    receiver: Receiver,
    /// A client for each publisher, with its key.
    clients: HashMap<&'static str, ApiClient>,
    /// The signing secret of each subscription's connection.
    secrets: HashMap<&'static str, String>,
}

/// Everything that the demo plays on.
pub(super) struct Stage {
    pub(super) stack: Stack,
    shops: Vec<Opened>,
    publishers: Vec<String>,
    backend: Backend,
    crashed: Option<Instant>,
}

impl Stage {
    /// Starts a private stack and opens the shops.
    pub(super) async fn set(options: &DemoOptions) -> Result<Self> {
        let (servers, replicas, processes) = match options.backend {
            Backend::Jetstream => ("nats-server, Postgres", REPLICAS, ROLES),
            Backend::Postgres => ("Postgres", REPLICAS, ROLES),
            Backend::Memory => ("Postgres", 1, "one process with every role"),
        };
        let step = Step::begin(&format!("Starting {servers}, {processes}"));
        let mut stack_options = StackOptions::default()
            .backend(options.backend)
            .servers(ServerChoice::Own(Durability::Full))
            .replicas(Role::Publisher, replicas)
            .replicas(Role::DeliveryWorker, replicas)
            .role_env(Role::DeliveryWorker, "EVENT_BUS_SINK__MAX_TIMEOUT_MS", MAX_TIMEOUT_MS)
            .env("EVENT_BUS_NATS__ACK_WAIT_MS", ACK_WAIT.as_millis());
        stack_options.bin_dir.clone_from(&options.bin_dir);
        let mut stack = Stack::start(stack_options).await?;
        step.done();

        let step = Step::begin("Opening two shops that call everything by the same names");
        let admin = stack.admin(0)?;
        let mut shops = Vec::new();
        for shop in &SHOPS {
            shops.push(Opened::open(&admin, shop).await.with_context(|| format!("open {}", shop.name))?);
        }
        step.done();
        let publishers: Vec<_> = (0..replicas).map(|index| stack.publisher(index).http_url()).collect();
        let stage = Self { stack, shops, publishers, backend: options.backend, crashed: None };
        stage.think(THINKING);
        Ok(stage)
    }

    /// Publishes everything, and kills a worker half way. Gives what each shop published.
    pub(super) async fn publish(
        &mut self,
        plan: Plan,
        progress: &mut Progress,
    ) -> Result<Vec<Vec<Published>>> {
        let mut published: Vec<Vec<Published>> = SHOPS.iter().map(|_| Vec::new()).collect();
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let half = plan.0.len() / 2;
        let mut requests = JoinSet::new();
        for (number, letter) in plan.0.into_iter().enumerate() {
            pace.tick().await;
            if number + BEFORE_CRASH == half {
                self.think(THINKING_HARD);
            }
            if number == half {
                self.crash(progress).await?;
                self.think(THINKING);
            }
            // Each replica takes its turn.
            let base = &self.publishers[number % self.publishers.len()];
            let client = self.shops[letter.shop].clients[letter.publisher.name()].at(base);
            requests.spawn(post(client, letter));
            while requests.len() >= REQUESTS {
                note(requests.join_next().await, &mut published, progress)?;
            }
            while let Some(finished) = requests.try_join_next() {
                note(Some(finished), &mut published, progress)?;
            }
            progress.delivered(self.arrived());
        }
        while let Some(finished) = requests.join_next().await {
            note(Some(finished), &mut published, progress)?;
            progress.delivered(self.arrived());
        }
        Ok(published)
    }

    /// Kills the worker that has done most, while deliveries are under way.
    async fn crash(&mut self, progress: &mut Progress) -> Result<()> {
        let keeper = match self.backend {
            Backend::Jetstream => "The broker",
            Backend::Postgres => "The database",
            Backend::Memory => {
                progress.tell("There is no crash: what is in the memory of the only process dies with it.");
                return Ok(());
            }
        };
        // If there are not that many, nothing holds them; the crash comes all the same.
        let under_way = || self.shops.iter().map(|shop| shop.receiver.in_flight()).sum::<usize>();
        let _ = poll("deliveries under way", THINKING_HARD, || async {
            let n = under_way();
            if n >= UNDER_WAY { Ok(()) } else { Err(n) }
        })
        .await;
        let mut victim = (0, 0.0);
        for index in 0..REPLICAS {
            let attempts = self.stack.worker(index).metric("bus_attempts_total").await?;
            if attempts > victim.1 {
                victim = (index, attempts);
            }
        }
        let under_way = under_way();
        let worker = self.stack.worker(victim.0);
        let name = worker.name().to_owned();
        worker.sigkill().await?;
        self.crashed = Some(Instant::now());

        progress.tell(&format!(
            "{} {} is killed while {under_way} deliveries are under way. {keeper} hands what it held",
            paint(BAD, "✗"),
            paint(STRONG, name),
        ));
        progress.tell(&format!(
            "  to the other worker when {} have gone without an acknowledgement.",
            elapsed(ACK_WAIT)
        ));
        Ok(())
    }

    fn think(&self, time: Duration) {
        for (opened, shop) in self.shops.iter().zip(&SHOPS) {
            for subscription in &shop.subscriptions {
                opened.receiver.script(&path(subscription), Answer::ok().after(time));
            }
        }
    }

    /// Waits until the queue holds nothing more, and so nothing more can come.
    pub(super) async fn drain(&self, patience: Duration, progress: &mut Progress) -> Result<()> {
        let until = Instant::now() + patience;
        loop {
            let waiting = self.stack.undelivered().await?;
            let left =
                self.crashed.map_or(Duration::ZERO, |crashed| ACK_WAIT.saturating_sub(crashed.elapsed()));
            progress
                .wait_for(format!("{waiting} without an acknowledgement, handed over in {}", elapsed(left)));
            progress.delivered(self.arrived());
            if waiting == 0 {
                return Ok(());
            }
            if Instant::now() >= until {
                // What is missing is counted, and makes the demo fail.
                line(format!("\n  {} deliveries still wait after {} s", waiting, patience.as_secs()));
                return Ok(());
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn arrived(&self) -> usize {
        self.shops.iter().map(|shop| shop.receiver.total()).sum()
    }

    /// What came for a subscription, and the secret that it is signed with.
    pub(super) fn inbox(&self, shop: usize, subscription: &Subscription) -> (&str, Vec<Received>) {
        let shop = &self.shops[shop];
        (&shop.secrets[subscription.name], shop.receiver.received(&path(subscription)))
    }
}

fn path(subscription: &Subscription) -> String {
    format!("/hooks/{}", subscription.name)
}

type Accepted = Result<(usize, Vec<Published>)>;

/// Publishes one letter.
async fn post(client: ApiClient, letter: Letter) -> Accepted {
    let slug = SHOPS[letter.shop].slug;
    let cloud_events: Vec<Value> = letter.events.iter().map(|event| event.to_json(slug)).collect();
    let at = Instant::now();
    let reply = match letter.mode {
        Mode::Batch => client.publish_batch(&cloud_events).await?,
        Mode::Structured => client.publish_structured(&cloud_events[0]).await?,
        Mode::Binary => client.publish_binary(&cloud_events[0]).await?,
        Mode::Plain => {
            let mut plain = cloud_events[0].clone();
            if let Some(members) = plain.as_object_mut() {
                members.retain(|name, _| !["specversion", "datacontenttype"].contains(&name.as_str()));
            }
            client.publish(&plain).await?
        }
    };
    reply.require(202)?;
    Ok((letter.shop, letter.events.into_iter().map(|event| Published { event, at }).collect()))
}

fn note(
    finished: Option<Result<Accepted, tokio::task::JoinError>>,
    published: &mut [Vec<Published>],
    progress: &mut Progress,
) -> Result<()> {
    if let Some(finished) = finished {
        let (shop, accepted) = finished.context("publish")??;
        progress.published(accepted.len());
        published[shop].extend(accepted);
    }
    Ok(())
}

impl Opened {
    async fn open(admin: &ApiClient, shop: &Shop) -> Result<Self> {
        let organization = admin.create_organization(shop.name).await?.require(201)?;
        let organization = organization.string("/id")?;
        let key = |scopes: Value, connection: Option<&str>| {
            let mut key = json!({ "name": "demo", "scopes": scopes });
            if let Some(connection) = connection {
                key["connectionId"] = connection.into();
            }
            async move {
                let created: Reply = admin.create_key(organization, &key).await?.require(201)?;
                anyhow::Ok(created.string("/key")?.to_owned())
            }
        };
        let owner = admin.with_token(key(json!(["subscribe", "read", "admin"]), None).await?);

        let mut clients = HashMap::new();
        let mut identities = HashMap::new();
        for publisher in Publisher::ALL {
            let connection = json!({ "name": publisher.name(), "kind": "publisher" });
            let connection = owner.post("/v1/connections", &connection).await?.require(201)?;
            let token = key(json!(["publish"]), Some(connection.string("/id")?)).await?;
            clients.insert(publisher.name(), admin.with_token(token));
            identities.insert(publisher.name(), connection.string("/id")?.to_owned());
        }

        let receiver = Receiver::start().await?;
        let mut secrets = HashMap::new();
        for subscription in &shop.subscriptions {
            let path = path(subscription);
            let connection =
                owner.create_webhook(subscription.name, &receiver.url(&path)).await?.require(201)?;
            secrets.insert(subscription.name, connection.string("/secret")?.to_owned());
            let mut wish =
                json!({ "connectionId": connection.string("/id")?, "eventType": subscription.event_type });
            if let Some(publisher) = subscription.publisher {
                wish["publisher"] = identities[publisher.name()].as_str().into();
            }
            if let Some(filter) = subscription.filter {
                wish["filter"] = filter.into();
            }
            owner.subscribe(&wish).await?.require(201)?;
        }
        Ok(Self { receiver, clients, secrets })
    }
}
