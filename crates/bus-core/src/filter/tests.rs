#![allow(clippy::unwrap_used)]

use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Value, json};

use super::*;

fn refusal(filter: &str) -> (usize, String) {
    let error = PayloadFilter::parse(filter).expect_err(filter);
    (error.position, error.message)
}

fn matches(filter: &str, payload: &Value) -> bool {
    PayloadFilter::parse(filter).unwrap().matches(payload)
}

#[test]
fn a_filter_holds_if_it_selects_a_node() {
    let order =
        json!({"total": 120.5, "status": null, "items": [{"sku": "a-1", "n": 1}, {"sku": "b-2", "n": 0}]});
    for (filter, expected) in [
        ("$", true),
        ("$.total", true),
        ("$.status", true),
        ("$.missing", false),
        ("$.items[2]", false),
        ("$.items[-1:]", true),
        ("$[?@ > 100]", true),
        ("$.items[?@.n > 1]", false),
        ("$..[?@.sku == 'b-2' && !(@.n > 0)]", true),
        ("$.items[?match(@.sku, '[a-z]-[0-9]')]", true),
        ("$.items[?search(@.sku, '^[0-9]')]", false),
        ("$.items[?count($.items[*]) == 2]", true),
        ("$[?length(@) == 2]", true),
        ("$[?@ == null]", true),
    ] {
        assert_eq!(matches(filter, &order), expected, "{filter}");
    }
    for payload in [json!(0), json!(false), json!(""), json!(null), json!([])] {
        assert!(matches("$", &payload));
        assert!(!matches("$.*", &payload));
    }
}

#[test]
fn numbers_compare_by_what_they_are_worth() {
    for (filter, payload, expected) in [
        ("$[?@ == 1]", json!([1.0]), true),
        ("$[?@ == -0]", json!([0]), true),
        ("$[?@ == 0]", json!([-0.0]), true),
        ("$[?@ == 9007199254740993]", json!([9_007_199_254_740_992_i64]), false),
        ("$[?@ < 18446744073709551615]", json!([18_446_744_073_709_551_614_u64]), true),
        ("$[?@ == $[1]]", json!([{"a": [1, 2.0]}, {"a": [1.0, 2]}]), true),
        ("$[?@ == 1e2]", json!([100]), true),
        ("$[?@ > '1']", json!([2]), false),
        ("$[?length(@) == 2.0]", json!(["ab"]), true),
    ] {
        assert_eq!(matches(filter, &payload), expected, "{filter} on {payload}");
    }
}

/// By RFC 9535 §2.3.5.2.2, "nothing" equals itself, so it is also `<=` itself; values that are
/// neither numbers nor strings have no order; and equality of numbers goes on inside of arrays.
#[test]
fn comparisons_that_implementations_get_wrong() {
    for (filter, payload, expected) in [
        ("$[?@.a <= @.b]", json!([{}]), true),
        ("$[?@.a >= length(@.b)]", json!([{}]), true),
        ("$[?@.a < @.b]", json!([{}]), false),
        ("$[?@.a <= 1]", json!([{}]), false),
        ("$[?@.a > @.b]", json!([{"a": true, "b": false}]), false),
        ("$[?@.a >= @.b]", json!([{"a": [2], "b": [1]}]), false),
        ("$[?@.a >= @.b]", json!([{"a": [1], "b": [1.0]}]), true),
        ("$[?@.a <= null]", json!([{"a": null}]), true),
        ("$[?@[-1] == 2]", json!([[1, 2]]), true),
    ] {
        assert_eq!(matches(filter, &payload), expected, "{filter} on {payload}");
    }
}

