//! Exceptions that a guest is given: what hardware would do on taking one to EL1, as a pure function.
//!
//! Reference: DDI 0487 issue K.a, D1.3.6 (exception entry) and D19.2.39 (ESR_EL1).

use crate::arch::context::{SCTLR_EL1_DSSBS, SCTLR_EL1_SPAN};
use crate::mmu::Access;
use crate::vm::trap::{Abort, ESR_IL, FaultStatus};

/// PSTATE.M: EL1 with SP_EL1.
pub const PSTATE_EL1H: u64 = 0b0101;
/// PSTATE.{D,A,I,F}.
pub const PSTATE_DAIF: u64 = 0xf << 6;
const PSTATE_MODE: u64 = 0xf;
const PSTATE_EL1T: u64 = 0b0100;
const PSTATE_AARCH32: u64 = 1 << 4;
const PSTATE_SSBS: u64 = 1 << 12;
const PSTATE_PAN: u64 = 1 << 22;
/// What exception entry keeps: N, Z, C, V, DIT and PAN (which may then be set). With FEAT_MTE2 it sets TCO; here TCO stays, for
/// no guest has tags that it could be about. SS is cleared, and D is set: nothing is stepped over in the handler until it says
/// so.
const PSTATE_KEPT: u64 = 0xf << 28 | 1 << 24 | PSTATE_PAN | 1 << 25;

const EC_SHIFT: u32 = 26;
const EC_UNKNOWN: u64 = 0x00;
const EC_SYSTEM_REGISTER: u64 = 0x18;
const EC_INSTRUCTION_ABORT_LOWER: u64 = 0x20;
const EC_DATA_ABORT_LOWER: u64 = 0x24;
/// Added to either abort's class when it comes from EL1 itself.
const EC_SAME_LEVEL: u64 = 1;
/// Synchronous external abort, not on a walk.
const FSC_EXTERNAL: u64 = 0x10;
/// Synchronous external abort on a walk, level unknown here: level 3.
const FSC_EXTERNAL_ON_WALK: u64 = 0x17;
const FSC_ALIGNMENT: u64 = 0x21;
const ISS_WNR: u64 = 1 << 6;
const ISS_CM: u64 = 1 << 8;
const ISS_FNV: u64 = 1 << 10;

/// An exception to be taken to EL1.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exception {
    /// The instruction is UNDEFINED.
    Undefined,
    /// An access to a system register that EL1 has trapped.
    SystemRegister {
        /// ESR_EL1.ISS.
        iss: u64,
    },
    /// The memory system answered with an error, or that it takes only aligned accesses.
    ExternalAbort {
        /// On an instruction fetch.
        fetch: bool,
        /// What hardware told of the access.
        abort: Abort,
        /// The virtual address.
        far: u64,
    },
}

/// What the guest's registers become.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    /// PC.
    pub pc: u64,
    /// PSTATE.
    pub pstate: u64,
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1, where the exception has an address.
    pub far: Option<u64>,
}

/// Takes `exception` to EL1 from `pstate`, with the vectors at `vbar` and SCTLR_EL1 = `sctlr`.
pub fn entry(exception: Exception, pstate: u64, vbar: u64, sctlr: u64) -> Entry {
    let from_el1 =
        matches!(pstate & PSTATE_MODE, PSTATE_EL1T | PSTATE_EL1H) && pstate & PSTATE_AARCH32 == 0;
    let (class, iss, far) = match exception {
        Exception::Undefined => (EC_UNKNOWN, 0, None),
        Exception::SystemRegister { iss } => (EC_SYSTEM_REGISTER, iss, None),
        Exception::ExternalAbort { fetch, abort, far } => {
            let class = if fetch {
                EC_INSTRUCTION_ABORT_LOWER
            } else {
                EC_DATA_ABORT_LOWER
            };
            (
                class + if from_el1 { EC_SAME_LEVEL } else { 0 },
                syndrome(fetch, abort),
                Some(far),
            )
        }
    };
    Entry {
        pc: vbar.wrapping_add(vector(pstate)),
        pstate: entry_pstate(pstate, sctlr),
        esr: class << EC_SHIFT | ESR_IL | iss,
        far,
    }
}

fn syndrome(fetch: bool, abort: Abort) -> u64 {
    let status = match abort.status {
        FaultStatus::Alignment => FSC_ALIGNMENT,
        _ if abort.stage1_walk => FSC_EXTERNAL_ON_WALK,
        _ => FSC_EXTERNAL,
    };
    let stored = abort.access == Access::Write && !abort.stage1_walk;
    let flags = [
        (!fetch && (abort.maintenance || stored), ISS_WNR),
        (abort.maintenance, ISS_CM),
        (abort.far_invalid && status == FSC_EXTERNAL, ISS_FNV),
    ];
    let set = |(is_set, bit)| if is_set { bit } else { 0 };
    status | flags.map(set).iter().sum::<u64>()
}

/// Offset of the synchronous vector for exceptions that come from `pstate`.
fn vector(pstate: u64) -> u64 {
    const CURRENT_SP0: u64 = 0x000;
    const CURRENT_SPX: u64 = 0x200;
    const LOWER_AARCH64: u64 = 0x400;
    const LOWER_AARCH32: u64 = 0x600;
    match pstate & PSTATE_MODE {
        _ if pstate & PSTATE_AARCH32 != 0 => LOWER_AARCH32,
        PSTATE_EL1T => CURRENT_SP0,
        PSTATE_EL1H => CURRENT_SPX,
        _ => LOWER_AARCH64,
    }
}

