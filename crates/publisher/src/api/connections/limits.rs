//! How much a connection takes, as it is asked for.

use bus_core::connection::{Limits, RateLimit};

use super::FieldError;

const MAX_IN_FLIGHT: u32 = 10_000;
const MIN_RATE: f64 = 0.001;
const MAX_RATE: f64 = 100_000.0;
const MAX_BURST: u32 = 100_000;

pub(super) fn read_limits(
    max_in_flight: Option<u32>,
    rate_per_second: Option<f64>,
    burst: Option<u32>,
) -> Result<Limits, FieldError> {
    if max_in_flight.is_some_and(|most| !(1..=MAX_IN_FLIGHT).contains(&most)) {
        let detail = format!("maxInFlight must be from 1 to {MAX_IN_FLIGHT}");
        return Err(FieldError::at("/maxInFlight", detail));
    }
    if rate_per_second.is_some_and(|rate| !(MIN_RATE..=MAX_RATE).contains(&rate)) {
        let detail = format!("ratePerSecond must be from {MIN_RATE} to {MAX_RATE}");
        return Err(FieldError::at("/ratePerSecond", detail));
    }
    if burst.is_some_and(|burst| !(1..=MAX_BURST).contains(&burst)) {
        return Err(FieldError::at("/burst", format!("burst must be from 1 to {MAX_BURST}")));
    }
    if burst.is_some() && rate_per_second.is_none() {
        return Err(FieldError::at("/burst", "a burst needs a ratePerSecond"));
    }
    Ok(Limits { max_in_flight, rate: rate_per_second.map(|per_second| RateLimit { per_second, burst }) })
}
