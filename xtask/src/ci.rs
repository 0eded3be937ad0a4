//! `cargo xtask ci`: what `.ci/run` calls, and therefore what a change must pass. The tests first: a rule is worth
//! reading about only in code that works.

use std::process::ExitCode;

use anyhow::Result;

use crate::{check, test};

/// Every test, then every check; the first that fails decides.
pub(crate) fn main() -> Result<ExitCode> {
    let tested = test::main(&test::Args::default())?;
    if tested != ExitCode::SUCCESS {
        return Ok(tested);
    }
    check::main()
}
