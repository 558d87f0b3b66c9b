//! Events as JSON objects: structured and batched mode (CloudEvents JSON format), and the bus's own
//! plain form, which leaves out what the bus can fill in.

use std::{collections::BTreeSet, fmt};

use jiff::Timestamp;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{
    Draft, ExtensionValue, Limits, MAX_EXTENSIONS,
    attributes::{Attributes, DELIVER_AT, check_specversion},
    error::{EventError, EventErrorKind, shortened},
    payload, recurring,
};

/// Members of an envelope: the attributes and the payload, with room for a few `null` ones.
const MAX_MEMBERS: usize = MAX_EXTENSIONS + 16;

/// How much of CloudEvents an object must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The JSON event format: `specversion`, `id`, `source` and `type`.
    Structured,
    /// Plain JSON: `type`.
    Plain,
}

/// Reads one event; for the bound see [`Limits`].
pub(super) fn event(text: &[u8], form: Form, deliver_before: Option<Timestamp>) -> Result<Draft, EventError> {
    if first(text) != Some(b'{') {
        return Err(EventError::malformed(
            "an event must be a JSON object, like {\"type\": \"order.created\"}",
        ));
    }
    let Members(mut members) = serde_json::from_slice(text)
        .map_err(|error| EventError::malformed(format!("not an event: {error}")))?;
    match form {
        Form::Structured => read(&members, form, deliver_before),
        Form::Plain => {
            let schedule = recurring::take(&mut members)?;
            let draft = read(&members, form, deliver_before)?;
            if schedule.is_some() && draft.deliver_at.is_some() {
                let name =
                    members.iter().map(|(name, _)| name.as_str()).find(|name| is_deliver_at(name, form));
                let detail =
                    "an event either recurs or is delivered at one time: leave out `cron` or `deliverAt`";
                return Err(EventError::attribute(detail).at_member(name.unwrap_or(DELIVER_AT)));
            }
            Ok(Draft { schedule: schedule.map(Box::new), ..draft })
        }
    }
}

/// Reads an array of events.
pub(super) fn batch(text: &[u8], form: Form, limits: &Limits) -> Result<Vec<Draft>, EventError> {
    let most = limits.max_batch;
    if first(text) != Some(b'[') {
        return Err(EventError::malformed("a batch must be a JSON array of events"));
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    let items = Items { most }
        .deserialize(&mut reader)
        .and_then(|items| reader.end().map(|()| items))
        .map_err(|error| EventError::malformed(format!("not a batch of events: {error}")))?;
    let Some(items) = items else {
        return Err(EventError::new(
            EventErrorKind::TooMany,
            format!("a batch has at most {most} events; send the others in further requests"),
        ));
    };
    items
        .into_iter()
        .enumerate()
        .map(|(index, item)| {
            event(item.get().as_bytes(), form, limits.deliver_before).map_err(|error| error.in_batch(index))
        })
        .collect()
}

/// The first byte that is no blank of JSON.
pub(super) fn first(text: &[u8]) -> Option<u8> {
    text.iter().copied().find(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))
}

/// The two names of one attribute.
fn is_deliver_at(name: &str, form: Form) -> bool {
    name == DELIVER_AT || (name == "deliverAt" && form == Form::Plain)
}

fn read(
    members: &[(String, &RawValue)],
    form: Form,
    deliver_before: Option<Timestamp>,
) -> Result<Draft, EventError> {
    let mut attributes = Attributes::new(deliver_before);
    let (mut data, mut bytes, mut version) = (None, None, false);
    let mut seen = BTreeSet::new();
    for (name, value) in members {
        let name = name.as_str();
        if !seen.insert(name) {
            let detail = format!("`{}` is there twice; leave one of them out", shortened(name));
            return Err(EventError::attribute(detail).at_member(name));
        }
        if name == "data" {
            data = Some(*value);
            continue;
        }
        // A `null` attribute is one that is not there (JSON format §2.2). A `null` payload is one.
        if value.get() == "null" {
            continue;
        }
        if name == "data_base64" || (name == "dataBase64" && form == Form::Plain) {
            if bytes.replace((name, *value)).is_some() {
                let detail = "`data_base64` and `dataBase64` are the same; leave one of them out";
                return Err(EventError::attribute(detail).at_member(name));
            }
            continue;
        }
        scalar(value)
            .and_then(|value| match (name, value) {
                ("specversion", ExtensionValue::String(text)) => {
                    version = true;
                    check_specversion(&text)
                }
                ("specversion", _) => check_specversion(""),
                (name, value) if is_deliver_at(name, form) => attributes.set(DELIVER_AT, value),
                (_, value) => attributes.set(name, value),
            })
            .map_err(|error| error.at_member(name))?;
    }
    if form == Form::Structured && !version {
        let detail = "`specversion` is missing; it must be \"1.0\"";
        return Err(EventError::attribute(detail).at_member("specversion"));
    }
    let content_type = attributes.datacontenttype();
    let payload = match (data, bytes) {
        (None, None) => None,
        (Some(data), None) => Some(payload::from_member(data, content_type)?),
        (None, Some((name, value))) => Some(encoded(name, value, content_type)?),
        (Some(_), Some((name, _))) => {
            let detail = format!("an event has either `data` or `{name}`, not both");
            return Err(EventError::attribute(detail).at_member(name));
        }
    };
    let draft = attributes.finish(form == Form::Structured).map_err(EventError::missing)?;
    Ok(Draft { data: payload, ..draft })
}

fn encoded(name: &str, value: &RawValue, content_type: Option<&str>) -> Result<super::Data, EventError> {
    let text: String = serde_json::from_str(value.get())
        .map_err(|_| EventError::data(format!("`{name}` must be a string in Base64")).at_member(name))?;
    payload::from_base64(&text, content_type).map_err(|error| match error.pointer {
        Some(_) => error,
        None => error.at_member(name),
    })
}

/// An attribute's value, by the types that CloudEvents has (JSON format §2.2).
fn scalar(value: &RawValue) -> Result<ExtensionValue, EventError> {
    let text = value.get();
    match text.as_bytes()[0] {
        b'"' => serde_json::from_str(text)
            .map(ExtensionValue::String)
            .map_err(|error| EventError::attribute(format!("not a Unicode string: {error}"))),
        b't' => Ok(ExtensionValue::Bool(true)),
        b'f' => Ok(ExtensionValue::Bool(false)),
        b'{' | b'[' => Err(EventError::attribute(
            "an attribute is a string, a boolean or an integer; arrays and objects belong into `data`",
        )),
        _ => text.parse().map(ExtensionValue::Integer).map_err(|_| {
            EventError::attribute(
                "a number in an attribute is an integer between -2147483648 and 2147483647; write others as strings",
            )
        }),
    }
}

/// The members of an object in their order, duplicates and all.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(16);
                while let Some(member) = map.next_entry()? {
                    if members.len() == MAX_MEMBERS {
                        return Err(A::Error::custom(format!("more than {MAX_MEMBERS} members")));
                    }
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// The items of an array, or `None` if there are more than allowed.
struct Items {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Items {
    type Value = Option<Vec<&'de RawValue>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items {
    type Value = Option<Vec<&'de RawValue>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (mut items, mut count) = (Vec::new(), 0);
        while let Some(item) = seq.next_element()? {
            count += 1;
            if count <= self.most {
                items.push(item);
            }
        }
        Ok((count <= self.most).then_some(items))
    }
}
