//! From text to a [`Query`], by the grammar of RFC 9535 (appendix A). It reads each character once.

use serde_json::Value;

use super::{
    FilterError, LITERAL_REGEXPS_BYTES, MAX_NESTING, MAX_REGEXPS,
    ast::{Comparison, Expr, Operand, Pattern, Query, Segment, Selector, Slice, Slots, Test},
    lexer::Lexer,
    regexp::Regexp,
};

/// Reads a whole filter; the last value is the size of its automata, bytes.
pub(super) fn parse(text: &str) -> Result<(Query, Slots, usize), FilterError> {
    let mut parser = Parser {
        lexer: Lexer::new(text),
        depth: 0,
        regexps: 0,
        regexp_bytes: LITERAL_REGEXPS_BYTES,
        slots: Slots::default(),
    };
    if parser.lexer.peek() != Some('$') {
        return parser.lexer.error("a filter starts with `$`, the payload");
    }
    let query = parser.query()?;
    match parser.lexer.peek() {
        None => Ok((query, parser.slots, LITERAL_REGEXPS_BYTES - parser.regexp_bytes)),
        Some(' ' | '\t' | '\n' | '\r') => parser.lexer.error("blanks at the end are not allowed"),
        Some(_) => {
            parser.lexer.error(format!("expected `.`, `[` or the end, found {}", parser.lexer.found()))
        }
    }
}

struct Parser<'t> {
    lexer: Lexer<'t>,
    depth: usize,
    regexps: usize,
    /// What is left for the automata of the filter.
    regexp_bytes: usize,
    slots: Slots,
}

/// A function call, by the type of its result (RFC 9535 §2.4.1).
enum Call {
    Value(Operand),
    Logical(Test),
}

