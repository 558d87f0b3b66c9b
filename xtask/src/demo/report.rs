//! What a person sees at the end: a table and one line.

use std::{fmt, time::Duration};

use super::{
    ledger::{Faults, Row},
    scenario::Shop,
};
use crate::ui::{self, BAD, FAINT, GOOD, STRONG, paint};

/// How the demo ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Events that the bus accepted.
    pub published: usize,
    /// Deliveries that there had to be.
    pub expected: usize,
    /// Of these, those that came.
    pub delivered: usize,
    /// Deliveries that came again.
    pub duplicates: usize,
    /// Everything else that must not happen: leaks, unwanted deliveries, bad signatures, changed ids.
    pub faults: usize,
}

impl Outcome {
    /// Whether the bus kept its promise. Duplicates are allowed: a crash may fall between the
    /// subscriber's answer and the acknowledgement.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.delivered == self.expected && self.faults == 0
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { published, expected, delivered, duplicates, .. } = self;
        let lost = expected - delivered;
        write!(
            f,
            "demo: published {published}, expected {expected}, delivered {delivered}, lost {lost}, duplicates {duplicates}"
        )
    }
}

/// The columns with their widths.
const NAME: usize = 13;
const COLUMNS: [(&str, usize); 7] = [
    ("published", 11),
    ("matched", 9),
    ("rejected", 10),
    ("delivered", 11),
    ("p50", 9),
    ("p99", 9),
    ("duplicates", 12),
];

/// Who asks for what, before it begins.
pub(super) fn subscriptions(shops: &[Shop]) {
    for shop in shops {
        ui::line(format!("\n  {}", paint(STRONG, shop.name)));
        for subscription in &shop.subscriptions {
            ui::line(format!("    {:NAME$} {}", subscription.name, paint(FAINT, subscription.describe())));
        }
    }
    ui::line("");
}

/// The table: a block for each shop, a row for each subscription.
pub(super) fn table(blocks: &[(Shop, Vec<Row>)]) {
    let cells = |texts: [String; 7]| -> [String; 7] {
        let mut widths = COLUMNS.iter().map(|(_, width)| *width);
        texts.map(|text| format!("{text:>width$}", width = widths.next().unwrap_or_default()))
    };
    let head = cells(COLUMNS.map(|(name, _)| name.to_owned())).concat();
    ui::line(format!("\n  {}", paint(FAINT, format!("  {:NAME$}{head}", ""))));
    for (shop, rows) in blocks {
        ui::line(format!("  {}", paint(STRONG, shop.name)));
        for (subscription, row) in shop.subscriptions.iter().zip(rows) {
            let mut cells = cells([
                row.published.to_string(),
                row.matched.to_string(),
                subscription.filter.map_or_else(|| "–".to_owned(), |_| row.filtered.to_string()),
                row.delivered.to_string(),
                latency(row.p50),
                latency(row.p99),
                row.duplicates.to_string(),
            ]);
            cells[3] = paint(if row.delivered == row.matched { GOOD } else { BAD }, &cells[3]);
            ui::line(format!("    {:NAME$}{}", subscription.name, cells.concat()));
        }
    }
    let legend = "rejected: by the filter, after type and publisher had matched\n  \
                  p50, p99: from publishing to the receiver";
    ui::line(format!("\n  {}", paint(FAINT, legend)));
}

/// The checks, good or bad.
pub(super) fn checks(faults: &Faults, deliveries: usize) {
    ui::line("");
    for (name, n) in [
        ("cross-organization leaks", faults.leaks),
        ("deliveries nobody asked for", faults.unwanted),
        ("repeats under another webhook-id", faults.renamed),
    ] {
        check(n == 0, &format!("{name}: {n}"));
    }
    check(
        faults.forged == 0,
        &format!("signatures that verify: {} of {deliveries}", deliveries - faults.forged),
    );
    for problem in &faults.told {
        ui::line(format!("      {}", paint(BAD, problem)));
    }
    ui::line("");
}

fn check(good: bool, text: &str) {
    let mark = if good { paint(GOOD, "✓") } else { paint(BAD, "✗") };
    ui::line(format!("  {mark} {text}"));
}

fn latency(latency: Option<Duration>) -> String {
    match latency {
        None => "–".to_owned(),
        Some(latency) if latency < Duration::from_secs(1) => format!("{} ms", latency.as_millis()),
        Some(latency) => format!("{:.1} s", latency.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::missing_docs_in_private_items)]

    use super::*;

    const GOOD_END: Outcome =
        Outcome { published: 400, expected: 760, delivered: 760, duplicates: 3, faults: 0 };

    #[test]
    fn the_last_line_is_what_scripts_read() {
        assert_eq!(
            GOOD_END.to_string(),
            "demo: published 400, expected 760, delivered 760, lost 0, duplicates 3"
        );
    }

    #[test]
    fn a_lost_delivery_or_a_fault_is_a_failure_and_a_duplicate_is_not() {
        assert!(GOOD_END.is_success());
        assert!(!Outcome { delivered: 759, ..GOOD_END }.is_success());
        assert!(!Outcome { faults: 1, ..GOOD_END }.is_success());
    }
}
