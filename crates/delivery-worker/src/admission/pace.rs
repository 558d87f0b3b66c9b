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
    /// One more comes back after this time.
    last: Instant,
    /// From then on none is parked any more; later than `last` if some were told to come later before a recall.
    end: Instant,
    /// The longest pause among them.
    slowest: Duration,
    /// When one was told to wait, last.
    told_at: Option<Instant>,
    recall: Option<Recall>,
}

/// The last time that some were told to come back sooner.
#[derive(Debug)]
struct Recall {
    begun: Instant,
    interval: Duration,
    /// They are back by then.
    until: Instant,
}

impl Pace {
    /// Nothing is parked.
    pub(crate) fn new(now: Instant) -> Self {
        Self { last: now, end: now, slowest: Duration::ZERO, told_at: None, recall: None }
    }

    /// What others have parked is not known.
    pub(crate) fn unknown(now: Instant) -> Self {
        Self { end: now + HORIZON.mul_f64(1.0 + JITTER), slowest: HORIZON, ..Self::new(now) }
    }

    /// Whether some are to be back later than anybody who would be parked now for the shortest time: whoever comes now
    /// would overtake them.
    pub(crate) fn is_ahead(&self, now: Instant) -> bool {
        self.last > now + SHORTEST
    }

    /// How long one more is parked: until `interval` after the last one, and after `from`. `random` is in `0.0..1.0`.
    pub(crate) fn next(&mut self, now: Instant, from: Instant, interval: Duration, random: f64) -> Duration {
        let begin = self.last.max(now);
        let pause = interval.max(from.saturating_duration_since(begin));
        self.slowest = if self.end > now { self.slowest.max(pause) } else { pause };
        self.told_at = Some(now);
        let mut wait = begin.max(from).saturating_duration_since(now).saturating_add(interval);
        if wait > HORIZON {
            wait = HORIZON.mul_f64(1.0 + JITTER * random);
        } else {
            self.last = now + wait;
        }
        self.end = self.end.max(now + wait);
        wait.max(SHORTEST)
    }

    /// Whether those that are parked for long are to come back with this interval from now on: at least twice as fast, or
    /// what gains so little is not worth a statement. While some are on their way only a pace that is twice theirs is.
    pub(crate) fn recalls(&mut self, interval: Duration, now: Instant) -> bool {
        let on_their_way = self.recall.as_ref().filter(|recall| recall.until > now + SHORTEST);
        let slowest = on_their_way.map_or(self.slowest, |recall| recall.interval);
        let recent = self.recall.as_ref().is_some_and(|recall| now.duration_since(recall.begun) < SHORTEST);
        let recalls = !recent && self.end > now + SHORTEST && interval.saturating_mul(2) <= slowest;
        if recalls {
            self.recall = Some(Recall { begun: now, interval, until: now });
        }
        recalls
    }

    /// So many come back with this interval, those first that are due first; perhaps these are all.
    pub(crate) fn recalled(&mut self, interval: Duration, seen: u32, all: bool, now: Instant) {
        let until = now + interval.saturating_mul(seen);
        let Some(recall) = &mut self.recall else { return };
        recall.until = until;
        // What finds no room comes behind them, and not behind those that are still to be recalled.
        self.last = self.last.min(until);
        // Those that were told a moment ago, or since, may not have been among them.
        let missed = self.told_at.is_some_and(|told| told + SHORTEST > recall.begun);
        if all && !missed {
            (self.end, self.slowest) = (until, interval);
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
