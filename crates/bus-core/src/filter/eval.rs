//! Evaluation of a parsed filter over a payload.

use std::{
    cell::{Cell, OnceCell},
    cmp::Ordering,
    ops::ControlFlow::{self, Break, Continue},
};

use serde_json::{Number, Value};

use super::{
    COMPUTED_REGEXP_BYTES,
    ast::{Comparison, Expr, Operand, Pattern, Query, Segment, Selector, Slice, Slots, Test},
    regexp::Regexp,
};

/// One payload, and what was found out about it so far.
pub(super) struct Evaluation<'a> {
    root: &'a Value,
    tests: Vec<Cell<Option<bool>>>,
    operands: Vec<OnceCell<Resolved<'a>>>,
    patterns: Vec<OnceCell<Option<Regexp>>>,
}

/// The value of an operand.
#[derive(Debug, Clone, Copy)]
enum Resolved<'a> {
    /// The special result `Nothing` (RFC 9535 §1.1).
    Nothing,
    Value(&'a Value),
    /// A result of `length` or `count`.
    Number(usize),
}

impl<'a> Evaluation<'a> {
    pub(super) fn new(root: &'a Value, slots: Slots) -> Self {
        Self {
            root,
            tests: vec![Cell::new(None); slots.tests],
            operands: vec![OnceCell::new(); slots.operands],
            patterns: vec![OnceCell::new(); slots.patterns],
        }
    }

    /// Visits the nodes that `segments` select from `node`, in the order of RFC 9535, until `visit`
    /// breaks.
    pub(super) fn walk<'v: 'a>(
        &self,
        segments: &'a [Segment],
        mut node: &'v Value,
        visit: &mut dyn FnMut(&'v Value) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut segments = segments;
        loop {
            let Some((segment, rest)) = segments.split_first() else { return visit(node) };
            // The steps of a plain path, without recursion.
            match &segment.selectors[..] {
                [Selector::Name(name)] if !segment.descendant => match node.get(name) {
                    Some(child) => node = child,
                    None => return Continue(()),
                },
                [Selector::Index(index)] if !segment.descendant => match element(node, *index) {
                    Some(child) => node = child,
                    None => return Continue(()),
                },
                selectors => {
                    for selector in selectors {
                        self.select(selector, rest, node, visit)?;
                    }
                    if segment.descendant {
                        for child in children(node) {
                            self.walk(segments, child, visit)?;
                        }
                    }
                    return Continue(());
                }
            }
            segments = rest;
        }
    }

    fn select<'v: 'a>(
        &self,
        selector: &'a Selector,
        rest: &'a [Segment],
        node: &'v Value,
        visit: &mut dyn FnMut(&'v Value) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        match selector {
            Selector::Name(name) => {
                node.get(name).map_or(Continue(()), |child| self.walk(rest, child, visit))
            }
            Selector::Index(index) => {
                element(node, *index).map_or(Continue(()), |child| self.walk(rest, child, visit))
            }
            Selector::Wildcard => children(node).try_for_each(|child| self.walk(rest, child, visit)),
            Selector::Slice(slice) => {
                slice_of(node, *slice).try_for_each(|child| self.walk(rest, child, visit))
            }
            Selector::Filter(expression) => children(node)
                .filter(|child| self.holds(expression, child))
                .try_for_each(|child| self.walk(rest, child, visit)),
        }
    }

    fn holds(&self, expression: &'a Expr, current: &'a Value) -> bool {
        match expression {
            Expr::Any(parts) => parts.iter().any(|part| self.holds(part, current)),
            Expr::All(parts) => parts.iter().all(|part| self.holds(part, current)),
            Expr::Not(inner) => !self.holds(inner, current),
            Expr::Test(test) => self.test(test, current),
            Expr::Once(slot, test) => self.tests[*slot].get().unwrap_or_else(|| {
                let result = self.test(test, self.root);
                self.tests[*slot].set(Some(result));
                result
            }),
        }
    }

    fn test(&self, test: &'a Test, current: &'a Value) -> bool {
        match test {
            Test::Exists(query) => self.first(query, current).is_some(),
            Test::Compare(left, operator, right) => {
                compare(self.resolve(left, current), *operator, self.resolve(right, current))
            }
            Test::Regexp(text, pattern) => {
                let Resolved::Value(Value::String(text)) = self.resolve(text, current) else { return false };
                match pattern {
                    Pattern::Compiled(regexp) => regexp.is_match(text),
                    Pattern::Computed { slot, operand, whole } => self.patterns[*slot]
                        .get_or_init(|| match self.resolve(operand, self.root) {
                            Resolved::Value(Value::String(pattern)) => {
                                Regexp::compile(pattern, *whole, COMPUTED_REGEXP_BYTES).ok()
                            }
                            _ => None,
                        })
                        .as_ref()
                        .is_some_and(|regexp| regexp.is_match(text)),
                    Pattern::Nothing => false,
                }
            }
        }
    }

    fn resolve(&self, operand: &'a Operand, current: &'a Value) -> Resolved<'a> {
        match operand {
            Operand::Literal(value) => Resolved::Value(value),
            Operand::Single(query) => self.first(query, current).map_or(Resolved::Nothing, Resolved::Value),
            Operand::Length(inner) => match self.resolve(inner, current) {
                Resolved::Value(Value::String(text)) => Resolved::Number(text.chars().count()),
                Resolved::Value(Value::Array(elements)) => Resolved::Number(elements.len()),
                Resolved::Value(Value::Object(members)) => Resolved::Number(members.len()),
                _ => Resolved::Nothing,
            },
            Operand::Count(query) => {
                let mut count = 0;
                let _all = self.walk_query(query, current, &mut |_| {
                    count += 1;
                    Continue(())
                });
                Resolved::Number(count)
            }
            Operand::Value(query) => {
                let mut nodes = [None; 2];
                let _two = self.walk_query(query, current, &mut |node| {
                    nodes[usize::from(nodes[0].is_some())] = Some(node);
                    if nodes[1].is_some() { Break(()) } else { Continue(()) }
                });
                match nodes {
                    [Some(only), None] => Resolved::Value(only),
                    _ => Resolved::Nothing,
                }
            }
            Operand::Once(slot, inner) => {
                *self.operands[*slot].get_or_init(|| self.resolve(inner, self.root))
            }
        }
    }

