//! The GICv3 CPU interface: ICC_* (Arm IHI 0069H, 12).

use super::registers::{mrs, msr, note_register_writes};
use super::{dsb_ishst, isb};
use crate::arch::ich_reset;

/// ICC_SRE_EL1 and ICC_SRE_EL2: system registers (SRE), no bypass (DFB, DIB). Without ICC_SRE_EL2.Enable a guest's accesses to
/// ICC_SRE_EL1 trap, so that none takes the registers from the guests after it.
const SRE: u64 = 0b0111;
/// ICC_CTLR_EL1.EOImode: EOIR drops the priority, DIR deactivates.
const CTLR_EOIMODE: u64 = 1 << 1;
/// ICC_CTLR_EL1.RSS: SGIs reach Aff0 of 16 and more.
const CTLR_RSS: u64 = 1 << 18;
/// ICC_PMR_EL1: everything may interrupt.
const PMR_ALL: u64 = 0xff;
/// ICC_IGRPEN1_EL1.Enable.
const GROUP_ENABLED: u64 = 1;
/// First of the INTIDs that mean "nothing to take".
const SPECIAL: u32 = 1020;

macro_rules! write {
    ($name:literal, $value:expr) => {{
        note_register_writes(1);
        // SAFETY: an architected value for the interrupt controller, which touches no memory.
        unsafe { msr!($name, $value) }
    }};
}

/// Opens this CPU's interface: EOImode = 1, group 1, all priorities; virtual interface at rest. Whether Aff0 beyond 15
/// can be sent to.
pub fn icc_init() -> bool {
    write!("icc_sre_el2", SRE);
    isb();
    write!("icc_sre_el1", SRE);
    isb();
    write!("icc_pmr_el1", PMR_ALL);
    write!("icc_bpr1_el1", 0_u64);
    write!("icc_ctlr_el1", CTLR_EOIMODE);
    ich_reset();
    write!("icc_igrpen1_el1", GROUP_ENABLED);
    isb();
    mrs!("icc_ctlr_el1") & CTLR_RSS != 0
}

/// ICC_IAR1_EL1: takes the most urgent interrupt, if any.
#[inline]
pub fn icc_iar1() -> Option<u32> {
    const INTID: u64 = 0xff_ffff;
    let intid = (mrs!("icc_iar1_el1") & INTID) as u32;
    super::dsb_nsh();
    (!(SPECIAL..SPECIAL + 4).contains(&intid)).then_some(intid)
}

/// ICC_EOIR1_EL1: drops the running priority.
#[inline]
pub fn icc_eoir1(intid: u32) {
    write!("icc_eoir1_el1", u64::from(intid));
    isb();
}

/// ICC_DIR_EL1: deactivates.
#[inline]
pub fn icc_dir(intid: u32) {
    write!("icc_dir_el1", u64::from(intid));
    isb();
}

/// ICC_SGI1R_EL1: interrupts other CPUs, after everything this CPU wrote.
#[inline]
pub fn icc_sgi1r(value: u64) {
    dsb_ishst();
    write!("icc_sgi1r_el1", value);
    isb();
}
