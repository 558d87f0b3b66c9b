//! CloudEvents 1.0.2: reading them from HTTP requests in every mode, and writing them.
//!
//! [`parse_http`] tells the mode by the headers, as the HTTP binding says (§3), with one mode more:
//!
//! | mode | recognized by | body |
//! |---|---|---|
//! | batched | `Content-Type: application/cloudevents-batch+json` | an array of events in the JSON format |
//! | structured | `Content-Type: application/cloudevents+json` | one event in the JSON format |
//! | binary | any header that starts with `ce-` | the payload |
//! | plain | `Content-Type: application/json`, or none | `{"type", "data"?, …}`, or an array of such |
//!
//! In plain mode only `type` is required: the bus fills in `id`, `source` and `time`, and payloads
//! that are bytes may also be called `dataBase64`. The extension attribute `deliverat` says when an event
//! is to be delivered, and may be called `deliverAt` there; an event with `cron` recurs.
//!
//! What is checked, beyond the specification: `id` and `type` have at most 255 characters, `source`,
//! `subject` and `dataschema` at most 1024, all attributes together [`MAX_ATTRIBUTE_BYTES`]; there are
//! at most [`MAX_EXTENSIONS`] extension attributes, with names of up to 20 characters; no member is
//! there twice. `source` and `dataschema` are checked only for characters that no URI-reference has.
//! A JSON payload is any JSON value whose numbers fit a double and whose arrays and objects nest at
//! most [`MAX_DEPTH`] deep, so that filters can read it; it travels on byte by byte as it was written,
//! apart from blanks around it. Any other payload is bytes: `application/json` and `*+json` are JSON,
//! and so is a payload without a content type unless it comes in Base64.

mod attributes;
mod binary;
mod envelope;
mod error;
mod media_type;
mod payload;
mod recurring;
mod structured;

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_TYPE};
use jiff::Timestamp;
use serde_json::value::RawValue;

use self::{envelope::Form, media_type::MediaType};

pub use self::{
    error::{EventError, EventErrorKind},
    recurring::ScheduleDraft,
};

/// The most extension attributes of an event.
pub const MAX_EXTENSIONS: usize = 32;
/// The most bytes in the names and values of an event's attributes.
pub const MAX_ATTRIBUTE_BYTES: usize = 16 * 1024;
/// The content type of an event in structured mode.
pub const STRUCTURED_CONTENT_TYPE: &str = "application/cloudevents+json; charset=utf-8";
/// The content type of events in batched mode.
pub const BATCH_CONTENT_TYPE: &str = "application/cloudevents-batch+json; charset=utf-8";
/// How deep arrays and objects in a JSON payload may nest. An event within a batch then stays within
/// the 127 levels that `serde_json`, and with it many a receiver, reads.
pub const MAX_DEPTH: usize = 120;

/// An event, complete and checked.
///
/// The fields hold what the rules of this module let through; code that fills them in itself keeps to
/// the rules.
#[derive(Debug, Clone, PartialEq)]
pub struct CloudEvent {
    /// Names the event, uniquely for its source.
    pub id: String,
    /// Where the event happened, a URI-reference.
    pub source: String,
    /// What kind of event it is; subscriptions match it.
    pub r#type: String,
    /// What the event is about, within its source.
    pub subject: Option<String>,
    /// When it happened.
    pub time: Option<Timestamp>,
    /// The media type of the payload.
    pub datacontenttype: Option<String>,
    /// The schema that the payload follows, a URI.
    pub dataschema: Option<String>,
    /// All other attributes.
    pub extensions: BTreeMap<String, ExtensionValue>,
    /// The payload. None at all is another thing than `null`.
    pub data: Option<Data>,
}

/// The value of an extension attribute. In binary mode all are strings, since headers have no types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtensionValue {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number of 32 bits.
    Integer(i32),
    /// Text, and whatever is written as text: bytes, times, URIs.
    String(String),
}

impl ExtensionValue {
    /// The length of the canonical string representation, in bytes.
    fn len(&self) -> usize {
        match self {
            Self::String(text) => text.len(),
            Self::Bool(_) | Self::Integer(_) => self.to_string().len(),
        }
    }
}

/// The canonical string representation of CloudEvents ("Type System").
impl fmt::Display for ExtensionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Integer(value) => value.fmt(f),
            Self::String(value) => value.fmt(f),
        }
    }
}

/// A payload. `Debug` shows only its size.
#[derive(Clone)]
pub enum Data {
    /// A JSON value, byte by byte as it was written.
    Json(Box<RawValue>),
    /// Anything else.
    Bytes(Bytes),
}

