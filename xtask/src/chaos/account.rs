//! What the bus says of itself at the end, through its API: when it has nothing more to do, and what it has given up.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use devkit::{client::ApiClient, stack::Stack};
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::sleep;

use super::{
    ledger::{Dead, Entry, Ledger},
    scene::Tenant,
};

/// How long the bus may take to finish when all is whole again and nothing more is published.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks, and how many in a row must find nothing.
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: usize = 3;
/// So many where deliveries may have been lost that are still to be found missing.
const LOOKS_FOR_LOST: usize = 40;

/// Waits until nothing is queued, parked, due or planned. What is then still missing will not come.
pub(super) async fn settled(
    stack: &Stack,
    tenants: &[Tenant],
    schedules: &[(Tenant, String)],
    something_lost: bool,
) -> Result<Result<(), String>> {
    let looks = if something_lost { LOOKS_FOR_LOST } else { LOOKS };
    let until = Instant::now() + PATIENCE;
    let mut idle = 0;
    loop {
        let open = open(stack, tenants, schedules).await;
        match &open {
            Ok(None) => idle += 1,
            _ => idle = 0,
        }
        if idle == looks {
            return Ok(Ok(()));
        }
        if Instant::now() >= until {
            return Ok(Err(match open {
                Ok(open) => open.unwrap_or_else(|| "it is not idle for long".to_owned()),
                Err(error) => format!("{error:#}"),
            }));
        }
        sleep(LOOK).await;
    }
}

/// What is still to come, if anything.
async fn open(stack: &Stack, tenants: &[Tenant], schedules: &[(Tenant, String)]) -> Result<Option<String>> {
    for tenant in tenants {
        let page = tenant.api.get("/v1/events?status=scheduled&limit=1").await?.require(200)?;
        if page.body["items"].as_array().is_some_and(|items| !items.is_empty()) {
            return Ok(Some("events are due later".to_owned()));
        }
    }
    for (tenant, schedule) in schedules {
        let found = tenant.api.get(&format!("/v1/schedules/{schedule}")).await?.require(200)?;
        if found.body["state"] != "ended" {
            return Ok(Some(format!("schedule {schedule} is {}", found.body["state"])));
        }
    }
    let waiting = stack.undelivered().await?;
    Ok((waiting > 0).then(|| format!("{waiting} deliveries wait")))
}

/// Writes down what the bus says that it has given up, and what became of every tick.
pub(super) async fn note(tenants: &[Tenant], schedules: &[(Tenant, String)], ledger: &Ledger) -> Result<()> {
    for tenant in tenants {
        for letter in all(&tenant.api, "/v1/dead-letters?limit=200").await? {
            let text = |pointer: &str| {
                letter.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let attempts = letter["attempts"].as_u64().unwrap_or_default();
            let died: Timestamp = text("/diedAt").parse()?;
            let dead = Dead {
                connection: text("/connectionId"),
                delivery: text("/id"),
                uid: text("/event/uid"),
                reason: text("/reason"),
                attempts: u32::try_from(attempts)?,
            };
            ledger.write_at(died, Entry::Dead(dead));
        }
    }
    for (tenant, schedule) in schedules {
        for tick in all(&tenant.api, &format!("/v1/schedules/{schedule}/occurrences?limit=200")).await? {
            let second = |name: &str| -> Result<i64> {
                Ok(tick[name].as_str().unwrap_or_default().parse::<Timestamp>()?.as_second())
            };
            ledger.write(Entry::Tick {
                schedule: schedule.clone(),
                state: tick["state"].as_str().unwrap_or_default().to_owned(),
                first: second("tick")?,
                last: second("lastTick")?,
                uid: tick["eventUid"].as_str().map(str::to_owned),
            });
        }
    }
    Ok(())
}

/// All parts of a list.
async fn all(api: &ApiClient, path: &str) -> Result<Vec<Value>> {
    let mut items = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let page = match &cursor {
            None => path.to_owned(),
            Some(cursor) => format!("{path}&cursor={cursor}"),
        };
        let mut reply = api.get(&page).await?.require(200)?;
        let Value::Array(part) = reply.body["items"].take() else { anyhow::bail!("{path} is no list") };
        items.extend(part);
        let next = reply.body["nextCursor"].as_str().map(str::to_owned);
        ensure!(next.is_none() || next != cursor, "{path} does not go on");
        match next {
            None => return Ok(items),
            next => cursor = next,
        }
    }
}
