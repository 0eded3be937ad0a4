//! `cargo xtask run`: build the image, boot it, show its console; the status is the run's.
//!
//! With `--guest linux` the console is the guest's: what it writes is shown as it comes, and what is typed goes to it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::bench;
use crate::board::Board;
use crate::clock;
use crate::console::Keyboard;
use crate::image::{self, Profile};
use crate::linux::{self, Series};
use crate::machine::{Firmware, Machine, Timing};
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
    /// Run this guest, linux, interactively: Debian's unmodified kernel with a busybox; Ctrl-] leaves it
    #[arg(long, value_name = "NAME", value_parser = ["linux"])]
    guest: Option<String>,
    /// vCPUs of the guest; the machine gets one CPU more
    #[arg(long, value_name = "N", default_value_t = 1, requires = "guest")]
    vcpus: u32,
    /// Series of the guest's kernel: 6.1 or 6.12
    #[arg(
        long,
        value_name = "SERIES",
        default_value = "6.12",
        requires = "guest"
    )]
    kernel: Series,
    /// Boot arguments, `key=value` separated by spaces; with a guest, what it is told stands behind ` -- `
    /// [default: suite=selftest, or what the guest needs]
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
    /// insn: virtual nanoseconds are instructions; parallel: so they are, and all CPUs advance together; wall: CPUs run at the same time
    #[arg(long, default_value = "wall")]
    timing: Timing,
    #[command(flatten)]
    clock: clock::Pace,
    /// Kill the run after this many seconds [default: 60; never with a guest]
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Build with debug assertions
    #[arg(long)]
    debug: bool,
    /// Wait for a debugger on TCP port 1234
    #[arg(long)]
    gdb: bool,
    /// Show what happens without EL2
    #[arg(long)]
    no_el2: bool,
    /// What starts the image: none (QEMU itself), uefi-acpi, uefi-tree (UEFI from a disk, with ACPI tables or a device tree),
    /// grub (GRUB under UEFI, with ACPI tables), pi-stub, pi-tfa (what a Raspberry Pi 4 has at address 0)
    /// [default: as the board boots]
    #[arg(long, value_name = "NAME")]
    firmware: Option<Firmware>,
    /// Spread CPUs and RAM over two NUMA nodes
    #[arg(long)]
    numa: bool,
    /// Write what the console says to this file too, byte by byte, as `cargo xtask collect` reads it
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Boot with this device tree instead of QEMU's own
    #[arg(long, value_name = "FILE")]
    dtb: Option<PathBuf>,
}

/// Which machine; what is not given is the board's default.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct MachineArgs {
    /// Board that QEMU stands in for
    #[arg(long, value_name = "NAME")]
    pub(crate) board: Option<String>,
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

/// Seconds after which a run is killed unless said otherwise.
const PATIENCE: u64 = 60;
/// As good as never.
const FOR_EVER: u64 = 1 << 32;
/// RAM of a machine with a guest, unless said otherwise; the guest gets half.
const MEMORY_MIB: u64 = 1024;

impl Args {
    /// The boot arguments; those of a guest's run may be added to.
    fn boot_arguments(&self, machine: &Machine) -> String {
        let more = self.append.as_deref();
        match self.guest {
            None => more.unwrap_or("suite=selftest").to_owned(),
            Some(_) => format!(
                "suite=linux console=raw vcpus={} guest-mib={} {}",
                self.vcpus,
                machine.memory_mib / 2,
                more.unwrap_or_default()
            ),
        }
    }
}

/// Boots once.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let board = match &args.machine.board {
        Some(name) => Board::load(name)?,
        None => Board::qemu_virt()?,
    };
    let mut wanted = args.machine.clone();
    if args.guest.is_some() {
        wanted.cpus = wanted.cpus.or(Some(args.vcpus.saturating_add(1)));
        wanted.memory = wanted.memory.or(Some(MEMORY_MIB));
    }
    let mut machine = wanted.apply(&board);
    board.accept(&machine)?;
    machine.timing = args.timing;
    args.clock.accept(&[args.timing])?;
    machine.clock = args.clock.settings();
    machine.virtualization = !args.no_el2;
    machine.dtb.clone_from(&args.dtb);
    machine.firmware = args.firmware.unwrap_or(machine.firmware);
    machine.numa = args.numa;
    let qemu = setup::qemu(&args.qemu)?;
    if args.timing == Timing::Parallel {
        clock::ready(&qemu)?;
    }
    let image = image::build(Profile::of(args.debug))?;
    if args.gdb {
        eprintln!(
            "waiting for a debugger: gdb -ex 'target remote :1234' {}",
            image.symbols.display()
        );
    }
    let unless_said = match args.guest {
        Some(_) => FOR_EVER,
        None if args.gdb => FOR_EVER,
        None => PATIENCE,
    };
    let patience = Duration::from_secs(args.seconds.unwrap_or(unless_said));
    let bundle = match args.guest {
        Some(_) => Some(linux::bundle(args.kernel)?),
        None => None,
    };
    let append = args.boot_arguments(&machine);
    let launch = Launch {
        machine: &machine,
        image: &image.flat,
        placed: None,
        bundle: bundle.as_deref(),
        append: &append,
        limit: patience,
        silence: patience,
        gdb: args.gdb,
        record: args.record.as_deref(),
    };
    let transcript = match args.guest {
        Some(_) => {
            let (keyboard, keys) = Keyboard::open()?;
            let transcript = qemu.run_with(&launch, Some(keys), &mut show);
            drop(keyboard);
            transcript?
        }
        None => qemu.run(&launch, &mut show)?,
    };
    if let Some(error) = transcript.errors.first() {
        eprintln!("error: {error}");
    }
    if machine.clock.lines {
        print!("{}", bench::tables(&transcript, &image)?);
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
pub(crate) fn show(line: &Line) {
    match line {
        Line::Text(text) | Line::Garbled(text) => println!("{text}"),
        Line::Guest(bytes) => {
            let mut out = std::io::stdout().lock();
            // Nobody reads any more if this fails; the run goes on to its end.
            drop(out.write_all(bytes).and_then(|()| out.flush()));
        }
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
