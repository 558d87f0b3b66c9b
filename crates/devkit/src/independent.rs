//! What we do, done by implementations that share nothing with ours: the Python packages of
//! `independent/requirements.txt`. `independent/check.py` reads requests by Standard Webhooks and CloudEvents,
//! and `independent/ticks.py` finds the times of cron expressions; each describes its questions and answers.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::{paths, python};

const REQUIREMENTS: &str = include_str!("../independent/requirements.txt");

/// The verdict on each request, in order.
///
/// # Errors
/// If the packages cannot be had or the reader fails.
pub fn verdicts(requests: &[Value]) -> Result<Vec<Value>> {
    ask("check.py", requests)
}

/// The times of each cron expression, in order.
///
/// # Errors
/// If the packages cannot be had, or an expression is refused.
pub fn ticks(questions: &[Value]) -> Result<Vec<Value>> {
    ask("ticks.py", questions)
}

fn ask(script: &str, questions: &[Value]) -> Result<Vec<Value>> {
    let tools = paths::target_dir().join("tools");
    let packages = tools.join(format!("independent-{}", paths::short_hash(REQUIREMENTS.as_bytes())));
    python::install(&tools, &packages, REQUIREMENTS, |_| Ok(()))?;
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
