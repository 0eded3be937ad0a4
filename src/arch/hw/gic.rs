//! The GICv3 CPU interface: ICC_* (Arm IHI 0069H, 12).

use super::registers::{mrs, msr, note_register_writes};
use super::{dsb_ishst, isb};
use crate::arch::ich_reset;

/// ICC_SRE_EL1 and ICC_SRE_EL2: system registers (SRE), no bypass (DFB, DIB). Without ICC_SRE_EL2.Enable a guest's accesses to
/// ICC_SRE_EL1 trap, so that none takes the registers from the guests after it.
const SRE: u64 = 0b0111;
/// ICC_CTLR_EL1.EOImode: EOIR drops the priority, DIR deactivates.
const CTLR_EOIMODE: u64 = 1 << 1;
/// ICC_CTLR_EL1.PRIbits: bits of a priority, less one.
const CTLR_PRIBITS_SHIFT: u64 = 8;
const CTLR_PRIBITS: u64 = 0b111;
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

/// The active priorities of a group: one register, two for 6 bits of priority, four for more.
macro_rules! forget_priorities {
    ($priority_bits:ident, $zero:literal $one:literal $two:literal $three:literal) => {{
        write!($zero, 0_u64);
        if $priority_bits >= 6 {
            write!($one, 0_u64);
        }
        if $priority_bits >= 7 {
            write!($two, 0_u64);
            write!($three, 0_u64);
        }
    }};
}

/// Opens this CPU's interface: EOImode = 1, group 1, all priorities; virtual interface at rest. Whether Aff0 beyond 15
/// can be sent to.
///
/// What was acknowledged and never ended keeps its priority active, and nothing less urgent is signalled.
pub fn icc_init() -> bool {
    write!("icc_sre_el2", SRE);
    isb();
    write!("icc_sre_el1", SRE);
    isb();
    let priority_bits = (mrs!("icc_ctlr_el1") >> CTLR_PRIBITS_SHIFT & CTLR_PRIBITS) + 1;
    if owns_group_0(priority_bits) {
        write!("icc_igrpen0_el1", 0_u64);
        forget_priorities!(priority_bits, "icc_ap0r0_el1" "icc_ap0r1_el1" "icc_ap0r2_el1" "icc_ap0r3_el1");
    }
    write!("icc_igrpen1_el1", 0_u64);
    forget_priorities!(priority_bits, "icc_ap1r0_el1" "icc_ap1r1_el1" "icc_ap1r2_el1" "icc_ap1r3_el1");
    write!("icc_pmr_el1", PMR_ALL);
    write!("icc_bpr1_el1", 0_u64);
    write!("icc_ctlr_el1", CTLR_EOIMODE);
    ich_reset();
    write!("icc_igrpen1_el1", GROUP_ENABLED);
    isb();
    mrs!("icc_ctlr_el1") & CTLR_RSS != 0
}

/// Whether group 0 is this world's. Where it is EL3's (SCR_EL3.FIQ), an access to its registers traps to EL3, and ICC_PMR_EL1
/// shows the less urgent half of the priorities only: the most urgent one above 0 loses its only bit.
fn owns_group_0(priority_bits: u64) -> bool {
    write!("icc_pmr_el1", 1_u64 << (8 - priority_bits));
    isb();
    mrs!("icc_pmr_el1") != 0
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
