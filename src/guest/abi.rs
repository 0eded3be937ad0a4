//! What the built-in guest and the bench agree on: hypercalls, operations, and where things lie in the guest's memory.
//!
//! A vCPU ends an operation and asks for the next by [`HVC_NEXT`], which blocks until the bench posts one. All words are
//! 64 bits, little-endian.

use core::sync::atomic::AtomicU64;

/// SMCCC function: does nothing, returns 0. For measuring.
pub const HVC_NULL: u64 = 0xc600_0000;
/// SMCCC function: reports the operation just finished (x1 status, x2 elapsed ticks, x3 and x4 results) and blocks until
/// the next one: x0 its [`op`], x1 to x5 its arguments.
pub const HVC_NEXT: u64 = 0xc600_0001;
/// SMCCC: the function does not exist.
pub const NOT_SUPPORTED: u64 = u64::MAX;

/// Operations.
pub mod op {
    /// Turn this vCPU off (PSCI CPU_OFF).
    pub const STOP: u64 = 0;
    /// vCPU 0: start all others (PSCI CPU_ON). Result: how many could not be started.
    pub const START_OTHERS: u64 = 1;
    /// One pass over a region: x1 first address, x2 steps, x3 bytes per step, x4 [`super::flags`], x5 seed << 32 | value.
    /// Results: stores made, and a checksum of what was read.
    pub const PASS: u64 = 2;
    /// Random stores into a region until told to stop: x1 first address, x2 pages, x3 seed. Result: stores made.
    pub const FREE_RUN: u64 = 3;
    /// Print the time of the last pass over the UART: x1 nanoseconds.
    pub const REPORT: u64 = 4;
    /// Timer and WFI self-test, of the virtual timer or, if x1 is not zero, the physical one. Results: checks made, bit mask of those that failed.
    pub const TIMER_TEST: u64 = 5;
    /// vCPU 0: send x1 rounds of IPIs to each other vCPU and wait for its answer. Results as above.
    pub const IPI_SEND: u64 = 6;
    /// Every other vCPU: sleep and answer until x1 rounds are done.
    pub const IPI_SERVE: u64 = 7;
    /// vCPU 1: wait x1 times, by exclusive load and WFE, for a store of vCPU 0, with interrupts pending that are not to be taken.
    /// vCPU 0: interrupt it, then store, as often. Results: stores, and whether one was waited for in vain.
    pub const EVENTS: u64 = 18;
    /// vCPU 1: go off x1 times, and live again until an interrupt comes. vCPU 0: turn it on as often and interrupt it. Results: how
    /// often, and bit mask of what failed.
    pub const RESTARTS: u64 = 21;
    /// Do what a hostile guest does; x1 first address of a writable page pair. Results as above.
    pub const HOSTILE: u64 = 8;
    /// Call the firmware with function x1, which is not to return.
    pub const FIRMWARE: u64 = 10;
    /// Run 32-bit code at EL0, which no guest is told it may, and reach for memory that is not there.
    pub const AARCH32: u64 = 11;
    /// Debug itself: x1 (one of [`super::debug`]) says which part. Results as above.
    pub const DEBUG: u64 = 20;
    /// Null hypercalls: x1 how many.
    pub const HYPERCALLS: u64 = 9;
    /// Round after round over two parts of a region, until told to stop: x1 first address of the region, x2 its pages, x3 the
    /// part that is stored to and x4 the part that is loaded from, each first page << 32 | pages, going on at the region's
    /// start where it ends. Rounds done are counted in [`super::Area::rounds`]. Result: rounds.
    pub const ROUNDS: u64 = 12;
    /// Until told to stop: x1 zero: send over the UART, line after line and whether it has room or not; else send an SGI to all
    /// other vCPUs, one after the other, and take what comes. Each line, each SGI, is a round of [`super::Area::rounds`].
    /// Result: rounds.
    pub const FLOOD: u64 = 22;
    /// Add one to the word at x1, x2 times.
    pub const ADD: u64 = 19;
    /// Every vCPU: the interrupt storm. x1 SGIs to send, x2 nonzero if each waits for the one before, x3 period of the timer in
    /// ticks, x4 seed. Results: SGIs handled, bit mask of what failed.
    pub const STORM: u64 = 17;
    /// A flag of [`STORM`]: each send waits until the one before was handled.
    pub const STORM_PACED: u64 = 1 << 0;
    /// A flag of [`STORM`]: vCPUs look at each other's interrupts, and every other one deactivates them apart from ending them.
    pub const STORM_MIXED: u64 = 1 << 1;
    /// x1 ticks of the timer, each of whose handlers waits between acknowledging and ending it, until
    /// [`super::Area::released`] permits. Results: ticks, and how many came other than once.
    pub const HELD_TICKS: u64 = 16;
    /// Do x1 (one of [`super::measure`]) x2 times with argument x3. x4 zero: one after the other; result: ticks that all took
    /// together. Otherwise each is timed alone and its ticks are stored at [`super::SAMPLES`]; result: how many those are.
    /// The second result counts interrupts that were waited for in vain.
    pub const MEASURE: u64 = 13;
    /// Let interrupts in until told to stop: x1 (one of [`super::listen`]) says how. Result: interrupts of [`IPI_MODES`] and
    /// the like that were taken meanwhile.
    pub const LISTEN: u64 = 14;
    /// Do x1 (one of [`super::ipi`]) x2 times, all other vCPUs listening. Results: ticks that the sends took, and ticks until
    /// all receivers had answered; all rounds together, `u64::MAX` both if an answer did not come.
    pub const IPI_MODES: u64 = 15;
}

