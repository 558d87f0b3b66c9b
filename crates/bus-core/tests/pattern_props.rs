//! [`TypePattern`] against a naive matcher that is written from the sentence in its documentation.
use bus_core::pattern::{MAX_PATTERN_CHARS, PatternError, TypePattern};
use proptest::{collection::vec, prelude::*, sample::select};

/// Whether `pattern` matches, by trying out what each wildcard may stand for.
fn naive(pattern: &[&str], event_type: &[&str]) -> bool {
    match pattern {
        [] => event_type.is_empty(),
        [">"] => !event_type.is_empty(),
        ["*", rest @ ..] => {
            (0..=event_type.len()).any(|taken| taken == 1 && naive(rest, &event_type[taken..]))
        }
        [token, rest @ ..] => event_type.first() == Some(token) && naive(rest, &event_type[1..]),
    }
}

/// Whether a text is a pattern at all, rule by rule.
fn is_pattern(text: &str) -> bool {
    let tokens: Vec<&str> = text.split('.').collect();
    text.chars().count() <= MAX_PATTERN_CHARS
        && !text.chars().any(char::is_control)
        && tokens.iter().all(|token| !token.is_empty())
        && tokens.iter().all(|token| ["*", ">"].contains(token) || !token.contains(['*', '>']))
        && tokens.iter().rev().skip(1).all(|token| *token != ">")
}

fn check(pattern: &str, event_type: &str) -> Result<(), TestCaseError> {
    match TypePattern::parse(pattern) {
        Ok(parsed) => {
            prop_assert!(is_pattern(pattern), "{pattern:?} is accepted");
            let expected =
                naive(&pattern.split('.').collect::<Vec<_>>(), &event_type.split('.').collect::<Vec<_>>());
            prop_assert_eq!(parsed.matches(event_type), expected, "{:?} on {:?}", pattern, event_type);
            prop_assert_eq!(parsed.is_exact(), !pattern.contains(['*', '>']));
            prop_assert!(!parsed.is_exact() || parsed.matches(pattern));
            prop_assert_eq!(parsed.as_str(), pattern);
            // What an index over first tokens may rely on.
            if parsed.matches(event_type) {
                prop_assert!(
                    parsed.first_token().is_none_or(|first| event_type.split('.').next() == Some(first))
                );
            }
        }
        Err(error) => {
            prop_assert!(!is_pattern(pattern), "{pattern:?}: {error}");
            let position = match error {
                PatternError::Empty | PatternError::TooLong(_) => 1,
                PatternError::EmptyToken(at)
                | PatternError::PartialWildcard(at)
                | PatternError::RestNotLast(at)
                | PatternError::ControlCharacter(at) => at,
            };
            prop_assert!((1..=pattern.chars().count() + 1).contains(&position));
        }
    }
    Ok(())
}

/// Few tokens, so that many pairs match.
fn tokens(choices: &'static [&'static str]) -> impl Strategy<Value = String> {
    vec(select(choices), 0..6).prop_map(|tokens| tokens.join("."))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn matches_like_the_naive_matcher(
        pattern in tokens(&["a", "b", "é", "*", "*", ">", "", "a*"]),
        event_type in tokens(&["a", "b", "é", "a", "", "*"]),
    ) {
        check(&pattern, &event_type)?;
    }

    #[test]
    fn a_pattern_made_from_a_type_matches_it(
        event_type in vec("[a-z]{1,3}", 1..6),
        stars in vec(any::<bool>(), 6),
        rest in 0..7_usize,
    ) {
        let mut pattern: Vec<&str> =
            event_type.iter().zip(&stars).map(|(token, star)| if *star { "*" } else { token.as_str() }).collect();
        if rest < pattern.len() {
            pattern.truncate(rest);
            pattern.push(">");
        }
        let (pattern, event_type) = (pattern.join("."), event_type.join("."));
        prop_assert!(TypePattern::parse(&pattern).unwrap().matches(&event_type), "{pattern} on {event_type}");
        check(&pattern, &event_type)?;
    }

    #[test]
    fn any_text_is_read_or_refused(pattern in any::<String>(), event_type in any::<String>()) {
        check(&pattern, &event_type)?;
    }
}
