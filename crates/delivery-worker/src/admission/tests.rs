#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use bus_core::{
    connection::{ContentMode, Limits, RateLimit, Webhook},
    signature::SigningSecret,
};
use futures::FutureExt as _;
use jiff::Timestamp;
use uuid::Uuid;

use super::{connection::FULL, *};
use crate::slots::{Slot, Slots};

const LIMITS: ConnectionConfig = ConnectionConfig { in_flight: 4, wait_ms: 100, backlog_per_s: 10.0 };

const BREAKER: BreakerConfig = BreakerConfig {
    enabled: true,
    window_s: 30,
    min_attempts: 10,
    failure_rate: 0.8,
    consecutive: 3,
    open_ms: 5_000,
    open_max_ms: 300_000,
    probes: 1,
    disable_after_s: 0,
};

fn connection(id: u128, limits: Limits) -> Connection {
    let webhook = Webhook {
        url: "https://receiver.example/".parse().unwrap(),
        headers: BTreeMap::new(),
        timeout: Duration::from_secs(15),
        content_mode: ContentMode::Structured,
        final_statuses: Vec::new(),
        limits,
        secret: SigningSecret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap(),
        previous_secret: None,
    };
    Connection {
        id: Uuid::from_u128(id).into(),
        organization: Uuid::from_u128(0).into(),
        name: id.to_string(),
        version: 1,
        enabled: true,
        disabled_reason: None,
        failing_since: None,
        target: Target::Webhook(Box::new(webhook)),
        created_at: Timestamp::UNIX_EPOCH,
        updated_at: Timestamp::UNIX_EPOCH,
    }
}

/// A worker with one lane.
struct Worker {
    admission: Admission,
    lane: Arc<Usage>,
    _slot: Slot,
}

impl Worker {
    async fn new(slots: usize) -> Self {
        let slot = Slots::new(slots + 1).acquire().await;
        let lane = Arc::clone(slot.usage());
        lane.take(1);
        let admission = Admission::new(LIMITS, BREAKER, 3, Peers::alone(), || 0.5);
        Self { admission, lane, _slot: slot }
    }

    fn request<'a>(&'a self, connection: &'a Connection, returns: bool) -> Request<'a> {
        Request { connection, lane: &self.lane, slots: 1, returns }
    }

    async fn new_one(&self, connection: &Connection) -> Result<Place, Refusal> {
        self.admission.admit(self.request(connection, false)).await
    }

    async fn returning_one(&self, connection: &Connection) -> Result<Place, Refusal> {
        self.admission.admit(self.request(connection, true)).await
    }

    /// What is decided without any wait.
    fn at_once(&self, connection: &Connection) -> Option<Result<Place, Refusal>> {
        self.new_one(connection).now_or_never()
    }

    async fn attempt(&self, connection: &Connection, failed: bool) -> Option<Change> {
        self.returning_one(connection).await.unwrap().report(Some(failed))
    }

    fn known(&self) -> usize {
        self.admission.lock().len()
    }
}

fn why(answer: Result<Place, Refusal>) -> Why {
    answer.unwrap_err().why
}

#[tokio::test(start_paused = true)]
async fn i7_who_does_not_answer_is_parked_after_a_second_and_others_have_room() {
    let worker = Worker::new(100).await;
    let (hog, victim) = (connection(1, Limits::default()), connection(2, Limits::default()));
    let places: Vec<Place> = (0..4).map(|_| worker.at_once(&hog).unwrap().unwrap()).collect();
    assert_eq!(why(worker.new_one(&hog).await), Why::NoPlace, "it is not known yet, and may be quick");
    // From now on it is known that nothing moves.
    let refused = worker.at_once(&hog).unwrap().unwrap_err();
    assert_eq!(refused.why, Why::NoPlace);
    let waits: Vec<Refusal> = (0..20).map(|_| worker.at_once(&hog).unwrap().unwrap_err()).collect();
    assert_eq!(waits[19].why, Why::Behind, "others are parked before it");
    assert!(waits.windows(2).all(|two| two[0].wait <= two[1].wait), "{waits:?}");
    assert!(worker.at_once(&victim).unwrap().is_ok());
    drop(places);
}

