//! The instructions themselves, for the target.
//!
//! One function per instruction, named by its mnemonic; a function that needs several says why they belong together.
//! References are to the Arm ARM, DDI 0487 issue K.a.

mod atomics;
mod barriers;
pub mod boot;
mod cache;
mod control;
mod gic;
mod registers;
mod tlbi;
mod vttbr;

pub use atomics::{cas, fetch_clear, fetch_or, set_lse, swap, use_lse};
pub use barriers::{
    dsb_ish, dsb_ishst, dsb_ld, dsb_nsh, dsb_nshst, hint_forget_lines, hint_measured,
    hint_tell_lines, hint_unmeasured, isb, sev, wfi, yield_now,
};
pub use boot::image_base;
pub use cache::{
    dc_civac_range, forget_instructions, set_coherent_guests, show_to_guest, zero_page,
};
pub use control::{affinity, id_registers, level_with, write_control_registers};
pub use gic::{icc_dir, icc_eoir1, icc_iar1, icc_init, icc_sgi1r};
pub use registers::{
    Syndrome, at_s1e1r, counter, counter_hz, hvc, note_register_writes, percpu_pointer,
    set_percpu_pointer, set_s2pir, smc, syndrome,
};
pub use tlbi::{
    tlbi_alle1is, tlbi_ipas2e1, tlbi_ipas2e1is, tlbi_ripas2e1is, tlbi_vaae1, tlbi_vmalle1,
    tlbi_vmalle1is, tlbi_vmalls12e1, tlbi_vmalls12e1is,
};
pub use vttbr::{replace_vttbr, set_vttbr, shield_stage1, vttbr, with_vttbr};

use crate::addr::Pa;

/// Tells the machine that a page is about to be used as a translation table, or is one no longer. Nothing here: the
/// host's oracle listens to it.
#[inline]
pub fn note_table(_table: Pa, _live: bool) {}

/// Tells the machine that this CPU enters a section or leaves one. Nothing here: the host's oracle listens to it.
#[inline]
pub fn note_section(_entered: bool) {}

/// Tells the machine that a descriptor changed. Nothing here: the host's oracle listens to it.
#[inline]
pub fn note_descriptor(_slot: Pa, _old: u64, _new: u64) {}