impl PartialEq for Data {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Json(left), Self::Json(right)) => left.get() == right.get(),
            (Self::Bytes(left), Self::Bytes(right)) => left == right,
            (Self::Json(_), Self::Bytes(_)) | (Self::Bytes(_), Self::Json(_)) => false,
        }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(value) => write!(f, "Json({} bytes)", value.get().len()),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

/// An event as a request holds it, before the bus fills in what plain JSON may leave out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    /// As in [`CloudEvent`]; always there in the modes of CloudEvents.
    pub id: Option<String>,
    /// As in [`CloudEvent`]; always there in the modes of CloudEvents.
    pub source: Option<String>,
    /// As in [`CloudEvent`].
    pub r#type: String,
    /// As in [`CloudEvent`].
    pub subject: Option<String>,
    /// As in [`CloudEvent`].
    pub time: Option<Timestamp>,
    /// As in [`CloudEvent`].
    pub datacontenttype: Option<String>,
    /// As in [`CloudEvent`].
    pub dataschema: Option<String>,
    /// As in [`CloudEvent`].
    pub extensions: BTreeMap<String, ExtensionValue>,
    /// As in [`CloudEvent`].
    pub data: Option<Data>,
    /// When it is to be delivered, if not at once; also among the extensions, as `deliverat`.
    pub deliver_at: Option<Timestamp>,
    /// How it recurs; only in plain JSON.
    pub schedule: Option<Box<ScheduleDraft>>,
}

impl Draft {
    /// The event, with what the request left out: `time` is that of its arrival.
    pub fn complete(
        self,
        id: impl FnOnce() -> String,
        source: impl FnOnce() -> String,
        time: Timestamp,
    ) -> CloudEvent {
        CloudEvent {
            id: self.id.unwrap_or_else(id),
            source: self.source.unwrap_or_else(source),
            r#type: self.r#type,
            subject: self.subject,
            time: self.time.or(Some(time)),
            datacontenttype: self.datacontenttype,
            dataschema: self.dataschema,
            extensions: self.extensions,
            data: self.data,
        }
    }
}

/// The events of one request.
#[expect(clippy::large_enum_variant, reason = "there is one per request, and it is moved a few times")]
#[derive(Debug, Clone, PartialEq)]
pub enum Submission {
    /// One event; the answer is about one.
    Single(Draft),
    /// An array of events, which may be empty.
    Batch(Vec<Draft>),
}

/// How much a request may hold. The size of the whole body is for the server to limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most events in a batch.
    pub max_batch: usize,
    /// The largest event, in bytes of its JSON format, without what the bus fills in.
    pub max_event_bytes: usize,
    /// A `deliverat` must be before this time, if there is one.
    pub deliver_before: Option<Timestamp>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_batch: 1000, max_event_bytes: 1 << 20, deliver_before: None }
    }
}

/// Reads the events of a request, in any mode.
///
/// # Errors
/// If the content type is none of the modes', the body is not what it announces, an event breaks one
/// of the rules of this module, or a limit is reached. A batch is taken as a whole or not at all.
pub fn parse_http(headers: &HeaderMap, body: &Bytes, limits: &Limits) -> Result<Submission, EventError> {
    let content_type = content_type(headers)?;
    let essence = content_type.as_ref().map(|(_, media_type)| media_type.essence.as_str());
    let submission = match essence {
        Some("application/cloudevents-batch+json") => {
            check_utf8(content_type.as_ref())?;
            Submission::Batch(envelope::batch(body, Form::Structured, limits)?)
        }
        Some("application/cloudevents+json") => {
            check_utf8(content_type.as_ref())?;
            Submission::Single(envelope::event(body, Form::Structured, limits.deliver_before)?)
        }
        Some(other) if other.starts_with("application/cloudevents") => {
            return Err(unsupported(
                "of the CloudEvents formats, only application/cloudevents+json and \
                 application/cloudevents-batch+json are supported",
            ));
        }
        _ if binary::is_binary(headers) => {
            let content_type = content_type.as_ref().map(|(text, media_type)| (*text, media_type));
            Submission::Single(binary::event(headers, content_type, body, limits)?)
        }
        None | Some("application/json") => {
            check_utf8(content_type.as_ref())?;
            match envelope::first(body) {
                None => {
                    return Err(EventError::malformed(
                        "the body is empty; send an event, like {\"type\": \"order.created\"}",
                    ));
                }
                Some(b'[') => Submission::Batch(envelope::batch(body, Form::Plain, limits)?),
                Some(_) => Submission::Single(envelope::event(body, Form::Plain, limits.deliver_before)?),
            }
        }
        Some(_) => {
            return Err(unsupported(
                "send application/json, application/cloudevents+json, application/cloudevents-batch+json, or any type \
                 with the ce- headers of an event in binary mode",
            ));
        }
    };
    match &submission {
        Submission::Single(draft) => check_size(draft, limits)?,
        Submission::Batch(drafts) => drafts.iter().enumerate().try_for_each(|(index, draft)| {
            check_size(draft, limits).and_then(|()| check_alone(draft)).map_err(|error| error.in_batch(index))
        })?,
    }
    Ok(submission)
}

