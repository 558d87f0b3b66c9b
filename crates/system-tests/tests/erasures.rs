//! Erasure: afterwards the payload is nowhere, whenever the archiver dies, and whatever was on its way to cold storage.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver as Released, Sender, channel},
    },
    time::Duration,
};

use archiver::{ArchiveConfig, Erasures, Leases, TableArchiver, TableRetention};
use async_nats::jetstream::{self, consumer::pull};
use bus_core::{
    audit::By,
    clock::{Clock, SystemClock},
    ids::{ErasureId, EventUid, Ids as _, OrganizationId, SystemIds},
    pg::{self, CreateErasure, DayTable, ErasureState},
    streams::Archive,
};
use cold_storage::{ColdStorage, Config, Query, Record, Value as Cell};
use devkit::{
    database::Database,
    processes::Role,
    receiver::{Answer, Receiver},
    servers::{connect_nats, shared_servers},
    stack::{Stack, StackOptions},
    wait_until,
};
use futures::{StreamExt as _, TryStreamExt as _};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use system_tests::Tenant;
use url::Url;

const DEADLINE: Duration = Duration::from_secs(60);

/// Where an archiver dies.
const POINTS: [&str; 3] =
    ["archiver.erasure-emptied", "archiver.erasure-removed", "archiver.erasure-expunged"];

fn leases(pool: &PgPool, holder: &str) -> Leases {
    Leases { pool: pool.clone(), holder: holder.to_owned(), seconds: 30 }
}

/// Moves the events that are stored to cold storage, and drops them.
fn archiver_of_events(pool: &PgPool, cold: &ColdStorage, clock: Arc<dyn Clock>) -> TableArchiver {
    TableArchiver {
        table: DayTable::Events,
        retention: TableRetention { keep_days: 1, archive: Archive::Archive },
        by_stream: None,
        cold: cold.clone(),
        leases: leases(pool, "tables"),
        config: ArchiveConfig {
            batch_messages: 100_000,
            batch_bytes: 32 * 1024 * 1024,
            batch_age_s: 300,
            lease_s: 30,
        },
        clock,
    }
}

async fn archived(cold: &ColdStorage, domain: &str, organization: Option<OrganizationId>) -> Vec<Record> {
    let query = Query {
        domain: domain.into(),
        organization: organization.map(|id| id.0),
        since: None,
        until: None,
        event: None,
        limit: usize::MAX,
    };
    cold.query(&query).unwrap().try_collect().await.unwrap()
}

/// The tables of the database, the stream of dead letters and cold storage, as far as they hold a text.
struct Places {
    pool: PgPool,
    jetstream: jetstream::Context,
    dead_stream: String,
    cold: ColdStorage,
}

impl Places {
    async fn with(&self, text: &str) -> Vec<String> {
        let mut places = self.tables_with(text).await;
        places.extend(self.dead_letters_with(text).await);
        for domain in ["events", "messages", "receipts", "occurrences", "audit"] {
            let records = archived(&self.cold, domain, None).await;
            if records.iter().any(|record| record.to_json().to_string().contains(text)) {
                places.push(format!("cold storage: {domain}"));
            }
        }
        places
    }

