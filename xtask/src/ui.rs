//! What the terminal shows. Colour is dropped where it is not wanted: no terminal, or `NO_COLOR`.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anstyle::{AnsiColor, Style};

/// Names and numbers to look at.
pub const STRONG: Style = Style::new().bold();
/// What is less important.
pub const FAINT: Style = Style::new().dimmed();
/// What went well.
pub const GOOD: Style = AnsiColor::Green.on_default().bold();
/// What went wrong.
pub const BAD: Style = AnsiColor::Red.on_default().bold();

/// A text in a style.
#[must_use]
pub fn paint(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// A line.
pub fn line(text: impl std::fmt::Display) {
    anstream::println!("{text}");
}

/// The error that ends the command, with what caused it.
pub fn failure(error: &anyhow::Error) {
    anstream::eprintln!("{}: {error:#}", paint(BAD, "error"));
}

/// A duration as people write it: `0.8 s`, `2 min 05 s`.
#[must_use]
pub fn elapsed(duration: Duration) -> String {
    if duration < Duration::from_secs(60) {
        format!("{:.1} s", duration.as_secs_f64())
    } else {
        format!("{} min {:02} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

/// Something that takes a moment: says what begins, and how long it took.
///
/// One that is dropped without being done has failed; what failed is said by the error.
#[derive(Debug)]
pub struct Step {
    start: Instant,
    done: bool,
}

impl Step {
    /// Says what begins.
    pub fn begin(what: &str) -> Self {
        anstream::print!("  {what} … ");
        // Shown at once, or not at all if nobody looks.
        let _ = std::io::stdout().flush();
        Self { start: Instant::now(), done: false }
    }

    /// Says that it is done.
    pub fn done(mut self) {
        line(paint(FAINT, elapsed(self.start.elapsed())));
        self.done = true;
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.done {
            line(paint(BAD, "failed"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::missing_docs_in_private_items)]

    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(elapsed(Duration::from_millis(840)), "0.8 s");
        assert_eq!(elapsed(Duration::from_secs(125)), "2 min 05 s");
    }
}
