//! Event-type patterns: what a subscription's `eventType` may say.
//!
//! A pattern is a list of tokens separated by `.`, with the wildcards of NATS subjects: `*` stands
//! for exactly one token and a final `>` for one or more remaining tokens. `order.*` matches
//! `order.created` but neither `order` nor `order.line.added`; `order.>` matches `order.created` and
//! `order.line.added` but not `order`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The longest pattern, in characters; the same as for an event's `type`.
pub const MAX_PATTERN_CHARS: usize = 255;

/// A pattern over event types.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TypePattern {
    text: Box<str>,
    exact: bool,
}

/// Why a text is no pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// There is no text.
    #[error("an event type pattern must not be empty")]
    Empty,
    /// The text is longer than [`MAX_PATTERN_CHARS`].
    #[error("an event type pattern has at most {MAX_PATTERN_CHARS} characters, this one has {0}")]
    TooLong(usize),
    /// A token is empty: the text starts or ends with a dot, or has two in a row.
    #[error("the token at character {0} is empty; separate tokens with single dots")]
    EmptyToken(usize),
    /// A token has a wildcard and something else.
    #[error("the wildcard at character {0} must be a token of its own, as in `order.*` or `order.>`")]
    PartialWildcard(usize),
    /// Tokens follow a `>`.
    #[error("the `>` at character {0} must be the last token; use `*` for a single token")]
    RestNotLast(usize),
    /// A character that no event type may have.
    #[error("the control character at character {0} is not allowed")]
    ControlCharacter(usize),
}

impl TypePattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// Says what is wrong, and at which character, counted from 1.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        let length = text.chars().count();
        if length > MAX_PATTERN_CHARS {
            return Err(PatternError::TooLong(length));
        }
        let mut exact = true;
        let mut position = 1;
        let mut tokens = text.split('.').peekable();
        while let Some(token) = tokens.next() {
            match token {
                "" => return Err(PatternError::EmptyToken(position)),
                "*" => exact = false,
                ">" if tokens.peek().is_some() => return Err(PatternError::RestNotLast(position)),
                ">" => exact = false,
                _ => {
                    for (offset, character) in token.chars().enumerate() {
                        if matches!(character, '*' | '>') {
                            return Err(PatternError::PartialWildcard(position + offset));
                        }
                        if character.is_control() {
                            return Err(PatternError::ControlCharacter(position + offset));
                        }
                    }
                }
            }
            position += token.chars().count() + 1;
        }
        Ok(Self { text: text.into(), exact })
    }

    /// Whether `event_type` matches. Costs no allocation. An event type with empty tokens is taken
    /// as it is written: the middle of `a..b` is one token, and it is empty.
    pub fn matches(&self, event_type: &str) -> bool {
        if self.exact {
            return *self.text == *event_type;
        }
        let mut wanted = self.text.split('.');
        let mut given = event_type.split('.');
        loop {
            match (wanted.next(), given.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (Some(wanted), Some(given)) if wanted == given => {}
                _ => return false,
            }
        }
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the pattern has no wildcard, and so matches one event type only.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// The first token, for an index; `None` if it is a wildcard.
    pub fn first_token(&self) -> Option<&str> {
        self.text.split('.').next().filter(|token| !matches!(*token, "*" | ">"))
    }
}

impl fmt::Display for TypePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for TypePattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl TryFrom<String> for TypePattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<TypePattern> for String {
    fn from(pattern: TypePattern) -> Self {
        pattern.text.into()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn wildcards_stand_for_whole_tokens() {
        for (pattern, matching, other) in [
            (
                "order.created",
                &["order.created"][..],
                &["order", "order.created.v2", "Order.created", ""][..],
            ),
            ("order.*", &["order.created", "order."], &["order", "order.line.added", "orders.created"]),
            ("*.created", &["order.created", ".created"], &["created", "a.order.created"]),
            ("order.>", &["order.created", "order.line.added", "order."], &["order", "orders.created"]),
            ("*", &["order", ""], &["order.created"]),
            (">", &["order", "order.created", ""], &[]),
            ("a.*.c.>", &["a.b.c.d", "a..c.d.e"], &["a.b.c", "a.c.d"]),
        ] {
            let parsed = TypePattern::parse(pattern).unwrap();
            for event_type in matching {
                assert!(parsed.matches(event_type), "{pattern} should match {event_type:?}");
            }
            for event_type in other {
                assert!(!parsed.matches(event_type), "{pattern} should not match {event_type:?}");
            }
        }
    }

    #[test]
    fn refusals_name_the_character() {
        for (pattern, error) in [
            ("", PatternError::Empty),
            (".", PatternError::EmptyToken(1)),
            ("a..b", PatternError::EmptyToken(3)),
            ("é.", PatternError::EmptyToken(3)),
            ("order.cre*", PatternError::PartialWildcard(10)),
            (">>", PatternError::PartialWildcard(1)),
            ("a.>.b", PatternError::RestNotLast(3)),
            ("a.\n", PatternError::ControlCharacter(3)),
        ] {
            assert_eq!(TypePattern::parse(pattern), Err(error), "{pattern:?}");
        }
        assert!(TypePattern::parse(&"é".repeat(255)).is_ok());
        assert_eq!(TypePattern::parse(&"a".repeat(256)), Err(PatternError::TooLong(256)));
    }

    #[test]
    fn the_index_key_is_the_first_token_unless_it_is_a_wildcard() {
        for (pattern, first, exact) in
            [("a.b", Some("a"), true), ("a.*", Some("a"), false), ("*.b", None, false), (">", None, false)]
        {
            let parsed = TypePattern::parse(pattern).unwrap();
            assert_eq!((parsed.first_token(), parsed.is_exact()), (first, exact), "{pattern}");
            assert_eq!(parsed.to_string(), pattern);
        }
    }
}
