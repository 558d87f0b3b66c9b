//! The compliance suite of RFC 9535 against [`PayloadFilter`].
//!
//! The suite (jsonpath-standard/jsonpath-compliance-test-suite) is not part of this repository.
//! `BUS_JSONPATH_CTS` names the file; without it, `../shared/data/jsonpath-cts.json` beside the
//! workspace is read if it is there.
use std::{collections::BTreeSet, path::PathBuf};

use bus_core::filter::PayloadFilter;
use serde::Deserialize;
use serde_json::Value;

/// Cases that fail, with what a user sees. There are none: all selectors that the suite calls valid
/// are accepted and select what they should, and all that it calls invalid are refused.
const KNOWN_FAILURES: &[(&str, &str)] = &[];

#[derive(Deserialize)]
struct Suite {
    tests: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    selector: String,
    #[serde(default)]
    document: Value,
    result: Option<Value>,
    results: Option<Vec<Value>>,
    #[serde(default)]
    invalid_selector: bool,
}

fn check(case: &Case) -> Result<(), String> {
    match (PayloadFilter::parse(&case.selector), case.invalid_selector) {
        (Err(_), true) => Ok(()),
        (Ok(_), true) => Err("is accepted, and should be refused".to_owned()),
        (Err(error), false) => Err(format!("is refused {error}")),
        (Ok(filter), false) => {
            let selected = filter.select(&case.document);
            let matches = filter.matches(&case.document);
            if matches == selected.is_empty() {
                return Err(format!("selects {} nodes, and matches: {matches}", selected.len()));
            }
            let selected = serde_json::to_value(selected).unwrap();
            let mut allowed = case.result.iter().chain(case.results.iter().flatten());
            if allowed.any(|allowed| *allowed == selected) {
                Ok(())
            } else {
                Err(format!("selects {selected}"))
            }
        }
    }
}

#[test]
fn the_rfc_9535_compliance_suite() {
    let path = std::env::var_os("BUS_JSONPATH_CTS").map_or_else(
        || {
            let beside = "../../../shared/data/jsonpath-cts.json";
            Some(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(beside)).filter(|path| path.exists())
        },
        |path| Some(PathBuf::from(path)),
    );
    let Some(path) = path else {
        println!("SKIPPED: no JSONPath compliance suite; name its cts.json in BUS_JSONPATH_CTS");
        return;
    };
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    let suite: Suite = serde_json::from_slice(&text).unwrap();
    let mut failed = BTreeSet::new();
    for case in &suite.tests {
        if let Err(reason) = check(case) {
            println!("{}: {} {reason}", case.name, case.selector);
            failed.insert(case.name.as_str());
        }
    }
    let invalid = suite.tests.iter().filter(|case| case.invalid_selector).count();
    println!(
        "JSONPath compliance suite: {} selectors, {} to accept, {invalid} to refuse; {} wrong",
        suite.tests.len(),
        suite.tests.len() - invalid,
        failed.len(),
    );
    assert!(suite.tests.len() > 500, "the suite is too short to be whole");
    let known: BTreeSet<_> = KNOWN_FAILURES.iter().map(|(name, _)| *name).collect();
    assert_eq!(failed, known, "the cases that fail are not those that are listed");
}
