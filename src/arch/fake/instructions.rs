//! The instructions of `arch::hw`, acting on this thread's fake machine.

extern crate std;

use super::tlb::Scope;
use super::{Event, execute, guest, machine};
use crate::addr::{Ipa, PAGE_BYTES, Pa, Va};
use crate::arch::atomic::{AtomicU64, Ordering};

/// TPIDR_EL2: the address of this CPU's [`crate::sync::percpu::CpuBlock`], never zero. The fake machine's blocks are
/// zeroed memory that is never freed; a thread without a machine has one, too.
pub fn percpu_pointer() -> usize {
    std::thread_local! {
        static BLOCK: usize = super::new_block();
    }
    let of_machine = machine().and_then(|machine| {
        let current = machine.state.borrow().current;
        machine.blocks.get(current).copied()
    });
    of_machine.unwrap_or_else(|| BLOCK.with(|block| *block))
}

/// `CASAL`: replaces `old` by `new`, acquire and release.
///
/// # Errors
///
/// The value found, when it was not `old`; nothing is written then.
pub fn cas(word: &AtomicU64, old: u64, new: u64) -> Result<u64, u64> {
    word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
}

/// `LDSETAL`: sets `bits` and returns the word as it was, acquire and release.
pub fn fetch_or(word: &AtomicU64, bits: u64) -> u64 {
    word.fetch_or(bits, Ordering::AcqRel)
}

/// `LDCLRAL`: clears `bits` and returns the word as it was, acquire and release.
pub fn fetch_clear(word: &AtomicU64, bits: u64) -> u64 {
    word.fetch_and(!bits, Ordering::AcqRel)
}

/// `SWPAL`: stores `new` and returns the word as it was, acquire and release.
pub fn swap(word: &AtomicU64, new: u64) -> u64 {
    word.swap(new, Ordering::AcqRel)
}

/// Shows a guest what EL2 wrote to `bytes` bytes from `start`, even while its caches are off: the host is coherent, and the
/// machine takes note.
pub fn show_to_guest(start: Pa, bytes: u64) {
    execute(Event::ShowToGuest(start, bytes), |_| ());
}

/// `IC IALLUIS`: the host executes nothing of a guest's.
pub fn forget_instructions() {
    execute(Event::ForgetInstructions, |_| ());
}

/// `DSB ISHST`: orders this CPU's earlier stores before its later invalidations, for all CPUs' walkers.
pub fn dsb_ishst() {
    execute(Event::DsbIshst, |state| state.dsb(true, false));
}

/// `DSB ISH`: completes earlier invalidations on all CPUs.
pub fn dsb_ish() {
    execute(Event::DsbIsh, |state| state.dsb(true, true));
}

/// `DSB NSHST`: orders this CPU's earlier stores before its later local invalidations.
pub fn dsb_nshst() {
    execute(Event::DsbNshst, |state| state.dsb(false, false));
}

/// `DSB NSH`: completes earlier local invalidations.
pub fn dsb_nsh() {
    execute(Event::DsbNsh, |state| state.dsb(false, true));
}

/// `DSB LD`: waits for earlier loads, of devices too, before anything later.
pub fn dsb_ld() {
    execute(Event::DsbLd, |_| ());
}

/// `ISB`: synchronizes the context of this CPU.
pub fn isb() {}

/// `HINT #0x70`: nothing, but to an emulator's clock: what follows is measured.
pub fn hint_measured() {}

/// `HINT #0x71`: nothing, but to an emulator's clock: what follows is not measured.
pub fn hint_unmeasured() {}

/// `HINT #0x74`: nothing, but to an emulator's clock: forgets which lines CPUs took from each other between their marks.
pub fn hint_forget_lines() {}

/// `HINT #0x75`: nothing, but to an emulator's clock: tells which those were.
pub fn hint_tell_lines() {}

fn page_of(ipa: Ipa) -> Scope {
    let ipa = ipa.align_down(PAGE_BYTES).raw();
    Scope::Stage2 {
        ipa,
        bytes: PAGE_BYTES,
    }
}

/// `TLBI IPAS2E1IS`: drops stage-2 entries for the page at `ipa`, current VMID, all CPUs, every level.
pub fn tlbi_ipas2e1is(ipa: Ipa) {
    execute(Event::TlbiIpas2e1is(ipa), |state| {
        state.invalidate(page_of(ipa), true)
    });
}

/// `TLBI IPAS2E1`: the same on this CPU only.
pub fn tlbi_ipas2e1(ipa: Ipa) {
    execute(Event::TlbiIpas2e1(ipa), |state| {
        state.invalidate(page_of(ipa), false)
    });
}

/// `TLBI RIPAS2E1IS` (FEAT_TLBIRANGE): as [`tlbi_ipas2e1is`] for `pages` pages from `ipa`, 1 to 2^21 of them, rounded
/// up to what one operand can name. The fake does not round: nobody may rely on it.
pub fn tlbi_ripas2e1is(ipa: Ipa, pages: u64) {
    assert!(
        (1..=1 << 21).contains(&pages),
        "one operand cannot name {pages} pages"
    );
    execute(Event::TlbiRipas2e1is(ipa, pages), |state| {
        let ipa = ipa.align_down(PAGE_BYTES).raw();
        state.invalidate(
            Scope::Stage2 {
                ipa,
                bytes: pages * PAGE_BYTES,
            },
            true,
        );
    });
}

