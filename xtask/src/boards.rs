//! `cargo xtask boards`: lists the boards.

use std::process::ExitCode;

use anyhow::Result;

use crate::board::Board;
use crate::table::Table;

/// Prints one line a board.
pub(crate) fn main() -> Result<ExitCode> {
    let mut table = Table::new(&[
        "board",
        "what",
        "CPU",
        "GIC",
        "most CPUs",
        "least MiB",
        "console",
    ]);
    for board in Board::all()? {
        let most = board.limits.cpus_gicv3.max(board.limits.cpus_gicv2);
        table.row(vec![
            board.name,
            board.title,
            board.machine.cpu,
            board.machine.gic_version.to_string(),
            most.to_string(),
            board.limits.memory_mib_min.to_string(),
            board.console,
        ]);
    }
    print!("{}", table.left(&[0, 1, 2, 6]));
    Ok(ExitCode::SUCCESS)
}
