//! Connections as the workers see them, with the rights that workers have.

use std::{collections::HashMap, time::Duration};

use bus_core::{
    audit::By,
    cloudevent::CloudEvent,
    connection::{Connection, ContentMode, Limits, Target, Webhook},
    ids::{ConnectionId, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    pattern::TypePattern,
    pg::{self, ChangeConnection, CreateConnection, CreateSubscription, NewConnection, PageRequest, Wanted},
    retry::RetryOverride,
    signature::SigningSecret,
    subscription::{BatchPolicy, SubscriptionRules},
};
use devkit::{
    database::{Database, role_url},
    processes::Role,
    servers::shared_servers,
};
use sqlx::{Connection as _, PgConnection, PgPool};

/// A database with an organization, and a pool with a worker's rights.
struct Fixture {
    database: Database,
    pool: PgPool,
    worker: PgPool,
    organization: OrganizationId,
}

impl Fixture {
    async fn new() -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        let worker = PgPool::connect(&role_url(database.url(), Role::DeliveryWorker).unwrap()).await.unwrap();
        let organization = OrganizationId(SystemIds.next());
        pg::create_organization(&pool, organization, "acme", &By::system(SystemIds.next())).await.unwrap();
        Self { database, pool, worker, organization }
    }

    async fn end(self) {
        self.worker.close().await;
        self.pool.close().await;
        self.database.drop().await.unwrap();
    }

    async fn connection(&self, name: &str) -> ConnectionId {
        let webhook = Webhook {
            url: "https://receiver.example/".parse().unwrap(),
            headers: Default::default(),
            timeout: Duration::from_secs(15),
            content_mode: ContentMode::Structured,
            final_statuses: vec![404, 422],
            limits: Limits::default(),
            secret: SigningSecret::generate(&mut rand::rng()),
            previous_secret: None,
        };
        let id = ConnectionId(SystemIds.next());
        let new = NewConnection {
            id,
            organization: self.organization,
            name: name.into(),
            enabled: true,
            target: Target::Webhook(Box::new(webhook)),
        };
        let created = pg::create_connection(&self.pool, new, &By::system(SystemIds.next())).await.unwrap();
        assert!(matches!(created, CreateConnection::Created(_)), "{created:?}");
        id
    }

    async fn subscription(
        &self,
        connection: ConnectionId,
        name: &str,
        rules: SubscriptionRules,
    ) -> SubscriptionId {
        let id = SubscriptionId(SystemIds.next());
        let event_type = TypePattern::parse(name).unwrap();
        let wanted = Wanted { event_type, publisher: None, filter: None, rules, enabled: true };
        let created = pg::create_subscription(
            &self.pool,
            self.organization,
            id,
            connection,
            &wanted,
            &By::system(SystemIds.next()),
        )
        .await
        .unwrap();
        assert!(matches!(created, CreateSubscription::Created(_)), "{created:?}");
        id
    }

    async fn versions(&self, connection: ConnectionId) -> (i64, i64) {
        let organization = sqlx::query_scalar("SELECT version FROM organizations WHERE id = $1")
            .bind(self.organization.0)
            .fetch_one(&self.pool)
            .await
            .unwrap();
        (organization, self.read(connection).await.version)
    }

    async fn read(&self, connection: ConnectionId) -> Connection {
        pg::connection(&self.worker, self.organization, connection).await.unwrap().unwrap()
    }

    async fn disable(&self, connection: ConnectionId, version: i64) -> bool {
        pg::disable_connection(&self.worker, self.organization, connection, version, "gone").await.unwrap()
    }

    /// Changes the connection's timeout, which counts up its version.
    async fn change(&self, connection: ConnectionId, seconds: u64) {
        let change = |mut connection: Connection| {
            let Target::Webhook(webhook) = &mut connection.target else { return Err("a publisher") };
            webhook.timeout = Duration::from_secs(seconds);
            Ok(connection)
        };
        let changed = pg::change_connection(
            &self.pool,
            self.organization,
            connection,
            change,
            &By::system(SystemIds.next()),
        )
        .await
        .unwrap();
        assert!(matches!(changed, ChangeConnection::Stored(_)), "{changed:?}");
    }
}

