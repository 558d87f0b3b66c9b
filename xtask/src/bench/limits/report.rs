//! The figures with their limits: as a table, and as JSON.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{
    bench::{
        statistics::{median, spread},
        table::{row, show_columns},
    },
    ui::{self, BAD, GOOD, paint},
};

/// What the middle of a figure's values has to be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// One figure, with a value for each round.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Figure {
    what: String,
    values: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<Bound>,
}

impl Figure {
    /// One that is only told.
    pub(super) fn new(what: impl Into<String>, values: Vec<f64>) -> Self {
        Self { what: what.into(), values, bound: None }
    }

    /// How many times `other` each value is, which was measured in the same round, so that a machine that is busy meanwhile
    /// weighs on both.
    pub(super) fn ratio(what: impl Into<String>, values: &[f64], other: &[f64]) -> Self {
        Self::new(what, values.iter().zip(other).map(|(value, other)| value / other).collect())
    }

    pub(super) fn bound(self, bound: Bound) -> Self {
        Self { bound: Some(bound), ..self }
    }

    /// Whether it is within its bound, if it has one.
    fn holds(&self) -> Option<bool> {
        let value = median(&self.values);
        self.bound.map(|bound| match bound {
            Bound::AtLeast(least) => value >= least,
            Bound::AtMost(most) => value <= most,
        })
    }

    fn cells(&self) -> Vec<String> {
        let digits = match median(&self.values).abs() {
            value if value >= 1_000.0 => 0,
            value if value >= 10.0 => 1,
            value if value >= 1.0 => 2,
            _ => 3,
        };
        let bound = match self.bound {
            Some(Bound::AtLeast(least)) => format!("≥ {least}"),
            Some(Bound::AtMost(most)) => format!("≤ {most}"),
            None => String::new(),
        };
        let held = match self.holds() {
            Some(true) => paint(GOOD, "holds"),
            Some(false) => paint(BAD, "does not hold"),
            None => String::new(),
        };
        vec![self.what.clone(), spread(&self.values, digits), bound, held]
    }
}

/// All figures of one call.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    sections: Vec<Measured>,
}

#[derive(Debug, Serialize)]
struct Measured {
    section: &'static str,
    figures: Vec<Figure>,
}

impl Report {
    pub(super) fn add(&mut self, section: &'static str, figures: Vec<Figure>) {
        self.sections.push(Measured { section, figures });
    }

    pub(super) fn show(&self) {
        for Measured { section, figures } in &self.sections {
            let mut rows = vec![row([section, "median (min–max)", "limit", ""])];
            rows.extend(figures.iter().map(Figure::cells));
            show_columns(&rows);
        }
        ui::line("");
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// What is not within its bound.
    pub(super) fn exceeded(&self) -> Vec<String> {
        let figures = self
            .sections
            .iter()
            .flat_map(|Measured { section, figures }| figures.iter().map(move |figure| (section, figure)));
        let exceeded = figures.filter(|(_, figure)| figure.holds() == Some(false));
        exceeded.map(|(section, figure)| format!("{section}: {}", figure.what)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)]

    use super::*;

    #[test]
    fn the_middle_of_the_rounds_is_what_is_bound() {
        let ratio = Figure::ratio("rate", &[90.0, 50.0, 200.0], &[100.0, 100.0, 200.0]);
        assert_eq!(ratio.values, [0.9, 0.5, 1.0]);
        assert_eq!(ratio.holds(), None);
        let mut report = Report::default();
        let least = |bound| ratio.clone().bound(Bound::AtLeast(bound));
        report.add("held", vec![least(0.9), ratio.clone().bound(Bound::AtMost(0.9))]);
        assert!(report.exceeded().is_empty());
        report.add("not", vec![least(0.91), ratio.clone().bound(Bound::AtMost(0.89))]);
        assert_eq!(report.exceeded(), ["not: rate", "not: rate"]);
    }
}
