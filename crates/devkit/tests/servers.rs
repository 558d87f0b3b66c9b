//! The servers start, keep their data over a crash on the same port, and never outlive their owner.

#![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use async_nats::jetstream;
use devkit::{
    process::{ProcessId, User, children_of},
    servers::{Durability, NatsCluster, NatsServer, PostgresServer, Tools, connect_nats},
    wait_until,
};
use sqlx::{Connection, PgConnection};

const DEADLINE: Duration = Duration::from_secs(30);

async fn gone(what: &str, process: &ProcessId) {
    wait_until(&format!("{what} to be gone"), DEADLINE, || async {
        if process.is_running() { Err("running") } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn nats_keeps_its_messages_and_its_port_when_it_is_killed() {
    let tools = Tools::locate().unwrap();
    let mut server = NatsServer::private(&tools).await.unwrap();
    let url = server.url();
    let context = jetstream::new(connect_nats(&url).await.unwrap());
    let stream = jetstream::stream::Config {
        name: "kept".to_owned(),
        subjects: vec!["kept.>".to_owned()],
        ..Default::default()
    };
    context.create_stream(stream).await.unwrap();
    context.publish("kept.one", "1".into()).await.unwrap().await.unwrap();

    let process = server.id().unwrap();
    server.kill().await.unwrap();
    assert!(!process.is_running());
    server.restart().await.unwrap();

    assert_eq!(server.url(), url);
    let context = jetstream::new(connect_nats(&url).await.unwrap());
    let mut stream = context.get_stream("kept").await.unwrap();
    assert_eq!(stream.info().await.unwrap().state.messages, 1);
    server.stop().await.unwrap();
    server.restart().await.unwrap();
}

#[tokio::test]
async fn a_cluster_keeps_its_messages_when_the_node_that_leads_is_killed() {
    let tools = Tools::locate().unwrap();
    let mut cluster = NatsCluster::private(&tools).await.unwrap();
    let context = jetstream::new(connect_nats(&cluster.url()).await.unwrap());
    let stream = jetstream::stream::Config {
        name: "kept".to_owned(),
        subjects: vec!["kept.>".to_owned()],
        num_replicas: 3,
        ..Default::default()
    };
    context.create_stream(stream).await.unwrap();
    context.publish("kept.one", "1".into()).await.unwrap().await.unwrap();

    let first = cluster.leader("kept").await.unwrap();
    cluster.node(first).kill().await.unwrap();
    wait_until("another leader", DEADLINE, async || match cluster.leader("kept").await {
        Ok(leader) if leader != first => Ok(()),
        other => Err(other.map_err(|error| format!("{error:#}"))),
    })
    .await;
    let context = jetstream::new(connect_nats(&cluster.url()).await.unwrap());
    let mut stream = context.get_stream("kept").await.unwrap();
    assert_eq!(stream.info().await.unwrap().state.messages, 1);
    cluster.restart(first).await.unwrap();
}

#[tokio::test]
async fn nats_lets_nobody_in_without_the_password() {
    let tools = Tools::locate().unwrap();
    let server = NatsServer::private(&tools).await.unwrap();
    let stranger = async_nats::connect(format!("nats://127.0.0.1:{}", server.port())).await;
    assert!(stranger.is_err());
}

#[tokio::test]
async fn postgres_keeps_its_rows_and_its_port_when_it_is_killed() {
    let tools = Tools::locate().unwrap();
    let mut server = PostgresServer::private(&tools, Durability::Full).await.unwrap();
    let url = server.superuser_url("postgres");
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::query("CREATE SCHEMA mine").execute(&mut connection).await.unwrap();
    sqlx::query("CREATE TABLE mine.kept AS SELECT 1 AS one").execute(&mut connection).await.unwrap();

    let process = server.id().unwrap();
    let children = children_of(process.pid).unwrap();
    assert!(children.len() > 3, "a Postgres has processes beside the first: {children:?}");
    server.kill().await.unwrap();
    for gone in children.iter().chain([&process]) {
        assert!(!gone.is_running());
    }
    assert!(sqlx::query("SELECT 1").execute(&mut connection).await.is_err());
    server.restart().await.unwrap();

    assert_eq!(server.superuser_url("postgres"), url);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let one: i32 = sqlx::query_scalar("SELECT one FROM mine.kept").fetch_one(&mut connection).await.unwrap();
    assert_eq!(one, 1);
    let durable: String = sqlx::query_scalar("SHOW fsync").fetch_one(&mut connection).await.unwrap();
    assert_eq!(durable, "on");
    server.stop().await.unwrap();
    server.restart().await.unwrap();
}

#[tokio::test]
async fn postgres_starts_although_another_process_has_the_number_of_the_crashed_one() {
    let tools = Tools::locate().unwrap();
    let mut server = PostgresServer::private(&tools, Durability::Fast).await.unwrap();
    server.kill().await.unwrap();
    let lock_file = server.data_dir().join("postmaster.pid");
    let text = std::fs::read_to_string(&lock_file).unwrap();
    let (_, rest) = text.split_once('\n').unwrap();
    // A process of the same user: Postgres could not tell it from itself.
    let mut other = Command::new("sleep");
    if devkit::paths::is_root() {
        let nobody = User::nobody().unwrap();
        other.uid(nobody.uid).gid(nobody.gid);
    }
    let mut other = other.arg("60").spawn().unwrap();
    std::fs::write(&lock_file, format!("{}\n{rest}", other.id())).unwrap();

    let restarted = server.restart().await;

    other.kill().unwrap();
    other.wait().unwrap();
    restarted.unwrap();
}

#[tokio::test]
async fn the_owner_of_the_databases_is_no_superuser_but_sees_the_statistics() {
    let tools = Tools::locate().unwrap();
    let server = PostgresServer::private(&tools, Durability::Fast).await.unwrap();
    let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
    sqlx::query("CREATE DATABASE fresh").execute(&mut connection).await.unwrap();

    let mut connection = PgConnection::connect(&server.url("fresh")).await.unwrap();
    let superuser: bool = sqlx::query_scalar("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(!superuser);
    let seen: i64 =
        sqlx::query_scalar("SELECT count(*) FROM pg_stat_statements WHERE query LIKE 'CREATE DATABASE%'")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert!(seen > 0);
    sqlx::query("SELECT pg_stat_statements_reset()").execute(&mut connection).await.unwrap();
}

#[tokio::test]
async fn two_pairs_of_servers_run_side_by_side() {
    let tools = Tools::locate().unwrap();
    let (first, second) = tokio::try_join!(NatsServer::private(&tools), NatsServer::private(&tools)).unwrap();
    assert_ne!(first.port(), second.port());
    let (first, second) = tokio::try_join!(
        PostgresServer::private(&tools, Durability::Fast),
        PostgresServer::private(&tools, Durability::Fast)
    )
    .unwrap();
    assert_ne!(first.port(), second.port());
}

#[tokio::test]
async fn servers_are_gone_after_their_owner_was_killed() {
    let mut owner = Command::new(env!("CARGO_BIN_EXE_devkit-servers"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let seen: serde_json::Value = serde_json::from_str(&line).unwrap();
    let process =
        |server: &str| -> ProcessId { serde_json::from_value(seen[server]["process"].clone()).unwrap() };
    let (nats, postgres) = (process("nats"), process("postgres"));
    let backends = children_of(postgres.pid).unwrap();
    assert!(nats.is_running() && postgres.is_running());

    owner.kill().unwrap();
    owner.wait().unwrap();

    gone("nats-server", &nats).await;
    gone("Postgres", &postgres).await;
    for backend in &backends {
        gone("a process of Postgres", backend).await;
    }
}
