//! The few numbers that stand for many.

use std::time::Duration;

/// The one in the middle.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// `median (least–most)`.
pub(super) fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{:.digits$} ({least:.digits$}–{most:.digits$})", median(values))
}

/// Of 1,000 that many take at most as long.
pub(super) fn quantile(sorted: &[Duration], of_1_000: usize) -> Duration {
    let place = sorted.len().saturating_sub(1) * of_1_000 / 1_000;
    sorted.get(place).copied().unwrap_or_default()
}
