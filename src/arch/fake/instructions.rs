//! The instructions of `arch::hw`, acting on this thread's fake machine.

extern crate std;

use crate::addr::{Ipa, Va};
use crate::arch::atomic::{AtomicU64, Ordering};

/// TPIDR_EL2: the address of this CPU's [`crate::sync::percpu::CpuBlock`], never zero. The fake machine's blocks are
/// zeroed memory that is never freed.
pub fn percpu_pointer() -> usize {
    std::thread_local! {
        static BLOCK: usize = std::vec![[0_u64; 16]; 64].leak().as_ptr().expose_provenance().next_multiple_of(128);
    }
    BLOCK.with(|block| *block)
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

/// `DSB ISHST`: orders this CPU's earlier stores before its later invalidations, for all CPUs' walkers.
pub fn dsb_ishst() {}
/// `DSB ISH`: completes earlier invalidations on all CPUs.
pub fn dsb_ish() {}
/// `DSB NSHST`: orders this CPU's earlier stores before its later local invalidations.
pub fn dsb_nshst() {}
/// `DSB NSH`: completes earlier local invalidations.
pub fn dsb_nsh() {}
/// `ISB`: synchronizes the context of this CPU.
pub fn isb() {}

/// `TLBI IPAS2E1IS`: drops stage-2 entries for the page at `ipa`, current VMID, all CPUs, every level.
pub fn tlbi_ipas2e1is(_ipa: Ipa) {}
/// `TLBI IPAS2E1`: the same on this CPU only.
pub fn tlbi_ipas2e1(_ipa: Ipa) {}
/// `TLBI RIPAS2E1IS` (FEAT_TLBIRANGE): as [`tlbi_ipas2e1is`] for `pages` pages from `ipa`, 1 to 2^21 of them, rounded
/// up to what one operand can name.
pub fn tlbi_ripas2e1is(_ipa: Ipa, _pages: u64) {}
/// `TLBI VMALLE1IS`: drops stage-1 and combined entries of the current VMID, all CPUs.
pub fn tlbi_vmalle1is() {}
/// `TLBI VMALLS12E1IS`: drops all entries of the current VMID, all CPUs.
pub fn tlbi_vmalls12e1is() {}
/// `TLBI VMALLS12E1`: the same on this CPU only.
pub fn tlbi_vmalls12e1() {}
/// `TLBI VAAE1`: drops stage-1 and combined entries for the page at `va`, any ASID, current VMID, this CPU only.
pub fn tlbi_vaae1(_va: Va) {}
/// `TLBI ALLE1IS`: drops all EL1&0 entries of all VMIDs, all CPUs.
pub fn tlbi_alle1is() {}

/// VTTBR_EL2 of this CPU: root in bits 47:1, VMID in 63:48.
pub fn vttbr() -> u64 {
    0
}

/// Runs `work` with VTTBR_EL2 = `vttbr` and restores it; the only way to issue an invalidation under a VMID that this
/// CPU is not running.
pub fn with_vttbr<R>(_vttbr: u64, work: impl FnOnce() -> R) -> R {
    work()
}

/// Gives the CPU away for a moment while polling; `YIELD`.
pub fn yield_now() {
    #[cfg(loom)]
    loom::thread::yield_now();
}

/// Tells the machine that a page is about to be used as a translation table whose 512 descriptors are all zero, or is
/// a table no longer (`live` false). Nothing on hardware; the oracle's only way to know.
pub fn note_table(_table: crate::addr::Pa, _live: bool) {}

/// Tells the machine that the descriptor at `slot` went from `old` to `new`. Nothing on hardware.
pub fn note_descriptor(_slot: crate::addr::Pa, _old: u64, _new: u64) {}
