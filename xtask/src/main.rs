//! `cargo xtask`: everything one does with Vellum, one file a task.
//!
//! Every task ends in one of two ways: it did what it says, or it prints one line `error: ...` and the status is not zero.

mod bench;
mod board;
mod boards;
mod check;
mod ci;
mod clock;
mod collect;
mod console;
mod flash;
mod image;
mod lines;
mod linux;
mod loaders;
mod machine;
mod media;
mod paths;
mod plot;
mod process;
mod qemu;
mod run;
mod setup;
mod table;
mod test;
mod uart;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything one does with Vellum")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the other tasks need: the Rust target and a recent QEMU (they do it themselves when something is missing)
    Setup(setup::Args),
    /// Build the image, boot it under QEMU and show its console
    Run(run::Args),
    /// Measure: tables on the terminal, JSON and plots below target/bench
    Bench(Box<bench::Args>),
    /// Build the image only
    Image(image::Args),
    /// Build what a board boots from and copy it to a mounted SD card or EFI system partition
    Flash(flash::Args),
    /// Read a board's serial port, or a file of what it said, to the end: tables, JSON and plots as bench makes them
    Collect(collect::Args),
    /// Run the tests
    Test(test::Args),
    /// Decide whether the tree keeps the house rules
    Check,
    /// What continuous integration runs: every test, then every check
    Ci,
    /// List the boards
    Boards,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let done = match cli.task {
        Task::Setup(args) => setup::main(&args),
        Task::Run(args) => run::main(&args),
        Task::Bench(args) => bench::main(&args),
        Task::Image(args) => image::main(&args),
        Task::Flash(args) => flash::main(&args),
        Task::Collect(args) => collect::main(&args),
        Task::Test(args) => test::main(&args),
        Task::Check => check::main(),
        Task::Ci => ci::main(),
        Task::Boards => boards::main(),
    };
    match done {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Help goes to standard output as clap lays it out; a wrong argument is one line.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => error.exit(),
        _ => {
            eprintln!("{}", one_line(&error.render().to_string()));
            ExitCode::from(2)
        }
    }
}

/// The first paragraphs of clap's message in one line, without its advice on `--help`.
fn one_line(message: &str) -> String {
    let said = |line: &&str| {
        !line.is_empty() && !line.starts_with("Usage:") && !line.starts_with("For more information")
    };
    let parts: Vec<&str> = message.lines().map(str::trim).filter(said).collect();
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::{Cli, one_line};
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_argument_is_one_line_that_names_the_right_ones() {
        let wrong = ["xtask", "bench", "--locking", "ticket"];
        let error = Cli::try_parse_from(wrong).err().expect("no such mode");
        let line = one_line(&error.render().to_string());
        assert!(line.starts_with("error: "), "{line}");
        assert!(
            line.contains("ticket") && line.contains("lockless"),
            "{line}"
        );
        assert!(!line.contains('\n'), "{line}");
    }
}
