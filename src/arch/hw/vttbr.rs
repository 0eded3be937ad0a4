//! VTTBR_EL2, and the only ways to change it.
//!
//! Erratum 1319367 (Cortex-A72 and its kin): a speculative `AT` or stage-1 walk under a half-switched context caches
//! translations that belong to neither. It is harmless while stage-1 walks are disabled for both halves of the address
//! space and the stage-1 MMU is on, because then no walk starts. Hence the order of every change of VTTBR_EL2:
//!
//! ```text
//! TCR_EL1.{EPD0,EPD1} = 1 ; ISB ; SCTLR_EL1.M = 1 ; ISB ; VTTBR_EL2 = new ; ISB
//! (rest of the context) ; ISB ; SCTLR_EL1 ; ISB ; TCR_EL1
//! ```
//!
//! Each `ISB` is needed: without it two direct writes may take effect in either order, and a guest that left its MMU off would
//! have it on, with tables that are none, before walks are forbidden. The kin: Cortex-A57 (1319537), A55 (1530923), A76 and
//! Neoverse N1 (1165522).
//!
//! It is followed on every CPU: it costs eleven instructions off the hot paths. A CPU that holds no vCPU keeps the first
//! two values, so loading a vCPU needs no [`shield_stage1`] before VTTBR_EL2.

use aarch64_cpu::registers::{ReadWriteable, Readable, SCTLR_EL1, TCR_EL1, VTTBR_EL2, Writeable};

use super::{isb, note_register_writes};

/// VTTBR_EL2 of this CPU: root in bits 47:1, VMID in 63:48.
#[inline]
pub fn vttbr() -> u64 {
    VTTBR_EL2.get()
}

/// Forbids stage-1 walks on this CPU until TCR_EL1 is written again, last, after SCTLR_EL1 and an `ISB`.
#[inline]
pub fn shield_stage1() {
    note_register_writes(2);
    TCR_EL1.modify(TCR_EL1::EPD0::DisableTTBR0Walks + TCR_EL1::EPD1::DisableTTBR1Walks);
    isb();
    SCTLR_EL1.modify(SCTLR_EL1::M::Enable);
    isb();
}

/// Loads a VTTBR_EL2 value and synchronizes. Stage-1 walks must be forbidden ([`shield_stage1`]), as they always are
/// on a CPU that holds no vCPU.
#[inline]
pub fn set_vttbr(value: u64) {
    debug_assert!(
        TCR_EL1.is_set(TCR_EL1::EPD0) && TCR_EL1.is_set(TCR_EL1::EPD1),
        "stage-1 walks are forbidden"
    );
    note_register_writes(1);
    VTTBR_EL2.set(value);
    isb();
}

/// Gives this CPU, which may hold a vCPU, the VTTBR_EL2 `value` for good; the vCPU's EL1 state stays.
pub fn replace_vttbr(value: u64) {
    if vttbr() == value {
        return;
    }
    let (sctlr, tcr) = (SCTLR_EL1.get(), TCR_EL1.get());
    shield_stage1();
    set_vttbr(value);
    note_register_writes(2);
    SCTLR_EL1.set(sctlr);
    isb();
    TCR_EL1.set(tcr);
    isb();
}

/// Runs `work` with VTTBR_EL2 = `value` and restores it; the only way to issue an invalidation under a VMID that this
/// CPU is not running. `work` must not enter a guest.
#[inline]
pub fn with_vttbr<R>(value: u64, work: impl FnOnce() -> R) -> R {
    let held = vttbr();
    if held == value {
        return work();
    }
    let (sctlr, tcr) = (SCTLR_EL1.get(), TCR_EL1.get());
    shield_stage1();
    set_vttbr(value);
    let result = work();
    set_vttbr(held);
    note_register_writes(2);
    SCTLR_EL1.set(sctlr);
    isb();
    TCR_EL1.set(tcr);
    isb();
    result
}
