//! What a message is as rows in cold storage.

use async_nats::HeaderMap;
use bus_core::{
    audit::{Actor, Record},
    nats::Names,
    receipt::Receipt,
};
use cold_storage::{AUDIT, Batch, Dataset, Error, MESSAGES, RECEIPTS, Row, Value};
use serde_json::{Map, Value as Json, json};
use uuid::Uuid;

use super::read::{Range, Stored};

/// The messages as rows, and the last one that is among them: a batch may be full before the range ends.
pub(super) fn batch(range: &Range, names: &Names) -> Result<(Batch, u64), Error> {
    let mut fits = range.messages.len();
    loop {
        let mut batch = Batch::new();
        let messages = range.messages.iter().take(fits).enumerate();
        let full = messages.map(|(n, message)| push(&mut batch, message, names).map_err(|error| (n, error)));
        match full.collect::<Result<(), _>>() {
            Ok(()) => {
                let next = range.messages.get(fits).map(|message| message.sequence - 1);
                return Ok((batch, next.unwrap_or(range.last)));
            }
            // Once more, without the message that does not fit: it may have come in with half of its rows.
            Err((n, Error::BatchFull { .. })) if n > 0 => fits = n,
            Err((_, error)) => return Err(error),
        }
    }
}

fn push(batch: &mut Batch, message: &Stored, names: &Names) -> Result<(), Error> {
    for (dataset, row) in rows(message, names) {
        batch.push(dataset, row)?;
    }
    Ok(())
}

/// What cannot be read as what its subject promises is kept as it is.
fn rows(stored: &Stored, names: &Names) -> Vec<(&'static Dataset, Row)> {
    let (subject, payload) = (stored.message.subject.as_str(), &stored.message.payload);
    if names.is_receipt(subject) {
        if let Ok(receipts) = serde_json::from_slice::<Vec<Receipt>>(payload) {
            return receipts.into_iter().map(|receipt| (&RECEIPTS, self::receipt(receipt))).collect();
        }
    } else if names.is_audit_record(subject)
        && let Ok(record) = serde_json::from_slice::<Record>(payload)
    {
        return vec![(&AUDIT, self::record(record))];
    }
    vec![(&MESSAGES, message(stored))]
}

fn receipt(receipt: Receipt) -> Row {
    let int = |number: u32| Value::Int(i32::try_from(number).unwrap_or(i32::MAX));
    vec![
        Value::Uuid(receipt.delivery.0),
        int(receipt.attempt),
        Value::Long(receipt.turn),
        Value::Uuid(receipt.event.0),
        Value::Uuid(receipt.organization.0),
        Value::Uuid(receipt.subscription.0),
        Value::Uuid(receipt.connection.0),
        Value::Text(receipt.outcome.as_str().to_owned()),
        receipt.status.map_or(Value::Null, |status| Value::Int(status.into())),
        receipt.error.map_or(Value::Null, Value::Text),
        Value::Timestamp(receipt.at),
        int(receipt.duration_ms),
    ]
}

fn message(stored: &Stored) -> Row {
    let headers = stored.message.headers.as_ref();
    let of = |name: &str| headers.and_then(|headers| headers.get(name)?.as_str().parse::<Uuid>().ok());
    let subject = stored.message.subject.as_str();
    // Subjects of the bus name the organization before anything else that is a UUID.
    let organization = subject.split('.').find_map(|token| Uuid::parse_str(token).ok());
    vec![
        Value::Long(i64::try_from(stored.sequence).unwrap_or(i64::MAX)),
        Value::Text(subject.to_owned()),
        organization.map_or(Value::Null, Value::Uuid),
        of("Bus-Event").map_or(Value::Null, Value::Uuid),
        Value::Timestamp(stored.time),
        headers.map_or(Value::Null, |headers| Value::Json(as_json(headers))),
        Value::Bytes(stored.message.payload.clone()),
        Value::Null,
    ]
}

/// Each name with the list of its values.
fn as_json(headers: &HeaderMap) -> String {
    let fields = headers.iter().map(|(name, values)| {
        let values: Vec<&str> = values.iter().map(|value| value.as_str()).collect();
        (name.to_string(), json!(values))
    });
    Json::Object(fields.collect::<Map<_, _>>()).to_string()
}

fn record(record: Record) -> Row {
    let (actor, key, connection) = match record.actor {
        Actor::Key { key_id, connection_id } => ("key", Some(key_id.0), connection_id.map(|id| id.0)),
        Actor::Admin => ("admin", None, None),
        Actor::System => ("system", None, None),
    };
    let optional = |id: Option<Uuid>| id.map_or(Value::Null, Value::Uuid);
    let json = |value: Option<Json>| value.map_or(Value::Null, |value| Value::Json(value.to_string()));
    vec![
        Value::Uuid(record.id.0),
        optional(record.organization_id.map(|id| id.0)),
        Value::Timestamp(record.at),
        Value::Text(actor.to_owned()),
        optional(key),
        optional(connection),
        Value::Text(record.action),
        Value::Text(record.target.kind),
        Value::Text(record.target.id),
        json(record.before),
        json(record.after),
        record.request_id.map_or(Value::Null, Value::Text),
    ]
}
