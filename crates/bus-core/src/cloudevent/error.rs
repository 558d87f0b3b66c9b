//! Why a request holds no events that the bus takes.

use std::fmt::Write as _;

/// Why a request holds no events that the bus takes: what kind of trouble, where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct EventError {
    /// The kind, for the status and the problem type of the answer.
    pub kind: EventErrorKind,
    /// One sentence or two for a person, that say what to change. It repeats no payload.
    pub detail: String,
    /// Where in the body, as a JSON Pointer (RFC 6901); in a batch it starts with the event's index.
    pub pointer: Option<String>,
    /// Which header, for an event in binary mode.
    pub header: Option<String>,
}

/// The kinds of [`EventError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventErrorKind {
    /// The body is not JSON, or not of the form that its content type announces.
    Malformed,
    /// The content type is none that the bus reads (HTTP 415).
    UnsupportedMedia,
    /// One event is larger than [`Limits::max_event_bytes`](super::Limits) (HTTP 413).
    TooLarge,
    /// A batch has more events than [`Limits::max_batch`](super::Limits) (HTTP 413).
    TooMany,
    /// An attribute is missing, given twice, or not as CloudEvents or the bus wants it.
    InvalidAttribute,
    /// The payload cannot be used: not what its content type says, too deep, or out of range.
    InvalidData,
    /// What recurs is published in plain JSON, alone.
    NotSupported,
}

impl EventError {
    pub(super) fn new(kind: EventErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), pointer: None, header: None }
    }

    pub(super) fn malformed(detail: impl Into<String>) -> Self {
        Self::new(EventErrorKind::Malformed, detail)
    }

    pub(super) fn attribute(detail: impl Into<String>) -> Self {
        Self::new(EventErrorKind::InvalidAttribute, detail)
    }

    /// A required attribute that a JSON event does not have.
    pub(super) fn missing(name: &str) -> Self {
        Self::attribute(format!("`{name}` is missing")).at_member(name)
    }

    pub(super) fn data(detail: impl Into<String>) -> Self {
        Self::new(EventErrorKind::InvalidData, detail)
    }

    /// Says which member of the event it is about.
    pub(super) fn at_member(mut self, name: &str) -> Self {
        let mut pointer = String::with_capacity(name.len() + 1);
        pointer.push('/');
        for character in shortened(name).chars() {
            match character {
                '~' => pointer.push_str("~0"),
                '/' => pointer.push_str("~1"),
                _ => pointer.push(character),
            }
        }
        self.pointer = Some(pointer);
        self
    }

    /// Says which header it is about.
    pub(super) fn at_header(mut self, name: &str) -> Self {
        self.header = Some(shortened(name));
        self
    }

    /// Says which event of a batch it is about.
    pub(super) fn in_batch(mut self, index: usize) -> Self {
        let mut pointer = format!("/{index}");
        if let Some(member) = self.pointer {
            write!(pointer, "{member}").expect("writing to a String cannot fail");
        }
        self.pointer = Some(pointer);
        self
    }
}

/// A name from a request, short enough for an answer.
pub(super) fn shortened(name: &str) -> String {
    const MOST: usize = 64;
    match name.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}
