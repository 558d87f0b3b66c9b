//! Of the database only its silence matters here: the tests of the API have a real one.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::pin::pin;

use bus_core::pg::QuotaPeriod;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use super::*;

const ORGANIZATION: OrganizationId = OrganizationId(uuid::Uuid::nil());

/// Limits over a database that lets everybody in and answers no statement.
struct Silent {
    limits: Limits,
    /// Statements that have arrived.
    statements: mpsc::UnboundedReceiver<()>,
}

impl Silent {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (arrived, statements) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(swallow(connection, arrived.clone()));
            }
        });
        let options = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(port)
            .username("bus")
            .ssl_mode(sqlx::postgres::PgSslMode::Disable);
        let pool = PgPoolOptions::new().connect_lazy_with(options);
        let defaults = Defaults {
            rate: PublishRate { per_second: 0.0, burst: 0 },
            quota: PublishQuota { events: 0, period: QuotaPeriod::Day },
        };
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        Self { limits: Limits::new(pool, defaults, Peers::alone(), tasks, stop), statements }
    }

    /// What is to be told, and whether it is being told.
    fn untold(&self) -> u64 {
        self.limits.accounts()[&ORGANIZATION].uncounted
    }
}

async fn swallow(mut connection: TcpStream, arrived: mpsc::UnboundedSender<()>) {
    let mut startup = vec![0; 4_096];
    let _ = connection.read(&mut startup).await.unwrap();
    // AuthenticationOk, and ReadyForQuery.
    connection.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await.unwrap();
    // A statement comes in one piece, and nothing follows it as long as it is not answered.
    while let Ok(1..) = connection.read(&mut startup).await {
        let _ = arrived.send(());
    }
}

#[tokio::test]
async fn i7_a_flush_that_is_not_answered_ends_and_loses_nothing() {
    let mut silent = Silent::start().await;
    silent.limits.count(ORGANIZATION, 3);
    let limits = silent.limits.clone();
    let flush = tokio::spawn(async move { limits.flush(|| ()).await });
    silent.statements.recv().await.unwrap();
    assert_eq!(silent.untold(), 0);
    silent.limits.count(ORGANIZATION, 1);
    // From here on nothing happens but that time passes.
    tokio::time::pause();
    let begun = Instant::now();
    flush.await.unwrap();
    assert!(begun.elapsed() < EVERY * 60, "the loop would be taken for dead: {:?}", begun.elapsed());
    assert_eq!(silent.untold(), 4);
}

#[tokio::test]
async fn i7_a_stop_does_not_wait_long_for_a_flush() {
    let mut silent = Silent::start().await;
    silent.limits.count(ORGANIZATION, 3);
    let limits = silent.limits.clone();
    let mut flush = pin!(limits.flush(|| ()));
    tokio::select! {
        () = &mut flush => panic!("nobody answered it"),
        arrived = silent.statements.recv() => arrived.unwrap(),
    }
    tokio::time::pause();
    limits.stop.cancel();
    let begun = Instant::now();
    flush.await;
    assert!(begun.elapsed() <= LAST + Duration::from_millis(2), "{:?}", begun.elapsed());
    assert_eq!(silent.untold(), 3);
}

#[tokio::test]
async fn i7_one_request_asks_and_none_soon_after_a_failure() {
    let mut silent = Silent::start().await;
    let limits = silent.limits.clone();
    let first = tokio::spawn(async move { limits.judge(ORGANIZATION, 1).await });
    silent.statements.recv().await.unwrap();
    tokio::time::pause();
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(silent.limits.judge(ORGANIZATION, 1).await.refused, None);
    }
    assert_eq!(begun.elapsed(), Duration::ZERO, "they go by what is known");
    first.await.unwrap();
    assert!(begun.elapsed() <= ASK + Duration::from_millis(2), "{:?}", begun.elapsed());
    // The statement goes on alone, until it is given up.
    silent.limits.tasks.close();
    silent.limits.tasks.wait().await;
    let given_up = Instant::now();
    silent.limits.judge(ORGANIZATION, 1).await;
    assert_eq!(given_up.elapsed(), Duration::ZERO);
    assert!(silent.statements.try_recv().is_err(), "one statement in all");
}

#[tokio::test]
async fn i7_few_connections_are_for_asking() {
    let mut silent = Silent::start().await;
    let judge = |n| {
        let limits = silent.limits.clone();
        tokio::spawn(async move { limits.judge(OrganizationId(uuid::Uuid::from_u128(n)), 1).await })
    };
    let asking: Vec<_> = (0..ASKING as u128).map(judge).collect();
    for _ in 0..ASKING {
        silent.statements.recv().await.unwrap();
    }
    tokio::time::pause();
    let begun = Instant::now();
    silent.limits.judge(OrganizationId(uuid::Uuid::from_u128(99)), 1).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    for request in asking {
        assert_eq!(request.await.unwrap().refused, None);
    }
}

#[tokio::test(start_paused = true)]
async fn i10_those_that_asked_least_lately_make_room() {
    let (now, mut accounts) = (Instant::now(), HashMap::new());
    for n in 0..CAPACITY {
        let id = OrganizationId(uuid::Uuid::from_u128(n as u128));
        let asked_at = Some(now - Duration::from_micros(n as u64));
        let account = accounts.entry(id).or_insert_with(Account::default);
        (account.asked_at, account.uncounted) = (asked_at, u64::from(n + 1 == CAPACITY));
    }
    make_room(&mut accounts, now);
    assert_eq!(accounts.len(), CAPACITY * 3 / 4 + 1, "and one that has something to say stays");
    assert!(accounts.contains_key(&OrganizationId(uuid::Uuid::nil())));
}