#[tokio::test(start_paused = true)]
async fn who_is_quick_keeps_those_who_miss_a_place_waiting_in_turn() {
    let worker = Worker::new(100).await;
    let quick = connection(1, Limits::default());
    // Each takes 20 ms, so with four at a time one ends every 5 ms: up to 20 may wait.
    for _ in 0..50 {
        let mut place = worker.new_one(&quick).await.unwrap();
        sleep(Duration::from_millis(20)).await;
        place.report(Some(false));
    }
    let mut places: Vec<Place> = (0..4).map(|_| worker.at_once(&quick).unwrap().unwrap()).collect();
    let mut waiting: Vec<_> = (0..20).map(|_| Box::pin(worker.new_one(&quick))).collect();
    assert!(waiting.iter_mut().all(|one| one.now_or_never().is_none()));
    assert_eq!(why(worker.at_once(&quick).unwrap()), Why::NoPlace, "that would take too long");
    // One of those who wait goes away.
    drop(waiting.remove(0));
    places.pop();
    assert!(waiting[0].as_mut().now_or_never().is_some_and(|answer| answer.is_ok()), "it gave its turn on");
    for (turn, mut one) in waiting.into_iter().enumerate().skip(1) {
        let answer = one.as_mut().now_or_never();
        assert!(answer.is_none_or(|answer| answer.is_ok()), "{turn}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_place_that_nobody_takes_any_more_is_not_lost() {
    let worker = Worker::new(100).await;
    let one = connection(1, Limits { max_in_flight: Some(1), rate: None });
    let place = worker.at_once(&one).unwrap().unwrap();
    let mut waiting = Box::pin(worker.new_one(&one));
    assert!(waiting.as_mut().now_or_never().is_none());
    drop(place);
    // It has the place by now, and goes without looking.
    drop(waiting);
    assert!(worker.at_once(&one).unwrap().is_ok());
    assert!(worker.at_once(&one).unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_sends_all_away_until_a_probe_succeeds() {
    let worker = Worker::new(100).await;
    let endpoint = connection(1, Limits::default());
    let mut under_way: Vec<Place> = (0..4).map(|_| worker.at_once(&endpoint).unwrap().unwrap()).collect();
    let waits = worker.new_one(&endpoint);
    tokio::pin!(waits);
    assert!(waits.as_mut().now_or_never().is_none());
    let changes: Vec<_> = under_way[..3].iter_mut().map(|place| place.report(Some(true))).collect();
    let Some(Change::Opened(period)) = changes[2] else { panic!("{changes:?}") };
    // Who waits is told at once, and nobody comes back before the period is over.
    let told = waits.now_or_never().unwrap().unwrap_err();
    assert_eq!((told.why, told.wait), (Why::CircuitOpen, period + Duration::from_millis(100)));
    let next = worker.at_once(&endpoint).unwrap().unwrap_err();
    assert_eq!((next.why, next.wait), (Why::CircuitOpen, period + Duration::from_millis(200)));
    for _ in 0..18 {
        worker.at_once(&endpoint).unwrap().unwrap_err();
    }
    drop(under_way);
    sleep(period).await;
    let mut probe = worker.at_once(&endpoint).unwrap().unwrap();
    assert_eq!(why(worker.returning_one(&endpoint).await), Why::CircuitOpen, "one at a time");
    assert_eq!(probe.report(Some(false)), Some(Change::Closed));
    drop(probe);
    let under_way: Vec<Place> = (0..4).map(|_| worker.at_once(&endpoint).unwrap().unwrap()).collect();
    assert_eq!(
        why(worker.new_one(&endpoint).await),
        Why::Behind,
        "without room those that were parked go first"
    );
    drop(under_way);
    assert!(worker.returning_one(&endpoint).await.is_ok());
    assert!(worker.new_one(&endpoint).await.is_ok(), "with room nobody waits for them");
    sleep(Duration::from_secs(10)).await;
    assert!(worker.new_one(&endpoint).await.is_ok(), "they are through");
}

#[tokio::test(start_paused = true)]
async fn what_was_parked_at_a_slow_pace_is_recalled_when_there_is_room() {
    let worker = Worker::new(100).await;
    let endpoint = connection(1, Limits::default());
    let slow: Vec<Place> = (0..4).map(|_| worker.at_once(&endpoint).unwrap().unwrap()).collect();
    sleep(Duration::from_secs(8)).await;
    for mut place in slow {
        place.report(Some(false));
    }
    let busy: Vec<Place> = (0..4).map(|_| worker.at_once(&endpoint).unwrap().unwrap()).collect();
    for _ in 0..20 {
        assert!(worker.at_once(&endpoint).unwrap().is_err(), "parked, one in eight fifths of a second");
    }
    assert_eq!(worker.admission.recalls(&endpoint), None, "there is no room");
    drop(busy);
    for _ in 0..20 {
        worker.attempt(&endpoint, false).await;
    }
    sleep(FULL).await;
    let interval = worker.admission.recalls(&endpoint).unwrap();
    assert!(interval < Duration::from_millis(200), "{interval:?}");
    assert_eq!(worker.admission.recalls(&endpoint), None, "these are on their way");
    sleep(Duration::from_secs(1)).await;
    assert!(worker.admission.recalls(&endpoint).is_some(), "not all were looked at");
    worker.admission.recalled(endpoint.id, interval, 10, false);
    let places: Vec<Place> = (0..4).map(|_| worker.at_once(&endpoint).unwrap().unwrap()).collect();
    let wait = worker.returning_one(&endpoint).await.unwrap_err().wait;
    assert!(
        wait < 20 * interval + Duration::from_secs(1),
        "{wait:?}: behind those that are recalled, not behind all"
    );
    drop(places);
    sleep(FULL).await;
    assert!(worker.admission.recalls(&endpoint).is_some(), "those that are parked for long still are");
    worker.admission.recalled(endpoint.id, interval, 10, true);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(worker.admission.recalls(&endpoint), None, "they are through");
}

#[tokio::test(start_paused = true)]
async fn what_others_have_parked_is_recalled_by_who_meets_one_of_them() {
    let worker = Worker::new(100).await;
    let (never_parked, parked_before) = (connection(1, Limits::default()), connection(2, Limits::default()));
    drop(worker.new_one(&never_parked).await.unwrap());
    assert_eq!(worker.admission.recalls(&never_parked), None, "nothing asks the database");
    drop(worker.returning_one(&parked_before).await.unwrap());
    let interval = worker.admission.recalls(&parked_before).unwrap();
    worker.admission.recalled(parked_before.id, interval, 0, true);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(worker.admission.recalls(&parked_before), None, "there were none");
}

#[tokio::test(start_paused = true)]
async fn what_waited_for_an_open_circuit_is_recalled_slowly_at_first() {
    let worker = Worker::new(100).await;
    let endpoint = connection(1, Limits { max_in_flight: Some(64), rate: None });
    let places: Vec<Place> = (0..50).map(|_| worker.at_once(&endpoint).unwrap().unwrap()).collect();
    drop(places);
    for _ in 0..3 {
        worker.attempt(&endpoint, true).await;
    }
    for _ in 0..100 {
        assert_eq!(why(worker.returning_one(&endpoint).await), Why::CircuitOpen);
    }
    sleep(Duration::from_secs(6)).await;
    let mut probe = worker.returning_one(&endpoint).await.unwrap();
    sleep(Duration::from_millis(10)).await;
    assert_eq!(probe.report(Some(false)), Some(Change::Closed));
    drop(probe);
    let interval = worker.admission.recalls(&endpoint).unwrap();
    assert_eq!(interval, Duration::from_millis(5), "two at a time, and not 64");
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_rate_is_not_recalled() {
    let worker = Worker::new(100).await;
    let rate = RateLimit { per_second: 2.0, burst: Some(1) };
    let endpoint = connection(1, Limits { max_in_flight: None, rate: Some(rate) });
    drop(worker.new_one(&endpoint).await.unwrap());
    for _ in 0..20 {
        assert_eq!(why(worker.returning_one(&endpoint).await), Why::RateLimit);
    }
    assert_eq!(worker.admission.recalls(&endpoint), None);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_is_not_made_is_another_ones() {
    let worker = Worker::new(100).await;
    let endpoint = connection(1, Limits::default());
    for _ in 0..3 {
        worker.attempt(&endpoint, true).await;
    }
    sleep(Duration::from_secs(6)).await;
    drop(worker.returning_one(&endpoint).await.unwrap());
    let mut asked_to_wait = worker.returning_one(&endpoint).await.unwrap();
    assert_eq!(asked_to_wait.report(None), None);
    drop(asked_to_wait);
    assert_eq!(worker.attempt(&endpoint, false).await, Some(Change::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_new_version_begins_anew() {
    let worker = Worker::new(100).await;
    let mut endpoint = connection(1, Limits::default());
    let mut before = worker.returning_one(&endpoint).await.unwrap();
    for _ in 0..3 {
        worker.attempt(&endpoint, true).await;
    }
    assert_eq!(why(worker.new_one(&endpoint).await), Why::CircuitOpen);
    endpoint.version += 1;
    for _ in 0..2 {
        assert_eq!(worker.attempt(&endpoint, true).await, None);
    }
    assert_eq!(before.report(Some(true)), None, "that was another one");
    assert!(worker.new_one(&endpoint).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_rate_is_kept_and_the_rest_comes_back_at_that_rate() {
    let worker = Worker::new(100).await;
    let rate = RateLimit { per_second: 2.0, burst: Some(3) };
    let endpoint = connection(1, Limits { max_in_flight: None, rate: Some(rate) });
    for _ in 0..3 {
        worker.attempt(&endpoint, false).await;
    }
    let waits: Vec<(Why, u128)> =
        [worker.returning_one(&endpoint).await, worker.returning_one(&endpoint).await]
            .into_iter()
            .map(|answer| answer.unwrap_err())
            .map(|refusal| (refusal.why, refusal.wait.as_millis()))
            .collect();
    assert_eq!(waits, [(Why::RateLimit, 1_000), (Why::RateLimit, 1_000)]);
    let third = worker.returning_one(&endpoint).await.unwrap_err();
    assert_eq!(third.wait, Duration::from_millis(1_500));
    sleep(Duration::from_millis(450)).await;
    let begun = Instant::now();
    worker.attempt(&endpoint, false).await;
    assert_eq!(begun.elapsed(), Duration::from_millis(50), "so short a wait is done in memory");
}

#[tokio::test(start_paused = true)]
async fn what_has_been_idle_for_the_longest_is_forgotten_and_never_what_is_under_way() {
    let worker = Worker::new(100).await;
    let all: Vec<Connection> = (1..=4).map(|id| connection(id, Limits::default())).collect();
    let place = worker.new_one(&all[0]).await.unwrap();
    for other in &all[1..3] {
        for _ in 0..3 {
            worker.attempt(other, true).await;
        }
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(worker.known(), 3);
    assert!(worker.new_one(&all[3]).await.is_ok());
    assert_eq!(worker.known(), 3);
    assert_eq!(why(worker.new_one(&all[2]).await), Why::CircuitOpen, "the latest one is still known");
    drop(place);
    assert!(worker.new_one(&all[1]).await.is_ok(), "its circuit is forgotten");
}
