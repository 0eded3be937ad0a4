//! The data of one CPU, found through TPIDR_EL2.
//!
//! A [`CpuBlock`] is never freed and never moves. Its head is read by the vectors; the rest is plain Rust. Who may
//! touch what: every field is written by its own CPU only, unless its comment says otherwise.

use alloc::vec::Vec;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use spin::Once;

use crate::arch::{self, offsets};
use crate::trace::ring::Ring;
use crate::trace::times::ExitTimes;
use crate::trace::{Counters, Event};

/// Everything one CPU owns. All-zero bytes are a valid block.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct CpuBlock {
    /// Top of the stack for exceptions taken from EL2 itself. Read by the vectors, written once before the CPU starts.
    pub emergency_stack_top: AtomicU64,
    /// What the vectors that mitigate go by: rounds of the loop, or a function of firmware. Written once, before guests run.
    pub mitigation: AtomicU64,
    /// Position of this CPU in the list of CPUs found at boot.
    pub index: AtomicU32,
    /// The NUMA node it is in. Written once, before the CPU starts.
    pub node: AtomicU32,
    /// MPIDR_EL1 affinity of this CPU.
    pub affinity: AtomicU64,
    /// What this CPU has counted.
    pub counters: Counters,
    /// What this CPU did last.
    pub ring: Ring,
    /// How long its exits take.
    pub exit_times: ExitTimes,
}

const _: () = {
    assert!(offset_of!(CpuBlock, emergency_stack_top) == offsets::EMERGENCY_STACK_TOP);
    assert!(offset_of!(CpuBlock, mitigation) == offsets::MITIGATION);
    assert!(offset_of!(CpuBlock, counters) + 8 * Event::Exits as usize == offsets::EXITS);
    assert!(
        offset_of!(CpuBlock, counters) + 8 * Event::RegisterWrites as usize
            == offsets::REGISTER_WRITES
    );
    assert!(size_of::<CpuBlock>() <= 4096);
};

/// The block of the CPU this runs on.
pub fn this() -> &'static CpuBlock {
    let block = core::ptr::with_exposed_provenance::<CpuBlock>(arch::percpu_pointer());
    // SAFETY: TPIDR_EL2 holds the address of a block that was initialized before Rust ran on this CPU and is never
    // freed (boot's duty; the fake's blocks are leaked zeroed memory); all fields are atomics.
    unsafe { &*block }
}

static BLOCKS: Once<Vec<&'static CpuBlock>> = Once::new();

/// Numbers the CPUs: `blocks[n]` belongs to CPU n. Called once, by boot, when it is known which CPUs came up.
pub fn publish(blocks: Vec<&'static CpuBlock>) {
    BLOCKS.call_once(|| {
        for (index, block) in (0..).zip(&blocks) {
            block.index.store(index, Ordering::Relaxed);
        }
        blocks
    });
}

/// The blocks of all CPUs, by number; none before [`publish`].
pub fn all() -> &'static [&'static CpuBlock] {
    BLOCKS.get().map_or(&[], |it| it.as_slice())
}

/// The NUMA node of the CPU this runs on; 0 where nothing was said of it.
pub fn node() -> usize {
    this().node.load(Ordering::Relaxed) as usize
}

/// The NUMA node of CPU `cpu`; 0 where nothing was said of it.
pub fn node_of(cpu: usize) -> usize {
    let block = all().get(cpu);
    block.map_or(0, |it| it.node.load(Ordering::Relaxed) as usize)
}

/// Counts one `event` on this CPU.
pub fn count(event: Event) {
    count_many(event, 1);
}

/// Counts `event` `n` times on this CPU.
pub fn count_many(event: Event, n: u64) {
    this().counters.add(event, n);
}

/// Position of this CPU in the list of CPUs found at boot.
pub fn index() -> usize {
    this().index.load(Ordering::Relaxed) as usize
}
