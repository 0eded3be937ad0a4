//! Every EL2 control register but the interrupt controller's, in one table, written on every CPU before anything else relies on
//! it.
//!
//! On silicon they are UNKNOWN at entry. The values are those of a CPU that holds no vCPU and protect the hypervisor
//! whatever EL1 would do; loading a vCPU changes only what differs between VMs. SCTLR_EL2, TCR_EL2, MAIR_EL2,
//! TTBR0_EL2, VBAR_EL2, TCR2_EL2, SCTLR2_EL2 and GCSCR_EL2 are written by the entry code; ICC_SRE_EL2 and ICH_* by the driver of
//! a GICv3. On a machine with a GICv2 nobody writes these two, even where CPUs have them: going back from system registers to
//! GICC's (ICC_SRE_EL2.SRE from 1 to 0) is UNPREDICTABLE, so the choice is firmware's.

use aarch64_cpu::registers::{
    CNTHCTL_EL2, HCR_EL2, MIDR_EL1, MPIDR_EL1, Readable, SCTLR_EL1, TCR_EL1, VTCR_EL2,
};

use super::isb;
use super::registers::{mrs, msr};
use crate::arch::debug::clear_comparators;
use crate::arch::features::{Features, IdRegisters};

/// HCR_EL2.FB: broadcast a guest's local invalidations, so that a vCPU that moves leaves nothing stale behind.
const HCR_FB: u64 = 1 << 9;
/// HCR_EL2.BSU: a guest's barriers reach the inner shareable domain.
const HCR_BSU_INNER: u64 = 0b01 << 10;
/// HCR_EL2.PTW: a stage-1 walk through device memory faults.
const HCR_PTW: u64 = 1 << 2;
/// HCR_EL2.TID1, TID3, TIDCP, TACR, TSW: ID, implementation-defined and auxiliary registers, set/way operations trap. TID5
/// does nothing where there is no FEAT_MTE2, whose GMID_EL1 it hides.
const HCR_TRAPS: u64 = 1 << 16 | 1 << 18 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 58;
/// HCR_EL2.TLOR: limited-ordering registers trap.
const HCR_TLOR: u64 = 1 << 35;
/// HCR_EL2.APK and API: pointer authentication does not trap.
const HCR_PAUTH: u64 = 1 << 40 | 1 << 41;
/// HCR_EL2.TERR, TEA: error records trap, and external aborts come to EL2, which tells the guest.
const HCR_ERRORS: u64 = 1 << 36 | 1 << 37;
/// HCR_EL2.FWB: stage 2 decides cacheability.
const HCR_FWB: u64 = 1 << 46;

/// CPTR_EL2 bits that are RES1 without E2H; bits 8 and 12 trap SVE and SME where these exist.
const CPTR_RES1: u64 = 0x33ff;
/// CPTR_EL2.TTA and TAM: trace and activity monitors trap.
const CPTR_TRAPS: u64 = 1 << 20 | 1 << 30;

/// MDCR_EL2.TPMCR, TPM: the PMU traps.
const MDCR_PMU: u64 = 1 << 5 | 1 << 6;
/// MDCR_EL2.TDA, TDOSA, TDRA: debug registers trap. TDE is zero: a guest's debug exceptions are its own (`vm::debug`).
const MDCR_DEBUG: u64 = 1 << 9 | 1 << 10 | 1 << 11;
/// MDCR_EL2.TPMS, TTRF: statistical profiling and trace filtering trap. E2PB and E2TB are zero: their buffers are EL2's.
const MDCR_PROFILING: u64 = 1 << 14 | 1 << 19;

/// MPAM2_EL2.TRAPMPAM0EL1, TRAPMPAM1EL1: resource partitioning traps.
const MPAM_TRAPS: u64 = 1 << 48 | 1 << 49;

/// MPAM2_EL2.TIDR: MPAMIDR_EL1 traps, where MPAMIDR_EL1.HAS_TIDR says so.
const MPAM_TRAPS_ID: u64 = 1 << 58;
const MPAMIDR_HAS_TIDR: u64 = 1 << 58;
/// MPAMHCR_EL2.TRAP_MPAMIDR_EL1: the same, where MPAMIDR_EL1.HAS_HCR says that there is the register.
const MPAMHCR_TRAPS_ID: u64 = 1 << 31;
const MPAMIDR_HAS_HCR: u64 = 1 << 17;