    async fn tables_with(&self, text: &str) -> Vec<String> {
        let tables: Vec<String> = sqlx::query_scalar(
            "SELECT c.relname::text FROM pg_class c
             WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace = 'public'::regnamespace
             ORDER BY 1",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap();
        let mut found = Vec::new();
        for table in tables {
            // Bytes are shown in hexadecimal.
            let statement = format!(
                "SELECT count(*) FROM {table} t
                 WHERE position($1 IN t::text) > 0 OR position(encode(convert_to($1, 'UTF8'), 'hex') IN t::text) > 0"
            );
            let rows: i64 =
                sqlx::query_scalar(AssertSqlSafe(statement)).bind(text).fetch_one(&self.pool).await.unwrap();
            if rows > 0 {
                found.push(table);
            }
        }
        found
    }

    async fn dead_letters_with(&self, text: &str) -> Vec<String> {
        let stream = self.jetstream.get_stream(&self.dead_stream).await.unwrap();
        let consumer = stream.create_consumer(pull::Config::default()).await.unwrap();
        let count = usize::try_from(consumer.cached_info().num_pending).unwrap();
        if count == 0 {
            return Vec::new();
        }
        let messages = consumer.fetch().max_messages(count).messages().await.unwrap();
        let messages: Vec<_> = messages.map(|message| message.unwrap()).collect().await;
        assert_eq!(messages.len(), count);
        let holds = |message: &jetstream::Message| String::from_utf8_lossy(&message.payload).contains(text);
        if messages.iter().any(holds) { vec!["dead letters".to_owned()] } else { Vec::new() }
    }
}

/// An organization whose receiver refuses everything for good, and repeats what it was sent.
async fn tenant(stack: &mut Stack, receiver: &Receiver, name: &str, secret: &str) -> Tenant {
    let tenant = Tenant::create(stack, name).await.unwrap();
    let path = format!("/{name}");
    receiver.script(&path, Answer::status(418).body(format!("you said {secret}")));
    let hook =
        json!({ "name": "hook", "kind": "webhook", "url": receiver.url(&path), "finalStatuses": [418] });
    let connection = tenant.api.post("/v1/connections", &hook).await.unwrap().expect(201).id().to_owned();
    tenant.subscribe(&connection, "t").await.unwrap();
    tenant
}

/// Publishes; gives the uid.
async fn publish(tenant: &Tenant, data: Value) -> String {
    let event = json!({ "type": "t", "data": data });
    tenant.api.publish(&event).await.unwrap().expect(202).text("/uid").to_owned()
}

/// Publishes what the queue carries and what it does not, and waits until all of it is dead.
async fn publish_and_die(pool: &PgPool, tenant: &Tenant, secret: &str) -> String {
    publish(tenant, json!(format!("{secret}{}", "x".repeat(300 * 1024)))).await;
    let event = publish(tenant, json!({ "said": secret })).await;
    wait_until("every delivery is dead", DEADLINE, async || {
        let (events, dead): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM events WHERE organization_id = $1::uuid),
                    (SELECT count(*) FROM delivery_states s
                     WHERE s.organization_id = $1::uuid AND state = 'dead'
                       AND EXISTS (SELECT FROM events e WHERE e.uid = s.event_uid))",
        )
        .bind(&tenant.organization)
        .fetch_one(pool)
        .await
        .unwrap();
        if events == dead { Ok(()) } else { Err(format!("{dead} of {events}")) }
    })
    .await;
    event
}

/// All events that are stored arrived three days ago.
async fn make_old(pool: &PgPool) {
    let day = (SystemClock.now() - SignedDuration::from_hours(72)).to_zoned(TimeZone::UTC).date();
    for statement in [
        "SELECT create_day_partition('events', $1::text::date)",
        "UPDATE events SET uid = (left(replace(uuid_floor($1::text::date)::text, '-', ''), 12)
                                  || substr(replace(uid::text, '-', ''), 13))::uuid",
    ] {
        sqlx::query(statement).bind(day.to_string()).execute(pool).await.unwrap();
    }
}

/// A dead archiver's leases end; nobody waits for that.
async fn end_leases(pool: &PgPool) {
    sqlx::query("UPDATE archive_sources SET lease_until = '-infinity'").execute(pool).await.unwrap();
}

/// Starts the archiver so that it stops at this point, and kills it there.
async fn die_at(stack: &mut Stack, pool: &PgPool, point: &str) {
    end_leases(pool).await;
    let archiver = stack.process(Role::Archiver, 0);
    archiver.set_env("BUS_FAULT_POINT", Some(point));
    archiver.respawn().unwrap();
    wait_until(point, DEADLINE, async || {
        let log = archiver.log_text().map_err(|error| error.to_string())?;
        let stopped =
            log.lines().any(|line| line.contains("Stopped at a fault point") && line.contains(point));
        if stopped { Ok(()) } else { Err(log) }
    })
    .await;
    archiver.sigkill().await.unwrap();
}

