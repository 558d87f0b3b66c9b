//! The OpenAPI document.

use std::{collections::BTreeSet, env, fs, path::Path};

use crate::common::operations;
use serde_json::Value;

fn document() -> Value {
    serde_json::to_value(publisher::api::openapi()).unwrap()
}

/// `docs/openapi.json` is what clients are generated from; `BUS_UPDATE=1` writes it.
#[test]
fn the_document_in_the_repository_is_the_one_that_is_served() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let fresh = format!("{:#}\n", document());
    if env::var_os("BUS_UPDATE").is_some() {
        fs::write(&path, &fresh).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == fresh, "docs/openapi.json is out of date; run this test with BUS_UPDATE=1");
}

#[test]
fn every_operation_says_who_may_call_it_and_how_it_fails() {
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations() {
        let at = format!("{method} {path}");
        let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{at} has no operationId"));
        assert!(ids.insert(id.to_owned()), "{id} is there twice");
        assert!(operation["summary"].is_string(), "{at} has no summary");
        assert_eq!(operation["tags"].as_array().map(Vec::len), Some(1), "{at}");
        if path == "/openapi.json" {
            continue;
        }
        assert!(operation["security"].as_array().is_some_and(|any| !any.is_empty()), "{at} has no security");
        for status in ["401", "403", "500", "503"] {
            let problem = &operation["responses"][status]["content"]["application/problem+json"];
            assert!(problem.is_object(), "{at} does not document {status}");
        }
        for (status, response) in operation["responses"].as_object().unwrap() {
            assert!(response["description"].as_str().is_some_and(|text| !text.is_empty()), "{at} {status}");
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn walk<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str));
                members.values().for_each(|value| walk(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut references = Vec::new();
    walk(&document, &mut references);
    assert!(references.len() > 20);
    for reference in references {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    for scheme in ["apiKey", "adminToken"] {
        assert_eq!(document["components"]["securitySchemes"][scheme]["scheme"], "bearer");
    }
}

/// A JSON name that is written in another case than the rest is a mistake that no client can undo.
#[test]
fn members_are_in_camel_case() {
    let document = document();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        let Some(properties) = schema["properties"].as_object() else { continue };
        for property in properties.keys() {
            // CloudEvents' own spelling
            let camel = !property.contains('_') && !property.starts_with(char::is_uppercase);
            assert!(camel || property == "data_base64", "{name}.{property}");
        }
    }
}