/// SCTLR_EL1 bits that are RES1 in Armv8.0.
const SCTLR_EL1_RES1: u64 = 0x30d0_0800;

/// VTCR_EL2 of a CPU without a guest: 32-bit addresses from level 1, which the empty root serves.
fn vtcr_idle() -> u64 {
    let value = VTCR_EL2::RES1::SET
        + VTCR_EL2::T0SZ.val(32)
        + VTCR_EL2::SL0.val(1)
        + VTCR_EL2::IRGN0::NormalWBRAWA
        + VTCR_EL2::ORGN0::NormalWBRAWA
        + VTCR_EL2::SH0::Inner
        + VTCR_EL2::TG0::Granule4KB;
    value.value
}

macro_rules! table {
    ($(if $given:expr => { $($name:literal = $value:expr;)* })*) => {$(
        if $given {
            $(
                // SAFETY: the value is architected for this register at EL2 and denies EL1 what EL2 does not give;
                // EL2's own translation does not depend on it.
                unsafe { msr!($name, $value) };
            )*
        }
    )*};
}

/// HCR_EL2 for every guest: what no VM chooses. The same on all CPUs, so `features` are the weakest's, but for FEAT_RAS.
fn hcr(features: &Features) -> u64 {
    let always = HCR_EL2::RW::EL1IsAarch64
        + HCR_EL2::VM::Enable
        + HCR_EL2::SWIO::SET
        + HCR_EL2::AMO::SET
        + HCR_EL2::IMO::EnableVirtualIRQ
        + HCR_EL2::FMO::EnableVirtualFIQ
        + HCR_EL2::TSC::EnableTrapEl1SmcToEl2;
    let pauth = if features.pauth { HCR_PAUTH } else { 0 };
    let fwb = if features.fwb { HCR_FWB } else { 0 };
    let errors = if features.ras { HCR_ERRORS } else { 0 };
    let inner = HCR_PTW | HCR_FB | HCR_BSU_INNER;
    always.value | inner | HCR_TRAPS | HCR_TLOR | pauth | fwb | errors
}

/// Adapts this CPU, which holds no vCPU, to what the `weakest` CPU can do. Error records and external aborts are this CPU's own:
/// where others have no FEAT_RAS, no guest may touch the records of one that has.
pub fn level_with(weakest: &Features) {
    let Features { ras, .. } = Features::new(&id_registers());
    table! {
        if true => {
            "hcr_el2" = hcr(&Features { ras, ..*weakest });
        }
    }
    isb();
}

/// MDCR_EL2: all event counters stay EL1's (and trap), so HPMN is their number.
fn mdcr(features: &Features) -> u64 {
    let counters = if features.pmu {
        mrs!("pmcr_el0") >> 11 & 0x1f
    } else {
        0
    };
    counters | MDCR_PMU | MDCR_DEBUG | MDCR_PROFILING
}

/// MPAMIDR_EL1; zero without FEAT_MPAM.
fn mpamidr(features: &Features) -> u64 {
    if features.mpam {
        mrs!("s3_0_c10_c4_4")
    } else {
        0
    }
}

/// MPAM2_EL2: the default partition, and what traps.
const fn mpam2(mpamidr: u64) -> u64 {
    if mpamidr & MPAMIDR_HAS_TIDR != 0 {
        MPAM_TRAPS | MPAM_TRAPS_ID
    } else {
        MPAM_TRAPS
    }
}