/// What [`op::MEASURE`] does.
pub mod measure {
    /// Nothing: what measuring itself takes.
    pub const NOTHING: u64 = 0;
    /// A null hypercall.
    pub const HYPERCALL: u64 = 1;
    /// Load a word from the argument into x0.
    pub const LOAD_X0: u64 = 2;
    /// Load a word from the argument into x25.
    pub const LOAD_X25: u64 = 3;
    /// Load a double word from the argument into x0.
    pub const LOAD_WIDE_X0: u64 = 4;
    /// Load a double word from the argument into x25.
    pub const LOAD_WIDE_X25: u64 = 5;
    /// End an interrupt that was not acknowledged: the register access alone.
    pub const EOI: u64 = 6;
    /// Send an interrupt to the vCPU that the argument names, and wait until its handler has run.
    pub const IPI: u64 = 7;
    /// As [`IPI`], after a pause in which the receiver falls asleep.
    pub const IPI_AFTER_PAUSE: u64 = 8;
    /// Wait in a loop for a timer that is set to the argument, in ticks from now: how late it is seen.
    pub const TIMER: u64 = 9;
    /// Sleep until that timer, interrupts masked: how late execution goes on.
    pub const WAKE: u64 = 10;
    /// Store to one page after the other, from the argument on.
    pub const STORE_PAGES: u64 = 11;
    /// Load from one page after the other, from the argument on.
    pub const LOAD_PAGES: u64 = 12;
    /// Wake the vCPU that the argument names by an interrupt that nobody counts or waits for.
    pub const POKE: u64 = 13;
    /// Wait for an event, which hands a CPU with several vCPUs to another.
    pub const HAND_ON: u64 = 14;
}

/// What [`op::DEBUG`] does.
pub mod debug {
    /// Single steps, breakpoints and watchpoints; leaves some behind.
    pub const TRY: u64 = 0;
    /// Nothing was left behind by anybody else.
    pub const APART: u64 = 1;
    /// What [`TRY`] left is still there, and does what it should.
    pub const KEPT: u64 = 2;
}

/// Debug exceptions that [`op::DEBUG`] keeps in mind.
pub const DEBUG_EVENTS: usize = 8;

/// How [`op::LISTEN`] waits.
pub mod listen {
    /// In a loop.
    pub const RUNNING: u64 = 0;
    /// Asleep.
    pub const ASLEEP: u64 = 1;
    /// For events, which hands a CPU with several vCPUs to another; interrupts stay masked.
    pub const HANDING_ON: u64 = 2;
}

/// What [`op::IPI_MODES`] does: the modes of the kernel's IPI benchmark.
pub mod ipi {
    /// Everything but send.
    pub const DRY: u64 = 0;
    /// To itself.
    pub const OWN: u64 = 1;
    /// To vCPU 1.
    pub const NORMAL: u64 = 2;
    /// To all others at once.
    pub const BROADCAST: u64 = 3;
    /// To all others at once; their handlers take a lock.
    pub const BROADCAST_LOCK: u64 = 4;
}

/// Flags of [`op::PASS`].
pub mod flags {
    /// Percent of the steps that store, 0 to 100; the others load.
    pub const WRITE_PERCENT: u64 = 0xff;
    /// Steps in random order, with repetition, from the seed.
    pub const RANDOM: u64 = 1 << 8;
    /// Keep the write log.
    pub const LOG: u64 = 1 << 9;
}

/// SGIs that the storm uses.
pub const STORM_SGIS: usize = 8;

/// Status of a finished operation.
pub mod status {
    /// Done.
    pub const OK: u64 = 0;
    /// The guest took an exception that it did not expect: results are ESR_EL1 and ELR_EL1.
    pub const EXCEPTION: u64 = 1;
    /// The operation is not known.
    pub const UNKNOWN: u64 = 2;
}