impl Parser<'_> {
    /// A query from its `$` or `@`, which is next, as far as segments follow.
    fn query(&mut self) -> Result<Query, FilterError> {
        let absolute = self.lexer.take("$");
        if !absolute {
            self.expect("@", "`$` or `@`")?;
        }
        let mut segments = Vec::new();
        loop {
            // Blanks belong to a query only if a segment follows.
            let mut ahead = self.lexer.clone();
            ahead.blanks();
            if !matches!(ahead.peek(), Some('.' | '[')) {
                return Ok(Query { absolute, segments });
            }
            self.lexer = ahead;
            segments.push(self.segment()?);
        }
    }

    fn segment(&mut self) -> Result<Segment, FilterError> {
        let position = self.lexer.position();
        let descendant = self.lexer.take("..");
        let selectors = if self.lexer.peek() == Some('[') {
            self.bracketed()?
        } else {
            if !descendant {
                self.expect(".", "`.`")?;
            }
            if self.lexer.take("*") {
                vec![Selector::Wildcard]
            } else if let Some(name) = self.lexer.shorthand() {
                vec![Selector::Name(name.to_owned())]
            } else {
                return self.lexer.error(format!(
                    "expected a member name or `*`, found {}; other names are written ['like this']",
                    self.lexer.found()
                ));
            }
        };
        Ok(Segment { descendant, selectors, position })
    }

    fn bracketed(&mut self) -> Result<Vec<Selector>, FilterError> {
        self.expect("[", "`[`")?;
        let mut selectors = Vec::new();
        loop {
            self.lexer.blanks();
            selectors.push(self.selector()?);
            self.lexer.blanks();
            if self.lexer.take("]") {
                return Ok(selectors);
            }
            self.expect(",", "`,` or `]`")?;
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        if self.lexer.take("*") {
            return Ok(Selector::Wildcard);
        }
        if self.lexer.take("?") {
            self.lexer.blanks();
            return self.logical().map(Selector::Filter);
        }
        if let Some(name) = self.lexer.string()? {
            return Ok(Selector::Name(name));
        }
        let start = self.optional_integer()?;
        let mut ahead = self.lexer.clone();
        ahead.blanks();
        if !ahead.take(":") {
            return match start {
                Some(index) => Ok(Selector::Index(index)),
                None => self.lexer.error(format!(
                    "expected a name in quotes, an index, a slice, `*` or `?`, found {}",
                    self.lexer.found()
                )),
            };
        }
        self.lexer = ahead;
        self.lexer.blanks();
        let end = self.optional_integer()?;
        let mut ahead = self.lexer.clone();
        ahead.blanks();
        let mut step = None;
        if ahead.take(":") {
            self.lexer = ahead;
            self.lexer.blanks();
            step = self.optional_integer()?;
        }
        Ok(Selector::Slice(Slice { start, end, step: step.unwrap_or(1) }))
    }

    fn optional_integer(&mut self) -> Result<Option<i64>, FilterError> {
        if self.lexer.at_number() { self.lexer.integer().map(Some) } else { Ok(None) }
    }

    /// `logical-expr`: alternatives of conjunctions.
    fn logical(&mut self) -> Result<Expr, FilterError> {
        self.nested(|parser| {
            let mut alternatives = vec![parser.conjunction()?];
            while parser.operator("||") {
                alternatives.push(parser.conjunction()?);
            }
            Ok(single_or(alternatives, Expr::Any))
        })
    }

    fn conjunction(&mut self) -> Result<Expr, FilterError> {
        let mut terms = vec![self.basic()?];
        while self.operator("&&") {
            terms.push(self.basic()?);
        }
        Ok(single_or(terms, Expr::All))
    }

    /// `basic-expr`: an expression in parentheses, a comparison or a test.
    fn basic(&mut self) -> Result<Expr, FilterError> {
        if self.lexer.take("!") {
            self.lexer.blanks();
            if self.lexer.peek() == Some('(') {
                return Ok(Expr::Not(Box::new(self.parenthesized()?)));
            }
            let start = self.lexer.clone();
            let negated = self.test()?;
            if let Expr::Test(Test::Compare(..)) | Expr::Once(_, Test::Compare(..)) = negated {
                return start.error("put the comparison that `!` negates in parentheses");
            }
            return Ok(Expr::Not(Box::new(negated)));
        }
        if self.lexer.peek() == Some('(') { self.parenthesized() } else { self.test() }
    }

    fn parenthesized(&mut self) -> Result<Expr, FilterError> {
        self.expect("(", "`(`")?;
        self.lexer.blanks();
        let inner = self.logical()?;
        self.lexer.blanks();
        self.expect(")", "`&&`, `||` or `)`")?;
        Ok(inner)
    }

    fn test(&mut self) -> Result<Expr, FilterError> {
        let start = self.lexer.clone();
        let left = if matches!(self.lexer.peek(), Some('$' | '@')) {
            let query = self.query()?;
            if !self.comparison_follows() {
                return Ok(self.once(Test::Exists(query)));
            }
            self.singular(query, &start)?
        } else {
            match self.literal_or_call()? {
                Call::Value(operand) => operand,
                Call::Logical(test) => {
                    if self.comparison_follows() {
                        return start
                            .error("the result of this function is true or false, and cannot be compared");
                    }
                    return Ok(self.once(test));
                }
            }
        };
        self.lexer.blanks();
        let Some(operator) = comparison(&mut self.lexer) else {
            return self.lexer.error(format!(
                "expected a comparison (`==`, `!=`, `<`, `<=`, `>`, `>=`), found {}",
                self.lexer.found()
            ));
        };
        self.lexer.blanks();
        let right = self.operand()?;
        Ok(self.once(Test::Compare(left, operator, right)))
    }

    /// `comparable`: a literal, a singular query, or a function whose result is a value.
    fn operand(&mut self) -> Result<Operand, FilterError> {
        let start = self.lexer.clone();
        if matches!(self.lexer.peek(), Some('$' | '@')) {
            let query = self.query()?;
            return self.singular(query, &start);
        }
        match self.literal_or_call()? {
            Call::Value(operand) => Ok(operand),
            Call::Logical(_) => {
                start.error("the result of this function is true or false, and cannot be used as a value")
            }
        }
    }

    fn singular(&mut self, query: Query, start: &Lexer<'_>) -> Result<Operand, FilterError> {
        if query.is_singular() {
            return Ok(Operand::Single(query));
        }
        start.error("this query may select several nodes, and so has no value; use value(…) or count(…)")
    }

    fn literal_or_call(&mut self) -> Result<Call, FilterError> {
        if let Some(literal) = self.lexer.literal()? {
            return Ok(Call::Value(Operand::Literal(literal)));
        }
        let start = self.lexer.clone();
        let Some(word) = self.lexer.keyword() else {
            return self.lexer.error(format!(
                "expected `@`, `$`, a function, a string, a number, true, false or null, found {}",
                self.lexer.found()
            ));
        };
        if self.lexer.take("(") {
            return self.nested(|parser| parser.call(word, &start));
        }
        match word {
            "true" => Ok(Call::Value(Operand::Literal(Value::Bool(true)))),
            "false" => Ok(Call::Value(Operand::Literal(Value::Bool(false)))),
            "null" => Ok(Call::Value(Operand::Literal(Value::Null))),
            _ => start
                .error(format!("`{word}` is no value; strings are written in quotes, members as @.{word}")),
        }
    }

    /// A call from after its `(`.
    fn call(&mut self, name: &str, start: &Lexer<'_>) -> Result<Call, FilterError> {
        self.lexer.blanks();
        let call = match name {
            "length" => {
                let operand = self.operand()?;
                Call::Value(Operand::Length(Box::new(operand)))
            }
            "count" => Call::Value(Operand::Count(self.nodes()?)),
            "value" => Call::Value(Operand::Value(self.nodes()?)),
            "match" | "search" => {
                let text = self.operand()?;
                self.lexer.blanks();
                self.expect(",", "`,` and a regular expression")?;
                self.lexer.blanks();
                let pattern = self.pattern(name == "match")?;
                Call::Logical(Test::Regexp(text, pattern))
            }
            _ => {
                return start.error(format!(
                    "no function is called `{name}`; there are length, count, value, match, search"
                ));
            }
        };
        self.lexer.blanks();
        self.expect(")", &format!("`)`, the end of the arguments of {name}"))?;
        Ok(call)
    }

    /// The argument of a function that takes nodes: any query.
    fn nodes(&mut self) -> Result<Query, FilterError> {
        if matches!(self.lexer.peek(), Some('$' | '@')) {
            return self.query();
        }
        self.lexer
            .error(format!("expected a query that starts with `@` or `$`, found {}", self.lexer.found()))
    }

    fn pattern(&mut self, whole: bool) -> Result<Pattern, FilterError> {
        let start = self.lexer.clone();
        self.regexps += 1;
        if self.regexps > MAX_REGEXPS {
            return start.error(format!("a filter uses match and search at most {MAX_REGEXPS} times"));
        }
        match self.operand()? {
            Operand::Literal(Value::String(pattern)) => {
                let regexp = Regexp::compile(&pattern, whole, self.regexp_bytes)
                    .or_else(|reason| start.error(reason))?;
                self.regexp_bytes = self.regexp_bytes.saturating_sub(regexp.size());
                Ok(Pattern::Compiled(regexp))
            }
            Operand::Literal(_) => Ok(Pattern::Nothing),
            operand if operand.is_constant() => {
                let slot = next(&mut self.slots.patterns);
                Ok(Pattern::Computed { slot, operand, whole })
            }
            _ => start
                .error("a regular expression cannot depend on `@`; write it as a string, or start at `$`"),
        }
    }

    /// Finds what is the same for every `@`, and gives it a slot.
    fn once(&mut self, test: Test) -> Expr {
        let constant = match &test {
            Test::Exists(query) => query.absolute,
            Test::Compare(left, _, right) => left.is_constant() && right.is_constant(),
            // No pattern depends on `@`.
            Test::Regexp(text, _) => text.is_constant(),
        };
        if constant {
            return Expr::Once(next(&mut self.slots.tests), test);
        }
        Expr::Test(match test {
            Test::Exists(query) => Test::Exists(query),
            Test::Compare(left, operator, right) => {
                Test::Compare(self.keep(left), operator, self.keep(right))
            }
            Test::Regexp(text, pattern) => Test::Regexp(text, pattern),
        })
    }

    fn keep(&mut self, operand: Operand) -> Operand {
        if operand.is_constant() && !matches!(operand, Operand::Literal(_)) {
            return Operand::Once(next(&mut self.slots.operands), Box::new(operand));
        }
        operand
    }

    fn nested<T>(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<T, FilterError>,
    ) -> Result<T, FilterError> {
        self.depth += 1;
        if self.depth > MAX_NESTING {
            return self.lexer.error(format!(
                "parentheses, functions and filters in filters may nest {MAX_NESTING} levels deep"
            ));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// Steps over a logical operator and the blanks around it, if one is next.
    fn operator(&mut self, operator: &str) -> bool {
        let mut ahead = self.lexer.clone();
        ahead.blanks();
        let found = ahead.take(operator);
        if found {
            ahead.blanks();
            self.lexer = ahead;
        }
        found
    }

    fn comparison_follows(&self) -> bool {
        let mut ahead = self.lexer.clone();
        ahead.blanks();
        comparison(&mut ahead).is_some()
    }

    fn expect(&mut self, token: &str, what: &str) -> Result<(), FilterError> {
        if self.lexer.take(token) {
            return Ok(());
        }
        self.lexer.error(format!("expected {what}, found {}", self.lexer.found()))
    }
}

fn comparison(lexer: &mut Lexer<'_>) -> Option<Comparison> {
    // The longer ones first: `<=` starts with `<`.
    [
        ("==", Comparison::Equal),
        ("!=", Comparison::NotEqual),
        ("<=", Comparison::LessOrEqual),
        (">=", Comparison::GreaterOrEqual),
        ("<", Comparison::Less),
        (">", Comparison::Greater),
    ]
    .into_iter()
    .find_map(|(token, comparison)| lexer.take(token).then_some(comparison))
}

fn single_or(mut parts: Vec<Expr>, many: impl FnOnce(Vec<Expr>) -> Expr) -> Expr {
    if parts.len() == 1 { parts.remove(0) } else { many(parts) }
}

fn next(counter: &mut usize) -> usize {
    *counter += 1;
    *counter - 1
}