fn entry_pstate(pstate: u64, sctlr: u64) -> u64 {
    let pan = if sctlr & SCTLR_EL1_SPAN == 0 {
        PSTATE_PAN
    } else {
        0
    };
    let ssbs = if sctlr & SCTLR_EL1_DSSBS != 0 {
        PSTATE_SSBS
    } else {
        0
    };
    pstate & PSTATE_KEPT | pan | ssbs | PSTATE_DAIF | PSTATE_EL1H
}

#[cfg(test)]
mod tests {
    use super::{Exception, PSTATE_DAIF, PSTATE_EL1H, PSTATE_PAN, PSTATE_SSBS, entry};
    use crate::arch::context::{SCTLR_EL1_DSSBS, SCTLR_EL1_SPAN};
    use crate::vm::trap::{Abort, data_abort};

    const VBAR: u64 = 0xffff_0000_0000_0800;

    fn abort(iss: u64) -> Abort {
        data_abort(iss)
    }

    #[test]
    fn what_el1_traps_of_el0_arrives_with_its_syndrome() {
        let iss = 0x0028_0420;
        let entry = entry(Exception::SystemRegister { iss }, 0, VBAR, 0);
        assert_eq!((entry.pc, entry.far), (VBAR + 0x400, None));
        assert_eq!(entry.esr, 0x18 << 26 | 1 << 25 | iss);
    }

    #[test]
    fn nothing_is_stepped_over_in_a_handler() {
        const SS: u64 = 1 << 21;
        const D: u64 = 1 << 9;
        for pstate in [SS | PSTATE_EL1H, SS, PSTATE_EL1H] {
            let entry = entry(Exception::Undefined, pstate, VBAR, 0);
            assert_eq!(entry.pstate & (SS | D), D);
        }
    }

    #[test]
    fn vectors_follow_the_mode_that_was_interrupted() {
        for (mode, offset) in [
            (0b0000, 0x400),
            (0b0100, 0x000),
            (0b0101, 0x200),
            (0b1_0000, 0x600),
        ] {
            assert_eq!(
                entry(Exception::Undefined, mode, VBAR, 0).pc,
                VBAR + offset,
                "{mode:#b}"
            );
        }
    }

    #[test]
    fn undefined_instructions_have_class_zero_and_no_address() {
        let entry = entry(Exception::Undefined, PSTATE_EL1H, VBAR, SCTLR_EL1_SPAN);
        assert_eq!((entry.esr, entry.far), (1 << 25, None));
        assert_eq!(entry.pstate, PSTATE_DAIF | PSTATE_EL1H);
    }

    #[test]
    fn external_aborts_tell_level_direction_and_address() {
        let at = |pstate, fetch, iss| {
            let exception = Exception::ExternalAbort {
                fetch,
                abort: abort(iss),
                far: 0x1234,
            };
            let entry = entry(exception, pstate, VBAR, 0);
            assert_eq!(entry.far, Some(0x1234));
            (entry.esr >> 26, entry.esr & 0x3f, entry.esr >> 6 & 1)
        };
        let (store, load, walk) = (1 << 24 | 1 << 6 | 0x06, 1 << 24 | 0x06, 1 << 7 | 0x06);
        assert_eq!(at(0b0000, false, store), (0x24, 0x10, 1));
        assert_eq!(at(0b0101, false, store), (0x25, 0x10, 1));
        assert_eq!(at(0b0101, false, load), (0x25, 0x10, 0));
        assert_eq!(at(0b0100, true, load), (0x21, 0x10, 0));
        assert_eq!(at(0b0000, true, walk), (0x20, 0x17, 0));
        // STP, atomics and their like, which are not described but for their direction; unaligned at a device.
        assert_eq!(at(0b0101, false, 1 << 6 | 0x06), (0x25, 0x10, 1));
        assert_eq!(at(0b0101, false, 0x06), (0x25, 0x10, 0));
        assert_eq!(at(0b0101, false, 1 << 6 | 0x21), (0x25, 0x21, 1));
        // A walk that would have set a flag; cache maintenance and address translation.
        assert_eq!(at(0b0101, false, 1 << 7 | 0x0f), (0x25, 0x17, 0));
        assert_eq!(at(0b0101, false, 1 << 8 | 0x06), (0x25, 0x10, 1));
        assert_eq!(at(0b0101, false, 1 << 8 | 1 << 7 | 0x06), (0x25, 0x17, 1));
    }

    #[test]
    fn an_address_that_hardware_does_not_know_is_not_vouched_for() {
        let is_invalid = |iss| {
            let exception = Exception::ExternalAbort {
                fetch: false,
                abort: abort(iss),
                far: 0,
            };
            entry(exception, PSTATE_EL1H, VBAR, 0).esr >> 10 & 1 == 1
        };
        assert!(is_invalid(1 << 10 | 0x10));
        assert!(!is_invalid(0x10));
        // The bit has a meaning with this status only.
        assert!(!is_invalid(1 << 10 | 1 << 7 | 0x17));
    }

    #[test]
    fn pstate_on_entry_is_the_architectures() {
        let flags = 0xf << 28 | 1 << 24;
        let all = u64::from(u32::MAX) & !0x1f;
        let state = |pstate, sctlr| entry(Exception::Undefined, pstate, VBAR, sctlr).pstate;
        assert_eq!(
            state(all, SCTLR_EL1_SPAN) & !(1 << 25),
            flags | PSTATE_PAN | PSTATE_DAIF | PSTATE_EL1H
        );
        assert_eq!(state(0, 0), PSTATE_PAN | PSTATE_DAIF | PSTATE_EL1H);
        assert_eq!(
            state(0, SCTLR_EL1_SPAN | SCTLR_EL1_DSSBS),
            PSTATE_SSBS | PSTATE_DAIF | PSTATE_EL1H
        );
    }
}
