//! The GICv3 CPU interface: ICC_* and the resting values of ICH_* (Arm IHI 0069H, 12).

use super::registers::{mrs, msr};
use super::{dsb_ishst, isb};

/// ICC_SRE_EL2: system registers for EL2 (SRE) and for guests (Enable), no bypass (DFB, DIB).
const SRE_ALL: u64 = 0b1111;
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
    ($name:literal, $value:expr) => {
        // SAFETY: an architected value for the interrupt controller, which touches no memory.
        unsafe { msr!($name, $value) }
    };
}

/// Opens this CPU's interface: EOImode = 1, group 1, all priorities; virtual interface at rest. Whether Aff0 beyond 15
/// can be sent to.
pub fn icc_init() -> bool {
    write!("icc_sre_el2", SRE_ALL);
    isb();
    write!("icc_pmr_el1", PMR_ALL);
    write!("icc_bpr1_el1", 0_u64);
    write!("icc_ctlr_el1", CTLR_EOIMODE);
    write!("ich_hcr_el2", 0_u64);
    write!("ich_vmcr_el2", 0_u64);
    reset_list_registers();
    write!("icc_igrpen1_el1", GROUP_ENABLED);
    isb();
    mrs!("icc_ctlr_el1") & CTLR_RSS != 0
}

fn reset_list_registers() {
    const LIST_REGISTERS: u64 = 0x1f;
    const PRE_BITS: u32 = 26;
    let vtr = mrs!("ich_vtr_el2");
    let count = (vtr & LIST_REGISTERS) + 1;
    macro_rules! lists {
        ($($index:literal $name:literal)*) => {
            $(if count > $index { write!($name, 0_u64); })*
        };
    }
    lists! {
        0 "ich_lr0_el2" 1 "ich_lr1_el2" 2 "ich_lr2_el2" 3 "ich_lr3_el2" 4 "ich_lr4_el2" 5 "ich_lr5_el2"
        6 "ich_lr6_el2" 7 "ich_lr7_el2" 8 "ich_lr8_el2" 9 "ich_lr9_el2" 10 "ich_lr10_el2" 11 "ich_lr11_el2"
        12 "ich_lr12_el2" 13 "ich_lr13_el2" 14 "ich_lr14_el2" 15 "ich_lr15_el2"
    }
    let preemption_bits = (vtr >> PRE_BITS & 7) + 1;
    write!("ich_ap0r0_el2", 0_u64);
    write!("ich_ap1r0_el2", 0_u64);
    if preemption_bits >= 6 {
        write!("ich_ap0r1_el2", 0_u64);
        write!("ich_ap1r1_el2", 0_u64);
    }
    if preemption_bits >= 7 {
        write!("ich_ap0r2_el2", 0_u64);
        write!("ich_ap1r2_el2", 0_u64);
        write!("ich_ap0r3_el2", 0_u64);
        write!("ich_ap1r3_el2", 0_u64);
    }
}

/// ICC_IAR1_EL1: takes the most urgent interrupt, if any.
#[inline]
pub fn icc_iar1() -> Option<u32> {
    const INTID: u64 = 0xff_ffff;
    let intid = (mrs!("icc_iar1_el1") & INTID) as u32;
    super::dsb_nsh();
    (intid < SPECIAL || intid > SPECIAL + 3).then_some(intid)
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
