//! Events with a `deliverAt`.

use bus_core::{
    audit::By,
    ids::{Ids as _, SystemIds},
    pg,
};
use jiff::SignedDuration;

use crate::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn i5_an_event_is_published_when_it_is_due_and_not_before() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let scheduler = world.scheduler();
    let due = "2026-05-01T12:00:00Z".parse().unwrap();
    let (event, later) = (world.due_at(due).await, world.due_at(due + SignedDuration::from_hours(1)).await);
    world.set(due - SignedDuration::from_micros(1)).await;
    world.drain(&scheduler).await;
    assert_eq!(world.published().await, []);
    world.set(due).await;
    world.drain(&scheduler).await;
    assert_eq!(world.published().await, [(event, true)]);
    assert!(pg::scheduled_event(&world.pool, world.organization, event).await.unwrap().is_none());
    assert!(pg::scheduled_event(&world.pool, world.organization, later).await.unwrap().is_some());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_goes_to_the_subscriptions_that_match_when_it_is_due() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let scheduler = world.scheduler();
    let due = "2026-05-01T12:00:00Z".parse().unwrap();
    sqlx::query("UPDATE subscriptions SET deleted_at = now()").execute(&world.pool).await.unwrap();
    sqlx::query("UPDATE organizations SET version = version + 1").execute(&world.pool).await.unwrap();
    let event = world.due_at(due).await;
    // The one that was there is gone by the time of publishing; another one comes before it is due.
    let tick = world.schedule("0 12 * * *", "UTC", bus_core::schedule::Rules::DEFAULT).await;
    sqlx::query("UPDATE subscriptions SET deleted_at = NULL").execute(&world.pool).await.unwrap();
    sqlx::query("UPDATE organizations SET version = version + 1").execute(&world.pool).await.unwrap();
    world.set(due).await;
    world.drain(&scheduler).await;
    for uid in [event, world.occurrences(tick).await[0].uid] {
        let stored = pg::event(&world.pool, world.organization, uid).await.unwrap().unwrap();
        assert_eq!(stored.subscriptions, [world.subscription]);
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_event_is_never_published() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let scheduler = world.scheduler();
    let due = "2026-05-01T12:00:00Z".parse().unwrap();
    let event = world.due_at(due).await;
    for _ in 0..2 {
        let cancelled =
            pg::cancel_scheduled(&world.pool, world.organization, event, &By::system(SystemIds.next()))
                .await
                .unwrap();
        assert_eq!(cancelled, pg::CancelScheduled::Cancelled);
    }
    world.set(due).await;
    world.drain(&scheduler).await;
    assert_eq!(world.published().await, []);
    assert_eq!(pg::agenda(&world.pool).await.unwrap().events, None);
    let kept = pg::scheduled_event(&world.pool, world.organization, event).await.unwrap().unwrap();
    assert!(kept.cancelled_at.is_some(), "what became of it can be asked");
    assert_eq!(pg::sweep_scheduled(&world.pool, 86_400, 10).await.unwrap(), 0, "for a while");
    world.advance(SignedDuration::from_hours(14)).await;
    assert_eq!(pg::sweep_scheduled(&world.pool, 86_400, 10).await.unwrap(), 1);
    world.end().await;
}

/// More than one transaction takes, all due at once: each once, in the order of their due times.
#[tokio::test(flavor = "multi_thread")]
async fn i5_many_events_at_once_come_out_once_and_in_order() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let scheduler = world.scheduler();
    let due: jiff::Timestamp = "2026-05-01T12:00:00Z".parse().unwrap();
    let mut expected = Vec::new();
    for n in 0..1_200 {
        // In another order than that of their due times.
        let at = due + SignedDuration::from_millis((n * 7_919) % 1_200);
        expected.push((at, world.due_at(at).await));
    }
    expected.sort_unstable();
    world.set(due + SignedDuration::from_secs(2)).await;
    world.drain(&scheduler).await;
    let queued: Vec<_> = world.in_queue().await;
    assert_eq!(queued, expected.into_iter().map(|(_, uid)| uid).collect::<Vec<_>>());
    world.end().await;
}
