//! Hints over real servers: that they arrive, and that a server which is away costs latency and nothing else,
//! at the start as well.

use std::{sync::Arc, time::Duration};

use bus_core::{
    config::load_common,
    ids::{DeliveryId, Ids as _, SystemIds},
    nats::Nats,
    notify::{Compose, Current, Hint, MemoryNotifier, NatsNotifier, Notifier, Polling, PostgresNotifier},
};
use devkit::{
    servers::{Durability, NatsServer, PostgresServer, Tools, connect_nats, shared_servers},
    wait_until,
};
use futures::StreamExt as _;
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);

async fn over_nats(url: &str, prefix: &str) -> Arc<dyn Notifier> {
    let environment =
        [("DATABASE_URL", "postgres://not.used/"), ("NATS_URL", url), ("EVENT_BUS_PREFIX", prefix)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let common = load_common(None, environment).unwrap();
    Arc::new(NatsNotifier::new(Nats::connect(&common, "test").await.unwrap()))
}

/// A pool that connects when it is used.
fn pool(url: &str) -> PgPool {
    PgPoolOptions::new().max_connections(3).acquire_timeout(Duration::from_secs(1)).connect_lazy(url).unwrap()
}

fn over_postgres(url: &str, prefix: &str) -> Arc<dyn Notifier> {
    Arc::new(PostgresNotifier::new(pool(url), prefix, CancellationToken::new()))
}

/// What one listener hears.
struct Heard(mpsc::UnboundedReceiver<Hint>);

impl Heard {
    fn by(notifier: &Arc<dyn Notifier>) -> Self {
        let mut hints = notifier.listen();
        let (sender, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(hint) = hints.next().await {
                if sender.send(hint).is_err() {
                    break;
                }
            }
        });
        Self(heard)
    }

    /// Waits for it, and gives what came before.
    async fn until(&mut self, wanted: Hint) -> Vec<Hint> {
        let (mut before, deadline) = (Vec::new(), Instant::now() + DEADLINE);
        while let Ok(Some(hint)) = timeout_at(deadline, self.0.recv()).await {
            if hint == wanted {
                return before;
            }
            before.push(hint);
        }
        panic!("{wanted} did not come, but {before:?}")
    }

    fn so_far(&mut self) -> Vec<Hint> {
        std::iter::from_fn(|| self.0.try_recv().ok()).collect()
    }
}

/// A hint that nobody has sent before.
fn fresh() -> Hint {
    Hint::Closed(DeliveryId(SystemIds.next()))
}

/// Sends hints until one is heard, and gives all that was heard meanwhile.
async fn flows(what: &str, sender: &Arc<dyn Notifier>, listener: &mut Heard) -> Vec<Hint> {
    let (mut sent, mut heard) = (Vec::new(), Vec::new());
    wait_until(what, DEADLINE, || {
        let hint = fresh();
        sent.push(hint);
        heard.extend(listener.so_far());
        let arrived = heard.iter().any(|hint| sent.contains(hint));
        async move {
            sender.notify(hint).await;
            if arrived { Ok(()) } else { Err("none arrived") }
        }
    })
    .await;
    heard
}

async fn hints_reach_every_listener(one: Arc<dyn Notifier>, other: Arc<dyn Notifier>) {
    let (mut own, mut others) = (Heard::by(&one), Heard::by(&other));
    flows("the first hints", &one, &mut own).await;
    flows("the first hints of the other", &one, &mut others).await;
    let all = [
        Hint::ConnectionChanged(SystemIds.next().into()),
        Hint::Closed(DeliveryId(SystemIds.next())),
        Hint::Due,
        Hint::Enqueued,
    ];
    for hint in all {
        one.notify(hint).await;
        own.until(hint).await;
        others.until(hint).await;
    }
}

#[tokio::test]
async fn nats_carries_hints() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let one = over_nats(servers.nats_url(), &prefix).await;
    hints_reach_every_listener(one, over_nats(servers.nats_url(), &prefix).await).await;
}

#[tokio::test]
async fn postgres_carries_hints() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let one = over_postgres(servers.postgres_url(), &prefix);
    hints_reach_every_listener(one, over_postgres(servers.postgres_url(), &prefix)).await;
}

#[tokio::test]
async fn with_nats_what_is_sent_after_the_first_missed_arrives() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let sender = over_nats(servers.nats_url(), &prefix).await;
    flows("the sender's connection", &sender, &mut Heard::by(&sender)).await;
    for _ in 0..20 {
        let listener = over_nats(servers.nats_url(), &prefix).await;
        let mut heard = Heard::by(&listener);
        assert!(heard.until(Hint::Missed).await.is_empty(), "it is the first");
        let hint = fresh();
        sender.notify(hint).await;
        heard.until(hint).await;
    }
}