fn content_type(headers: &HeaderMap) -> Result<Option<(&str, MediaType)>, EventError> {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let Some(value) = values.next() else { return Ok(None) };
    value
        .to_str()
        .ok()
        .and_then(|text| MediaType::parse(text).map(|media_type| Some((text, media_type))))
        .filter(|_| values.next().is_none())
        .ok_or_else(|| unsupported("the header Content-Type is not one media type, like application/json"))
}

fn check_utf8(content_type: Option<&(&str, MediaType)>) -> Result<(), EventError> {
    if content_type.is_none_or(|(_, media_type)| media_type.is_utf8()) {
        return Ok(());
    }
    Err(unsupported("JSON is UTF-8 (RFC 8259, section 8.1): leave the charset out"))
}

fn unsupported(detail: &str) -> EventError {
    EventError::new(EventErrorKind::UnsupportedMedia, detail).at_header("content-type")
}

fn check_size(draft: &Draft, limits: &Limits) -> Result<(), EventError> {
    let (size, most) = (structured::measure(draft), limits.max_event_bytes);
    if size <= most {
        return Ok(());
    }
    Err(EventError::new(
        EventErrorKind::TooLarge,
        format!(
            "an event has at most {most} bytes in the JSON format, this one has {size}; send a reference to what is large"
        ),
    ))
}

/// What recurs is answered in another way than an event.
fn check_alone(draft: &Draft) -> Result<(), EventError> {
    match draft.schedule {
        None => Ok(()),
        Some(_) => {
            Err(recurring::refused("an event that recurs is published alone, not in a batch")
                .at_member("cron"))
        }
    }
}

/// The body of batched mode, from events in the JSON format.
pub fn to_batch<'a>(events: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let mut batch = vec![b'['];
    for event in events {
        if batch.len() > 1 {
            batch.push(b',');
        }
        batch.extend_from_slice(event);
    }
    batch.push(b']');
    batch.into()
}

impl CloudEvent {
    /// The event in the JSON format, the body of structured mode: the attributes in the order of this
    /// type's fields, and the payload as it was written.
    pub fn to_structured(&self) -> Bytes {
        structured::render(self).into()
    }

    /// Reads an event in the JSON format.
    ///
    /// # Errors
    /// As [`parse_http`] in structured mode, without the [`Limits`].
    pub fn from_structured(body: &[u8]) -> Result<Self, EventError> {
        let draft = envelope::event(body, Form::Structured, None)?;
        Ok(Self {
            id: draft.id.ok_or_else(|| EventError::missing("id"))?,
            source: draft.source.ok_or_else(|| EventError::missing("source"))?,
            r#type: draft.r#type,
            subject: draft.subject,
            time: draft.time,
            datacontenttype: draft.datacontenttype,
            dataschema: draft.dataschema,
            extensions: draft.extensions,
            data: draft.data,
        })
    }

    /// The `id` of an event in the JSON format, without looking at the rest of it.
    pub fn id_of(body: &[u8]) -> Option<String> {
        #[derive(serde::Deserialize)]
        struct Named {
            id: String,
        }
        serde_json::from_slice(body).ok().map(|Named { id }| id)
    }

    /// The event in binary mode: its headers, with the `Content-Type`, and the body.
    ///
    /// A payload without a declared content type is sent as `application/json` or, if it is bytes, as
    /// `application/octet-stream`. Extension attributes become text. Binary mode cannot tell a payload
    /// of no bytes from none.
    pub fn to_binary(&self) -> (HeaderMap, Bytes) {
        binary::render(self)
    }

    /// The payload that filters look at: JSON only.
    pub fn json_payload(&self) -> Option<&RawValue> {
        match &self.data {
            Some(Data::Json(value)) => Some(value),
            Some(Data::Bytes(_)) | None => None,
        }
    }
}

#[cfg(test)]
mod tests;
