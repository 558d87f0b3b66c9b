//! The parsed form of a filter.

use serde_json::Value;

use super::regexp::Regexp;

/// A query of RFC 9535 §2.1: where it starts, and the segments that lead on from there.
#[derive(Debug, Clone)]
pub(super) struct Query {
    /// Starts at the root (`$`) instead of the current node (`@`). Such a query has one result per
    /// payload, wherever it stands: nothing in it can refer to an `@` outside of it.
    pub(super) absolute: bool,
    pub(super) segments: Vec<Segment>,
}

impl Query {
    /// Whether it can select one node at most (RFC 9535 §2.3.5.1, `singular-query`).
    pub(super) fn is_singular(&self) -> bool {
        self.segments.iter().all(|segment| {
            !segment.descendant && matches!(segment.selectors[..], [Selector::Name(_) | Selector::Index(_)])
        })
    }
}

/// A segment of RFC 9535 §2.5. It has at least one selector.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// `..`: applies to the node and everything below it.
    pub(super) descendant: bool,
    pub(super) selectors: Vec<Selector>,
    /// The 1-based character at which it is written.
    pub(super) position: usize,
}

/// A selector of RFC 9535 §2.3.
#[derive(Debug, Clone)]
pub(super) enum Selector {
    Name(String),
    Wildcard,
    Index(i64),
    Slice(Slice),
    Filter(Expr),
}

/// `start:end:step`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slice {
    pub(super) start: Option<i64>,
    pub(super) end: Option<i64>,
    pub(super) step: i64,
}

/// A logical expression of RFC 9535 §2.3.5.
#[derive(Debug, Clone)]
pub(super) enum Expr {
    Any(Vec<Expr>),
    All(Vec<Expr>),
    Not(Box<Expr>),
    Test(Test),
    /// A test that does not depend on `@`: done once per payload, its answer kept in this slot.
    Once(usize, Test),
}

#[derive(Debug, Clone)]
pub(super) enum Test {
    Exists(Query),
    Compare(Operand, Comparison, Operand),
    /// `match` or `search`: the text, then the pattern.
    Regexp(Operand, Pattern),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// What can be compared: an expression with at most one value.
#[derive(Debug, Clone)]
pub(super) enum Operand {
    Literal(Value),
    /// A singular query.
    Single(Query),
    Length(Box<Operand>),
    Count(Query),
    Value(Query),
    /// An operand that does not depend on `@`: computed once per payload, and kept in this slot.
    Once(usize, Box<Operand>),
}

impl Operand {
    /// Whether it is the same for every `@`.
    pub(super) fn is_constant(&self) -> bool {
        match self {
            Self::Literal(_) | Self::Once(..) => true,
            Self::Single(query) | Self::Count(query) | Self::Value(query) => query.absolute,
            Self::Length(operand) => operand.is_constant(),
        }
    }
}

/// The second argument of `match` and `search`.
#[derive(Debug, Clone)]
pub(super) enum Pattern {
    /// A string in the filter.
    Compiled(Regexp),
    /// From the payload, and the same for every `@`: compiled once per payload, kept in this slot.
    Computed { slot: usize, operand: Operand, whole: bool },
    /// A literal that is no string, which matches nothing (RFC 9535 §2.4.6).
    Nothing,
}

/// How many results of each kind an evaluation keeps.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Slots {
    pub(super) tests: usize,
    pub(super) operands: usize,
    pub(super) patterns: usize,
}
