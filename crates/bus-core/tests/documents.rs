//! The documents name every key that has a default, and every metric.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use figment::{
    Figment,
    providers::{Format as _, Toml},
    value::Value,
};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap()
}

fn crates() -> impl Iterator<Item = PathBuf> {
    fs::read_dir(workspace().join("crates")).unwrap().map(|entry| entry.unwrap().path())
}

/// `section` and `key` of each value.
fn keys(value: &Value, section: &str, found: &mut BTreeSet<(String, String)>) {
    for (key, value) in value.as_dict().unwrap() {
        if value.as_dict().is_some() {
            keys(value, format!("{section}.{key}").trim_start_matches('.'), found);
        } else {
            found.insert((section.to_owned(), key.clone()));
        }
    }
}

#[test]
fn every_key_with_a_default_is_in_the_table_and_no_other() {
    let page = read("docs/configuration.md");
    let table = page.split("| section |").nth(1).unwrap();
    let mut written = BTreeSet::new();
    for row in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
        let (section, keys) = row.trim_matches('|').split_once('|').unwrap();
        let section = section.split_once('[').map_or("", |(_, rest)| rest.split_once(']').unwrap().0);
        // What follows a colon is prose.
        for key in keys.split(':').next().unwrap().split(',') {
            written.insert((section.to_owned(), key.trim().trim_matches('`').to_owned()));
        }
    }
    let mut coded = BTreeSet::new();
    for defaults in crates().map(|dir| dir.join("defaults.toml")).filter(|file| file.exists()) {
        let values: Value = Figment::from(Toml::file(defaults)).extract().unwrap();
        keys(&values, "", &mut coded);
    }
    assert_eq!(written, coded);
}

#[test]
fn every_stream_is_in_the_table_with_its_subjects_and_no_other() {
    let page = read("docs/configuration.md");
    let table = page.split("| stream |").nth(1).unwrap();
    let written: BTreeSet<(String, String)> = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|row| {
            let cell = |n| row.split('|').nth(n).unwrap().trim().trim_matches('`').to_owned();
            (cell(1), cell(2))
        })
        .collect();
    let defaults = workspace().join("crates/bus-core/streams.toml");
    let values: Value = Figment::from(Toml::file(defaults)).extract().unwrap();
    let subjects = |stream: &Value| {
        let subjects = stream.find_ref("subjects").unwrap().as_array().unwrap();
        subjects.iter().map(|subject| subject.as_str().unwrap()).collect::<Vec<_>>().join(", ")
    };
    let streams = values.find_ref("streams").unwrap().as_dict().unwrap();
    let coded = streams.iter().map(|(name, stream)| (name.clone(), subjects(stream))).collect();
    assert_eq!(written, coded);
}

/// Names in quotes, or after a backtick, that begin like a metric's.
fn metrics(text: &str, before: char) -> impl Iterator<Item = String> {
    text.split(before)
        .filter(|part| part.starts_with("bus_"))
        .map(|part| part.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect())
}

fn sources(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            sources(&entry.path(), text);
        } else {
            text.push_str(&fs::read_to_string(entry.path()).unwrap());
        }
    }
}

#[test]
fn every_metric_is_in_the_table_and_no_other() {
    let page = read("docs/operations.md");
    let table = page.split("## Metrics").nth(1).unwrap().split("\n## ").next().unwrap();
    let written: BTreeSet<String> = metrics(table, '`').collect();
    let mut text = String::new();
    // The dev kit names the databases' roles alike.
    for dir in crates().filter(|dir| !dir.ends_with("devkit")) {
        sources(&dir.join("src"), &mut text);
    }
    let coded: BTreeSet<String> = metrics(&text, '"').collect();
    assert_eq!(written, coded);
}