#[test]
fn errors_point_at_the_character() {
    for (filter, position, message) in [
        ("", 1, "a filter starts with `$`"),
        ("a.b", 1, "a filter starts with `$`"),
        ("$.a ", 4, "blanks at the end"),
        ("$.a b", 4, "blanks at the end"),
        ("$a", 2, "expected `.`, `[` or the end, found 'a'"),
        ("$.é.1", 5, "expected a member name or `*`, found '1'"),
        ("$['é', ]", 8, "expected a name in quotes, an index"),
        ("$['é", 3, "no closing quote"),
        ("$['\\x']", 4, "no such escape"),
        ("$['\\ud800']", 4, "surrogate pair"),
        ("$[01]", 3, "leading zeros"),
        ("$[-0]", 3, "cannot be -0"),
        ("$[9007199254740992]", 3, "2^53"),
        ("$[-9223372036854775808]", 3, "2^53"),
        ("$[1e400]", 4, "expected `,` or `]`, found 'e'"),
        ("$[?@.a > ]", 10, "expected `@`, `$`, a function, a string"),
        ("$[?@.a == 1e400]", 11, "representable as a double"),
        ("$[?@.a = 1]", 8, "expected `,` or `]`, found '='"),
        ("$[?(@.a == 1]", 13, "expected `&&`, `||` or `)`"),
        ("$[?@.a == 1 &&]", 15, "expected `@`, `$`, a function"),
        ("$[?@.* == 1]", 4, "may select several nodes"),
        ("$[?1]", 5, "expected a comparison"),
        ("$[?price > 1]", 4, "members as @.price"),
        ("$[?length(@.a)]", 15, "expected a comparison"),
        ("$[?match(@.a, 'b') == true]", 4, "cannot be compared"),
        ("$[?!@.a == 1]", 5, "in parentheses"),
        ("$[?len(@.a) == 1]", 4, "no function is called `len`"),
        ("$[?count(1) == 1]", 10, "expected a query"),
        ("$[?length(@.a, 1) == 1]", 14, "the end of the arguments of length"),
        ("$[?match(@.a, '(')]", 15, "not a regular expression: unclosed group"),
    ] {
        let (found, reason) = refusal(filter);
        assert!(found == position && reason.contains(message), "{filter}: {found}, {reason}");
    }
}

#[test]
fn i10_what_could_cost_too_much_is_refused() {
    for (filter, position, message) in [
        (&*format!("$.{}", "a".repeat(MAX_FILTER_CHARS)), 1025, "at most 1024 characters"),
        ("$..a..b", 5, "a second `..`"),
        ("$..a[?@..b]", 8, "a second `..`"),
        ("$[?count(@..a[?@..b]) > 0]", 17, "a second `..`"),
        ("$[*,*][*,*][*,*][*,*][*,*]", 22, "more than 16 times"),
        ("$[0,0,0,0,0][0,-1,1:][1,'a',?@.b]", 22, "more than 16 times"),
        ("$[?match(@.a, @.b)]", 15, "cannot depend on `@`"),
        ("$[?match(@.a, '[ab]*a[ab]{20}')]", 15, "too complex"),
        (
            "$[?search(@, '\\\\w+@\\\\w+') || search(@, '\\\\w+:\\\\w+') || search(@, '\\\\w+=')]",
            66,
            "too complex",
        ),
        (&*format!("${}", "[?@".repeat(33)), 100, "nest 32 levels deep"),
        (&*format!("$[?{}", "(".repeat(40)), 36, "nest 32 levels deep"),
        (&*format!("$[?{}", "length(".repeat(40)), 228, "nest 32 levels deep"),
        (&*format!("$[?{}]", ["match(@,'a')"; 9].join("||")), 124, "at most 8 times"),
    ] {
        let (found, reason) = refusal(filter);
        assert!(found == position && reason.contains(message), "{filter}: {found}, {reason}");
    }
    for filter in [
        "$..a[?@.b > 1].c",
        "$[?@..a && @..b && $..c]",
        "$['a','b','c']['a','b','c',0,1,2]..['a','b','c']",
        "$[*,*][*,*][*,*][*,*]",
        &format!("$[?{}@.a{}]", "(".repeat(31), ")".repeat(31)),
        &format!("$[?{}@.a{}]", "@[?".repeat(31), "]".repeat(31)),
    ] {
        assert!(PayloadFilter::parse(filter).is_ok(), "{filter}");
    }
}

