//! What becomes of ticks that nobody could fire in time, that overlap, or that somebody has paused.

use bus_core::{
    audit::By,
    ids::{Ids as _, SystemIds},
    pg::{self, Turn},
    schedule::{Missed, Overlap, Rules},
};
use jiff::ToSpan as _;

use crate::world::World;

fn rules(missed: Missed) -> Rules {
    Rules { missed, catch_up_limit: 3, ..Rules::DEFAULT }
}

/// A day without a scheduler: each policy does what it says, and the record shows it.
#[tokio::test(flavor = "multi_thread")]
async fn i5_after_a_day_without_a_scheduler_every_policy_keeps_its_word() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let hourly = "30 * * * *";
    let skip = world.schedule(hourly, "UTC", rules(Missed::Skip)).await;
    let once = world.schedule(hourly, "UTC", rules(Missed::FireOnce)).await;
    let catch_up = world.schedule(hourly, "UTC", rules(Missed::CatchUp)).await;
    let daily = world.schedule("0 6 * * *", "Europe/London", rules(Missed::FireOnce)).await;
    let scheduler = world.scheduler();
    world.set("2026-05-01T00:30:00Z".parse().unwrap()).await;
    world.drain(&scheduler).await;
    for schedule in [skip, once, catch_up] {
        assert_eq!(world.account(schedule).await, ["01 00:30:00 fired"]);
    }

    // The outage ends half a minute after a tick, which is late and not missed.
    world.set("2026-05-02T00:30:30Z".parse().unwrap()).await;
    world.drain(&scheduler).await;
    assert_eq!(
        world.account(skip).await,
        ["01 00:30:00 fired", "01 01:30:00–01 23:30:00 missed: 23 skipped", "02 00:30:00 fired"]
    );
    assert_eq!(
        world.account(once).await,
        [
            "01 00:30:00 fired",
            "01 01:30:00–01 22:30:00 missed: 22 skipped",
            "01 23:30:00 fired",
            "02 00:30:00 fired",
        ]
    );
    assert_eq!(
        world.account(catch_up).await,
        [
            "01 00:30:00 fired",
            "01 01:30:00–01 20:30:00 missed: 20 skipped",
            "01 21:30:00 fired",
            "01 22:30:00 fired",
            "01 23:30:00 fired",
            "02 00:30:00 fired",
        ]
    );
    // 06:00 in London is 05:00 UTC in May: one tick was missed, and is made good.
    assert_eq!(world.account(daily).await, ["01 05:00:00 fired"]);
    let late = &world.occurrences(daily).await[0];
    assert_eq!(late.at.duration_since(late.tick).as_secs(), 19 * 3_600 + 1_830, "lateness is on record");
    world.end().await;
}

/// A schedule that has more missed ticks than one visit looks at, and more to catch up than one transaction takes.
#[tokio::test(flavor = "multi_thread")]
async fn i5_a_long_backlog_is_worked_off_in_parts_and_without_a_gap() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let rules = Rules { missed: Missed::CatchUp, catch_up_limit: 900, ..Rules::DEFAULT };
    let schedule = world.schedule("*/2 * * * * *", "UTC", rules).await;
    let scheduler = world.scheduler();
    world.advance(20.hours().to_duration_inexact()).await;
    world.drain(&scheduler).await;
    let occurrences = world.occurrences(schedule).await;
    let fired = occurrences.iter().filter(|row| row.skipped.is_none()).count();
    // What is less than a minute late is fired in any case: 30 ticks, and the one that is exactly a minute late.
    assert_eq!(fired, 900 + 31);
    let skipped: u64 = occurrences.iter().filter(|row| row.skipped.is_some()).map(|row| row.ticks).sum();
    assert_eq!(skipped + u64::try_from(fired).unwrap(), 20 * 1_800);
    assert_eq!(occurrences.len() - fired, 1, "one run of skipped ticks, however many visits it took");
    // The next tick is fired as ever.
    world.advance(2.seconds().to_duration_inexact()).await;
    world.drain(&scheduler).await;
    assert_eq!(world.occurrences(schedule).await.len(), occurrences.len() + 1);
    world.end().await;
}

trait Inexact {
    fn to_duration_inexact(self) -> jiff::SignedDuration;
}

impl Inexact for jiff::Span {
    fn to_duration_inexact(self) -> jiff::SignedDuration {
        self.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).unwrap()
    }
}