/// First address of guest RAM, and of [`Params`].
pub const RAM: u64 = 0x4000_0000;
/// Where the image is loaded and entered.
pub const IMAGE: u64 = 0x4008_0000;
/// Bytes that image may take.
pub const IMAGE_BYTES: u64 = TABLES - IMAGE;
/// The guest's own stage-1 tables: two pages. From here on memory is writable and not executable.
pub const TABLES: u64 = 0x4020_0000;
/// The private areas of the vCPUs.
pub const AREAS: u64 = 0x4021_0000;
/// Bytes of one area: [`Area`] at its start, the stack growing down from its end.
pub const AREA_BYTES: u64 = 0x4000;
/// Most vCPUs.
pub const MAX_VCPUS: u64 = 128;
/// What [`op::MEASURE`] found, one word each.
pub const SAMPLES: u64 = 0x4050_0000;
/// Most samples.
pub const MAX_SAMPLES: u64 = (LOGS - SAMPLES) / 8;
/// The write logs: one bit a page of the vCPU's region, [`Params::log_bytes`] each.
pub const LOGS: u64 = 0x4060_0000;
/// First address of the memory that is written and logged.
pub const DATA: u64 = 0x8000_0000;

const _: () = assert!(AREAS + MAX_VCPUS * AREA_BYTES <= SAMPLES);

/// What the hypervisor tells the guest, at [`RAM`]; read only.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Params {
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Architecture version of the interrupt controller: 2 or 3.
    pub gic: u64,
    /// Bytes of one vCPU's region of the memory at [`DATA`].
    pub region_bytes: u64,
    /// Bytes of one vCPU's write log.
    pub log_bytes: u64,
}

impl Params {
    /// The bytes for memory.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let words = [self.vcpus, self.gic, self.region_bytes, self.log_bytes];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The head of a vCPU's area.
#[derive(Debug)]
#[repr(C)]
pub struct Area {
    /// Nonzero: leave [`op::FREE_RUN`], [`op::ROUNDS`] or [`op::FLOOD`]. Written by the hypervisor.
    pub stop: AtomicU64,
    /// MPIDR_EL1 of the vCPU, for those who send it interrupts.
    pub affinity: AtomicU64,
    /// Position of the vCPU.
    pub index: AtomicU64,
    /// What an exception means: see the guest's `trap`.
    pub probe: AtomicU64,
    /// ESR_EL1 of the exception that the probe caught.
    pub probe_esr: AtomicU64,
    /// FAR_EL1 of it.
    pub probe_far: AtomicU64,
    /// Timer interrupts taken.
    pub timer_ticks: AtomicU64,
    /// Inter-processor interrupts taken.
    pub ipis: AtomicU64,
    /// Written by the sender before each IPI.
    pub ipi_number: AtomicU64,
    /// What the receiver's handler last saw there.
    pub ipi_seen: AtomicU64,
    /// Operations done.
    pub operations: AtomicU64,
    /// Rounds done by the current [`op::ROUNDS`] or [`op::FLOOD`], or the last.
    pub rounds: AtomicU64,
    /// Nonzero: the number of the tick that [`op::HELD_TICKS`] waits for.
    pub handling: AtomicU64,
    /// Number of the last tick whose handler waited before ending it.
    pub held: AtomicU64,
    /// Handlers up to this number may end. Written by the hypervisor.
    pub released: AtomicU64,
    /// [`op::STORM`], by SGI: how many were sent to this vCPU. Written by the senders.
    pub storm_sent: [AtomicU64; STORM_SGIS],
    /// As above: what the handler last saw there.
    pub storm_seen: [AtomicU64; STORM_SGIS],
    /// As above: handlers that ran.
    pub storm_taken: AtomicU64,
    /// As above: ticks between two interrupts of the timer, zero for one only.
    pub storm_period: AtomicU64,
    /// As above: this vCPU deactivates interrupts apart from ending them.
    pub storm_deactivates: AtomicU64,
    /// As above: this vCPU has sent everything.
    pub storm_done: AtomicU64,
    /// The lock that [`ipi::BROADCAST_LOCK`] takes, in the area of vCPU 0.
    pub lock: AtomicU64,
    /// Times it was taken.
    pub locked: AtomicU64,
    /// [`op::EVENTS`]: the store that vCPU 1 waits for next. Written by it.
    pub event_awaited: AtomicU64,
    /// As above: the last store, by vCPU 0.
    pub event: AtomicU64,
    /// [`op::DEBUG`]: debug exceptions taken.
    pub debug_taken: AtomicU64,
    /// As above: class and address of each.
    pub debug_events: [AtomicU64; DEBUG_EVENTS],
    /// [`op::RESTARTS`]: how often the vCPU is still to be turned on; zero: it is not a new life that begins.
    pub lives: AtomicU64,
    /// As above: how often it was.
    pub births: AtomicU64,
    /// As above: up to which birth it need not spin any more. Written by vCPU 0.
    pub may_sleep: AtomicU64,
    /// As above: [`Area::timer_ticks`] before.
    pub ticks_before: AtomicU64,
    /// As above: bit mask of what failed.
    pub restart_faults: AtomicU64,
}

/// Address of the area of vCPU `index`.
pub const fn area(index: u64) -> u64 {
    AREAS + index * AREA_BYTES
}
