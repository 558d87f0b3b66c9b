//! What a payload must have for a filter to select anything of it: so that of many filters only some are evaluated.

use serde_json::Value;

use super::ast::{Comparison, Expr, Operand, Query, Selector, Test};

/// A string that is among the values of every payload that the query selects something of, if it asks for one, as
/// `$[?@.customer == 'c-5']` does.
pub(super) fn string(query: &Query) -> Option<&str> {
    query.segments.iter().find_map(|segment| match &segment.selectors[..] {
        [Selector::Filter(expression)] => in_expression(expression),
        // Of several selectors none alone has to select anything.
        _ => None,
    })
}

fn in_expression(expression: &Expr) -> Option<&str> {
    match expression {
        Expr::All(parts) => parts.iter().find_map(in_expression),
        Expr::Test(Test::Compare(left, Comparison::Equal, right))
        | Expr::Once(_, Test::Compare(left, Comparison::Equal, right)) => match (left, right) {
            (Operand::Literal(Value::String(text)), other)
            | (other, Operand::Literal(Value::String(text)))
                if is_of_payload(other) =>
            {
                Some(text)
            }
            _ => None,
        },
        Expr::Any(_) | Expr::Not(_) | Expr::Test(_) | Expr::Once(..) => None,
    }
}

/// Whether its value is one of the payload's own.
fn is_of_payload(operand: &Operand) -> bool {
    match operand {
        Operand::Single(_) | Operand::Value(_) => true,
        Operand::Once(_, operand) => is_of_payload(operand),
        Operand::Literal(_) | Operand::Length(_) | Operand::Count(_) => false,
    }
}