/// Ticks are skipped while deliveries of the last occurrence are open, whatever becomes of them in the end.
#[tokio::test(flavor = "multi_thread")]
async fn an_occurrence_that_is_still_being_delivered_is_not_overlapped() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let skipping = Rules { overlap: Overlap::Skip, ..Rules::DEFAULT };
    let schedule = world.schedule("* * * * *", "UTC", skipping).await;
    let allowed = world.schedule("* * * * *", "UTC", Rules::DEFAULT).await;
    let scheduler = world.scheduler();
    let minute = jiff::SignedDuration::from_mins(1);
    for _ in 0..3 {
        world.advance(minute).await;
        world.drain(&scheduler).await;
    }
    let first = "01 00:01:00 fired";
    assert_eq!(world.account(schedule).await, [first, "01 00:02:00–01 00:03:00 overlap: 2 skipped"]);
    assert_eq!(world.account(allowed).await.len(), 3);

    // It is delivered, and history says so.
    let event = world.occurrences(schedule).await[0].uid;
    sqlx::query(
        "INSERT INTO delivery_attempts (delivery_id, attempt, event_uid, organization_id, subscription_id,
                                        connection_id, outcome, at, duration_ms)
         SELECT gen_random_uuid(), 1, $1, organization_id, id, connection_id, 'delivered', now(), 1 FROM subscriptions",
    )
    .bind(event.0)
    .execute(&world.pool)
    .await
    .unwrap();
    world.advance(minute).await;
    world.drain(&scheduler).await;
    assert_eq!(world.account(schedule).await.last().unwrap(), "01 00:04:00 fired");

    // The second one dies; that is an end too.
    world.advance(minute).await;
    world.drain(&scheduler).await;
    assert_eq!(world.account(schedule).await.last().unwrap(), "01 00:05:00–01 00:05:00 overlap: 1 skipped");
    let event = world.occurrences(schedule).await.iter().rfind(|row| row.skipped.is_none()).unwrap().uid;
    sqlx::query(
        "INSERT INTO delivery_states (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                                      connection_version, state, turn, attempts, since, reason)
         SELECT gen_random_uuid(), $1, organization_id, id, connection_id, 1, 'dead', 1, 1, now(), 'attempts_exhausted'
         FROM subscriptions",
    )
    .bind(event.0)
    .execute(&world.pool)
    .await
    .unwrap();
    world.advance(minute).await;
    world.drain(&scheduler).await;
    assert_eq!(world.account(schedule).await.last().unwrap(), "01 00:06:00 fired");

    // One that matches nobody overlaps with nothing.
    sqlx::query("UPDATE subscriptions SET deleted_at = now()").execute(&world.pool).await.unwrap();
    sqlx::query("UPDATE organizations SET version = version + 1").execute(&world.pool).await.unwrap();
    world.advance(jiff::SignedDuration::from_hours(2)).await;
    world.drain(&scheduler).await;
    let before = world.account(schedule).await.len();
    for _ in 0..2 {
        world.advance(minute).await;
        world.drain(&scheduler).await;
    }
    assert_eq!(world.account(schedule).await.len(), before + 2);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paused_ticks_are_skipped_and_a_cancelled_schedule_never_fires_again() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let schedule = world.schedule("*/10 * * * *", "UTC", Rules::DEFAULT).await;
    let scheduler = world.scheduler();
    let ten = jiff::SignedDuration::from_mins(10);
    world.advance(ten).await;
    world.drain(&scheduler).await;
    world.turn(schedule, Turn::Pause).await;
    for _ in 0..3 {
        world.advance(ten).await;
        world.drain(&scheduler).await;
    }
    world.turn(schedule, Turn::Resume).await;
    world.advance(ten).await;
    world.drain(&scheduler).await;
    let account = ["01 00:10:00 fired", "01 00:20:00–01 00:40:00 paused: 3 skipped", "01 00:50:00 fired"];
    assert_eq!(world.account(schedule).await, account);

    // Nobody comes while it is paused: nothing is made good all the same.
    world.turn(schedule, Turn::Pause).await;
    world.advance(ten).await;
    world.turn(schedule, Turn::Resume).await;
    world.drain(&scheduler).await;
    let unseen = "01 01:00:00–01 01:00:00 paused: 1 skipped";
    assert_eq!(world.account(schedule).await, [&account[..], &[unseen]].concat());

    // A tick is due, and put off for some reason, and it is cancelled before anyone comes to it.
    world.advance(ten).await;
    pg::put_off_schedules(&world.pool, &[schedule], 60).await.unwrap();
    world.turn(schedule, Turn::Cancel).await;
    for turn in [Turn::Pause, Turn::Resume] {
        let turned =
            pg::turn_schedule(&world.pool, world.whose(), schedule, turn, &By::system(SystemIds.next()))
                .await
                .unwrap();
        assert!(matches!(turned, pg::Turned::Over(_)), "{turned:?}");
    }
    for _ in 0..3 {
        world.drain(&scheduler).await;
        world.advance(ten).await;
    }
    let cancelled = "01 01:10:00–01 01:10:00 cancelled: 1 skipped";
    assert_eq!(world.account(schedule).await, [&account[..], &[unseen, cancelled]].concat());
    assert_eq!(pg::agenda(&world.pool).await.unwrap().ticks, None, "nothing is planned");
    world.end().await;
}

/// A start and an end are both inclusive, and a schedule is over after its last tick.
#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_has_its_ticks_from_its_start_to_its_end() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let rules = Rules {
        starts_at: Some("2026-05-01T02:00:00Z".parse().unwrap()),
        ends_at: Some("2026-05-01T04:00:00+00:00".parse().unwrap()),
        ..Rules::DEFAULT
    };
    let schedule = world.schedule("@hourly", "UTC", rules).await;
    let scheduler = world.scheduler();
    for _ in 0..10 {
        world.advance(jiff::SignedDuration::from_mins(30)).await;
        world.drain(&scheduler).await;
    }
    assert_eq!(
        world.account(schedule).await,
        ["01 02:00:00 fired", "01 03:00:00 fired", "01 04:00:00 fired"]
    );
    let over = pg::schedule(&world.pool, world.whose(), schedule).await.unwrap().unwrap();
    assert_eq!((over.state, over.position), (pg::ScheduleState::Ended, None));
    world.end().await;
}

