//! Tests that need no emulator: `cargo test` of the whole workspace, then the model checks, which are compiled with
//! `--cfg loom` into a target folder of their own.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::Tally;
use crate::paths;
use crate::process;

/// Both kinds.
pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    println!("host tests");
    tally.add(count(
        process::cargo().args(["test", "--workspace", "--no-fail-fast"]),
        "cargo test",
    )?);
    println!("model checks");
    let mut models = process::cargo();
    models.args([
        "test",
        "--package",
        "vellum",
        "--release",
        "--test",
        "loom",
        "--no-fail-fast",
    ]);
    models.arg("--target-dir").arg(paths::target("loom"));
    // Fat LTO and debug information make every model wait for the linker and change nothing that it sees.
    models
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("RUSTFLAGS", "--cfg loom");
    tally.add(count(&mut models, "model checks")?);
    Ok(tally)
}

/// Runs a test command; shows its output but for the tests that passed.
fn count(command: &mut Command, name: &str) -> Result<Tally> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let pipe = child.stdout.take().context("no output")?;
    let mut tally = Tally::default();
    for line in BufReader::new(pipe).lines() {
        let line = line?;
        if !line.ends_with("... ok") && !line.trim().is_empty() {
            println!("{line}");
        }
        take(&line, &mut tally);
    }
    if !child.wait()?.success() && tally.failed == 0 {
        tally.fail(format!("{name} did not run to its end"));
    }
    Ok(tally)
}

/// Adds what one line of the test harness says.
fn take(line: &str, tally: &mut Tally) {
    if let Some(name) = line
        .strip_prefix("test ")
        .and_then(|rest| rest.strip_suffix(" ... FAILED"))
    {
        tally.failures.push(name.to_owned());
    }
    let Some(result) = line.strip_prefix("test result: ") else {
        return;
    };
    let number = |word: &str| {
        let part = result
            .split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(word));
        part.and_then(|count| count.trim().parse::<usize>().ok())
            .unwrap_or(0)
    };
    tally.passed += number("passed");
    tally.failed += number("failed");
    tally.skipped += number("ignored");
}

#[cfg(test)]
mod tests {
    use super::{Tally, take};

    #[test]
    fn results_of_several_binaries_add_up() {
        let mut tally = Tally::default();
        let lines = [
            "running 3 tests",
            "test mmu::tests::good_split ... ok",
            "test mmu::tests::bad_make ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.10s",
            "test result: ok. 7 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ];
        lines.iter().for_each(|line| take(line, &mut tally));
        assert_eq!((tally.passed, tally.failed, tally.skipped), (9, 1, 1));
        assert_eq!(tally.failures, ["mmu::tests::bad_make"]);
    }
}
