//! Requests read by implementations of Standard Webhooks and CloudEvents that share nothing with ours: the
//! Python packages of `independent/requirements.txt`, driven by `independent/check.py`, which describes
//! requests and verdicts.

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
    let tools = paths::target_dir().join("tools");
    let packages = tools.join(format!("readers-{}", paths::short_hash(REQUIREMENTS.as_bytes())));
    python::install(&tools, &packages, REQUIREMENTS, |_| Ok(()))?;
    let mut python = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("independent/check.py"))
        .env("PYTHONPATH", packages)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start python3")?;
    let mut lines = String::new();
    for request in requests {
        lines += &request.to_string();
        lines.push('\n');
    }
    let mut stdin = python.stdin.take().context("the reader has no standard input")?;
    // Beside the reading, so that neither side waits for the other with a full pipe.
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = python.wait_with_output()?;
    writer.join().map_err(|_| anyhow!("the writer panicked"))??;
    ensure!(output.status.success(), "check.py: {}", output.status);
    let verdicts = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let verdicts: Vec<Value> = verdicts.map(serde_json::from_slice).collect::<Result<_, _>>()?;
    ensure!(verdicts.len() == requests.len(), "{} verdicts on {} requests", verdicts.len(), requests.len());
    Ok(verdicts)
}
