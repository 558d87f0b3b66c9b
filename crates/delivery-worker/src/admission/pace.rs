//! When parked deliveries of one connection come back: one after another, and not all at once.

use std::time::Duration;

use tokio::time::Instant;

/// Nothing is parked for longer: it comes back and is judged anew.
const HORIZON: Duration = Duration::from_secs(3_600);

/// To waits at the horizon at most this share of them is added.
const JITTER: f64 = 0.1;

/// Nothing is parked for less, so that it does not go round and round.
const SHORTEST: Duration = Duration::from_secs(1);

/// When the parked ones are to be back.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The last one, as far as they were not told a later time before a recall.
    last: Instant,
    /// From then on none of them is parked any more.
    all: Instant,
    /// The longest time between two of them.
    slowest: Duration,
}

impl Pace {
    /// Nothing is parked.
    pub(crate) fn new(now: Instant) -> Self {
        Self { last: now, all: now, slowest: Duration::ZERO }
    }

    /// Whether some are to be back later than anybody who would be parked now for the shortest time: whoever comes now
    /// would overtake them.
    pub(crate) fn is_ahead(&self, now: Instant) -> bool {
        self.last > now + SHORTEST
    }

    /// How long one more is parked: until `interval` after the last one, and after `from`. `random` is in `0.0..1.0`.
    pub(crate) fn next(&mut self, now: Instant, from: Instant, interval: Duration, random: f64) -> Duration {
        self.slowest = if self.all > now { self.slowest.max(interval) } else { interval };
        let wait = self.last.max(from).saturating_duration_since(now).saturating_add(interval);
        if wait > HORIZON {
            let wait = HORIZON.mul_f64(1.0 + JITTER * random);
            self.all = self.all.max(now + wait);
            return wait;
        }
        self.last = now + wait;
        self.all = self.all.max(self.last);
        wait.max(SHORTEST)
    }

    /// Whether some are parked for long who would come back at least twice as fast with this interval.
    pub(crate) fn gains(&self, interval: Duration, now: Instant) -> bool {
        self.all > now + SHORTEST && interval.saturating_mul(2) <= self.slowest
    }

    /// Those that are due first come back sooner than they were told, the last one of them at `last`; perhaps these are
    /// all.
    pub(crate) fn recalled(&mut self, interval: Duration, last: Instant, all: bool) {
        self.last = self.last.min(last);
        if all {
            (self.all, self.slowest) = (self.last, interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn they_come_back_one_by_one() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert!(!pace.is_ahead(now));
        let from = now + Duration::from_secs(5);
        let waits: Vec<u128> = (0..3).map(|_| pace.next(now, from, INTERVAL, 0.5).as_millis()).collect();
        assert_eq!(waits, [5_100, 5_200, 5_300]);
        assert!(pace.is_ahead(from - SHORTEST));
        assert!(!pace.is_ahead(from));
        let later = now + Duration::from_secs(60);
        assert!(!pace.is_ahead(later));
        assert_eq!(pace.next(later, later, INTERVAL, 0.5), SHORTEST);
        assert!(!pace.is_ahead(later), "a single one does not make others wait");
    }

    #[tokio::test]
    async fn beyond_the_horizon_it_does_not_move_on() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let minute = Duration::from_secs(60);
        let waits: Vec<Duration> = (0..62).map(|_| pace.next(now, now, minute, 0.5)).collect();
        assert_eq!(waits[59], HORIZON);
        assert_eq!(waits[60], HORIZON.mul_f64(1.05));
        assert_eq!(waits[61], HORIZON.mul_f64(1.05));
        assert_eq!(pace.next(now + minute, now, minute, 0.0), HORIZON);
    }
}
