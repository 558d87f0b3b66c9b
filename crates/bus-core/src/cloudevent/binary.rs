//! Binary mode: attributes in `ce-` headers, the payload as the body (CloudEvents HTTP binding §3.1).

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header::CONTENT_TYPE};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode, utf8_percent_encode};

use super::{
    CloudEvent, Data, Draft, ExtensionValue, Limits,
    attributes::{Attributes, check_specversion},
    error::{EventError, EventErrorKind},
    media_type::MediaType,
    payload,
};

const PREFIX: &str = "ce-";
/// What is percent-encoded in a header (§3.1.3.2); everything outside of ASCII always is.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// Whether a request has any header of an event in binary mode.
pub(super) fn is_binary(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with(PREFIX))
}

/// Reads an event, of which `content_type` is the header's value if there is one.
pub(super) fn event(
    headers: &HeaderMap,
    content_type: Option<(&str, &MediaType)>,
    body: &Bytes,
    limits: &Limits,
) -> Result<Draft, EventError> {
    let mut attributes = Attributes::new(limits.deliver_before);
    let mut version = false;
    for name in headers.keys() {
        let Some(attribute) = name.as_str().strip_prefix(PREFIX) else { continue };
        let mut values = headers.get_all(name).iter();
        let value = values.next().map_or(&b""[..], HeaderValue::as_bytes);
        if values.next().is_some() {
            return Err(
                EventError::attribute(format!("the header `{name}` is there twice")).at_header(name.as_str())
            );
        }
        decode(value)
            .and_then(|value| match attribute {
                "specversion" => {
                    version = true;
                    check_specversion(&value)
                }
                "datacontenttype" => {
                    Err(EventError::attribute("in binary mode this is the header `Content-Type`"))
                }
                "data" => Err(EventError::attribute("in binary mode the payload is the body")),
                _ => attributes.set(attribute, ExtensionValue::String(value)),
            })
            .map_err(|error| error.at_header(name.as_str()))?;
    }
    if !version {
        let detail = "the header `ce-specversion` is missing; it must be 1.0";
        return Err(EventError::attribute(detail).at_header("ce-specversion"));
    }
    if let Some((value, media_type)) = content_type {
        if media_type.is_json() && !media_type.is_utf8() {
            let detail = "JSON is UTF-8 (RFC 8259, section 8.1): leave the charset out";
            return Err(EventError::new(EventErrorKind::UnsupportedMedia, detail).at_header("content-type"));
        }
        attributes
            .set("datacontenttype", ExtensionValue::String(value.to_owned()))
            .map_err(|error| error.at_header("content-type"))?;
    }
    let data = payload::from_body(body, content_type.map(|(_, media_type)| media_type))?;
    let draft = attributes.finish(true).map_err(|attribute| {
        let name = format!("{PREFIX}{attribute}");
        EventError::attribute(format!("the header `{name}` is missing")).at_header(&name)
    })?;
    Ok(Draft { data, ..draft })
}

/// Reads a header's value: quoted strings first (RFC 9110 §5.6.4), then one round of percent-decoding.
fn decode(value: &[u8]) -> Result<String, EventError> {
    let mut unquoted = Vec::with_capacity(value.len());
    let (mut quoted, mut bytes) = (false, value.iter().copied());
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => quoted = !quoted,
            b'\\' if quoted => unquoted.extend(bytes.next()),
            _ => unquoted.push(byte),
        }
    }
    if quoted {
        return Err(EventError::attribute("a quote is not closed; write a quote in a value as %22"));
    }
    percent_decode(&unquoted)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| EventError::attribute("not UTF-8 after percent-decoding"))
}

fn encode(value: &str) -> HeaderValue {
    HeaderValue::try_from(utf8_percent_encode(value, ENCODED).to_string())
        .expect("percent-encoded text is visible ASCII")
}

/// Writes an event.
pub(super) fn render(event: &CloudEvent) -> (HeaderMap, Bytes) {
    let mut headers = HeaderMap::with_capacity(8 + event.extensions.len());
    headers.insert("ce-specversion", HeaderValue::from_static("1.0"));
    headers.insert("ce-id", encode(&event.id));
    headers.insert("ce-source", encode(&event.source));
    headers.insert("ce-type", encode(&event.r#type));
    if let Some(subject) = &event.subject {
        headers.insert("ce-subject", encode(subject));
    }
    if let Some(time) = event.time {
        headers.insert("ce-time", encode(&time.to_string()));
    }
    if let Some(schema) = &event.dataschema {
        headers.insert("ce-dataschema", encode(schema));
    }
    for (name, value) in &event.extensions {
        // Always a header name, as parsing let no others through.
        if let Ok(name) = HeaderName::try_from(format!("{PREFIX}{name}")) {
            headers.insert(name, encode(&value.to_string()));
        }
    }
    let content_type = match (&event.datacontenttype, &event.data) {
        // The same holds for its value: a media type is visible ASCII.
        (Some(declared), _) => Some(HeaderValue::from_str(declared).unwrap_or_else(|_| encode(declared))),
        // What JSON format §3.1.2 says of events that leave it out.
        (None, Some(Data::Json(_))) => Some(HeaderValue::from_static("application/json")),
        (None, Some(Data::Bytes(_))) => Some(HeaderValue::from_static("application/octet-stream")),
        (None, None) => None,
    };
    if let Some(content_type) = content_type {
        headers.insert(CONTENT_TYPE, content_type);
    }
    let body = match &event.data {
        None => Bytes::new(),
        Some(Data::Json(value)) => Bytes::copy_from_slice(value.get().as_bytes()),
        Some(Data::Bytes(bytes)) => bytes.clone(),
    };
    (headers, body)
}
