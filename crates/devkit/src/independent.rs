//! What we do, done by implementations that share nothing with ours: the Python packages of
//! `independent/requirements.txt`. `independent/check.py` reads requests by Standard Webhooks and CloudEvents,
//! `independent/ticks.py` finds the times of cron expressions, and `independent/parquet.py`, with the packages of
//! `independent/parquet.txt`, reads Parquet; each describes its questions and answers.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::python;

const REQUIREMENTS: &str = include_str!("../independent/requirements.txt");
const PARQUET: &str = include_str!("../independent/parquet.txt");

/// The verdict on each request, in order.
///
/// # Errors
/// If the packages cannot be had or the reader fails.
pub fn verdicts(requests: &[Value]) -> Result<Vec<Value>> {
    ask("check.py", &python::packages("independent", REQUIREMENTS)?, requests)
}

/// The times of each cron expression, in order.
///
/// # Errors
/// If the packages cannot be had, or an expression is refused.
pub fn ticks(questions: &[Value]) -> Result<Vec<Value>> {
    ask("ticks.py", &python::packages("independent", REQUIREMENTS)?, questions)
}

/// The rows that DuckDB finds with each SQL query, as JSON objects; `read_parquet('…')` is a table.
///
/// # Errors
/// If the packages cannot be had, or a query is refused.
pub fn parquet(queries: &[&str]) -> Result<Vec<Vec<Value>>> {
    let questions: Vec<Value> = queries.iter().map(|sql| json!({ "sql": sql })).collect();
    let answers = ask("parquet.py", &python::packages("parquet", PARQUET)?, &questions)?;
    let rows = |mut answer: Value| serde_json::from_value(answer["rows"].take()).context("read rows");
    answers.into_iter().map(rows).collect()
}

fn ask(script: &str, packages: &Path, questions: &[Value]) -> Result<Vec<Value>> {
    let mut python = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("independent").join(script))
        .env("PYTHONPATH", packages)
        // The time zones of the package `tzdata`, and not those of this machine.
        .env("PYTHONTZPATH", "")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start python3")?;
    let mut lines = String::new();
    for question in questions {
        lines += &question.to_string();
        lines.push('\n');
    }
    let mut stdin = python.stdin.take().with_context(|| format!("{script} has no standard input"))?;
    // Beside the reading, so that neither side waits for the other with a full pipe.
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = python.wait_with_output()?;
    writer.join().map_err(|_| anyhow!("the writer panicked"))??;
    ensure!(output.status.success(), "{script}: {}", output.status);
    let answers = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let answers: Vec<Value> = answers.map(serde_json::from_slice).collect::<Result<_, _>>()?;
    ensure!(answers.len() == questions.len(), "{} answers to {} questions", answers.len(), questions.len());
    Ok(answers)
}
