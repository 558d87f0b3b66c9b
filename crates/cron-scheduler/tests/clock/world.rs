//! A database whose clock stands still until it is told to go on, and schedulers that may die after every step.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bus_core::{
    audit::By,
    clock::{ManualClock, SystemClock},
    cloudevent::CloudEvent,
    fanout::FanOutStore,
    ids::{ConnectionId, EventUid, Ids as _, OrganizationId, ScheduleId, SubscriptionId, SystemIds},
    notify::MemoryNotifier,
    pg::{self, IfThere, NewEvent, NewSchedule, PageRequest, Publisher, PutSchedule, ScheduledEvent, Turn},
    queue::{DeliveryQueue as _, MemoryQueue},
    schedule::{Recurrence, Rules},
    snapshots::Snapshots,
};
use cron_scheduler::{
    ClaimedEvents, ClaimedSchedules, Committed, Enqueued, Firing, SchedulerConfig, Stored, TicksConfig,
    publish_due, visit_due,
};
use devkit::{database::Database, servers::shared_servers};
use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

/// A tick that is late by more counts as missed.
pub(crate) const MISSED_AFTER: Duration = Duration::from_secs(60);

/// `now()` of every statement that names no schema: what the test has set, the same throughout a transaction.
const CLOCK: &str = "
    CREATE SCHEMA manual;
    CREATE TABLE manual.clock (at timestamptz NOT NULL);
    INSERT INTO manual.clock VALUES ('2026-01-01T00:00:00Z');
    CREATE FUNCTION manual.now() RETURNS timestamptz LANGUAGE plpgsql VOLATILE AS $$
    DECLARE
        seen text := pg_catalog.current_setting('manual.seen', true);
    BEGIN
        IF seen IS NULL OR seen = '' THEN
            seen := (SELECT at FROM manual.clock)::text;
            PERFORM pg_catalog.set_config('manual.seen', seen, true);
        END IF;
        RETURN seen::timestamptz;
    END
    $$;
";

pub(crate) struct World {
    database: Database,
    pub(crate) pool: PgPool,
    pub(crate) queue: Arc<MemoryQueue>,
    pub(crate) organization: OrganizationId,
    pub(crate) subscription: SubscriptionId,
    now: Timestamp,
}

