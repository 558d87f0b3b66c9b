//! Payload filters: JSONPath by RFC 9535, with a bound on the work (invariant I10).

mod ast;
mod cost;
mod eval;
mod lexer;
mod parser;
mod regexp;
mod required;

use std::{
    fmt,
    ops::ControlFlow::{Break, Continue},
    str::FromStr,
    sync::Arc,
};

use serde_json::Value;

use self::{
    ast::{Query, Slots},
    eval::Evaluation,
};

/// The longest filter, in characters.
pub const MAX_FILTER_CHARS: usize = 1024;
/// How deep parentheses, functions and filters within filters may nest.
pub const MAX_NESTING: usize = 32;
/// How many times the selectors of a filter may select one and the same node.
pub const MAX_OVERLAP: usize = 16;
/// How many calls of `match` and `search` a filter may have.
pub const MAX_REGEXPS: usize = 8;
/// The size of the automata of all regular expressions that are written in a filter, in bytes.
const LITERAL_REGEXPS_BYTES: usize = 1 << 20;
/// The size of one that is taken from the payload, which is compiled for each payload: smaller, since
/// building it takes about 10 ms per MiB.
const COMPUTED_REGEXP_BYTES: usize = 1 << 17;

/// A condition on the payload: a JSONPath query that holds if it selects at least one node.
///
/// All of RFC 9535 is there, with the five functions of §2.4. What a filter costs is bounded by what
/// it says, and not only by the grammar: evaluation looks at each node of the payload at most
/// [`MAX_OVERLAP`] times for each part of the filter, whatever the payload. (Comparing two parts of
/// the payload with each other looks into them as deep as they are equal, which makes it at most the
/// payload's nesting depth times that.) Anything in a filter that does not depend on `@` is computed
/// once per payload. To hold this, [`parse`](Self::parse) refuses, with its position and the reason,
/// some filters that the RFC would allow:
///
/// - more than [`MAX_FILTER_CHARS`] characters, or [`MAX_NESTING`] levels of nesting;
/// - a second `..` on the way to the same node, as in `$..a..b` or `$..a[?@..b]`. Two `..` in
///   conditions beside each other, or after `$` within a filter, are fine;
/// - brackets that together could select one node more than [`MAX_OVERLAP`] times, as `[*,*]` does
///   twice. Different names, and different indexes from the front, do not count;
/// - a regular expression that depends on `@` or that is not one; more than [`MAX_REGEXPS`] of them;
///   and any whose automata would together be larger than 1 MiB. (RFC 9535 §2.4.6 lets one that is not valid
///   match nothing, which is no help to who wrote it.) One that is taken from the payload matches
///   nothing if it is not valid or its automaton would be larger than 128 KiB.
///
/// Regular expressions are those of RFC 9485, and beyond it the syntax of the `regex-syntax` crate
/// except word boundaries. Numbers compare as integers if both are, and as doubles otherwise.
#[derive(Clone)]
pub struct PayloadFilter(Arc<Parsed>);

struct Parsed {
    text: String,
    query: Query,
    slots: Slots,
    /// The size of its regular expressions' automata, bytes.
    automata: usize,
}

/// Why a text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at character {position}: {message}")]
pub struct FilterError {
    /// The character at which the text stops making sense, counted from 1.
    pub position: usize,
    /// What is wrong there, and what would be right.
    pub message: String,
}

impl PayloadFilter {
    /// Reads a filter.
    ///
    /// # Errors
    /// If the text is no query of RFC 9535, or one that this type refuses.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        if text.chars().nth(MAX_FILTER_CHARS).is_some() {
            return Err(FilterError {
                position: MAX_FILTER_CHARS + 1,
                message: format!("a filter has at most {MAX_FILTER_CHARS} characters"),
            });
        }
        let (query, slots, automata) = parser::parse(text)?;
        cost::check(&query)?;
        Ok(Self(Arc::new(Parsed { text: text.to_owned(), query, slots, automata })))
    }

    /// Whether the filter selects at least one node of `payload`.
    pub fn matches(&self, payload: &Value) -> bool {
        Evaluation::new(payload, self.0.slots)
            .walk(&self.0.query.segments, payload, &mut |_| Break(()))
            .is_break()
    }

    /// The nodes that the filter selects, in the order of RFC 9535 (members by name).
    pub fn select<'v>(&self, payload: &'v Value) -> Vec<&'v Value> {
        let mut nodes = Vec::new();
        let _all =
            Evaluation::new(payload, self.0.slots).walk(&self.0.query.segments, payload, &mut |node| {
                nodes.push(node);
                Continue(())
            });
        nodes
    }

    /// A string that is among the values of every payload that this filter holds for, if it asks for one.
    pub(crate) fn required_string(&self) -> Option<&str> {
        required::string(&self.0.query)
    }

    /// About how much memory the filter takes, bytes: for whoever keeps many of them within a bound.
    pub fn memory_bytes(&self) -> usize {
        // A parsed query is at most a few dozen bytes for each character of its text.
        size_of::<Parsed>() + self.0.text.len() * 32 + self.0.automata
    }

    /// The filter as it was written.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }
}

impl fmt::Display for PayloadFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

impl fmt::Debug for PayloadFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PayloadFilter").field(&self.0.text).finish()
    }
}

impl PartialEq for PayloadFilter {
    fn eq(&self, other: &Self) -> bool {
        self.0.text == other.0.text
    }
}

impl Eq for PayloadFilter {}

impl FromStr for PayloadFilter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests;
