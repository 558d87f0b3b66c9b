//! The circuit breaker of one connection: an endpoint that fails is left alone for a while, and then asked carefully.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::BreakerConfig;

/// The window's parts; as time goes on the oldest one is forgotten.
const PARTS: usize = 6;

/// To each open period at most this share of it is added, so that workers do not probe in step.
const JITTER: f64 = 0.1;

/// How one connection's endpoint does, as far as this worker knows.
#[derive(Debug)]
pub(crate) struct Breaker {
    state: State,
    /// Counts the changes of `state`. What was asked for before one says nothing after it.
    era: u64,
    window: Window,
    /// Failures without a success in between.
    consecutive: u32,
    /// Open periods without a whole window of health in between.
    openings: u32,
    closed_at: Instant,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Closed,
    Open { until: Instant },
    HalfOpen { probing: u32 },
}

/// Whether an attempt may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// It may. What comes of it is to be reported, or [abandoned](Breaker::abandon).
    Granted(Ticket),
    /// Not before this time.
    Refused(Instant),
}

/// The right to one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket {
    era: u64,
    pub(crate) is_probe: bool,
}

/// What a report led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The endpoint is left alone for this long.
    Opened(Duration),
    /// The endpoint works again.
    Closed,
}

impl Breaker {
    /// A closed one.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            state: State::Closed,
            era: 0,
            window: Window::new(now),
            consecutive: 0,
            openings: 0,
            closed_at: now,
        }
    }

    /// Forgets all: the endpoint may be another one.
    pub(crate) fn reset(&mut self, now: Instant) {
        let era = self.era + 1;
        *self = Self { era, ..Self::new(now) };
    }

    /// Its state's name, as metrics tell it.
    pub(crate) fn state(&self) -> &'static str {
        match self.state {
            State::Closed => "closed",
            State::Open { .. } => "open",
            State::HalfOpen { .. } => "half_open",
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// While it is open, until when.
    pub(crate) fn open_until(&self) -> Option<Instant> {
        match self.state {
            State::Open { until } => Some(until),
            State::Closed | State::HalfOpen { .. } => None,
        }
    }

    /// Asks for one attempt.
    pub(crate) fn ask(&mut self, now: Instant, rules: &BreakerConfig) -> Pass {
        if let State::Open { until } = self.state {
            if now < until {
                return Pass::Refused(until);
            }
            self.change(State::HalfOpen { probing: 0 });
        }
        let era = self.era;
        match &mut self.state {
            State::HalfOpen { probing } if *probing < rules.probes => {
                *probing += 1;
                Pass::Granted(Ticket { era, is_probe: true })
            }
            State::HalfOpen { .. } => Pass::Refused(now),
            _ => Pass::Granted(Ticket { era, is_probe: false }),
        }
    }

    /// There will be no report.
    pub(crate) fn abandon(&mut self, ticket: Ticket) {
        if let State::HalfOpen { probing } = &mut self.state
            && ticket.era == self.era
        {
            *probing = probing.saturating_sub(1);
        }
    }

    /// An attempt has ended, and its endpoint `failed` or did not. `random` is in `0.0..1.0`.
    pub(crate) fn report(
        &mut self,
        ticket: Ticket,
        failed: bool,
        now: Instant,
        rules: &BreakerConfig,
        random: f64,
    ) -> Option<Change> {
        if ticket.era != self.era || !rules.enabled {
            return None;
        }
        match self.state {
            State::Open { .. } => None,
            State::HalfOpen { .. } if failed => Some(self.open(now, rules, random)),
            State::HalfOpen { .. } => {
                self.change(State::Closed);
                self.closed_at = now;
                Some(Change::Closed)
            }
            State::Closed => {
                self.consecutive = if failed { self.consecutive.saturating_add(1) } else { 0 };
                let seen = self.window.add(failed, now, rules.window());
                let opens = failed
                    && (self.consecutive >= rules.consecutive
                        || (seen.made >= rules.min_attempts && seen.failure_rate() >= rules.failure_rate));
                if opens && now.duration_since(self.closed_at) >= rules.window() {
                    self.openings = 0;
                }
                opens.then(|| self.open(now, rules, random))
            }
        }
    }

    fn open(&mut self, now: Instant, rules: &BreakerConfig, random: f64) -> Change {
        let most = Duration::from_millis(rules.open_max_ms);
        let growth = 2_u32.saturating_pow(self.openings);
        let period = Duration::from_millis(rules.open_ms).saturating_mul(growth).min(most);
        let period = period.mul_f64(1.0 + JITTER * random);
        self.openings = self.openings.saturating_add(1);
        self.change(State::Open { until: now + period });
        self.window = Window::new(now);
        self.consecutive = 0;
        Change::Opened(period)
    }

    fn change(&mut self, state: State) {
        self.state = state;
        self.era += 1;
    }
}

/// Attempts of the last while.
#[derive(Debug)]
struct Window {
    begun: Instant,
    /// The part that is counted in now, since the beginning.
    part: u128,
    counts: [Seen; PARTS],
}

#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    made: u32,
    failed: u32,
}

