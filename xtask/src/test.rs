//! `cargo xtask test`: everything that can be wrong, in two halves: on the host (unit tests, the protocol against the fake
//! machine, model checks) and under QEMU (the shipped image on many machines).
//!
//! The last line is `N passed, N failed`, with `, N skipped` behind it when something was.

mod aging;
mod cases;
mod checks;
mod emulated;
mod epochs;
mod exits;
mod host;
mod hostile;
mod linux;
mod parallel;
mod scheduling;
mod soak;
mod splitting;
mod trees;
mod ways;

use std::process::ExitCode;

use anyhow::Result;

/// Options of the task.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Only the tests that need no emulator
    #[arg(long)]
    host: bool,
    /// Only the tests under QEMU
    #[arg(long)]
    qemu: bool,
    /// Full sizes under QEMU; cases that passed are not run again for the same image (target/soak)
    #[arg(long)]
    soak: bool,
    /// Every QEMU case that QEMU itself would start, behind a boot loader that leaves garbage everywhere; resumed like --soak
    #[arg(long)]
    hostile: bool,
    /// Only the QEMU cases whose name contains this
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    only: String,
}

/// How many tests ended how, and what to say about those that failed.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    failures: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
    }

    fn skip(&mut self) {
        self.skipped += 1;
    }

    fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    fn closing_line(&self) -> String {
        let skipped = if self.skipped > 0 {
            format!(", {} skipped", self.skipped)
        } else {
            String::new()
        };
        format!("{} passed, {} failed{skipped}", self.passed, self.failed)
    }
}

/// Runs what was asked for, everything by default.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let emulated_only = args.qemu || args.soak || args.hostile || !args.only.is_empty();
    if args.host || !emulated_only {
        tally.add(host::run()?);
    }
    if emulated_only || !args.host {
        tally.add(emulated::run(args.soak, args.hostile, &args.only)?);
    }
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    println!("{}", tally.closing_line());
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn the_closing_line_names_skipped_tests_only_when_there_are_some() {
        let mut tally = Tally {
            passed: 3,
            ..Tally::default()
        };
        assert_eq!(tally.closing_line(), "3 passed, 0 failed");
        tally.add(Tally {
            skipped: 1,
            ..Tally::default()
        });
        tally.fail("x".into());
        assert_eq!(tally.closing_line(), "3 passed, 1 failed, 1 skipped");
    }
}
