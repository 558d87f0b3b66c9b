//! Regular expressions for `match` and `search`, at a fixed cost per byte of text.
//!
//! RFC 9535 §2.4.6 leaves the expression to RFC 9485 (I-Regexp), which asks in §8 for limits against
//! expressions that cost too much. A pattern becomes a complete DFA within a size limit: matching is
//! then one table look-up per byte whatever the pattern, and a pattern whose DFA is larger is refused
//! when it is read. The syntax is that of the `regex-syntax` crate, which includes I-Regexp.

use std::sync::Arc;

use regex_automata::{
    Anchored, Input,
    dfa::{Automaton, StartKind, dense},
    nfa::thompson,
    util::syntax,
};

/// How deeply groups may nest in a pattern.
const MAX_GROUPS: u32 = 32;

/// A compiled pattern.
#[derive(Debug, Clone)]
pub(super) struct Regexp {
    dfa: Arc<dense::DFA<Vec<u32>>>,
    anchored: Anchored,
}

impl Regexp {
    /// Compiles `pattern`, to fit the `whole` text or some part of it, within `limit` bytes for each
    /// of its intermediate forms and for the result.
    pub(super) fn compile(pattern: &str, whole: bool, limit: usize) -> Result<Self, String> {
        let syntax = || syntax::Config::new().crlf(true).nest_limit(MAX_GROUPS);
        // On its own first, so that a `)` in it cannot close the group around it.
        syntax::parse_with(pattern, &syntax()).map_err(|error| explain(&error.to_string()))?;
        let (pattern, start, anchored) = if whole {
            (&*format!("(?:{pattern})\\z"), StartKind::Anchored, Anchored::Yes)
        } else {
            (pattern, StartKind::Unanchored, Anchored::No)
        };
        let dfa = dense::Builder::new()
            .configure(
                dense::Config::new()
                    .start_kind(start)
                    .dfa_size_limit(Some(limit))
                    .determinize_size_limit(Some(limit)),
            )
            .syntax(syntax())
            .thompson(thompson::Config::new().nfa_size_limit(Some(limit)))
            .build(pattern)
            .map_err(|_| {
                "the regular expression is too complex, or uses a word boundary; \
                 fewer repetitions of a fixed count and smaller character classes make it simpler"
                    .to_owned()
            })?;
        Ok(Self { dfa: Arc::new(dfa), anchored })
    }

    /// The size of the automaton, in bytes.
    pub(super) fn size(&self) -> usize {
        self.dfa.memory_usage()
    }

    /// Whether `text` matches.
    pub(super) fn is_match(&self, text: &str) -> bool {
        let input = Input::new(text).anchored(self.anchored).earliest(true);
        // It fails only for an automaton with quit bytes, of which these have none.
        matches!(self.dfa.try_search_fwd(&input), Ok(Some(_)))
    }
}

/// The last line of a syntax error; those before it draw the pattern over several lines.
fn explain(error: &str) -> String {
    let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
    format!("not a regular expression: {reason}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn matches(pattern: &str, whole: bool, text: &str) -> bool {
        Regexp::compile(pattern, whole, 1 << 20).unwrap().is_match(text)
    }

    #[test]
    fn whole_and_partial_matches() {
        for (pattern, text, whole, partial) in [
            ("b", "abc", false, true),
            ("a|bc", "abc", false, true),
            ("a|abc", "abc", true, true),
            ("a.c", "a\u{1F600}c", true, true),
            ("a.c", "a\nc", false, false),
            ("a.c", "a\rc", false, false),
            ("a[.]c", "abc", false, false),
            ("\\p{Lu}+", "ÀÉ", true, true),
            ("^b", "ab", false, false),
            ("", "", true, true),
            ("", "a", false, true),
        ] {
            assert_eq!(matches(pattern, true, text), whole, "whole {pattern:?} on {text:?}");
            assert_eq!(matches(pattern, false, text), partial, "part {pattern:?} on {text:?}");
        }
    }

    #[test]
    fn what_would_cost_too_much_is_refused() {
        for pattern in ["[ab]*a[ab]{20}c", "(\\p{L}{100}){100}", "\\w{50}"] {
            let error = Regexp::compile(pattern, false, 1 << 20).unwrap_err();
            assert!(error.contains("too complex"), "{pattern}: {error}");
        }
        for pattern in ["a)|(b", "(", "[", "a{2,1}", &"(".repeat(40)] {
            let error = Regexp::compile(pattern, true, 1 << 20).unwrap_err();
            assert!(error.starts_with("not a regular expression: "), "{pattern}: {error}");
            assert!(!error.contains('\n'));
        }
    }
}
