//! VMIDs: 8 or 16 bits for any number of VMs.
//!
//! A VM's VMID is good for one *generation*. When the numbers run out a new generation begins: all EL1&0 translations
//! of all CPUs are invalidated once, VMs that are running keep their numbers, and every other VM gets a new one when it
//! is next loaded.
//!
//! # Protocol
//!
//! `active[cpu]` is the tag (generation and number) that `cpu` runs under, or `IDLE`; rollover replaces it by
//! `ROLLED` and keeps the number reserved for that CPU.
//!
//! ```text
//!   load, fast                            rollover, under the lock
//!   seen := active[cpu]                   generation += 1
//!   tag has current generation,           for each cpu: was := swap(active[cpu], ROLLED)
//!   seen != ROLLED, and                       its number stays in use
//!   CAS(active[cpu], seen -> tag)         invalidate everything
//! ```
//!
//! Either the CAS comes first, then the swap finds the number and reserves it; or the swap comes first, then the CAS
//! fails and the loader takes the lock. A plain store in place of the CAS lets a CPU run under a number that rollover
//! gave to another VM (`bad_plain_store_shares_a_vmid` in `tests/loom`).

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering};
use crate::sync::mutex::Mutex;
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::trace::Event;

/// A VMID as VTTBR_EL2 takes it, 1 to 2^bits - 1. Zero is never given to a VM: idle CPUs run under it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Vmid(u16);

/// The VMID of idle CPUs, whose root translates nothing.
pub const RESERVED: Vmid = Vmid(0);

impl Vmid {
    /// The number.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// VTTBR_EL2 for this VMID over the tree at `root`.
    pub const fn vttbr(self, root: crate::addr::Pa) -> u64 {
        (self.0 as u64) << 48 | root.raw()
    }
}

/// What one VM remembers of its VMID: generation and number, zero before the first load.
#[derive(Debug, Default)]
pub struct VmidCell(AtomicU64);

/// A generation and a number: `generation << 16 | number`. Generations start at 1.
type TagBits = u64;

const NUMBER: u64 = 0xffff;
/// This CPU runs no VM.
const IDLE: TagBits = NUMBER + 1;
/// A rollover happened since this CPU last loaded.
const ROLLED: TagBits = 0;
const FIRST_GENERATION: u64 = 2 << 16;
const GENERATION_STEP: u64 = 1 << 16;

/// Hands out VMIDs to the VMs of one machine.
#[derive(Debug)]
pub struct VmidAllocator {
    generation: AtomicU64,
    active: Box<[Active]>,
    state: Mutex<State>,
}

#[derive(Debug)]
#[repr(align(128))]
struct Active(AtomicU64);

#[derive(Debug)]
struct State {
    /// One bit a number: in use in this generation.
    used: Vec<u64>,
    /// Per CPU: the tag that the last rollover found it running under.
    reserved: Vec<TagBits>,
    /// Where the search for a free number begins.
    hint: usize,
    numbers: usize,
}

impl VmidAllocator {
    /// An allocator of `bits`-bit VMIDs (8 or 16; fewer in models) for `cpus` CPUs.
    pub fn new(bits: u32, cpus: usize) -> Self {
        let numbers = 1_usize << bits.clamp(1, 16);
        let mut used = vec![0; numbers.div_ceil(64)];
        if let Some(first) = used.first_mut() {
            *first = 1;
        }
        Self {
            generation: AtomicU64::new(FIRST_GENERATION),
            active: (0..cpus).map(|_| Active(AtomicU64::new(IDLE))).collect(),
            state: Mutex::new(State {
                used,
                reserved: vec![ROLLED; cpus],
                hint: 1,
                numbers,
            }),
        }
    }

    /// Makes `cell`'s VM the one that `cpu`, the calling CPU, runs under; allocates if its number is of an older
    /// generation. The number is the VM's until [`Self::unload`]. CPUs out of range get the reserved VMID.
    pub fn load(&self, cell: &VmidCell, cpu: CpuId) -> Vmid {
        let Some(active) = self.active.get(cpu.0) else {
            return RESERVED;
        };
        let tag = cell.0.load(Ordering::Acquire);
        let seen = active.0.load(Ordering::Relaxed);
        let current = tag & !NUMBER == self.generation.load(Ordering::Acquire);
        if current && seen != ROLLED && arch::cas(&active.0, seen, tag).is_ok() {
            return number(tag);
        }
        self.load_slow(cell, active)
    }

    /// `cpu`, the calling CPU, runs no VM any more: VTTBR_EL2 already names the reserved VMID.
    pub fn unload(&self, cpu: CpuId) {
        if let Some(active) = self.active.get(cpu.0) {
            arch::swap(&active.0, IDLE);
        }
    }

    /// The number under which translations of `cell`'s VM may be cached, if any may.
    pub fn cached(&self, cell: &VmidCell) -> Option<Vmid> {
        match cell.0.load(Ordering::Acquire) {
            0 => None,
            tag => Some(number(tag)),
        }
    }

    /// Numbers in use in this generation, the reserved one not counted.
    pub fn in_use(&self) -> usize {
        let ones: u32 = self
            .state
            .lock()
            .used
            .iter()
            .map(|word| word.count_ones())
            .sum();
        (ones as usize).saturating_sub(1)
    }

    /// Gives back the number of a VM that is being destroyed: loaded nowhere, its translations invalidated.
    pub fn release(&self, cell: &VmidCell) {
        let mut state = self.state.lock();
        let tag = cell.0.load(Ordering::Relaxed);
        if tag & !NUMBER == self.generation.load(Ordering::Relaxed) {
            state.free(number(tag));
        }
        cell.0.store(0, Ordering::Release);
    }

