//! `cargo xtask run`: build the image, boot it, show its console; the status is the run's.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::board::Board;
use crate::image::{self, Profile};
use crate::machine::{Machine, Timing};
use crate::qemu::Launch;
use crate::setup;
use crate::uart::{Line, Record};

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    qemu: setup::Choice,
    /// Boot arguments, `key=value` separated by spaces
    #[arg(long, default_value = "suite=selftest", value_name = "TEXT")]
    append: String,
    /// insn: virtual nanoseconds are instructions; wall: CPUs run at the same time
    #[arg(long, default_value = "wall")]
    timing: Timing,
    /// Kill the run after this many seconds
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u64,
    /// Build with debug assertions
    #[arg(long)]
    debug: bool,
    /// Wait for a debugger on TCP port 1234
    #[arg(long)]
    gdb: bool,
    /// Show what happens without EL2
    #[arg(long)]
    no_el2: bool,
    /// Boot with this device tree instead of QEMU's own
    #[arg(long, value_name = "FILE")]
    dtb: Option<PathBuf>,
}

/// Which machine; what is not given is the board's default.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct MachineArgs {
    /// CPU model
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu: Option<String>,
    /// GIC version: 2 or 3
    #[arg(long, value_name = "N")]
    pub(crate) gic: Option<u32>,
    /// Number of CPUs
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// RAM in MiB
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
}

impl MachineArgs {
    /// The board's machine with what was asked for.
    pub(crate) fn apply(&self, board: &Board) -> Machine {
        let mut machine = Machine::of(board);
        machine
            .cpu
            .clone_from(self.cpu.as_ref().unwrap_or(&board.machine.cpu));
        machine.gic = self.gic.unwrap_or(machine.gic);
        machine.cpus = self.cpus.unwrap_or(machine.cpus);
        machine.memory_mib = self.memory.unwrap_or(machine.memory_mib);
        machine
    }
}

/// Boots once.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let board = Board::qemu_virt()?;
    let mut machine = args.machine.apply(&board);
    board.accept(&machine)?;
    machine.timing = args.timing;
    machine.virtualization = !args.no_el2;
    machine.dtb.clone_from(&args.dtb);
    let qemu = setup::qemu(&args.qemu)?;
    let image = image::build(Profile::of(args.debug))?;
    if args.gdb {
        eprintln!(
            "waiting for a debugger: gdb -ex 'target remote :1234' {}",
            image.symbols.display()
        );
    }
    let patience = if args.gdb {
        Duration::from_secs(24 * 3600)
    } else {
        Duration::from_secs(args.seconds)
    };
    let launch = Launch {
        machine: &machine,
        image: &image.flat,
        append: &args.append,
        limit: patience,
        silence: patience,
        gdb: args.gdb,
    };
    let transcript = qemu.run(&launch, &mut show)?;
    if let Some(error) = transcript.errors.first() {
        eprintln!("error: {error}");
    }
    match transcript.status {
        Some(status) => Ok(ExitCode::from(status)),
        None => bail!(
            "the run ended without a status: {}",
            transcript.last_words()
        ),
    }
}

/// The console as it comes; of the records, those a reader needs the most in words.
fn show(line: &Line) {
    match line {
        Line::Text(text) | Line::Garbled(text) => println!("{text}"),
        Line::Record(Record::Progress { done, of, text }) => println!("[{done}/{of}] {text}"),
        Line::Record(Record::Row(row)) => println!(
            "{} {} {}",
            row.suite,
            row.case,
            serde_json::Value::Object(row.values.clone())
        ),
        Line::Record(Record::Machine { facts }) => {
            println!("machine {}", serde_json::Value::Object(facts.clone()))
        }
        Line::Record(Record::Error { .. } | Record::Exit { .. }) => {}
    }
}