/// `TLBI VMALLE1IS`: drops stage-1 and combined entries of the current VMID, all CPUs.
pub fn tlbi_vmalle1is() {
    execute(Event::TlbiVmalle1is, |state| {
        state.invalidate(Scope::Stage1, true)
    });
}

/// `TLBI VMALLE1`: the same on this CPU only.
pub fn tlbi_vmalle1() {
    execute(Event::TlbiVmalle1, |state| {
        state.invalidate(Scope::Stage1, false)
    });
}

/// `TLBI VMALLS12E1IS`: drops all entries of the current VMID, all CPUs.
pub fn tlbi_vmalls12e1is() {
    execute(Event::TlbiVmalls12e1is, |state| {
        state.invalidate(Scope::Vmid, true)
    });
}

/// `TLBI VMALLS12E1`: the same on this CPU only.
pub fn tlbi_vmalls12e1() {
    execute(Event::TlbiVmalls12e1, |state| {
        state.invalidate(Scope::Vmid, false)
    });
}

/// `TLBI VAAE1`: drops stage-1 and combined entries for the page at `va`, any ASID, current VMID, this CPU only.
pub fn tlbi_vaae1(va: Va) {
    execute(Event::TlbiVaae1(va), |state| {
        if let Some(ipa) = guest::ipa_of(va) {
            let ipa = ipa.align_down(PAGE_BYTES).raw();
            state.invalidate(Scope::Stage1Page { ipa }, false);
        }
    });
}

/// `TLBI ALLE1IS`: drops all EL1&0 entries of all VMIDs, all CPUs.
pub fn tlbi_alle1is() {
    execute(Event::TlbiAlle1is, |state| {
        state.invalidate(Scope::Everything, true)
    });
}

/// VTTBR_EL2 of this CPU: root in bits 47:1, VMID in 63:48.
pub fn vttbr() -> u64 {
    machine().map_or(0, |machine| machine.state.borrow().vttbr())
}

/// Loads a VTTBR_EL2 value for a guest and synchronizes.
pub fn set_vttbr(value: u64) {
    execute(Event::Vttbr(value), |state| state.load(value));
}

/// Gives this CPU another VTTBR_EL2 for good.
pub fn replace_vttbr(value: u64) {
    if vttbr() != value {
        set_vttbr(value);
    }
}

/// Sets S2PIR_EL2 and synchronizes.
pub fn set_s2pir(value: u64) {
    execute(Event::S2pir(value), |state| state.set_s2pir(value));
}

/// Runs `work` with VTTBR_EL2 = `vttbr` and restores it; the only way to issue an invalidation under a VMID that this
/// CPU is not running. Stage-1 walks are forbidden meanwhile, so nothing is cached under it.
pub fn with_vttbr<R>(vttbr: u64, work: impl FnOnce() -> R) -> R {
    let before = lend_vttbr(Some(vttbr));
    let result = work();
    lend_vttbr(before);
    result
}

fn lend_vttbr(value: Option<u64>) -> Option<u64> {
    let machine = machine()?;
    let mut state = machine.state.borrow_mut();
    let current = state.current;
    let cpu = state.cpus.get_mut(current)?;
    core::mem::replace(&mut cpu.borrowed, value)
}

/// `AT S1E1R`: what stage 1 of the guest on this CPU makes of `va`, or `None` when its walk fails.
pub fn at_s1e1r(va: Va) -> Option<Ipa> {
    if let Some(machine) = machine() {
        let mut state = machine.state.borrow_mut();
        let cpu = state.current;
        // It walks by the guest's registers, and caches what it finds.
        state.enter(cpu);
    }
    guest::ipa_of(va)
}

/// Gives the CPU away for a moment while polling; `YIELD`.
pub fn yield_now() {
    execute(Event::Yield, |_| {});
    #[cfg(loom)]
    loom::thread::yield_now();
}

/// Tells the machine that a page is about to be used as a translation table whose 512 descriptors are all zero, or is
/// a table no longer (`live` false). Nothing on hardware; the oracle's only way to know.
pub fn note_table(table: Pa, live: bool) {
    execute(Event::Table(table, live), |state| {
        state.note_table(table.raw(), live)
    });
}

/// Tells the machine that the descriptor at `slot` went from `old` to `new`. Nothing on hardware.
pub fn note_descriptor(slot: Pa, old: u64, new: u64) {
    let event = Event::Descriptor { slot, old, new };
    execute(event, |state| state.note_descriptor(slot.raw(), old, new));
}

/// Tells the machine that software of this CPU enters a section, in which it may refer to tables, or leaves one. Nothing
/// on hardware.
pub fn note_section(entered: bool) {
    if let Some(machine) = machine() {
        let mut state = machine.state.borrow_mut();
        let cpu = state.current;
        state.walkers.note(cpu, entered);
    }
}