#[tokio::test]
async fn another_deployment_hears_nothing_and_what_is_not_understood_is_ignored() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let nats = over_nats(servers.nats_url(), &prefix).await;
    let postgres = over_postgres(servers.postgres_url(), &prefix);
    let both: Arc<dyn Notifier> = Arc::new(Compose::new(nats, vec![postgres]));
    let mut heard = Heard::by(&both);
    let strangers = devkit::random_token(6);
    let stranger = over_nats(servers.nats_url(), &strangers).await;
    let other_stranger = over_postgres(servers.postgres_url(), &strangers);
    let mut strange = Heard::by(&stranger);
    flows("the stranger's hints", &stranger, &mut strange).await;
    let mut strange = Heard::by(&other_stranger);
    flows("the other stranger's hints", &other_stranger, &mut strange).await;
    let client = connect_nats(servers.nats_url()).await.unwrap();
    let pool = PgPool::connect(servers.postgres_url()).await.unwrap();
    for garbage in ["", "paused", "connection x", "\u{0}"] {
        client.publish(format!("{prefix}.wake.hints"), garbage.into()).await.unwrap();
    }
    client.publish(format!("{prefix}.wake.hints"), vec![0xff, 0xfe].into()).await.unwrap();
    client.flush().await.unwrap();
    for garbage in ["", "paused", "connection x"] {
        let notify = sqlx::query("SELECT pg_notify($1, $2)").bind(format!("{prefix}_hints")).bind(garbage);
        notify.execute(&pool).await.unwrap();
    }
    let own = fresh();
    both.notify(own).await;
    let before = heard.until(own).await;
    assert!(before.iter().all(|hint| *hint == Hint::Missed), "{before:?}");
}

#[tokio::test]
async fn a_nats_that_is_away_at_the_start_or_later_costs_latency_only() {
    let tools = Tools::locate().unwrap();
    let mut server = NatsServer::private(&tools).await.unwrap();
    let prefix = devkit::random_token(6);
    server.kill().await.unwrap();
    let one = over_nats(&server.url(), &prefix).await;
    let other = over_nats(&server.url(), &prefix).await;
    let mut heard = Heard::by(&other);
    // Nobody waits for it. Who comes back later than this hint is told that it may have missed some.
    one.notify(fresh()).await;
    server.restart().await.unwrap();
    assert!(heard.until(Hint::Missed).await.is_empty(), "it is the first");
    flows("hints after the start", &one, &mut heard).await;
    for _ in 0..2 {
        server.kill().await.unwrap();
        one.notify(fresh()).await;
        server.restart().await.unwrap();
        heard.until(Hint::Missed).await;
        flows("hints after the restart", &one, &mut heard).await;
    }
}

#[tokio::test]
async fn a_postgres_that_is_away_at_the_start_or_later_costs_latency_only() {
    let tools = Tools::locate().unwrap();
    let mut server = PostgresServer::private(&tools, Durability::Fast).await.unwrap();
    let prefix = devkit::random_token(6);
    server.kill().await.unwrap();
    let one = over_postgres(&server.url("postgres"), &prefix);
    let other = over_postgres(&server.url("postgres"), &prefix);
    let mut heard = Heard::by(&other);
    assert!(heard.until(Hint::Missed).await.is_empty(), "it is the first");
    one.notify(fresh()).await;
    server.restart().await.unwrap();
    heard.until(Hint::Missed).await;
    flows("hints after the start", &one, &mut heard).await;
    for _ in 0..2 {
        server.kill().await.unwrap();
        one.notify(fresh()).await;
        server.restart().await.unwrap();
        heard.until(Hint::Missed).await;
        flows("hints after the restart", &one, &mut heard).await;
    }
}

#[tokio::test]
async fn of_two_transports_one_may_be_away() {
    let tools = Tools::locate().unwrap();
    let servers = shared_servers().await.unwrap();
    let mut nats = NatsServer::private(&tools).await.unwrap();
    nats.kill().await.unwrap();
    let prefix = devkit::random_token(6);
    let both: Arc<dyn Notifier> = Arc::new(Compose::new(
        over_nats(&nats.url(), &prefix).await,
        vec![over_postgres(servers.postgres_url(), &prefix)],
    ));
    let mut heard = Heard::by(&both);
    flows("hints without NATS", &both, &mut heard).await;
    nats.restart().await.unwrap();
    let mut by_nats = Heard::by(&over_nats(&nats.url(), &prefix).await);
    flows("hints by NATS", &both, &mut by_nats).await;
}