    fn first(&self, query: &'a Query, current: &'a Value) -> Option<&'a Value> {
        let mut first = None;
        let _found = self.walk_query(query, current, &mut |node| {
            first = Some(node);
            Break(())
        });
        first
    }

    fn walk_query(
        &self,
        query: &'a Query,
        current: &'a Value,
        visit: &mut dyn FnMut(&'a Value) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.walk(&query.segments, if query.absolute { self.root } else { current }, visit)
    }
}

/// The members' values or the elements, in order. A payload's members are ordered by name.
fn children(node: &Value) -> impl Iterator<Item = &Value> {
    let (elements, members) = match node {
        Value::Array(elements) => (Some(elements.iter()), None),
        Value::Object(members) => (None, Some(members.values())),
        _ => (None, None),
    };
    elements.into_iter().flatten().chain(members.into_iter().flatten())
}

/// The element at `index`, counted from the end if negative (RFC 9535 §2.3.3).
fn element(node: &Value, index: i64) -> Option<&Value> {
    let elements = node.as_array()?;
    let distance = usize::try_from(index.unsigned_abs()).ok()?;
    let at = if index < 0 { elements.len().checked_sub(distance)? } else { distance };
    elements.get(at)
}

/// The elements of a slice, by the bounds of RFC 9535 §2.3.4.2.2.
fn slice_of(node: &Value, Slice { start, end, step }: Slice) -> impl Iterator<Item = &Value> {
    let elements = node.as_array().map_or(&[][..], Vec::as_slice);
    let length = i64::try_from(elements.len()).unwrap_or(i64::MAX);
    let normal = |bound: i64| if bound < 0 { length + bound } else { bound };
    let (mut next, end) = if step < 0 {
        let start = start.map_or(length - 1, normal).clamp(-1, length - 1);
        (start, end.map_or(-1, normal).clamp(-1, length - 1))
    } else {
        (start.map_or(0, normal).clamp(0, length), end.map_or(length, normal).clamp(0, length))
    };
    std::iter::from_fn(move || {
        let more = match step.cmp(&0) {
            Ordering::Less => next > end,
            Ordering::Equal => false,
            Ordering::Greater => next < end,
        };
        let element = usize::try_from(next).ok().filter(|_| more).and_then(|at| elements.get(at));
        next = next.saturating_add(step);
        element
    })
}

/// RFC 9535 §2.3.5.2.2.
fn compare(left: Resolved<'_>, operator: Comparison, right: Resolved<'_>) -> bool {
    match operator {
        Comparison::Equal => equal(left, right),
        Comparison::NotEqual => !equal(left, right),
        Comparison::Less => less(left, right),
        Comparison::Greater => less(right, left),
        Comparison::LessOrEqual => less(left, right) || equal(left, right),
        Comparison::GreaterOrEqual => less(right, left) || equal(left, right),
    }
}

fn equal(left: Resolved<'_>, right: Resolved<'_>) -> bool {
    match (left, right) {
        (Resolved::Nothing, Resolved::Nothing) => true,
        (Resolved::Nothing, _) | (_, Resolved::Nothing) => false,
        (Resolved::Value(left), Resolved::Value(right)) => same(left, right),
        (Resolved::Number(left), Resolved::Number(right)) => left == right,
        (Resolved::Value(value), Resolved::Number(number))
        | (Resolved::Number(number), Resolved::Value(value)) => same(value, &Value::from(number)),
    }
}

/// Equality of values, with numbers by what they are worth: `1` equals `1.0`.
fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => order(left, right) == Ordering::Equal,
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| same(left, right))
        }
        (Value::Object(left), Value::Object(right)) => {
            left.len() == right.len()
                && left.iter().all(|(name, left)| right.get(name).is_some_and(|right| same(left, right)))
        }
        _ => left == right,
    }
}

fn less(left: Resolved<'_>, right: Resolved<'_>) -> bool {
    if let (Resolved::Value(Value::String(left)), Resolved::Value(Value::String(right))) = (left, right) {
        return left < right;
    }
    match (number(left), number(right)) {
        (Some(left), Some(right)) => order(&left, &right) == Ordering::Less,
        _ => false,
    }
}

fn number(operand: Resolved<'_>) -> Option<Number> {
    match operand {
        Resolved::Value(Value::Number(number)) => Some(number.clone()),
        Resolved::Number(number) => Some(number.into()),
        Resolved::Value(_) | Resolved::Nothing => None,
    }
}

/// The order of two numbers: exact for integers, and that of doubles otherwise.
fn order(left: &Number, right: &Number) -> Ordering {
    if let (Some(left), Some(right)) = (left.as_i128(), right.as_i128()) {
        return left.cmp(&right);
    }
    let double = |number: &Number| number.as_f64().unwrap_or(f64::NAN);
    double(left).partial_cmp(&double(right)).unwrap_or(Ordering::Greater)
}