#[tokio::test]
async fn a_worker_reads_a_connection_with_the_rules_of_its_subscriptions() {
    let fixture = Fixture::new().await;
    let (connection, other) = (fixture.connection("hook").await, fixture.connection("other").await);
    let retry = RetryOverride { factor: Some(1.5), max_attempts: Some(3), ..RetryOverride::default() };
    let batch = BatchPolicy { max_events: 10, max_wait_ms: 100 };
    let both = SubscriptionRules { retry: Some(retry), batch: Some(batch) };
    let batched = SubscriptionRules { retry: None, batch: Some(batch) };
    fixture.subscription(connection, "plain", SubscriptionRules::default()).await;
    let live = fixture.subscription(connection, "live", both.clone()).await;
    let deleted = fixture.subscription(connection, "deleted", batched.clone()).await;
    fixture.subscription(other, "live", batched.clone()).await;
    assert!(
        pg::delete_subscription(
            &fixture.pool,
            fixture.organization,
            None,
            deleted,
            &By::system(SystemIds.next())
        )
        .await
        .unwrap()
    );

    let read = |organization| pg::receiver(&fixture.worker, organization, connection);
    let receiver = read(fixture.organization).await.unwrap().unwrap();
    assert_eq!(receiver.rules, HashMap::from([(live, both), (deleted, batched)]));
    assert_eq!(receiver.connection, fixture.read(connection).await);
    assert_eq!(receiver.connection.version, 3, "two subscriptions brought rules");
    let Target::Webhook(webhook) = &receiver.connection.target else { panic!("a publisher") };
    assert_eq!(webhook.final_statuses, [404, 422]);
    // I3
    assert_eq!(read(OrganizationId(SystemIds.next())).await.unwrap(), None);
    assert!(
        pg::delete_connection(&fixture.pool, fixture.organization, connection, &By::system(SystemIds.next()))
            .await
            .unwrap()
    );
    assert_eq!(read(fixture.organization).await.unwrap(), None);
    fixture.end().await;
}

#[tokio::test]
async fn a_worker_disables_the_connection_that_it_knew_and_no_other() {
    let fixture = Fixture::new().await;
    let connection = fixture.connection("hook").await;
    let bystander = fixture.connection("bystander").await;
    fixture.change(connection, 20).await;
    let before = fixture.versions(connection).await;
    assert_eq!(before.1, 2);
    let stranger = OrganizationId(SystemIds.next());
    assert!(!fixture.disable(connection, 1).await, "it was changed since the attempt");
    assert!(!fixture.disable(ConnectionId(SystemIds.next()), 1).await);
    // I3
    let foreign = pg::disable_connection(&fixture.worker, stranger, connection, 2, "gone").await.unwrap();
    assert!(!foreign);
    assert_eq!(fixture.versions(connection).await, before);
    assert!(fixture.read(connection).await.enabled);

    assert!(fixture.disable(connection, 2).await);
    let disabled = fixture.read(connection).await;
    assert_eq!((disabled.enabled, disabled.disabled_reason.as_deref()), (false, Some("gone")));
    assert_eq!(fixture.versions(connection).await, (before.0 + 1, 3));
    assert!(!fixture.disable(connection, 3).await, "it is disabled already");
    assert_eq!(fixture.versions(connection).await, (before.0 + 1, 3));
    assert!(fixture.read(bystander).await.enabled);
    fixture.end().await;
}

/// Both writers take the organization's lock first; in another order some of these would end in a deadlock.
#[tokio::test(flavor = "multi_thread")]
async fn disabling_and_changing_at_once_wait_for_each_other() {
    let fixture = Fixture::new().await;
    let connection = fixture.connection("hook").await;
    for round in 0..20 {
        let version = fixture.read(connection).await.version;
        let (_, first, second) = tokio::join!(
            fixture.change(connection, 1 + round),
            fixture.disable(connection, version),
            fixture.disable(connection, version),
        );
        assert!(!(first && second), "one version is disabled once");
        let after = fixture.read(connection).await;
        assert_eq!(after.version, version + 1 + i64::from(first || second));
        assert_eq!(after.enabled, !(first || second));
        sqlx::query("UPDATE connections SET enabled = true, disabled_reason = NULL")
            .execute(&fixture.pool)
            .await
            .unwrap();
    }
    fixture.end().await;
}

