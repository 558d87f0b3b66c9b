//! Media types (RFC 9110 §8.3.1), as far as the modes of CloudEvents depend on them.

/// A media type, split into what matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MediaType {
    /// `type/subtype` in lower case.
    pub(super) essence: String,
    /// The `charset` parameter in lower case.
    charset: Option<String>,
}

impl MediaType {
    /// Reads a media type with any parameters; `None` if it is none.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let end = text.find(';').unwrap_or(text.len());
        let essence = text[..end].trim_matches(BLANKS);
        let (kind, subtype) = essence.split_once('/')?;
        if !is_token(kind) || !is_token(subtype) {
            return None;
        }
        let mut media_type = Self { essence: essence.to_ascii_lowercase(), charset: None };
        let mut rest = &text[end..];
        while let Some(parameter) = rest.strip_prefix(';') {
            let parameter = parameter.trim_start_matches(BLANKS);
            // RFC 9110 §5.6.6 allows parameters that are empty.
            if parameter.is_empty() || parameter.starts_with(';') {
                rest = parameter;
                continue;
            }
            let (name, value) = parameter.split_once('=')?;
            if !is_token(name) {
                return None;
            }
            let (value, after) = parameter_value(value)?;
            if name.eq_ignore_ascii_case("charset") {
                media_type.charset = Some(value.to_ascii_lowercase());
            }
            rest = after.trim_start_matches(BLANKS);
        }
        rest.is_empty().then_some(media_type)
    }

    /// Whether it declares JSON: `*/json` or `*/*+json` (CloudEvents JSON format §3.1.1).
    pub(super) fn is_json(&self) -> bool {
        let subtype = self.essence.split_once('/').map_or("", |(_, subtype)| subtype);
        subtype == "json" || subtype.ends_with("+json")
    }

    /// Whether text of this type is UTF-8, as it is without a `charset`, and in ASCII too.
    pub(super) fn is_utf8(&self) -> bool {
        self.charset.as_deref().is_none_or(|charset| matches!(charset, "utf-8" | "utf8" | "us-ascii"))
    }
}

const BLANKS: [char; 2] = [' ', '\t'];

/// The value of a parameter, a token or a quoted string, and what follows it.
fn parameter_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([';', ' ', '\t']).unwrap_or(text.len());
        return is_token(&text[..end]).then(|| (text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            ' '..='~' | '\t' => value.push(character),
            _ => return None,
        }
    }
    None
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_their_parameters() {
        for (text, essence, json, utf8) in [
            ("application/json", "application/json", true, true),
            ("Application/JSON ; Charset=\"UTF-8\"", "application/json", true, true),
            ("application/problem+json;charset=latin1;q=1", "application/problem+json", true, false),
            ("text/plain; format=\"a \\\" b\"; charset=us-ascii;", "text/plain", false, true),
            ("text/jsonish", "text/jsonish", false, true),
        ] {
            let parsed = MediaType::parse(text).expect(text);
            assert_eq!(
                (parsed.essence.as_str(), parsed.is_json(), parsed.is_utf8()),
                (essence, json, utf8),
                "{text}"
            );
        }
        for text in [
            "",
            "json",
            "text/",
            "/json",
            "text/pl ain",
            "text/plain; charset",
            "text/plain x",
            "a/b;c=\"d",
            "é/b",
        ] {
            assert_eq!(MediaType::parse(text), None, "{text}");
        }
    }
}