/// Each of these took work that grew with the square of the payload, or worse, if it were evaluated
/// as it is written: hours, here.
#[test]
fn i10_work_grows_with_the_payload_and_no_faster() {
    let many = 100_000;
    let numbers = json!(vec![7; many]);
    for filter in ["$[?$.*.a]", "$[?count($..*) == 3]", "$[?@ == value($..x)]", "$[*,*][*,*][*,*][*,*]"] {
        assert!(!matches(filter, &numbers), "{filter}");
    }
    let long = "a".repeat(500_000);
    let texts = json!({"long": long, "pattern": "a*b", "list": vec!["aaaa"; many]});
    for filter in [
        "$.list[?length($.long) == 3]",
        "$.list[?search($.long, 'a*b')]",
        "$.list[?match(@, $.pattern)]",
        "$..[?search(@, '(a|aa)+$') && @ == 'b']",
        "$.list[?$.long == @]",
    ] {
        assert!(!matches(filter, &texts), "{filter}");
    }
    let mut deep = json!({"b": vec![0; many]});
    for _ in 0..120 {
        deep = json!({"a": deep});
    }
    assert!(!matches("$..[?@.a.a.a.a.a.a.a.a == 1]", &deep));
    assert!(!matches("$..*.*.*.*.*.*[?@ == 1]", &deep));
    assert!(matches("$..[?@ == 0]", &deep));
}

/// A regular expression from the payload is the publisher's: one that costs too much matches nothing.
#[test]
fn i10_a_costly_expression_in_the_payload_matches_nothing() {
    for (pattern, expected) in [("a+", true), ("(", false), ("[ab]*a[ab]{20}", false), ("a)|(b", false)] {
        let payload = json!({"pattern": pattern, "texts": ["aaaaaaaaaaaaaaaaaaaaaaaa"]});
        assert_eq!(matches("$.texts[?match(@, $.pattern)]", &payload), expected, "{pattern}");
    }
}

fn payloads() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-2..4_i64).prop_map(Value::from),
        select(vec![0.5, -2.5, 1e3]).prop_map(Value::from),
        select(vec!["", "a", "b", "ab", "é", "1"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((select(vec!["a", "b", "c", "é"]), inner), 0..4).prop_map(|members| Value::Object(
                members.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
            )),
        ]
    })
}

fn singular_segments() -> impl Strategy<Value = String> {
    vec(select(vec![".a", ".b", "['c']", "[\"\\u00e9\"]", "[0]", " ['a']"]), 0..3)
        .prop_map(|segments| segments.concat())
}

fn expressions(queries: BoxedStrategy<String>) -> impl Strategy<Value = String> {
    let singular = (select(vec!["@", "$"]), singular_segments())
        .prop_map(|(root, segments)| root.to_owned() + &segments)
        .boxed();
    let operand = prop_oneof![
        3 => singular.clone(),
        1 => singular.clone().prop_map(|query| format!("length({query})")),
        1 => queries.clone().prop_map(|query| format!("count({query})")),
        1 => queries.clone().prop_map(|query| format!("value( {query} )")),
        3 => select(vec!["1", "0.5", "-2e0", "1000", "-0", "'a'", "\"ab\"", "''", "true", "false", "null"])
            .prop_map(str::to_owned),
    ];
    let test = prop_oneof![
        2 => queries,
        4 => (operand.clone(), select(vec!["==", " != ", "<"]), operand)
            .prop_map(|(left, operator, right)| format!("{left}{operator}{right}")),
        1 => (select(vec!["match", "search"]), singular, select(vec!["'a.*'", "'^b'", "'[^a]+'", "1", "$.a"]))
            .prop_map(|(function, text, pattern)| format!("{function}({text}, {pattern})")),
    ];
    test.prop_recursive(2, 6, 2, |inner| {
        prop_oneof![
            (inner.clone(), select(vec!["&&", " || "]), inner.clone())
                .prop_map(|(left, operator, right)| format!("{left}{operator}{right}")),
            inner.prop_map(|inner| format!("!({inner})")),
        ]
    })
}