/// What is due when a schedule is changed is decided, and the rest goes by the new rules.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_schedule_leaves_no_tick_unaccounted_for() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let scheduler = world.scheduler();
    let ten = jiff::SignedDuration::from_mins(10);
    let at = |time: &str| Some(format!("2026-05-01T{time}Z").parse().unwrap());
    let later = world.schedule("*/10 * * * *", "UTC", Rules::DEFAULT).await;
    let over = world.schedule("*/10 * * * *", "UTC", Rules::DEFAULT).await;
    world.advance(ten).await;
    world.change(later, Rules { starts_at: at("01:00:00"), ..Rules::DEFAULT }).await;
    world.change(over, Rules { ends_at: at("00:05:00"), ..Rules::DEFAULT }).await;
    for _ in 0..6 {
        world.drain(&scheduler).await;
        world.advance(ten).await;
    }
    world.drain(&scheduler).await;
    let changed = "01 00:10:00–01 00:10:00 changed: 1 skipped";
    assert_eq!(world.account(later).await, [changed, "01 01:00:00 fired", "01 01:10:00 fired"]);
    assert_eq!(world.account(over).await, [changed]);
    world.end().await;
}

/// Jitter delays a tick, never advances it, and is no lateness that a policy looks at.
#[tokio::test(flavor = "multi_thread")]
async fn i5_jitter_only_delays() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let rules = Rules { jitter_ms: 50_000, missed: Missed::Skip, ..Rules::DEFAULT };
    let schedule = world.schedule("* * * * *", "UTC", rules).await;
    let scheduler = world.scheduler();
    for _ in 0..600 {
        world.advance(jiff::SignedDuration::from_secs(1)).await;
        world.drain(&scheduler).await;
    }
    let fired = world.occurrences(schedule).await;
    assert!(fired.iter().all(|row| row.skipped.is_none()), "{fired:?}");
    let jitter: Vec<i64> = fired.iter().map(|row| row.at.duration_since(row.tick).as_secs()).collect();
    assert!(fired.len() >= 9 && jitter.iter().all(|late| (0..=51).contains(late)), "{jitter:?}");
    assert!(jitter.iter().max() > jitter.iter().min(), "it is spread: {jitter:?}");
    world.end().await;
}

/// What the database refuses for one schedule stops no other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_cannot_be_visited_is_put_off_alone() {
    let mut world = World::at("2026-05-01T00:00:00Z").await;
    let schedules = [
        world.schedule("* * * * *", "UTC", Rules::DEFAULT).await,
        world.schedule("* * * * *", "UTC", Rules::DEFAULT).await,
        world.schedule("* * * * *", "UTC", Rules::DEFAULT).await,
        world.schedule("* * * * *", "UTC", Rules::DEFAULT).await,
    ];
    let scheduler = world.scheduler();
    let set = async |statement: &'static str, id: bus_core::ids::ScheduleId| {
        sqlx::query(statement).bind(id.0).execute(&world.pool).await.unwrap();
    };
    // Its tick is on record already; its zone is unknown; its template is no event.
    let tick = "2026-05-01T00:01:00Z".parse().unwrap();
    sqlx::query(
        "INSERT INTO occurrences (uid, schedule_id, organization_id, state, tick, last_tick, ticks)
         SELECT $1, id, organization_id, 'fired', next_tick, next_tick, 1 FROM schedules WHERE id = $2",
    )
    .bind(bus_core::ids::EventUid::of_tick(schedules[0], tick).0)
    .bind(schedules[0].0)
    .execute(&world.pool)
    .await
    .unwrap();
    set("UPDATE schedules SET timezone = 'Atlantis/Capital' WHERE id = $1", schedules[1]).await;
    set("UPDATE schedules SET template = 'x' WHERE id = $1", schedules[2]).await;
    // Another version has another policy, of which this one has not heard.
    let unknown = world.schedule("* * * * *", "UTC", Rules::DEFAULT).await;
    sqlx::query("ALTER TABLE schedules DROP CONSTRAINT schedules_missed_check")
        .execute(&world.pool)
        .await
        .unwrap();
    set("UPDATE schedules SET missed = 'whatever' WHERE id = $1", unknown).await;
    world.advance(jiff::SignedDuration::from_mins(1)).await;
    world.drain(&scheduler).await;
    assert_eq!(world.account(schedules[3]).await, ["01 00:01:00 fired"]);
    assert_eq!(world.published().await.len(), 1, "no tick has two events");
    let next = pg::agenda(&world.pool).await.unwrap().ticks.unwrap();
    assert!(next.as_secs() > 0, "nothing is tried again and again");
    world.end().await;
}