/// The probe that comes back proves that everything before it came.
async fn whoever_catches_up_has_heard_it(sender: Arc<dyn Notifier>, listener: Arc<dyn Notifier>) {
    const ROUNDS: usize = 1_000;
    flows("the first hints", &sender, &mut Heard::by(&listener)).await;
    let mut hints = listener.listen();
    assert_eq!(hints.next().await, Some(Hint::Missed), "it listens from now on");
    for round in 0..ROUNDS {
        let news = [Hint::Cancelled(DeliveryId(SystemIds.next())), fresh()];
        sender.announce(&news).await.unwrap();
        let current = Current::new(Arc::clone(&listener), Arc::new(SystemIds));
        let mut heard = Vec::new();
        let following = async {
            loop {
                let hint = hints.next().await.unwrap();
                heard.push(hint);
                if let Hint::Probe(probe) = hint
                    && current.awaits(probe)
                {
                    return current.heard(probe, true);
                }
            }
        };
        // Whether it was quick enough to be of use is a matter of the machine.
        let _ = timeout_at(Instant::now() + DEADLINE, async { tokio::join!(current.catch_up(), following) })
            .await
            .unwrap();
        assert!(news.iter().all(|hint| heard.contains(hint)), "round {round}: {heard:?}");
    }
}

#[tokio::test]
async fn with_nats_whoever_catches_up_has_heard_what_was_announced() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let sender = over_nats(servers.nats_url(), &prefix).await;
    whoever_catches_up_has_heard_it(sender, over_nats(servers.nats_url(), &prefix).await).await;
}

#[tokio::test]
async fn with_postgres_whoever_catches_up_has_heard_what_was_announced() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let sender = over_postgres(servers.postgres_url(), &prefix);
    whoever_catches_up_has_heard_it(sender, over_postgres(servers.postgres_url(), &prefix)).await;
}

#[tokio::test]
async fn with_both_whoever_catches_up_has_heard_what_was_announced() {
    let servers = shared_servers().await.unwrap();
    let prefix = devkit::random_token(6);
    let both = async || {
        let nats = over_nats(servers.nats_url(), &prefix).await;
        let both = Compose::new(over_postgres(servers.postgres_url(), &prefix), vec![nats]);
        Arc::new(both) as Arc<dyn Notifier>
    };
    whoever_catches_up_has_heard_it(both().await, both().await).await;
}

#[tokio::test]
async fn in_memory_whoever_catches_up_has_heard_what_was_announced() {
    let notifier = MemoryNotifier::default();
    whoever_catches_up_has_heard_it(Arc::new(notifier.clone()), Arc::new(notifier)).await;
}

/// Whoever was cut off hears that, or what was announced meanwhile, before the first probe that comes back.
#[tokio::test]
async fn no_probe_hides_what_was_lost_with_a_connection() {
    let tools = Tools::locate().unwrap();
    let mut server = NatsServer::private(&tools).await.unwrap();
    let prefix = devkit::random_token(6);
    let sender = over_nats(&server.url(), &prefix).await;
    let listener = over_nats(&server.url(), &prefix).await;
    let mut heard = Heard::by(&listener);
    flows("the first hints", &sender, &mut heard).await;
    for _ in 0..5 {
        server.kill().await.unwrap();
        wait_until("an announcement that fails", DEADLINE, || async {
            sender.announce(&[fresh()]).await.err().ok_or("it was made")
        })
        .await;
        heard.so_far();
        server.restart().await.unwrap();
        let news = fresh();
        wait_until("the news", DEADLINE, || sender.announce(std::slice::from_ref(&news))).await;
        let (mut probes, mut all) = (Vec::new(), Vec::new());
        let back = wait_until("a probe", DEADLINE, || {
            all.extend(heard.so_far());
            let back = all.iter().position(|hint| probes.contains(hint));
            let probe = Hint::Probe(SystemIds.next());
            probes.push(probe);
            let listener = &listener;
            async move {
                match back {
                    Some(back) => Ok(back),
                    None => Err(listener.announce(&[probe]).await),
                }
            }
        })
        .await;
        let before = &all[..back];
        assert!(before.contains(&Hint::Missed) || before.contains(&news), "{before:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_announced_is_an_error() {
    let tools = Tools::locate().unwrap();
    let mut postgres = PostgresServer::private(&tools, Durability::Fast).await.unwrap();
    let by_postgres = over_postgres(&postgres.url("postgres"), "away");
    by_postgres.announce(&[fresh()]).await.unwrap();
    postgres.kill().await.unwrap();
    by_postgres.announce(&[fresh()]).await.unwrap_err();
    // Without hints everyone asks the database instead, where the news is; there is nothing to catch up with.
    let polling = Polling::new(DEADLINE);
    polling.announce(&[fresh()]).await.unwrap();
    polling.announce(&[Hint::Probe(SystemIds.next())]).await.unwrap_err();
}
