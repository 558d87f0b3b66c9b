//! Refuses filters whose work could grow faster than the payload. See [`super::PayloadFilter`].

use std::collections::BTreeSet;

use super::{
    FilterError, MAX_OVERLAP,
    ast::{Expr, Operand, Pattern, Query, Segment, Selector, Test},
};

/// What leads to a node, from the root through filters down to the query at hand.
#[derive(Debug, Clone, Copy)]
struct Way {
    descended: bool,
    /// How many times a node may be reached at most.
    overlap: usize,
}

const ROOT: Way = Way { descended: false, overlap: 1 };

/// Checks a query that starts at the root, and all within.
pub(super) fn check(query: &Query) -> Result<(), FilterError> {
    check_query(query, ROOT)
}

fn check_query(query: &Query, way: Way) -> Result<(), FilterError> {
    // An absolute query has one result per payload, which is kept, so its work is not multiplied by
    // that of the filter that it stands in.
    let mut way = if query.absolute { ROOT } else { way };
    for segment in &query.segments {
        let refuse = |message: String| Err(FilterError { position: segment.position, message });
        if segment.descendant && way.descended {
            return refuse(
                "a second `..` on the way to the same node is not supported: its work grows faster than the payload"
                    .to_owned(),
            );
        }
        way.descended |= segment.descendant;
        way.overlap *= overlap(segment);
        if way.overlap > MAX_OVERLAP {
            return refuse(format!(
                "these brackets could select the same node more than {MAX_OVERLAP} times; use fewer `*`, slices, \
                 filters and negative indexes side by side"
            ));
        }
        for selector in &segment.selectors {
            if let Selector::Filter(expression) = selector {
                check_expression(expression, way)?;
            }
        }
    }
    Ok(())
}

fn check_expression(expression: &Expr, way: Way) -> Result<(), FilterError> {
    match expression {
        Expr::Any(parts) | Expr::All(parts) => parts.iter().try_for_each(|part| check_expression(part, way)),
        Expr::Not(inner) => check_expression(inner, way),
        Expr::Test(test) | Expr::Once(_, test) => match test {
            Test::Exists(query) => check_query(query, way),
            Test::Compare(left, _, right) => {
                check_operand(left, way)?;
                check_operand(right, way)
            }
            Test::Regexp(text, pattern) => {
                check_operand(text, way)?;
                match pattern {
                    Pattern::Computed { operand, .. } => check_operand(operand, way),
                    Pattern::Compiled(_) | Pattern::Nothing => Ok(()),
                }
            }
        },
    }
}

fn check_operand(operand: &Operand, way: Way) -> Result<(), FilterError> {
    match operand {
        Operand::Literal(_) => Ok(()),
        Operand::Single(query) | Operand::Count(query) | Operand::Value(query) => check_query(query, way),
        Operand::Length(inner) | Operand::Once(_, inner) => check_operand(inner, way),
    }
}

/// How many times a segment may select one child: different names and different indexes from the
/// front never select the same one.
fn overlap(segment: &Segment) -> usize {
    let (mut names, mut indexes, mut others) = (BTreeSet::new(), BTreeSet::new(), 0);
    for selector in &segment.selectors {
        let distinct = match selector {
            Selector::Name(name) => names.insert(name),
            Selector::Index(index) if *index >= 0 => indexes.insert(index),
            Selector::Index(_) | Selector::Wildcard | Selector::Slice(_) | Selector::Filter(_) => false,
        };
        others += usize::from(!distinct);
    }
    others + usize::from(!names.is_empty() || !indexes.is_empty())
}