/// Writes the table on this CPU, which has `features`, holds no vCPU and rests on the empty stage-2 tables that
/// `idle_vttbr` names.
pub fn write_control_registers(features: &Features, idle_vttbr: u64) {
    let mpamidr = mpamidr(features);
    let shielded = TCR_EL1::EPD0::DisableTTBR0Walks + TCR_EL1::EPD1::DisableTTBR1Walks;
    table! {
        if true => {
            "tcr_el1" = shielded.value;
        }
    }
    isb();
    table! {
        if true => {
            "sctlr_el1" = SCTLR_EL1_RES1 | SCTLR_EL1::M::Enable.value;
        }
    }
    isb();
    table! {
        if true => {
            "vtcr_el2" = vtcr_idle();
            "vttbr_el2" = idle_vttbr;
            "hcr_el2" = hcr(features);
            "cptr_el2" = CPTR_RES1 | CPTR_TRAPS;
            "mdcr_el2" = mdcr(features);
            "hstr_el2" = 0_u64;
            "hacr_el2" = 0_u64;
            "actlr_el2" = 0_u64;
            "amair_el2" = 0_u64;
            "mdscr_el1" = 0_u64;
            "oslar_el1" = 0_u64; // closed, it would keep a guest's debug exceptions back
            "osdlr_el1" = 0_u64;
            "cnthctl_el2" = CNTHCTL_EL2::EL1PCTEN::SET.value;
            "cntvoff_el2" = 0_u64;
            "cnthp_ctl_el2" = 0_u64;
            "cntv_ctl_el0" = 0_u64;
            "cntp_ctl_el0" = 0_u64;
            "vpidr_el2" = MIDR_EL1.get();
            "vmpidr_el2" = MPIDR_EL1.get();
        }
        if features.ras => {
            "s3_4_c5_c2_3" = 0_u64; // VSESR_EL2
            "s3_4_c12_c1_1" = 0_u64; // VDISR_EL2
        }
        if features.hcx => {
            "s3_4_c1_c2_2" = 0_u64; // HCRX_EL2
        }
        if features.fine_grained_traps >= 1 => {
            "s3_4_c1_c1_4" = 0_u64; // HFGRTR_EL2
            "s3_4_c1_c1_5" = 0_u64; // HFGWTR_EL2
            "s3_4_c1_c1_6" = 0_u64; // HFGITR_EL2
            "s3_4_c3_c1_4" = 0_u64; // HDFGRTR_EL2
            "s3_4_c3_c1_5" = 0_u64; // HDFGWTR_EL2
        }
        if features.fine_grained_traps >= 1 && features.amu => {
            "s3_4_c3_c1_6" = 0_u64; // HAFGRTR_EL2
        }
        if features.fine_grained_traps >= 2 => {
            "s3_4_c3_c1_0" = 0_u64; // HDFGRTR2_EL2
            "s3_4_c3_c1_1" = 0_u64; // HDFGWTR2_EL2
            "s3_4_c3_c1_2" = 0_u64; // HFGRTR2_EL2
            "s3_4_c3_c1_3" = 0_u64; // HFGWTR2_EL2
            "s3_4_c3_c1_7" = 0_u64; // HFGITR2_EL2
        }
        if features.spe => {
            "s3_4_c9_c9_0" = 0_u64; // PMSCR_EL2
        }
        if features.trace_filter => {
            "s3_4_c1_c2_1" = 0_u64; // TRFCR_EL2
        }
        if features.mpam => {
            "s3_4_c10_c5_0" = mpam2(mpamidr); // MPAM2_EL2
        }
        if mpamidr & MPAMIDR_HAS_HCR != 0 => {
            "s3_4_c10_c4_0" = MPAMHCR_TRAPS_ID; // MPAMHCR_EL2
        }
    }
    clear_comparators();
    isb();
}

/// The ID registers of this CPU. Those that its architecture does not name yet read as zero.
pub fn id_registers() -> IdRegisters {
    IdRegisters {
        midr: mrs!("midr_el1"),
        ctr: mrs!("ctr_el0"),
        pfr0: mrs!("id_aa64pfr0_el1"),
        pfr1: mrs!("id_aa64pfr1_el1"),
        dfr0: mrs!("id_aa64dfr0_el1"),
        isar0: mrs!("id_aa64isar0_el1"),
        isar1: mrs!("id_aa64isar1_el1"),
        isar2: mrs!("s3_0_c0_c6_2"),
        mmfr0: mrs!("id_aa64mmfr0_el1"),
        mmfr1: mrs!("id_aa64mmfr1_el1"),
        mmfr2: mrs!("s3_0_c0_c7_2"),
        mmfr3: mrs!("s3_0_c0_c7_3"),
    }
}

/// MPIDR_EL1's affinity fields of this CPU.
pub fn affinity() -> u64 {
    const AFFINITY: u64 = 0xff_00ff_ffff;
    MPIDR_EL1.get() & AFFINITY
}
