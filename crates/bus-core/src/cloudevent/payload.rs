//! The payload: whatever JSON value or bytes an event carries.

use std::fmt;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{Data, MAX_DEPTH, error::EventError, media_type::MediaType};

/// The alphabet of RFC 4648 §4, written with padding and read with or without.
pub(super) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The payload of a `data` member, by CloudEvents JSON format §3.1.2: a value if the content type
/// is JSON or absent, and otherwise text.
pub(super) fn from_member(data: &RawValue, content_type: Option<&str>) -> Result<Data, EventError> {
    check(data).map_err(|error| error.at_member("data"))?;
    let Some(media_type) = content_type.and_then(MediaType::parse) else {
        return Ok(Data::Json(data.to_owned()));
    };
    check_charset(&media_type).map_err(|error| error.at_member("datacontenttype"))?;
    if media_type.is_json() {
        return Ok(Data::Json(data.to_owned()));
    }
    serde_json::from_str::<String>(data.get()).map(|text| Data::Bytes(text.into())).map_err(|_| {
        EventError::data(format!(
            "`data` must be a string, since `datacontenttype` is {}; send bytes as `data_base64`, or JSON as \
             application/json",
            media_type.essence
        ))
        .at_member("data")
    })
}

/// The payload of a `data_base64` member: bytes, and JSON if the content type says so.
pub(super) fn from_base64(encoded: &str, content_type: Option<&str>) -> Result<Data, EventError> {
    let bytes = BASE64
        .decode(encoded)
        .map_err(|_| EventError::data("the payload's bytes must be in Base64 (RFC 4648, section 4)"))?;
    match content_type.and_then(MediaType::parse).filter(MediaType::is_json) {
        Some(media_type) => {
            check_charset(&media_type).map_err(|error| error.at_member("datacontenttype"))?;
            json(&bytes).map(Data::Json)
        }
        None => Ok(Data::Bytes(bytes.into())),
    }
}

/// The payload of a body in binary mode. A body that is empty is no payload.
pub(super) fn from_body(body: &Bytes, media_type: Option<&MediaType>) -> Result<Option<Data>, EventError> {
    if body.is_empty() {
        return Ok(None);
    }
    match media_type.filter(|media_type| !media_type.is_json()) {
        Some(_) => Ok(Some(Data::Bytes(body.clone()))),
        None => json(body).map(|value| Some(Data::Json(value))),
    }
}

/// JSON text, without the blanks around it.
fn json(bytes: &[u8]) -> Result<Box<RawValue>, EventError> {
    let value: Box<RawValue> = serde_json::from_slice(bytes).map_err(|error| {
        EventError::data(format!("the payload is not JSON, as its content type says: {error}"))
    })?;
    check(&value)?;
    Ok(value)
}

fn check_charset(media_type: &MediaType) -> Result<(), EventError> {
    if media_type.is_utf8() {
        return Ok(());
    }
    Err(EventError::data(
        "a payload within JSON is UTF-8: leave the charset out, or send the bytes as `data_base64`",
    ))
}

/// Checks what the grammar of JSON leaves open, so that a filter can read every payload: numbers fit
/// a double, strings are Unicode, and nesting ends.
fn check(data: &RawValue) -> Result<(), EventError> {
    let mut reader = serde_json::Deserializer::from_str(data.get());
    Check { deeper: MAX_DEPTH }.deserialize(&mut reader).map_err(|error| {
        EventError::data(format!(
            "the payload cannot be used: {error}; numbers must fit a double, strings be Unicode without lone \
             surrogates, and arrays and objects nest at most {MAX_DEPTH} deep"
        ))
    })
}

/// Reads a value and keeps nothing.
struct Check {
    deeper: usize,
}

impl Check {
    fn below<E: serde::de::Error>(&self) -> Result<usize, E> {
        self.deeper.checked_sub(1).ok_or_else(|| E::custom("nested too deep"))
    }
}

impl<'de> DeserializeSeed<'de> for Check {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Check {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        let deeper = self.below()?;
        while elements.next_element_seed(Self { deeper })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let deeper = self.below()?;
        while members.next_key::<IgnoredAny>()?.is_some() {
            members.next_value_seed(Self { deeper })?;
        }
        Ok(())
    }
}