#[tokio::test]
async fn an_erased_payload_is_nowhere_whenever_the_archiver_dies() {
    let (secret, other_secret) = ("quicksilver-4711", "cinnabar-0815");
    let options = StackOptions::default().replicas(Role::CronScheduler, 0);
    let mut stack = Stack::start(options).await.unwrap();
    let receiver = Receiver::start().await.unwrap();
    let pool = stack.owner_pool().await.unwrap();
    let acme = tenant(&mut stack, &receiver, "acme", secret).await;
    let other = tenant(&mut stack, &receiver, "other", other_secret).await;
    stack.process(Role::Archiver, 0).sigkill().await.unwrap();
    let cold = ColdStorage::open(&Config::at(Url::from_directory_path(stack.cold_dir()).unwrap())).unwrap();

    // Some is in cold storage alone, and some in the database.
    for (tenant, secret) in [(&acme, secret), (&other, other_secret)] {
        publish_and_die(&pool, tenant, secret).await;
    }
    make_old(&pool).await;
    end_leases(&pool).await;
    let archiver = archiver_of_events(&pool, &cold, Arc::new(SystemClock));
    assert!(leases(&pool, "t").round(&archiver).await.unwrap());
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM events").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 0);
    let event = publish_and_die(&pool, &acme, secret).await;
    publish_and_die(&pool, &other, other_secret).await;
    // Taken back before it was due; the row stays for a while.
    let due_at = (SystemClock.now() + SignedDuration::from_hours(1)).to_string();
    let due = json!({ "type": "t", "data": secret, "deliverAt": due_at });
    let cancelled = acme.api.publish(&due).await.unwrap().expect(202).text("/uid").to_owned();
    acme.api.post(&format!("/v1/events/{cancelled}/cancel"), &json!({})).await.unwrap().expect(200);

    let client = connect_nats(&stack.nats_url().unwrap()).await.unwrap();
    let dead_stream = format!("{}_DEAD", stack.prefix().to_ascii_uppercase());
    let places =
        Places { pool: pool.clone(), jetstream: jetstream::new(client), dead_stream, cold: cold.clone() };
    let everywhere = places.with(secret).await;
    let expected = ["delivery_states", "events", "scheduled_events", "dead letters", "cold storage: events"];
    assert_eq!(everywhere, expected);
    let before = places.with(other_secret).await;

    let job = acme.api.post("/v1/erasures", &json!({})).await.unwrap().expect(202);
    for point in POINTS {
        die_at(&mut stack, &pool, point).await;
    }
    end_leases(&pool).await;
    let archiver = stack.process(Role::Archiver, 0);
    archiver.set_env("BUS_FAULT_POINT", None);
    archiver.respawn().unwrap();
    let path = format!("/v1/erasures/{}", job.id());
    let done = wait_until("the end of an erasure", DEADLINE, async || {
        let body = acme.api.get(&path).await.unwrap().body;
        if body["state"] == "done" { Ok(body) } else { Err(body) }
    })
    .await;

    assert_eq!(places.with(secret).await, [""; 0]);
    assert_eq!(places.with(other_secret).await, before, "what others have stays");
    assert_eq!((&done["emptied"]["events"], &done["emptied"]["archived"]), (&json!(3), &json!(2)));
    let report = cold.verify(|_| ()).await.unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    let shown = acme.api.get(&format!("/v1/events/{event}")).await.unwrap().expect(200).body;
    assert!(shown["expungedAt"].is_string() && shown.get("event").is_none(), "{shown:#}");
    assert_eq!(shown["status"], "failed", "what became of it is still known");
    pool.close().await;
    stack.shutdown().await.unwrap();
}

/// A clock that stops whoever asks it a second time, until it is released: the archiver looks at it first for the day,
/// and then when it has read the rows of a part and is about to write them.
#[derive(Debug)]
struct StoppingClock {
    now: Timestamp,
    stop: Mutex<Option<Stop>>,
}

