//! Writing events in the CloudEvents JSON format.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use base64::display::Base64Display;
use jiff::Timestamp;

use super::{CloudEvent, Data, Draft, ExtensionValue, payload::BASE64};

/// What there is to write. A draft may lack what the bus fills in.
struct View<'a> {
    id: Option<&'a str>,
    source: Option<&'a str>,
    r#type: &'a str,
    subject: Option<&'a str>,
    time: Option<Timestamp>,
    datacontenttype: Option<&'a str>,
    dataschema: Option<&'a str>,
    extensions: &'a BTreeMap<String, ExtensionValue>,
    data: Option<&'a Data>,
}

/// Writes an event.
pub(super) fn render(event: &CloudEvent) -> Vec<u8> {
    let payload = match &event.data {
        None => 0,
        Some(Data::Json(value)) => value.get().len(),
        Some(Data::Bytes(bytes)) => bytes.len() / 3 * 4 + 4,
    };
    // The attributes of a usual event fit into 512 bytes.
    let mut text = Vec::with_capacity(payload + 512);
    let view = View {
        id: Some(&event.id),
        source: Some(&event.source),
        r#type: &event.r#type,
        subject: event.subject.as_deref(),
        time: event.time,
        datacontenttype: event.datacontenttype.as_deref(),
        dataschema: event.dataschema.as_deref(),
        extensions: &event.extensions,
        data: event.data.as_ref(),
    };
    view.write(&mut text).expect("writing to a Vec cannot fail");
    text
}

/// How many bytes a draft takes when it is written as it is.
pub(super) fn measure(draft: &Draft) -> usize {
    let mut length = Length(0);
    let view = View {
        id: draft.id.as_deref(),
        source: draft.source.as_deref(),
        r#type: &draft.r#type,
        subject: draft.subject.as_deref(),
        time: draft.time,
        datacontenttype: draft.datacontenttype.as_deref(),
        dataschema: draft.dataschema.as_deref(),
        extensions: &draft.extensions,
        data: draft.data.as_ref(),
    };
    view.write(&mut length).expect("counting cannot fail");
    length.0
}

impl View<'_> {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(br#"{"specversion":"1.0""#)?;
        let time = self.time.map(|time| time.to_string());
        for (name, value) in [
            ("id", self.id),
            ("source", self.source),
            ("type", Some(self.r#type)),
            ("subject", self.subject),
            ("time", time.as_deref()),
            ("datacontenttype", self.datacontenttype),
            ("dataschema", self.dataschema),
        ] {
            if let Some(value) = value {
                // These names need no escape.
                write!(out, ",\"{name}\":")?;
                serde_json::to_writer(&mut *out, value)?;
            }
        }
        for (name, value) in self.extensions {
            out.write_all(b",")?;
            serde_json::to_writer(&mut *out, name)?;
            out.write_all(b":")?;
            match value {
                ExtensionValue::Bool(value) => write!(out, "{value}")?,
                ExtensionValue::Integer(value) => write!(out, "{value}")?,
                ExtensionValue::String(value) => serde_json::to_writer(&mut *out, value)?,
            }
        }
        match self.data {
            None => {}
            Some(Data::Json(value)) => {
                out.write_all(b",\"data\":")?;
                out.write_all(value.get().as_bytes())?;
            }
            Some(Data::Bytes(bytes)) => {
                write!(out, ",\"data_base64\":\"{}\"", Base64Display::new(bytes, &BASE64))?;
            }
        }
        out.write_all(b"}")
    }
}

/// Counts what is written.
struct Length(usize);

impl Write for Length {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
