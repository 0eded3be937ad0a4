//! How a run ends.
//!
//! Every run ends with the line `{"vellum":"exit","status":N}`, which is what tools take its status from, and the
//! machine switched off. When the hypervisor itself is at fault an epitaph comes first: where, why, the registers of an
//! exception taken from EL2, and what this CPU did last. Writing it touches no guest state.

use core::fmt::{self, Arguments};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::arch;
use crate::dev::power;
use crate::log::{Escaped, flush, last_line};
use crate::sync::percpu;

/// Exit status after a panic.
pub const PANICKED: u32 = 101;
/// Exit status after input that cannot be worked with.
pub const REFUSED: u32 = 2;

/// No CPU's affinity.
const NOBODY: u64 = u64::MAX;

/// The affinity of the CPU that ends the run; others that end it or fail meanwhile say nothing. Blocks of CPUs need EL2.
static ENDING: AtomicU64 = AtomicU64::new(NOBODY);
/// Some CPU has failed.
static FAILED: AtomicBool = AtomicBool::new(false);
/// How often the one that ends the run has.
static FAILURES: AtomicU32 = AtomicU32::new(0);

/// Ends the run: says `status`, or that a CPU has failed meanwhile, and switches the machine off.
pub fn exit(status: u32) -> ! {
    claim();
    let status = Status(status);
    last_line(format_args!(r#"{{"vellum":"exit","status":{status}}}"#));
    flush();
    power::off()
}

/// What is said of a run, as of when it is said.
struct Status(u32);

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self.0 == 0 && FAILED.load(Ordering::Relaxed);
        write!(f, "{}", if failed { PANICKED } else { self.0 })
    }
}

/// Ends a run that cannot be done, saying why in one line.
pub fn refuse(reason: Arguments<'_>) -> ! {
    last_line(format_args!(
        r#"{{"vellum":"error","text":"{}"}}"#,
        Escaped(reason)
    ));
    exit(REFUSED)
}

/// The panic handler.
pub fn epitaph(info: &PanicInfo<'_>) -> ! {
    fail();
    match info.location() {
        Some(at) => last_line(format_args!(
            "PANIC on cpu{} at {}:{}: {}",
            percpu::index(),
            at.file(),
            at.line(),
            info.message()
        )),
        None => last_line(format_args!(
            "PANIC on cpu{}: {}",
            percpu::index(),
            info.message()
        )),
    }
    last_events();
    exit(PANICKED)
}

/// Ends the run because the machine failed in a way that nobody can go on from.
pub fn give_up(reason: Arguments<'_>) -> ! {
    fail();
    last_line(format_args!("PANIC on cpu{}: {reason}", percpu::index()));
    last_events();
    exit(PANICKED)
}

/// Registers at an exception taken from EL2, as the vectors saved them.
#[derive(Debug)]
#[repr(C)]
pub struct Registers {
    /// x0 to x30.
    pub x: [u64; 31],
    /// The stack pointer of the interrupted code.
    pub sp: u64,
}

/// Where the vectors end up with an exception that must not happen.
#[unsafe(no_mangle)]
extern "C" fn fatal_exception(registers: &Registers, vector: u64) -> ! {
    const KIND: [&str; 4] = ["synchronous exception", "IRQ", "FIQ", "SError"];
    const FROM: [&str; 4] = ["EL2 with SP_EL0", "EL2", "a guest", "a 32-bit guest"];
    fail();
    let pick = |names: [&'static str; 4], index: u64| {
        names[usize::try_from(index & 3).unwrap_or_default()]
    };
    let kind = pick(KIND, vector);
    let from = pick(FROM, vector >> 2);
    let syndrome = arch::syndrome();
    last_line(format_args!(
        "PANIC on cpu{}: {kind} from {from}",
        percpu::index()
    ));
    last_line(format_args!(
        "  esr {:#x} (class {:#04x})  elr {:#x}  far {:#x}  hpfar {:#x}  spsr {:#x}",
        syndrome.esr,
        syndrome.esr >> 26,
        syndrome.elr,
        syndrome.far,
        syndrome.hpfar,
        syndrome.spsr
    ));
    last_line(format_args!(
        "  sp {:#018x}  image at {:#x}",
        registers.sp,
        arch::image_base()
    ));
    for (row, values) in registers.x.chunks(4).enumerate() {
        last_line(format_args!(
            "  {}",
            Row {
                first: row * 4,
                values
            }
        ));
    }
    last_events();
    exit(PANICKED)
}

/// Some registers on a line.
struct Row<'a> {
    first: usize,
    values: &'a [u64],
}

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.first..)
            .zip(self.values)
            .try_for_each(|(number, value)| write!(f, "x{number:<2} {value:#018x}  "))
    }
}

/// Makes this the CPU that ends the run, or sleeps for ever when another is.
fn claim() {
    let this = arch::affinity();
    let ending = ENDING.compare_exchange(NOBODY, this, Ordering::Relaxed, Ordering::Relaxed);
    if ending.is_err_and(|who| who != this) {
        loop {
            arch::wfi();
        }
    }
}

/// As [`claim`], before an epitaph. What fails while it is written ends the run without one, and what fails then the machine.
fn fail() {
    FAILED.store(true, Ordering::Relaxed);
    claim();
    match FAILURES.fetch_add(1, Ordering::Relaxed) {
        0 => {}
        1 => exit(PANICKED),
        _ => power::off(),
    }
}

fn last_events() {
    for event in percpu::this().ring.latest() {
        last_line(format_args!("  {event}"));
    }
}