#[derive(Debug)]
struct Stop {
    asked: bool,
    reached: Sender<()>,
    released: Released<()>,
}

impl Clock for StoppingClock {
    fn now(&self) -> Timestamp {
        let mut stop = self.stop.lock().unwrap();
        match stop.as_mut() {
            Some(stop) if !stop.asked => stop.asked = true,
            Some(_) => {
                let Stop { reached, released, .. } = stop.take().unwrap();
                // The other tasks of this thread, and the runtime's own work, go on elsewhere.
                tokio::task::block_in_place(|| {
                    reached.send(()).unwrap();
                    released.recv().unwrap();
                });
            }
            None => {}
        }
        self.now
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_payload_that_was_on_its_way_to_cold_storage_does_not_come_back() {
    let servers = shared_servers().await.unwrap();
    let database = Database::create(servers.postgres_url()).await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cold = ColdStorage::open(&Config::at(Url::from_directory_path(folder.path()).unwrap())).unwrap();
    let now = SystemClock.now();
    let organization = OrganizationId(SystemIds.next());
    let event = EventUid::at(now - SignedDuration::from_hours(72), SystemIds.next());
    let day = (now - SignedDuration::from_hours(72)).to_zoned(TimeZone::UTC).date();
    sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, 'acme')")
        .bind(organization.0)
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query("SELECT create_day_partition('events', $1::text::date)")
        .bind(day.to_string())
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query(
        "INSERT INTO events (uid, organization_id, id, source, type, time, received_at, body)
         VALUES ($1, $2, 'one', '/s', 't', now() - interval '3 days', now() - interval '3 days', '{\"data\":1}')",
    )
    .bind(event.0)
    .bind(organization.0)
    .execute(&pool)
    .await
    .unwrap();

    // The archiver has read the event's row, and is about to write it.
    let ((reached, at_stop), (release, released)) = (channel(), channel());
    let stop = Mutex::new(Some(Stop { asked: false, reached, released }));
    let tables = archiver_of_events(&pool, &cold, Arc::new(StoppingClock { now, stop }));
    let archiving = tokio::spawn({
        let leases = leases(&pool, "tables");
        async move { leases.round(&tables).await }
    });
    tokio::task::spawn_blocking(move || at_stop.recv().unwrap()).await.unwrap();

    // Meanwhile it is erased.
    let id = ErasureId(SystemIds.next());
    let by = By::system(SystemIds.next());
    let created = pg::create_erasure(&pool, id, organization, Some(event), &by).await.unwrap();
    assert!(matches!(created, CreateErasure::Stored(_)));
    let erasures = Erasures {
        cold: cold.clone(),
        leases: leases(&pool, "erasures"),
        nats: None,
        events_archived: true,
        clock: Arc::new(SystemClock),
        ids: Arc::new(SystemIds),
    };
    let erasing = tokio::spawn({
        let leases = leases(&pool, "erasures");
        async move { leases.round(&erasures).await }
    });
    wait_until("the row is empty", DEADLINE, async || {
        let empty: bool = sqlx::query_scalar("SELECT expunged_at IS NOT NULL FROM events WHERE uid = $1")
            .bind(event.0)
            .fetch_one(&pool)
            .await
            .unwrap();
        if empty { Ok(()) } else { Err("it is not") }
    })
    .await;
    release.send(()).unwrap();
    assert!(archiving.await.unwrap().unwrap());
    assert!(erasing.await.unwrap().unwrap());

    let done = pg::erasure(&pool, organization, id).await.unwrap().unwrap();
    assert_eq!(done.state, ErasureState::Done);
    assert_eq!((done.emptied.events, done.emptied.archived), (1, 1), "it had come to cold storage");
    let records = archived(&cold, "events", Some(organization)).await;
    let [record] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!(record.get("body"), Some(&Cell::Null));
    assert!(matches!(record.get("expunged_at"), Some(Cell::Timestamp(_))));
    pool.close().await;
    database.drop().await.unwrap();
}