#[tokio::test]
async fn i7_a_connection_that_fails_is_noted_once_and_disabled_after_a_time_with_an_event() {
    const DAY: u64 = 86_400;
    let fixture = Fixture::new().await;
    let connection = fixture.connection("hook").await;
    let organization = fixture.organization;
    let fails = async |version, after_s| {
        pg::note_failing(&fixture.worker, organization, connection, version, after_s).await.unwrap()
    };
    let before = fixture.versions(connection).await;
    assert!(!fails(2, DAY).await, "another version was attempted");
    assert_eq!(fixture.read(connection).await.failing_since, None);
    assert!(!fails(1, DAY).await);
    let since = fixture.read(connection).await.failing_since;
    assert!(since.is_some());
    assert!(!fails(1, DAY).await && !fails(1, 0).await);
    assert_eq!(fixture.read(connection).await.failing_since, since, "it is the first time that counts");
    pg::note_working(&fixture.worker, organization, connection).await.unwrap();
    assert_eq!(fixture.read(connection).await.failing_since, None);
    assert_eq!(fixture.versions(connection).await, before, "nothing of it matters to deliveries");

    fails(1, DAY).await;
    sqlx::query("UPDATE connections SET failing_since = now() - interval '25 hours', updated_at = now() - interval '26 hours'")
        .execute(&fixture.pool)
        .await
        .unwrap();
    assert!(!fails(1, 0).await, "never");
    assert!(fails(1, DAY).await);
    assert!(!fails(1, DAY).await, "it is disabled already");
    let shown = fixture.read(connection).await;
    assert!(!shown.enabled && shown.failing_since.is_some());
    let reason = shown.disabled_reason.unwrap();
    assert!(reason.starts_with("failing since "), "{reason}");
    assert_eq!(fixture.versions(connection).await, (before.0 + 1, before.1 + 1));
    let page = PageRequest { after: None, limit: 10 };
    let due = pg::scheduled_events(&fixture.pool, organization, true, page).await.unwrap();
    let [scheduled] = &due.items[..] else { panic!("{due:?}") };
    let event = CloudEvent::from_structured(&scheduled.event.body).unwrap();
    assert_eq!(scheduled.event.r#type, "eventbus.connection.disabled");
    assert_eq!(event.source, format!("/connections/{connection}"));
    assert_eq!(
        scheduled.event.uid.received_at().map(|at| at.as_second()),
        Some(scheduled.due_at.as_second())
    );

    // Whoever enables it again is told, too.
    let enable = |mut connection: Connection| {
        (connection.enabled, connection.disabled_reason, connection.failing_since) = (true, None, None);
        Ok::<_, ()>(connection)
    };
    let by = By::system(SystemIds.next());
    pg::change_connection(&fixture.pool, organization, connection, enable, &by).await.unwrap();
    let due = pg::scheduled_events(&fixture.pool, organization, false, page).await.unwrap();
    let types: Vec<&str> = due.items.iter().map(|item| item.event.r#type.as_str()).collect();
    assert_eq!(types, ["eventbus.connection.disabled", "eventbus.connection.enabled"]);
    fixture.end().await;
}

#[tokio::test]
async fn i3_only_workers_may_disable_and_nothing_else() {
    let fixture = Fixture::new().await;
    let connection = fixture.connection("hook").await;
    let refused = |error: &sqlx::Error| {
        error.as_database_error().and_then(|error| error.code().map(|code| code.into_owned()))
    };
    for role in [Role::Publisher, Role::CronScheduler, Role::Archiver] {
        let url = role_url(fixture.database.url(), role).unwrap();
        let mut session = PgConnection::connect(&url).await.unwrap();
        let call = sqlx::query("SELECT disable_connection($1, $2, 1, 'x')")
            .bind(fixture.organization.0)
            .bind(connection.0)
            .execute(&mut session)
            .await;
        assert_eq!(refused(&call.unwrap_err()).as_deref(), Some("42501"), "{role:?}");
        session.close().await.unwrap();
    }
    for statement in [
        "UPDATE connections SET url = 'https://attacker.example/'",
        "UPDATE organizations SET version = 1",
        "UPDATE subscriptions SET enabled = false",
        "SELECT name FROM organizations",
    ] {
        let call = sqlx::query(statement).execute(&fixture.worker).await;
        assert_eq!(refused(&call.unwrap_err()).as_deref(), Some("42501"), "{statement}");
    }
    // A worker's own temporary tables do not get in the way of the real ones.
    let mut session = fixture.worker.acquire().await.unwrap();
    sqlx::raw_sql(
        "CREATE TEMP TABLE organizations (id uuid, version bigint);
         CREATE TEMP TABLE connections (id uuid)",
    )
    .execute(&mut *session)
    .await
    .unwrap();
    let disabled: bool = sqlx::query_scalar("SELECT disable_connection($1, $2, 1, 'gone')")
        .bind(fixture.organization.0)
        .bind(connection.0)
        .fetch_one(&mut *session)
        .await
        .unwrap();
    assert!(disabled);
    session.close().await.unwrap();
    assert!(!fixture.read(connection).await.enabled);
    fixture.end().await;
}
