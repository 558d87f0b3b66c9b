//! Parts of lists.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bus_core::pg::{PageRequest, Paged};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// How many items a part of a list has at most: 1–200, 50 if nothing is said.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Limit(pub(super) u32);

impl Default for Limit {
    fn default() -> Self {
        Self(50)
    }
}

impl TryFrom<String> for Limit {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let limit = text.parse().ok().filter(|limit| (1..=200).contains(limit));
        limit.map(Self).ok_or("limit must be a number from 1 to 200")
    }
}

/// Where a part of a list starts: the id of the last item of the part before. Opaque to clients, so that
/// its content may change.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Cursor(pub(super) Uuid);

impl TryFrom<String> for Cursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok();
        let id = bytes.and_then(|bytes| Uuid::from_slice(&bytes).ok());
        id.map(Self).ok_or("cursor must be a nextCursor that this list gave")
    }
}

/// The cursor of the next part.
pub(super) fn cursor(id: Uuid) -> String {
    URL_SAFE_NO_PAD.encode(id)
}

/// Which part of a list of rows.
pub(super) fn request(limit: Option<Limit>, cursor: Option<Cursor>) -> PageRequest {
    PageRequest { after: cursor.map(|cursor| cursor.0), limit: limit.unwrap_or_default().0 }
}

/// A part of a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Page<T> {
    /// The items.
    pub(super) items: Vec<T>,
    /// Give this as `cursor` to get the next part; absent in the last part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// Shows what the store gave.
    pub(super) fn of<R>(paged: Paged<R>, show: impl Fn(R) -> T) -> Self {
        Self { items: paged.items.into_iter().map(show).collect(), next_cursor: paged.next.map(cursor) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_cursors_are_checked() {
        for (text, limit) in
            [("1", Some(1)), ("200", Some(200)), ("0", None), ("201", None), ("-1", None), ("x", None)]
        {
            assert_eq!(Limit::try_from(text.to_owned()).ok().map(|limit| limit.0), limit, "{text}");
        }
        let id = Uuid::from_u128(7);
        assert_eq!(Cursor::try_from(cursor(id)).map(|cursor| cursor.0), Ok(id));
        for text in ["", "x", "AAAA", "%%%"] {
            assert!(Cursor::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
