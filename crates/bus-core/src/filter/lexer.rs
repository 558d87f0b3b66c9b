//! The characters, names, numbers and strings of RFC 9535's grammar.

use serde_json::{Number, Value};

use super::FilterError;

/// The largest index and step: integers of I-JSON (RFC 9535 §2.1, RFC 7493 §2.2).
const MAX_INTEGER: i64 = (1 << 53) - 1;

/// A place in the text of a filter.
#[derive(Debug, Clone)]
pub(super) struct Lexer<'t> {
    text: &'t str,
    /// In bytes; always between two characters.
    at: usize,
}

impl<'t> Lexer<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    pub(super) fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    /// The next character's number, counted from 1.
    pub(super) fn position(&self) -> usize {
        self.text[..self.at].chars().count() + 1
    }

    /// An error at the next character.
    pub(super) fn error<T>(&self, message: impl Into<String>) -> Result<T, FilterError> {
        Err(FilterError { position: self.position(), message: message.into() })
    }

    /// What stands here, for a message.
    pub(super) fn found(&self) -> String {
        self.peek().map_or_else(|| "the end".to_owned(), |character| format!("{character:?}"))
    }

    fn skip(&mut self) {
        self.at += self.peek().map_or(0, char::len_utf8);
    }

    /// Steps over `token` if it is next.
    pub(super) fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// Steps over blanks: `S` of the grammar.
    pub(super) fn blanks(&mut self) {
        self.at += run(self.rest(), |character| matches!(character, ' ' | '\t' | '\n' | '\r'));
    }

    /// A member name without quotes: `member-name-shorthand`.
    pub(super) fn shorthand(&mut self) -> Option<&'t str> {
        let first =
            |character: char| character.is_ascii_alphabetic() || character == '_' || !character.is_ascii();
        if !self.peek().is_some_and(first) {
            return None;
        }
        self.word(|character| first(character) || character.is_ascii_digit())
    }

    /// The name of a function, or `true`, `false` or `null`.
    pub(super) fn keyword(&mut self) -> Option<&'t str> {
        if !self.peek().is_some_and(|character| character.is_ascii_lowercase()) {
            return None;
        }
        self.word(|character| {
            character.is_ascii_lowercase() || character.is_ascii_digit() || character == '_'
        })
    }

    fn word(&mut self, part: impl Fn(char) -> bool) -> Option<&'t str> {
        let length = run(self.rest(), part);
        let word = &self.rest()[..length];
        self.at += length;
        (length > 0).then_some(word)
    }

    /// Whether an integer or a number starts here.
    pub(super) fn at_number(&self) -> bool {
        self.peek().is_some_and(|character| character.is_ascii_digit() || character == '-')
    }

    /// The digits of an `int`, with `-0` only where a number may follow.
    fn digits(&mut self, minus_zero: bool) -> Result<&'t str, FilterError> {
        let start = self.clone();
        let negative = self.take("-");
        let digits = run(self.rest(), |character| character.is_ascii_digit());
        match &self.rest().as_bytes()[..digits] {
            [] => return self.error(format!("expected a digit, found {}", self.found())),
            [b'0', _, ..] => return start.error("a number has no leading zeros"),
            [b'0'] if negative && !minus_zero => return start.error("an integer cannot be -0"),
            _ => self.at += digits,
        }
        Ok(&self.text[start.at..self.at])
    }

    /// An index or a part of a slice: `int`.
    pub(super) fn integer(&mut self) -> Result<i64, FilterError> {
        let start = self.clone();
        match self.digits(false)?.parse::<i64>() {
            Ok(value) if (-MAX_INTEGER..=MAX_INTEGER).contains(&value) => Ok(value),
            _ => start.error("an integer lies within ±(2^53 - 1)"),
        }
    }

    /// A number that is compared with: `number`.
    pub(super) fn number(&mut self) -> Result<Number, FilterError> {
        let start = self.clone();
        self.digits(true)?;
        if self.take(".") {
            self.some_digits()?;
        }
        if self.take("e") || self.take("E") {
            let _sign = self.take("-") || self.take("+");
            self.some_digits()?;
        }
        let text = &self.text[start.at..self.at];
        text.parse().or_else(|_| start.error("a number must be representable as a double"))
    }

    fn some_digits(&mut self) -> Result<(), FilterError> {
        let digits = run(self.rest(), |character| character.is_ascii_digit());
        if digits == 0 {
            return self.error(format!("expected a digit, found {}", self.found()));
        }
        self.at += digits;
        Ok(())
    }

    /// A string in single or double quotes, if one starts here: `string-literal`.
    pub(super) fn string(&mut self) -> Result<Option<String>, FilterError> {
        let start = self.clone();
        let quote = match self.peek() {
            Some(quote @ ('\'' | '"')) => quote,
            _ => return Ok(None),
        };
        self.skip();
        let mut string = String::new();
        loop {
            match self.peek() {
                None => return start.error("this string has no closing quote"),
                Some('\\') => string.push(self.escape(quote)?),
                Some(character) if character < ' ' => {
                    return self
                        .error("a control character in a string must be written as an escape, like \\n");
                }
                Some(character) => {
                    self.skip();
                    if character == quote {
                        return Ok(Some(string));
                    }
                    string.push(character);
                }
            }
        }
    }

    fn escape(&mut self, quote: char) -> Result<char, FilterError> {
        let start = self.clone();
        self.skip();
        let escaped = match self.peek() {
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some(character @ ('/' | '\\')) => character,
            Some(character) if character == quote => character,
            Some('u') => {
                self.skip();
                return self.unicode().map_or_else(
                    || {
                        start.error(
                            "expected four hexadecimal digits that name a character, or a surrogate pair",
                        )
                    },
                    Ok,
                );
            }
            _ => return start.error("no such escape; a backslash itself is written \\\\"),
        };
        self.skip();
        Ok(escaped)
    }

    fn unicode(&mut self) -> Option<char> {
        let unit = self.hex4()?;
        if !(0xD800..0xDC00).contains(&unit) {
            return char::from_u32(unit.into());
        }
        if !self.take("\\u") {
            return None;
        }
        char::decode_utf16([unit, self.hex4()?]).next()?.ok()
    }

    fn hex4(&mut self) -> Option<u16> {
        let digits =
            self.rest().get(..4).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        self.at += 4;
        u16::from_str_radix(digits, 16).ok()
    }

    /// A literal other than a keyword, if one starts here.
    pub(super) fn literal(&mut self) -> Result<Option<Value>, FilterError> {
        if self.at_number() {
            return self.number().map(|number| Some(Value::Number(number)));
        }
        Ok(self.string()?.map(Value::String))
    }
}

/// How many bytes the leading characters that are `part` take.
fn run(text: &str, part: impl Fn(char) -> bool) -> usize {
    text.find(|character| !part(character)).unwrap_or(text.len())
}