impl World {
    /// One organization with a subscription to everything, at this time.
    pub(crate) async fn at(now: &str) -> Self {
        let servers = shared_servers().await.unwrap();
        let database = Database::create(servers.postgres_url()).await.unwrap();
        let owner = PgPool::connect(database.url()).await.unwrap();
        sqlx::raw_sql(CLOCK).execute(&owner).await.unwrap();
        owner.close().await;
        let options: PgConnectOptions = database.url().parse().unwrap();
        // The catalog is searched last, so that `now()` is ours.
        let options = options.options([("search_path", "manual,public,pg_catalog")]);
        let pool = PgPoolOptions::new().max_connections(8).connect_with(options).await.unwrap();
        let (organization, connection) = (OrganizationId(SystemIds.next()), ConnectionId(SystemIds.next()));
        let subscription = SubscriptionId(SystemIds.next());
        for statement in [
            "INSERT INTO organizations (id, name) VALUES ($1, 'acme') RETURNING $2::uuid, $3::uuid",
            "INSERT INTO connections (id, organization_id, name, kind, url, secret)
             VALUES ($2, $1, 'hook', 'webhook', 'https://receiver.example', 'whsec_x') RETURNING $3::uuid",
            "INSERT INTO subscriptions (id, organization_id, connection_id, event_type) VALUES ($3, $1, $2, '>')",
        ] {
            let query = sqlx::query(statement).bind(organization.0).bind(connection.0);
            query.bind(subscription.0).execute(&pool).await.unwrap();
        }
        let queue =
            Arc::new(MemoryQueue::new(pool.clone(), Arc::new(SystemClock), 1, Duration::from_secs(600)));
        let mut world =
            Self { database, pool, queue, organization, subscription, now: Timestamp::UNIX_EPOCH };
        world.set(now.parse().unwrap()).await;
        world
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    pub(crate) async fn set(&mut self, now: Timestamp) {
        self.now = now;
        let now = jiff_sqlx::Timestamp::from(now);
        sqlx::query("UPDATE manual.clock SET at = $1").bind(now).execute(&self.pool).await.unwrap();
    }

    pub(crate) async fn advance(&mut self, by: SignedDuration) {
        self.set(self.now + by).await;
    }

    /// A scheduler of this world.
    pub(crate) fn scheduler(&self) -> Firing {
        Firing {
            pool: self.pool.clone(),
            snapshots: Snapshots::new(self.pool.clone()),
            queue: self.queue.clone(),
            store: FanOutStore { queue_in_database: None, lease_s: 10 },
            hints: Arc::new(MemoryNotifier::default()),
            ids: Arc::new(SystemIds),
            clock: Arc::new(ManualClock::new(self.now)),
            config: SchedulerConfig { scheduler: TicksConfig { missed_after_s: MISSED_AFTER.as_secs() } },
        }
    }

    pub(crate) async fn schedule(&self, cron: &str, timezone: &str, rules: Rules) -> ScheduleId {
        self.try_schedule(cron, timezone, rules).await.expect("it has a tick")
    }

    /// None if there is no tick between its start and its end.
    pub(crate) async fn try_schedule(&self, cron: &str, timezone: &str, rules: Rules) -> Option<ScheduleId> {
        let new = self.new_schedule(ScheduleId(SystemIds.next()), cron, timezone, rules);
        match pg::put_schedule(&self.pool, &new, IfThere::Keep, 1_000, &By::system(SystemIds.next()))
            .await
            .unwrap()
        {
            PutSchedule::Created(schedule) => Some(schedule.id),
            PutSchedule::NoTick => None,
            other => panic!("{other:?}"),
        }
    }

    /// Gives a schedule other rules.
    pub(crate) async fn change(&self, id: ScheduleId, rules: Rules) {
        let there = pg::schedule(&self.pool, self.whose(), id).await.unwrap().unwrap();
        let new = self.new_schedule(id, &there.cron, &there.timezone, rules);
        let put = pg::put_schedule(&self.pool, &new, IfThere::Change, 1_000, &By::system(SystemIds.next()))
            .await
            .unwrap();
        assert!(matches!(&put, PutSchedule::There(changed) if changed.id == id), "{put:?}");
    }

    fn new_schedule(&self, id: ScheduleId, cron: &str, timezone: &str, rules: Rules) -> NewSchedule {
        let event = event(&id.to_string(), "tick");
        NewSchedule {
            id,
            organization: self.organization,
            publisher: None,
            r#type: event.r#type.clone(),
            // Schedules are told apart by their source too.
            source: format!("/{id}"),
            recurrence: Recurrence::parse(cron, timezone).unwrap(),
            rules,
            template: event.to_structured(),
        }
    }

    pub(crate) async fn turn(&self, id: ScheduleId, turn: Turn) {
        pg::turn_schedule(&self.pool, self.whose(), id, turn, &By::system(SystemIds.next())).await.unwrap();
    }

    pub(crate) fn whose(&self) -> Publisher {
        Publisher { organization: self.organization, only: None }
    }

    /// An event that is due at this time.
    pub(crate) async fn due_at(&self, due_at: Timestamp) -> EventUid {
        let uid = EventUid::at(due_at, SystemIds.next());
        let event = event(&uid.to_string(), "later");
        let scheduled = ScheduledEvent {
            event: NewEvent {
                uid,
                organization: self.organization,
                id: event.id.clone(),
                source: event.source.clone(),
                r#type: event.r#type.clone(),
                subject: None,
                time: self.now,
                publisher: None,
                received_at: None,
                subscriptions: Vec::new(),
                body: event.to_structured(),
            },
            due_at,
            schedule: None,
            cancelled_at: None,
        };
        let mut connection = self.pool.acquire().await.unwrap();
        pg::insert_scheduled(&mut connection, &[scheduled]).await.unwrap();
        uid
    }

    /// What became of a schedule's ticks, in order: (first, last, how many, why not fired).
    pub(crate) async fn occurrences(&self, id: ScheduleId) -> Vec<pg::Occurrence> {
        let page = PageRequest { after: None, limit: 1_000_000 };
        let mut occurrences =
            pg::occurrences(&self.pool, self.organization, id, pg::OccurrenceQuery::default(), page)
                .await
                .unwrap()
                .items;
        occurrences.reverse();
        occurrences
    }

    /// The occurrences as text, with times of day of UTC.
    pub(crate) async fn account(&self, id: ScheduleId) -> Vec<String> {
        let day = |at: Timestamp| at.strftime("%d %H:%M:%S").to_string();
        let row = |row: pg::Occurrence| match row.skipped {
            None => format!("{} fired", day(row.tick)),
            Some(why) => {
                format!("{}–{} {}: {} skipped", day(row.tick), day(row.last_tick), why.as_str(), row.ticks)
            }
        };
        self.occurrences(id).await.into_iter().map(row).collect()
    }

    /// Does everything that is due.
    pub(crate) async fn drain(&self, scheduler: &Firing) {
        while visit_due(scheduler).await.unwrap().is_zero() || publish_due(scheduler).await.unwrap().is_zero()
        {
        }
    }

    /// The events whose deliveries are in the queue, in its order.
    pub(crate) async fn in_queue(&self) -> Vec<EventUid> {
        let mut pulled = self.queue.pull(0, 1_000_000, Duration::ZERO).await.unwrap();
        let (mut events, mut leases) = (Vec::new(), Vec::new());
        while let Some(leased) = pulled.next().await {
            let leased = leased.unwrap();
            events.push(leased.key.event);
            leases.push(leased.lease);
        }
        for lease in leases {
            lease.put_back(Duration::ZERO).await.unwrap();
        }
        events
    }

    /// The stored events, and for each whether its delivery is in the queue or waits for a relay.
    pub(crate) async fn published(&self) -> Vec<(EventUid, bool)> {
        let queued = self.in_queue().await;
        let distinct: HashSet<EventUid> = queued.iter().copied().collect();
        assert_eq!(distinct.len(), queued.len(), "a delivery is in the queue twice");
        let stored: Vec<(uuid::Uuid, bool)> = sqlx::query_as(
            "SELECT uid, EXISTS (SELECT FROM outbox o WHERE o.finished_at IS NULL AND e.uid = ANY (o.event_uids))
             FROM events e ORDER BY uid",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap();
        stored
            .into_iter()
            .map(|(uid, open)| (EventUid(uid), open || distinct.contains(&EventUid(uid))))
            .collect()
    }

    pub(crate) async fn end(self) {
        self.pool.close().await;
        self.database.drop().await.unwrap();
    }
}

fn event(id: &str, event_type: &str) -> CloudEvent {
    CloudEvent {
        id: id.into(),
        source: "/test".into(),
        r#type: event_type.into(),
        subject: None,
        time: None,
        datacontenttype: None,
        dataschema: None,
        extensions: std::collections::BTreeMap::new(),
        data: None,
    }
}

/// How far a scheduler has come with what it has claimed.
#[derive(Default)]
pub(crate) enum Stage<'f> {
    #[default]
    Idle,
    Ticks(ClaimedSchedules<'f>),
    Events(ClaimedEvents<'f>),
    Stored(Stored<'f>),
    Committed(Committed<'f>),
    Enqueued(Enqueued<'f>),
}

impl<'f> Stage<'f> {
    /// The next step. To drop a stage instead is to die there.
    pub(crate) async fn step(self, scheduler: &'f Firing, ticks_first: bool) -> Self {
        match self {
            Self::Idle if ticks_first => match ClaimedSchedules::claim(scheduler, None).await.unwrap() {
                Some(claimed) => Self::Ticks(claimed),
                None => Self::Idle,
            },
            Self::Idle => match ClaimedEvents::claim(scheduler, None).await.unwrap() {
                Some(claimed) => Self::Events(claimed),
                None => Self::Idle,
            },
            Self::Ticks(claimed) => Self::Stored(claimed.store().await.unwrap()),
            Self::Events(claimed) => Self::Stored(claimed.store().await.unwrap()),
            Self::Stored(stored) => Self::Committed(stored.commit().await.unwrap()),
            Self::Committed(committed) => Self::Enqueued(committed.enqueue().await),
            Self::Enqueued(enqueued) => {
                enqueued.finish().await.unwrap();
                Self::Idle
            }
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Ticks(_) | Self::Events(_) => "claimed",
            Self::Stored(_) => "stored",
            Self::Committed(_) => "committed",
            Self::Enqueued(_) => "enqueued",
        }
    }
}
