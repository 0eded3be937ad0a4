//! Cache maintenance for memory that goes to a guest, and zeroing.
//!
//! A guest whose caches are off reads memory past them. Without FEAT_S2FWB a frame is therefore zeroed *and* cleaned
//! before a guest sees it and when it leaves a guest; otherwise the guest could read what the frame's last owner
//! left in memory below a dirty line. The same where instruction fetches are past the data caches (CTR_EL0.IDC = 0).
//!
//! Instruction caches may hold what the last owner executed (CTR_EL0.DIC = 0), for a guest that jumps to memory that it never
//! wrote. They are emptied when memory is given to a VM: nobody can execute it between its last owner and its next.

use core::arch::asm;
use core::sync::atomic::AtomicBool;

use super::registers::mrs;
use crate::addr::{PAGE_BYTES, Pa, to_usize};
use crate::arch::atomic::Ordering;

/// CTR_EL0.DminLine: log2 of the words in the smallest data-cache line.
const CTR_DMINLINE: u32 = 16;
/// DCZID_EL0.BS: log2 of the words that `DC ZVA` zeroes.
const DCZID_BS: u64 = 0xf;
/// DCZID_EL0.DZP: `DC ZVA` is not to be used.
const DCZID_DZP: u64 = 1 << 4;

static COHERENT_GUESTS: AtomicBool = AtomicBool::new(false);

static COHERENT_INSTRUCTIONS: AtomicBool = AtomicBool::new(false);

/// Declares what every CPU has. `data`: FEAT_S2FWB, which stage 2 uses, and CTR_EL0.IDC; guests then neither read nor fetch
/// past the caches. `instructions`: CTR_EL0.DIC; what is fetched is what memory holds. Called once, by boot.
pub fn set_coherent_guests(data: bool, instructions: bool) {
    COHERENT_GUESTS.store(data, Ordering::Relaxed);
    COHERENT_INSTRUCTIONS.store(instructions, Ordering::Relaxed);
}

/// `DC CIVAC` over `bytes` bytes from `start`, then `DSB SY`: memory holds what the caches held.
pub fn dc_civac_range(start: Pa, bytes: u64) {
    let line = 4_u64 << (mrs!("ctr_el0") >> CTR_DMINLINE & 0xf);
    let mut at = start.raw() & !(line - 1);
    let end = start.raw() + bytes;
    while at < end {
        // SAFETY: cleaning and invalidating a line loses nothing; EL2 maps all of RAM at its own address.
        unsafe { asm!("dc civac, {}", in(reg) at, options(nostack, preserves_flags)) };
        at += line;
    }
    // SAFETY: a barrier changes no state that Rust can see.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}

/// Shows a guest what EL2 wrote to `bytes` bytes from `start`, even while its caches are off.
pub fn show_to_guest(start: Pa, bytes: u64) {
    if !COHERENT_GUESTS.load(Ordering::Relaxed) {
        dc_civac_range(start, bytes);
    }
}

/// `IC IALLUIS`, complete, where instruction caches need it: no CPU executes what memory held before.
pub fn forget_instructions() {
    if COHERENT_INSTRUCTIONS.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: instruction caches are fetched again; barriers change no state that Rust can see.
    unsafe {
        asm!(
            "dsb ish",
            "ic ialluis",
            "dsb ish",
            "isb",
            options(nostack, preserves_flags)
        )
    };
}

/// Fills the page at `page` with zeros that a guest sees with its caches off, too.
///
/// # Safety
///
/// `page` is a page of RAM that the caller owns and to which no reference exists.
pub unsafe fn zero_page(page: Pa) {
    let dczid = mrs!("dczid_el0");
    let block = 4_u64 << (dczid & DCZID_BS);
    if dczid & DCZID_DZP != 0 || block > PAGE_BYTES {
        let bytes = core::ptr::with_exposed_provenance_mut::<[u8; to_usize(PAGE_BYTES)]>(to_usize(
            page.raw(),
        ));
        // SAFETY: the caller owns the page; all RAM is mapped at its own address.
        unsafe { bytes.write_bytes(0, 1) };
    } else {
        for at in (page.raw()..page.raw() + PAGE_BYTES).step_by(to_usize(block)) {
            // SAFETY: the block lies in a page the caller owns; EL2 maps RAM as normal memory.
            unsafe { asm!("dc zva, {}", in(reg) at, options(nostack, preserves_flags)) };
        }
    }
    if !COHERENT_GUESTS.load(Ordering::Relaxed) {
        dc_civac_range(page, PAGE_BYTES);
    }
}
