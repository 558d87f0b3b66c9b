//! The guards of the statements are the state machine's: every state, every step, in time and late.

use std::time::Duration;

use bus_core::{
    audit::By,
    delivery::{DeliveryKey, Progress},
    ids::{ConnectionId, DeliveryId, EventUid, Ids as _, OrganizationId, SubscriptionId, SystemIds},
    lifecycle::{State, Step},
    pg::{self, Closed, DeadLetter, DeadLetterAction, LastAttempt, Park, Whose},
    receipt::{Receipt, ReceiptOutcome},
    retry::DeadReason,
};
use devkit::{database::Database, servers::shared_servers};
use jiff::Timestamp;
use sqlx::PgPool;

/// The turn that the row is about.
const TURN: i64 = 5;

/// An organization with a connection and a subscription.
struct Scene {
    pool: PgPool,
    organization: OrganizationId,
    connection: ConnectionId,
    subscription: SubscriptionId,
}

impl Scene {
    async fn new(pool: PgPool) -> Self {
        let [organization, connection, subscription] = [(); 3].map(|()| SystemIds.next());
        sqlx::query("INSERT INTO organizations (id, name) VALUES ($1, 'acme')")
            .bind(organization)
            .execute(&pool)
            .await
            .unwrap();
        sqlx::query(
            "INSERT INTO connections (id, organization_id, name, kind) VALUES ($1, $2, 'to', 'publisher')",
        )
        .bind(connection)
        .bind(organization)
        .execute(&pool)
        .await
        .unwrap();
        sqlx::query(
            "INSERT INTO subscriptions (id, organization_id, connection_id, event_type) VALUES ($1, $2, $3, 'x')",
        )
        .bind(subscription)
        .bind(organization)
        .bind(connection)
        .execute(&pool)
        .await
        .unwrap();
        Self {
            pool,
            organization: organization.into(),
            connection: connection.into(),
            subscription: subscription.into(),
        }
    }

    /// A delivery whose row says `state`.
    async fn delivery(&self, state: State) -> DeliveryKey {
        let event = EventUid(SystemIds.next());
        sqlx::query(
            "INSERT INTO events (uid, organization_id, id, source, type, time, subscriptions, body)
             VALUES ($1, $2, $1::text, '/test', 'x', now(), ARRAY[$3], '{}')",
        )
        .bind(event.0)
        .bind(self.organization.0)
        .bind(self.subscription.0)
        .execute(&self.pool)
        .await
        .unwrap();
        let id = DeliveryId::derive(event, self.subscription);
        sqlx::query(
            "INSERT INTO delivery_states (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                          connection_version, state, turn, attempts, since, due_at, reason)
             VALUES ($1, $2, $3, $4, $5, 1, $6, $7, 1, now(), CASE WHEN $6 = 'waiting' THEN now() END, 'x')",
        )
        .bind(id.0)
        .bind(event.0)
        .bind(self.organization.0)
        .bind(self.subscription.0)
        .bind(self.connection.0)
        .bind(state.as_str())
        .bind(TURN)
        .execute(&self.pool)
        .await
        .unwrap();
        DeliveryKey {
            id,
            event,
            organization: self.organization,
            subscription: self.subscription,
            connection: self.connection,
            connection_version: 1,
        }
    }

    /// Does what a step is in the database, as whoever holds `turn`.
    async fn take(&self, step: Step, key: DeliveryKey, turn: i64) {
        let at = Timestamp::from_second(1_800_000_000).unwrap();
        let progress = Progress { attempts: 1, turn, since: at };
        let last = LastAttempt::default();
        let pool = &self.pool;
        let close = async |closed| {
            pg::close_deliveries(
                pool,
                key.organization,
                key.event,
                Some(key.connection),
                closed,
                &By::system(SystemIds.next()),
            )
            .await
            .unwrap();
        };
        let settle = async |action| {
            let whose = Whose { organization: key.organization, only: None };
            let mut connection = pool.acquire().await.unwrap();
            pg::settle_dead_letters(&mut connection, whose, &[key.id.0], action).await.unwrap();
        };
        match step {
            Step::Postponed => {
                let (next, reason) = (progress.next(2), "failed".to_owned());
                let park = Park { key, next, wait: Duration::ZERO, paced: false, reason, last };
                pg::park(pool, &[park]).await.unwrap();
            }
            Step::GivenUp => {
                let letter = DeadLetter::new(key, progress, DeadReason::AttemptsExhausted);
                pg::bury(pool, &letter).await.unwrap();
            }
            Step::Returned => pg::returned(pool, &[(key.id, turn)]).await.unwrap(),
            Step::Succeeded => {
                let receipt = Receipt {
                    delivery: key.id,
                    attempt: 2,
                    turn,
                    event: key.event,
                    organization: key.organization,
                    subscription: key.subscription,
                    connection: key.connection,
                    outcome: ReceiptOutcome::Delivered,
                    status: Some(200),
                    error: None,
                    at,
                    duration_ms: 1,
                };
                pg::insert_attempts(pool, &[receipt]).await.unwrap();
            }
            Step::Ack => close(Closed::Acked).await,
            Step::Cancel => close(Closed::Cancelled).await,
            Step::Replay => settle(DeadLetterAction::Replay).await,
            Step::Discard => settle(DeadLetterAction::Discard).await,
        }
    }
}

#[tokio::test]
async fn i4_every_statement_has_the_guards_of_the_state_machine() {
    let servers = shared_servers().await.unwrap();
    let database = Database::create(servers.postgres_url()).await.unwrap();
    let scene = Scene::new(PgPool::connect(database.url()).await.unwrap()).await;
    for state in State::ALL {
        for step in Step::ALL {
            // Replays of other states are jobs of the scheduler, with a test there.
            if step == Step::Replay && state != State::Dead {
                continue;
            }
            for late in [false, true] {
                // Whoever acts from outside, or brings a waiting delivery back, has no turn that could be late.
                let of_a_worker = matches!(step, Step::Succeeded | Step::Postponed | Step::GivenUp);
                if late && !of_a_worker && step != Step::Returned {
                    continue;
                }
                let key = scene.delivery(state).await;
                scene.take(step, key, if late { TURN - 1 } else { TURN }).await;
                let (now, turn) = pg::standing(&scene.pool, key.id).await.unwrap().unwrap();
                let expected = state.after(step, late);
                assert_eq!(now, expected, "{state:?} after {step:?}, late: {late}");
                assert!(turn >= TURN, "a turn is never taken back");
                // The same once more changes nothing: whoever dies before saying that it is done repeats it.
                if expected != state && step != Step::Replay {
                    scene.take(step, key, if late { TURN - 1 } else { TURN }).await;
                    assert_eq!(pg::standing(&scene.pool, key.id).await.unwrap().unwrap().0, expected);
                }
            }
        }
    }
    scene.pool.close().await;
    database.drop().await.unwrap();
}