fn queries(root: &'static str, depth: u32) -> BoxedStrategy<String> {
    let plain = select(vec![
        ".a",
        ".b",
        ".é",
        ".*",
        "[*]",
        "[0]",
        "[-2:]",
        "[1:]",
        "[::-1]",
        "[-3:2:1]",
        "[::0]",
        "['a','b']",
        "[0,-1]",
        "[*,'a']",
        "..a",
        "..*",
        "..[0,1]",
        " [ 1 : 3 ]",
    ])
    .prop_map(str::to_owned);
    let segment = if depth == 0 {
        plain.boxed()
    } else {
        let inner = select(vec!["@", "$"]).prop_flat_map(move |root| queries(root, depth - 1)).boxed();
        let filter = (option::of(Just("..")), expressions(inner)).prop_map(|(descendant, expression)| {
            format!("{}[?{expression}]", descendant.unwrap_or_default())
        });
        prop_oneof![2 => plain, 3 => filter].boxed()
    };
    vec(segment, 0..4).prop_map(move |segments| root.to_owned() + &segments.concat()).boxed()
}

/// Texts that are nearly filters: one character of a filter is gone, doubled or another.
fn damaged() -> impl Strategy<Value = String> {
    (
        queries("$", 2),
        any::<prop::sample::Index>(),
        option::of(select("$@.*[]()?!&|<>=,:'\"\\ a1-e0".chars().collect::<Vec<_>>())),
    )
        .prop_map(|(filter, at, replacement)| {
            let mut characters: Vec<char> = filter.chars().collect();
            let at = at.index(characters.len());
            characters.splice(at..=at, replacement);
            characters.into_iter().collect()
        })
}

/// Refused by choice, not by the grammar.
fn is_beyond_the_limits(error: &FilterError) -> bool {
    [
        "a second `..`",
        "could select the same node",
        "cannot depend on `@`",
        "not a regular expression",
        "a filter has at most",
        "a filter uses match",
    ]
    .iter()
    .any(|reason| error.message.contains(reason))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    /// Without `<=`, `>=`, `>`, negative indexes as values, and numbers within arrays that are
    /// equal only by their worth, which the other one gets wrong: see `comparisons_that_implementations_get_wrong`.
    #[test]
    fn selects_what_an_independent_implementation_selects(filter in queries("$", 2), payload in payloads()) {
        let other = serde_json_path::JsonPath::parse(&filter).expect(&filter);
        match PayloadFilter::parse(&filter) {
            Ok(ours) => {
                prop_assert_eq!(ours.select(&payload), other.query(&payload).all(), "{}", filter);
                prop_assert_eq!(ours.matches(&payload), !other.query(&payload).is_empty());
            }
            Err(error) => prop_assert!(is_beyond_the_limits(&error), "{}: {}", filter, error),
        }
    }

    #[test]
    fn accepts_what_an_independent_implementation_accepts(filter in damaged()) {
        let other = serde_json_path::JsonPath::parse(&filter);
        match PayloadFilter::parse(&filter) {
            Ok(_) => prop_assert!(other.is_ok(), "{} is accepted", filter),
            Err(error) => prop_assert!(other.is_err() || is_beyond_the_limits(&error), "{}: {}", filter, error),
        }
    }

    #[test]
    fn any_text_is_read_or_refused_at_one_of_its_characters(
        text in prop_oneof![any::<String>(), "\\$[\\[\\]?@.*()'\"a-c0-9=<>!&|, :é$-]{0,60}"]
    ) {
        if let Err(error) = PayloadFilter::parse(&text) {
            prop_assert!((1..=text.chars().count() + 1).contains(&error.position));
        }
    }
}