impl Seen {
    fn failure_rate(self) -> f64 {
        f64::from(self.failed) / f64::from(self.made.max(1))
    }
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { begun: now, part: 0, counts: [Seen::default(); PARTS] }
    }

    /// Counts an attempt, and gives all of the last `length`.
    fn add(&mut self, failed: bool, now: Instant, length: Duration) -> Seen {
        let part = now.duration_since(self.begun).as_nanos() * PARTS as u128 / length.as_nanos().max(1);
        let slot = |part: u128| usize::try_from(part % PARTS as u128).unwrap_or(0);
        for passed in (self.part + 1..=part).rev().take(PARTS) {
            self.counts[slot(passed)] = Seen::default();
        }
        self.part = part;
        let now = &mut self.counts[slot(part)];
        now.made = now.made.saturating_add(1);
        now.failed = now.failed.saturating_add(u32::from(failed));
        self.counts.iter().fold(Seen::default(), |sum, part| Seen {
            made: sum.made.saturating_add(part.made),
            failed: sum.failed.saturating_add(part.failed),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const RULES: BreakerConfig = BreakerConfig {
        enabled: true,
        window_s: 30,
        min_attempts: 10,
        failure_rate: 0.8,
        consecutive: 10,
        open_ms: 5_000,
        open_max_ms: 20_000,
        probes: 2,
        disable_after_s: 0,
    };

    struct Scene {
        breaker: Breaker,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self { breaker: Breaker::new(now), now }
        }

        fn passes(&mut self, seconds: f64) {
            self.now += Duration::from_secs_f64(seconds);
        }

        fn ask(&mut self) -> Ticket {
            match self.breaker.ask(self.now, &RULES) {
                Pass::Granted(ticket) => ticket,
                Pass::Refused(until) => panic!("refused for {:?}", until.duration_since(self.now)),
            }
        }

        fn refused_for(&mut self) -> Duration {
            match self.breaker.ask(self.now, &RULES) {
                Pass::Granted(ticket) => panic!("granted {ticket:?}"),
                Pass::Refused(until) => until.duration_since(self.now),
            }
        }

        fn report(&mut self, ticket: Ticket, failed: bool) -> Option<Change> {
            self.breaker.report(ticket, failed, self.now, &RULES, 0.0)
        }

        fn attempt(&mut self, failed: bool) -> Option<Change> {
            let ticket = self.ask();
            self.report(ticket, failed)
        }

        /// Fails until it opens.
        fn open(&mut self) -> Duration {
            let opened = (0..RULES.consecutive).find_map(|_| self.attempt(true));
            let Some(Change::Opened(period)) = opened else { panic!("{opened:?}") };
            period
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn consecutive_failures_open_it_and_a_success_in_between_does_not() {
        let mut scene = Scene::new();
        for _ in 0..RULES.consecutive - 1 {
            assert_eq!(scene.attempt(true), None);
        }
        assert_eq!(scene.attempt(false), None);
        // One in ten succeeded: the rate is too high all the same, now that there are enough.
        assert_eq!(scene.attempt(true), Some(Change::Opened(5 * SECOND)));
        assert_eq!(scene.refused_for(), 5 * SECOND);
    }

    #[tokio::test]
    async fn failures_that_are_over_are_forgotten() {
        let mut scene = Scene::new();
        for _ in 0..4 {
            for _ in 0..RULES.consecutive - 1 {
                assert_eq!(scene.attempt(true), None);
            }
            assert_eq!(scene.attempt(false), None);
            scene.passes(31.0);
        }
        assert_eq!(scene.attempt(true), None);
        assert!(scene.breaker.is_closed());
    }

    #[tokio::test]
    async fn a_rate_below_the_limit_leaves_it_closed() {
        let mut scene = Scene::new();
        for n in 0..400 {
            assert_eq!(scene.attempt(n % 4 != 0), None, "three of four fail");
            scene.passes(0.1);
        }
    }

    #[tokio::test]
    async fn a_few_probes_decide_and_open_periods_grow_up_to_a_limit() {
        let mut scene = Scene::new();
        let mut period = scene.open();
        for expected in [5, 10, 20, 20] {
            assert_eq!(period, expected * SECOND);
            scene.passes(period.as_secs_f64() - 0.001);
            assert_eq!(scene.refused_for(), Duration::from_millis(1));
            scene.passes(0.001);
            let (one, other) = (scene.ask(), scene.ask());
            assert!(one.is_probe && other.is_probe);
            assert_eq!(scene.refused_for(), Duration::ZERO, "two are under way");
            let Some(Change::Opened(next)) = scene.report(one, true) else { panic!("it stayed half-open") };
            assert_eq!(scene.report(other, false), None, "what was asked before comes too late");
            period = next;
        }
        scene.passes(period.as_secs_f64());
        assert_eq!(scene.attempt(false), Some(Change::Closed));
        // Not healthy for long enough: it goes on growing.
        assert_eq!(scene.open(), 20 * SECOND);
        scene.passes(21.0);
        assert_eq!(scene.attempt(false), Some(Change::Closed));
        scene.passes(30.0);
        assert_eq!(scene.open(), 5 * SECOND, "after a whole window of health it begins anew");
    }

    #[tokio::test]
    async fn a_probe_that_was_not_made_leaves_its_place_to_another() {
        let mut scene = Scene::new();
        let before = scene.ask();
        scene.open();
        scene.passes(5.0);
        let (one, _) = (scene.ask(), scene.ask());
        scene.breaker.abandon(before);
        assert_eq!(scene.refused_for(), Duration::ZERO, "that was none");
        scene.breaker.abandon(one);
        assert!(scene.ask().is_probe);
        assert_eq!(scene.breaker.state(), "half_open");
    }

    #[tokio::test]
    async fn what_was_under_way_when_it_opened_changes_nothing() {
        let mut scene = Scene::new();
        let late: Vec<Ticket> = (0..50).map(|_| scene.ask()).collect();
        scene.open();
        for (n, ticket) in late.into_iter().enumerate() {
            assert_eq!(scene.report(ticket, n % 2 == 0), None);
        }
        assert_eq!(scene.refused_for(), 5 * SECOND);
    }
}
