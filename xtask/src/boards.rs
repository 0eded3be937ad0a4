//! `cargo xtask boards`: lists the boards, and how far each is known to work.

use std::process::ExitCode;

use anyhow::Result;

use crate::board::Board;
use crate::table::Table;

/// Prints one line a board, then what was tried on it.
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
    let mut tried = String::new();
    for board in Board::all()? {
        tried.push_str(&format!(
            "\n{}\n  emulated: {}\n  hardware: {}\n",
            board.name, board.status.emulated, board.status.hardware
        ));
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
    print!("{}{tried}", table.left(&[0, 1, 2, 6]));
    Ok(ExitCode::SUCCESS)
}
