//! The event of an occurrence.

use jiff::Timestamp;

use crate::{
    cloudevent::{CloudEvent, ExtensionValue},
    ids::{EventUid, ScheduleId},
};

/// The extension attribute that names an occurrence's schedule.
pub const SCHEDULE_ID: &str = "scheduleid";

/// The extension attribute with an occurrence's nominal time; one that was triggered by hand has none.
pub const SCHEDULED_TIME: &str = "scheduledtime";

/// What a schedule publishes: its template, with an id and a time of its own.
pub fn occurrence(
    template: &CloudEvent,
    schedule: ScheduleId,
    uid: EventUid,
    time: Timestamp,
    tick: Option<Timestamp>,
) -> CloudEvent {
    let mut event = CloudEvent { id: uid.to_string(), time: Some(time), ..template.clone() };
    let mut set = |name: &str, value: String| {
        event.extensions.insert(name.to_owned(), ExtensionValue::String(value));
    };
    set(SCHEDULE_ID, schedule.to_string());
    if let Some(tick) = tick {
        set(SCHEDULED_TIME, tick.to_string());
    }
    event
}
