//! How far it is: one line that moves on a terminal, a line now and then elsewhere.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use crate::ui::{self, FAINT, GOOD, paint};

/// How often a terminal's line is drawn.
const TERMINAL: Duration = Duration::from_millis(80);
/// How often a line is written where no terminal is, and when nothing has changed.
const PLAIN: Duration = Duration::from_secs(1);
const PLAIN_IDLE: Duration = Duration::from_secs(4);
/// The width of the bar.
const WIDTH: usize = 30;

/// The progress of the demo.
pub(super) struct Progress {
    events: usize,
    deliveries: usize,
    start: Instant,
    drawn: Option<Instant>,
    terminal: bool,
    published: usize,
    delivered: usize,
    /// What the line showed last.
    shown: Option<(usize, usize)>,
    phase: String,
}

impl Progress {
    pub(super) fn new(events: usize, deliveries: usize) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self {
            events,
            deliveries,
            start: Instant::now(),
            drawn: None,
            terminal,
            published: 0,
            delivered: 0,
            shown: None,
            phase: String::new(),
        }
    }

    pub(super) fn published(&mut self, n: usize) {
        self.published += n;
    }

    /// Takes the present number of deliveries, and shows it if it is time.
    pub(super) fn delivered(&mut self, n: usize) {
        self.delivered = n;
        let interval = match self.terminal {
            true => TERMINAL,
            false if self.shown == Some((self.published, self.delivered)) => PLAIN_IDLE,
            false => PLAIN,
        };
        if self.drawn.is_none_or(|drawn| drawn.elapsed() >= interval) {
            self.draw();
        }
    }

    /// Says what takes so long.
    pub(super) fn wait_for(&mut self, phase: String) {
        self.phase = phase;
    }

    /// A line of the story, above the moving one.
    pub(super) fn tell(&mut self, text: &str) {
        self.clear();
        ui::line(format!("  {text}"));
        if self.terminal {
            self.draw();
        }
    }

    /// The last state stays.
    pub(super) fn finish(&mut self) {
        self.phase.clear();
        self.draw();
        if self.terminal {
            ui::line("");
        }
    }

    fn clear(&self) {
        if self.terminal {
            anstream::print!("\r\x1b[2K");
        }
    }

    fn draw(&mut self) {
        self.drawn = Some(Instant::now());
        self.shown = Some((self.published, self.delivered));
        let filled = (WIDTH * self.delivered).checked_div(self.deliveries).unwrap_or(WIDTH).min(WIDTH);
        let bar = format!("{}{}", paint(GOOD, "━".repeat(filled)), paint(FAINT, "━".repeat(WIDTH - filled)));
        let again = match self.delivered.saturating_sub(self.deliveries) {
            0 => String::new(),
            n => format!(" + {n} again"),
        };
        let counts = format!(
            "published {:>4}/{}   delivered {:>4}/{}{again}",
            self.published,
            self.events,
            self.delivered.min(self.deliveries),
            self.deliveries
        );
        let time = paint(FAINT, format!("{}  {}", ui::elapsed(self.start.elapsed()), self.phase));
        if self.terminal {
            self.clear();
            anstream::print!("  {bar}  {counts}   {time}");
            // Shown at once, or not at all if nobody looks.
            let _ = std::io::stdout().flush();
        } else {
            ui::line(format!("    {counts}   {time}"));
        }
    }
}