    #[cold]
    fn load_slow(&self, cell: &VmidCell, active: &Active) -> Vmid {
        let mut state = self.state.lock();
        let mut tag = cell.0.load(Ordering::Relaxed);
        if tag & !NUMBER != self.generation.load(Ordering::Relaxed) {
            tag = self.renew(&mut state, tag);
            cell.0.store(tag, Ordering::Release);
        }
        // A CPU takes part again in rollovers from here on; under the lock there is none in between. The number that the
        // last rollover reserved for it stays reserved until the next: it may have cached entries under it since, which
        // its VM, once it carries the number over, invalidates.
        arch::swap(&active.0, tag);
        number(tag)
    }

    /// A tag of the current generation for a VM that had `old`.
    fn renew(&self, state: &mut State, old: TagBits) -> TagBits {
        let generation = self.generation.load(Ordering::Relaxed);
        if old != 0 && state.carry_over(old, generation) {
            return generation | old & NUMBER;
        }
        if old != 0 && state.claim(number(old)) {
            return generation | old & NUMBER;
        }
        if let Some(free) = state.find_free() {
            return generation | free;
        }
        let generation = self.roll_over(state);
        match state.find_free() {
            Some(free) => generation | free,
            // As many CPUs run VMs as there are numbers: with 8 bits and 256 CPUs. Sharing the reserved number would mix
            // two guests, so this is refused when the machine is described (`cpus < 2^bits`).
            None => generation,
        }
    }

    fn roll_over(&self, state: &mut State) -> u64 {
        let generation = self.generation.load(Ordering::Relaxed) + GENERATION_STEP;
        self.generation.store(generation, Ordering::Release);
        state.forget_all();
        for (active, reserved) in self.active.iter().zip(&mut state.reserved) {
            let was = arch::swap(&active.0, ROLLED);
            if was != ROLLED {
                // An idle CPU reserves nothing.
                *reserved = if was == IDLE { ROLLED } else { was };
            }
            mark(&mut state.used, number(*reserved));
        }
        arch::dsb_ishst();
        arch::tlbi_alle1is();
        percpu::count(Event::TlbiBroadcast);
        arch::dsb_ish();
        generation
    }
}

fn number(tag: TagBits) -> Vmid {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the number is the low sixteen bits"
    )]
    Vmid(tag as u16)
}

fn mark(used: &mut [u64], vmid: Vmid) {
    if let Some(word) = used.get_mut(usize::from(vmid.0) / 64) {
        *word |= 1 << (vmid.0 % 64);
    }
}

impl State {
    /// Whether `old` is reserved by the last rollover; then it becomes the VM's number of this generation everywhere.
    fn carry_over(&mut self, old: TagBits, generation: u64) -> bool {
        let renewed = generation | old & NUMBER;
        let mut hit = false;
        for reserved in self
            .reserved
            .iter_mut()
            .filter(|reserved| **reserved == old)
        {
            *reserved = renewed;
            hit = true;
        }
        hit
    }

    fn claim(&mut self, vmid: Vmid) -> bool {
        let Some(word) = self.used.get_mut(usize::from(vmid.0) / 64) else {
            return false;
        };
        let bit = 1 << (vmid.0 % 64);
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    fn free(&mut self, vmid: Vmid) {
        if vmid != RESERVED
            && let Some(word) = self.used.get_mut(usize::from(vmid.0) / 64)
        {
            *word &= !(1 << (vmid.0 % 64));
        }
    }

    fn find_free(&mut self) -> Option<u64> {
        for offset in 0..self.numbers {
            let candidate = (self.hint + offset) % self.numbers;
            let vmid = Vmid(u16::try_from(candidate).ok()?);
            if candidate != 0 && self.claim(vmid) {
                self.hint = candidate + 1;
                return Some(u64::from(vmid.0));
            }
        }
        None
    }

    fn forget_all(&mut self) {
        self.used.fill(0);
        mark(&mut self.used, RESERVED);
        self.hint = 1;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use super::{RESERVED, VmidAllocator, VmidCell};
    use crate::sync::quiescence::CpuId;

    #[test]
    fn a_vm_keeps_its_number_while_the_generation_lasts() {
        let vmids = VmidAllocator::new(8, 2);
        let cell = VmidCell::default();
        assert_eq!(vmids.cached(&cell), None);
        let first = vmids.load(&cell, CpuId(0));
        assert_eq!(vmids.load(&cell, CpuId(1)), first);
        assert_ne!(first, RESERVED);
        assert_eq!(vmids.in_use(), 1);
    }

    #[test]
    fn numbers_of_one_generation_are_distinct() {
        let vmids = VmidAllocator::new(8, 1);
        let cells: Vec<_> = (0..255).map(|_| VmidCell::default()).collect();
        let numbers: BTreeSet<_> = cells
            .iter()
            .map(|cell| vmids.load(cell, CpuId(0)).number())
            .collect();
        assert_eq!(numbers.len(), 255);
        assert!(!numbers.contains(&0));
    }

    #[test]
    fn a_running_vm_keeps_its_number_through_rollover() {
        let vmids = VmidAllocator::new(4, 2);
        let running = VmidCell::default();
        let number = vmids.load(&running, CpuId(1));
        for _ in 0..100 {
            let other = VmidCell::default();
            assert_ne!(vmids.load(&other, CpuId(0)), number);
        }
        assert_eq!(vmids.load(&running, CpuId(1)), number);
    }

    #[test]
    fn a_released_number_is_given_again() {
        let vmids = VmidAllocator::new(8, 1);
        for _ in 0..1000 {
            let cell = VmidCell::default();
            vmids.load(&cell, CpuId(0));
            vmids.unload(CpuId(0));
            vmids.release(&cell);
        }
        assert_eq!(vmids.in_use(), 0);
    }
}
